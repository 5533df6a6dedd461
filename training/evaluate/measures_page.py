"""What the measures show: a table with intervals, the drawings, their nearest training pictures, two charts."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from .evaluation import SHOWN, Evaluated
from .grids import picture_grid
from .report import _COLOURS, _embed, _table, _text

GREY = "#888888"  # readable on white and on black
MEANING = {  # by how a figure's name begins
    "fid_": "Fréchet distance from the training pictures; 0 is equal, lower is nearer, fewer pictures are further",
    "kid_": "kernel distance from the training pictures, without bias; 0 is equal, lower is nearer",
    "precision_": "share of drawings that look like some training picture",
    "recall_": "share of training pictures that some drawing looks like",
    "density_": "how densely training pictures lie around a drawing; 1 is as among themselves",
    "coverage_": "share of training pictures with a drawing among their nearest",
    "copying_": "how often a drawing is nearer to its nearest training picture than a held-out picture is to its own; "
    "0.5 is no memorisation, 1 is copies alone",
    "clip_score": "how well a drawing fits its prompt in a CLIP's eyes, 0 to 100, higher is better",
    "held_out_loss": "mean loss at held-out pictures over eight noise levels, lower is better",
    "bits_per_dim": "upper bound of the bits in a value of a held-out picture, 8 unpacked, lower is better",
    "pictures_per_second": "speed of drawing",
}
EXTRA = {  # what else is known of a figure, as the table says it
    "of_another_prompt": "drawings against another's prompt",
    "training_pictures": "training pictures",
    "median_distance": "median distance of drawings",
    "held_out_median_distance": "median distance of held-out pictures",
}


def sections(found: Evaluated) -> list[str]:
    """HTML of what was measured, for ``write_report``."""
    parts = ["<h2>Measures</h2>", _measures(found.figures)]
    parts += [f'<p class="soft">{html.escape(note)}</p>' for note in found.notes]
    charts = _charts(found)
    if charts:
        parts += ['<div class="curves">', *charts, "</div>"]
    if found.drawn.files:
        some = list(range(min(SHOWN, len(found.drawn.files))))
        texts = [found.drawn.prompts[i].text for i in some] if found.drawn.prompts else None
        new = sum(p.held_out for p in (found.drawn.prompts or [])[: len(some)])
        first = f"The first {new} are of captions that no training picture has." if new else ""
        parts += [
            "<h2>Drawings</h2>",
            f'<p class="soft">{first}</p>',
            _sheet(picture_grid(found.drawn.pictures(some, found.side), texts, 8), "drawings"),
        ]
    if found.pairs:
        pictures, texts = [], []
        for drawing, row, distance in found.pairs:
            pictures += [found.drawn.pictures([drawing], found.side), found.train.pictures([row])]
            texts += [f"drawn, {distance:.3f} from", found.train.name(row).rpartition("/")[2]]
        sheet = picture_grid(torch.cat(pictures), texts, 8)
        parts.append("<h2>Drawings nearest to a training picture</h2>")
        parts += [
            '<p class="soft">Each with that picture to its right, the nearest first; one of each training picture.</p>',
            _sheet(sheet, "pairs"),
        ]
    return [*parts, "<h2>What was measured</h2>", _table(found.about)]


def _measures(figures: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, figure in figures.items():
        more = [f"{words} {_text(figure[key])}" for key, words in EXTRA.items() if key in figure]
        if "as_many" in figure:
            few = (_text(figure[f"{what}_of_as_many"]) for what in ("drawings", "held_out_pictures"))
            more.append("of {n} drawings {}, of {n} held-out pictures {}".format(*few, n=_text(figure["as_many"])))
        held = figure.get("held_out_pictures")
        says = html.escape("; ".join([_meaning(name), *more]))
        cells = [
            f'<th>{html.escape(name)}<br><span class="soft">{says}</span></th>',
            f'<td class="number"><b>{_text(figure["value"])}</b></td>',
            f'<td class="number">{_text(figure["low"])} … {_text(figure["high"])}</td>',
            f'<td class="number">{"" if held is None else _text(held)}</td>',
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{x}</th>" for x in ("measure", "value", "95%", "held-out pictures"))
    return f'<table class="measures"><tr>{heads}</tr>{"".join(rows)}</table>'


def _meaning(name: str) -> str:
    return next((text for start, text in MEANING.items() if name.startswith(start)), "")


def _charts(found: Evaluated) -> list[str]:
    charts = []
    loss = found.figures.get("held_out_loss")
    if loss is not None:
        charts.append(_chart("loss at each noise level", "t: 0 is data, 1 is noise", lambda axes: _losses(axes, loss)))
    if found.distances is not None:
        drawn, held_out = found.distances
        title = "distance to the nearest training picture"
        charts.append(_chart(title, "1 − cosine of features", lambda axes: _histogram(axes, drawn, held_out)))
    return charts


def _losses(axes: Any, loss: Mapping[str, Any]) -> None:
    t = [x["t"] for x in loss["levels"]]
    axes.fill_between(
        t, [x["low"] for x in loss["levels"]], [x["high"] for x in loss["levels"]], color=_COLOURS[1], alpha=0.25
    )
    axes.plot(t, [x["value"] for x in loss["levels"]], color=_COLOURS[1], marker="o", markersize=3, label="held out")
    axes.plot(t, loss["training_levels"], color=_COLOURS[0], marker="o", markersize=3, label="training")
    axes.set_ylim(bottom=0)


def _histogram(axes: Any, drawn: torch.Tensor, held_out: torch.Tensor) -> None:
    end = float(torch.cat([drawn, held_out]).max())
    for values, label, colour in ((held_out, "held-out pictures", _COLOURS[1]), (drawn, "drawings", _COLOURS[0])):
        weights = [1 / len(values)] * len(values)
        axes.hist(values.tolist(), bins=24, range=(0, end), weights=weights, color=colour, alpha=0.6, label=label)


def _chart(title: str, below: str, draw: Any) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.6), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=10, color=GREY)
    axes.set_xlabel(below, fontsize=8, color=GREY)
    axes.tick_params(which="both", labelsize=8, colors=GREY)
    axes.grid(color=GREY, alpha=0.2)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    axes.legend(fontsize=8, frameon=False, labelcolor=GREY)
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": title}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _embed(file.getvalue(), "image/svg+xml", title, "")


def _sheet(sheet: Image.Image, what: str) -> str:
    file = io.BytesIO()
    sheet.save(file, format="PNG", optimize=True)
    return _embed(file.getvalue(), "image/png", what, "")
