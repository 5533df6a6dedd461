"""``ldm evaluate``: a pipeline draws, or pictures are there already, and every measure that is asked for is taken."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.precision import dtype_name

from ..data import Rows, open_rows
from ..pictures import dimensions
from . import measures as m
from .features import extract, label, load_features
from .measures_data import Drawn, Progress, Prompt, Real, drawn_already, prompt_order, real
from .measures_draw import Painter, device_name, speeds
from .metrics import ClipScore

log = logging.getLogger(__name__)
OF_FEATURES = ("fid", "kid", "precision_recall", "nearest")
OF_MODEL = ("loss", "bits", "throughput")  # not to be had of pictures alone
MEASURES = (*OF_FEATURES, "clip_score", *OF_MODEL)
DEFAULT = tuple(x for x in MEASURES if x != "bits")  # which is a chain of steps for each picture
LEAST = {"fid": 2, "kid": 2, "precision_recall": m.NEIGHBOURS + 1, "nearest": 1, "clip_score": 1}  # drawings
LEAST_REAL = {"fid": 2, "kid": 2, "precision_recall": m.NEIGHBOURS + 1, "nearest": 2}
SHOWN = 16  # drawings in the report


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and how.

    measures: of ``MEASURES``; None: ``DEFAULT``, less what cannot be had here.
    features: the network that looks at pictures, as ``load_features`` names it.
    clip: folder of a CLIP; None: the one that the pipeline's run was conditioned by.
    samples: drawings. steps, guidance_scale, sampler, seed: how they are drawn.
    likelihoods: held-out pictures whose bits per dimension are found.
    resolution: side at which pictures are compared; None: what the pipeline draws.
    cache: folder for the features of real pictures; None: that of ``datasets``.
    dtype: of the weights that draw, as ``pipelines.precision.sampling_dtype`` takes it; the loss and the bits are
        computed in float32.
    """

    measures: tuple[str, ...] | None = None
    features: str = "mobilenetv2"
    allow_pickle: bool = False
    clip: str | None = None
    samples: int = 256
    steps: int = 20
    guidance_scale: float = 3.0
    sampler: str | None = None
    seed: int = 0
    batch_size: int = 16
    likelihoods: int = 8
    device: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    resolution: int | None = None
    cache: Path | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        unknown = [x for x in self.measures or () if x not in MEASURES]
        if unknown or self.measures == ():
            raise ValueError(f"measures: {', '.join(unknown) or 'none'}; expected some of {', '.join(MEASURES)}")
        for name in ("samples", "steps", "batch_size", "likelihoods"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")

    @property
    def all(self) -> tuple[str, ...]:
        return DEFAULT if self.measures is None else self.measures

    @property
    def where(self) -> torch.device:
        try:
            return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise ValueError(f"device {self.device!r}: expected cpu, cuda, cuda:1 or such") from error


@dataclass
class Evaluated:
    """figures: by name, each with ``value``, ``low`` and ``high``, and what else is known of it. The rest is what the
    report shows: ``distances``: of drawings and of held-out pictures to their nearest training pictures, ``pairs``
    rows (drawing, its nearest training picture, distance) from the nearest on."""

    figures: dict[str, dict[str, Any]]
    about: dict[str, Any]
    notes: list[str]
    drawn: Drawn
    train: Rows
    side: int
    distances: tuple[Tensor, Tensor] | None = None
    pairs: list[tuple[int, int, float]] | None = None


def evaluate(source: str | Path, data: str | Path, out: str | Path, asked: Asked, progress: Progress) -> Evaluated:
    """Measure a pipeline folder (or a folder of pictures) by a data set; write ``measures.json`` into ``out``, in the
    place of an earlier one. Drawings stay in ``out/drawn``, and are taken up when the same is asked again.

    Raises:
        ValueError: naming what is missing, or of what there is too little, before anything is drawn.
    """
    source, out = Path(source).expanduser(), Path(out)
    is_pipeline, wanted, notes = (source / "model_index.json").is_file(), list(asked.all), []
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; expected a pipeline's, or one of pictures")
    if not is_pipeline:
        _drop(wanted, OF_MODEL, asked, f"{source} holds no pipeline (model_index.json)", notes)
    clip = asked.clip or (own_clip(source) if is_pipeline else None)
    if clip is None:
        _drop(wanted, ("clip_score",), asked, "no CLIP was found beside the pipeline; give --clip FOLDER", notes)
    net = load_features(asked.features, allow_pickle=asked.allow_pickle) if set(wanted) & set(OF_FEATURES) else None
    judge = ClipScore(clip, asked.where) if clip is not None and "clip_score" in wanted else None
    painter, drawn, folder = None, Drawn([], []), None
    if is_pipeline:
        painter = Painter(source, asked.where, asked.steps, asked.guidance_scale, asked.sampler, asked.dtype)
    train, held_out = _rows(data, asked, source, painter)
    side = train.resolution
    if len(held_out) < LEAST_REAL["nearest"] and asked.measures is None:
        why = f"it needs {LEAST_REAL['nearest']} held-out pictures, and {data} has {len(held_out)}"
        _drop(wanted, ("nearest",), asked, why, notes)
    if painter is None:
        drawn = drawn_already(source, set(train.captions) if judge is not None else None)
        if drawn.prompts is None and judge is not None:
            why = f"{source} has no metadata.jsonl that says what its pictures were drawn for"
            _drop(wanted, ("clip_score",), asked, why, notes)
            judge = None
    needs_pictures = bool(set(wanted) & set(LEAST)) or "throughput" in wanted
    _check_enough(wanted, asked.samples if painter else len(drawn.files), len(train), len(held_out))

    if painter is not None and needs_pictures:
        order = prompt_order(train, held_out, asked.seed)
        drawn, folder = painter.draw(order, asked.samples, asked.seed, asked.batch_size, out / "drawn", progress)
    about = _about(source, data, asked, drawn, train, held_out)
    about |= {"clip": clip} if judge is not None else {}
    if painter is not None:
        about |= {"steps": asked.steps, "guidance": asked.guidance_scale}
        about |= {"sampler": asked.sampler or "the folder's own", "weights": painter.weights}
        about |= {"dtype": dtype_name(painter.dtype)}
    found = Evaluated({}, about, notes, drawn, train, side)
    groups = _groups(drawn)
    if net is not None:
        net = net.to(asked.where)
        place = asked.cache or _cache()
        of_train, of_held = (
            real(rows, net, label(asked.features), asked.batch_size, place, progress) for rows in (train, held_out)
        )
        x = _of_drawn(net, drawn, side, asked.batch_size, progress)
        _take_features(found, wanted, asked, x, of_train, of_held, groups)
    if judge is not None:
        _take_clip(found, asked, judge, held_out, groups, progress)
    if painter is not None:
        _take_model(found, wanted, asked, painter, held_out, folder, progress)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"measures": found.figures, "about": found.about, "notes": notes}, indent=1, ensure_ascii=False)
    beside = out / f".measures.json.{os.getpid()}"
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, out / "measures.json")
    return found


# --- before anything is drawn -----------------------------------------------------------------------------------------


def own_clip(pipeline: Path) -> str | None:
    """The CLIP that conditions the pipeline of a run: ``text.pretrained`` of the config.yaml beside it."""
    import yaml

    from ..tasks.common import made

    run = pipeline.resolve().parent
    if not (run / "config.yaml").is_file():
        return None
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    name = ((config or {}).get("text") or {}).get("pretrained")
    if not isinstance(name, str):
        return None
    for root in (Path(), *run.parents):  # written from where the run was begun
        folder = Path(made(str(root / name)))
        if (folder / "config.json").is_file() and '"vision_config"' in (folder / "config.json").read_text("utf-8"):
            return str(folder)
    return None


def _drop(wanted: list[str], names: Sequence[str], asked: Asked, why: str, notes: list[str]) -> None:
    """What cannot be had is left out with a note, or refused where it was asked for by name."""
    for name in [x for x in names if x in wanted]:
        if asked.measures is not None:
            raise ValueError(f"measures: {name} cannot be had: {why}")
        wanted.remove(name)
        notes.append(f"{name} is left out: {why}.")


def _rows(data: str | Path, asked: Asked, source: Path, painter: Painter | None) -> tuple[Rows, Rows]:
    side = asked.resolution
    if side is None and painter is not None:
        side = min(painter.pipeline.parts.size)
    elif side is None:
        side = min(dimensions(drawn_already(source).files[0].read_bytes()))
    captions = asked.caption_column if painter is not None or asked.clip else None
    keys: dict[str, Any] = {"resolution": side, "image_column": asked.image_column, "caption_column": captions}
    return open_rows(data, split="train", **keys), open_rows(data, split="test", **keys)


def _check_enough(wanted: Sequence[str], drawn: int, train: int, held_out: int) -> None:
    for name in wanted:
        for what, there, least in (
            ("drawings", drawn, LEAST.get(name, 0)),
            ("training pictures", train, LEAST_REAL.get(name, 0)),
            ("held-out pictures", held_out, 2 if name == "nearest" else 0),
        ):
            if there < least:
                cure = "raise --samples, or give a folder of more" if what == "drawings" else "give more --data"
                raise ValueError(f"measures: {name} needs {least} {what} or more, and there are {there}; {cure}")


def _cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "latent_t2i_features"


def _about(source: Path, data: str | Path, asked: Asked, drawn: Drawn, train: Rows, held_out: Rows) -> dict[str, Any]:
    about: dict[str, Any] = {"source": str(source), "data": str(data), "resolution": train.resolution}
    about |= {"drawings": len(drawn.files)} if drawn.files else {}
    if drawn.prompts:
        about["of different prompts"] = len(set(drawn.prompts))
        about |= {"of held-out prompts": new} if (new := sum(x.held_out for x in drawn.prompts)) else {}
    about |= {"training pictures": len(train), "held-out pictures": len(held_out), "features": asked.features}
    return about | {"device": device_name(asked.where), "seed": asked.seed}


# --- the measures -----------------------------------------------------------------------------------------------------


def _groups(drawn: Drawn) -> Tensor:
    """(N,) which prompt each was drawn for; each its own where that is not known, or one prompt is that of all."""
    texts = [p.text for p in drawn.prompts or ()]
    number = {text: i for i, text in enumerate(texts)}
    return torch.tensor([number[text] for text in texts]) if len(number) > 1 else torch.arange(len(drawn.files))


def _of_drawn(net: torch.nn.Module, drawn: Drawn, side: int, batch_size: int, progress: Progress) -> Tensor:
    found = []
    for start in range(0, len(drawn.files), batch_size):
        some = range(start, min(start + batch_size, len(drawn.files)))
        found.append(extract(net, drawn.pictures(some, side), batch_size))
        progress("looking at drawings", some[-1] + 1, len(drawn.files))
    return torch.cat(found)


def _figure(figure: m.Figure, **more: Any) -> dict[str, Any]:
    return {**figure._asdict(), **{k: v for k, v in more.items() if v is not None}}


def _take_features(
    found: Evaluated, wanted: Sequence[str], asked: Asked, x: Tensor, train: Real, held: Real, groups: Tensor
) -> None:
    y, z, name, seed, figures = train.features, held.features, label(asked.features), asked.seed, found.figures
    for what, features in (("drawn", x), ("training", y), ("held-out", z)):
        if not features.isfinite().all():
            raise ValueError(f"{asked.features}: its features of the {what} pictures are not finite")
    if "fid" in wanted:
        n = min(len(x), len(z))
        more = {"as_many": n, "drawings_of_as_many": _some(x, y, n), "held_out_pictures_of_as_many": _some(z, y, n)}
        figures[f"fid_{name}"] = _figure(m.fid(x, y, groups, seed), **(more if n > 1 else {}))
    if "kid" in wanted:
        of_held = m.kid(z, y, torch.arange(len(z)), seed).value if len(z) > 1 else None
        figures[f"kid_{name}"] = _figure(m.kid(x, y, groups, seed), held_out_pictures=of_held)
    if "precision_recall" in wanted:
        of_held = m.manifolds(z, y, torch.arange(len(z)), seed=seed) if len(z) > m.NEIGHBOURS else None
        for which, figure in m.manifolds(x, y, groups, seed=seed)._asdict().items():
            ceiling = getattr(of_held, which).value if of_held and which in ("precision", "density") else None
            figures[f"{which}_{name}"] = _figure(figure, held_out_pictures=ceiling)
    if "nearest" in wanted:
        far, which = m.nearest(x, y)
        of_held, _ = m.nearest(z, y)
        found.distances = far, of_held
        first: dict[int, int] = {}  # of each training picture the drawing that is nearest to it
        for i in far.argsort().tolist():
            first.setdefault(int(which[i]), i)
        found.pairs = [(i, train.chosen[row], far[i].item()) for row, i in list(first.items())[: SHOWN // 2]]
        middle = {"median_distance": far.median().item(), "held_out_median_distance": of_held.median().item()}
        figures[f"copying_{name}"] = _figure(m.nearer(far, of_held, groups, seed), **middle)
        new = torch.tensor([p.held_out for p in found.drawn.prompts or ()], dtype=torch.bool)
        if len(new) and new.any() and not new.all():
            for part, of in ((new, "held_out"), (~new, "training")):
                part_of = m.nearer(far[part], of_held, groups[part], seed)
                figures[f"copying_of_{of}_prompts_{name}"] = _figure(part_of)


def _some(x: Tensor, y: Tensor, n: int) -> float:
    return m.frechet_of_some(x, y, n, 1 if n == len(x) else 10) if n > 1 else 0.0


def _take_clip(
    found: Evaluated, asked: Asked, judge: ClipScore, held_out: Rows, groups: Tensor, progress: Progress
) -> None:
    prompts: Sequence[Prompt] = found.drawn.prompts or ()
    texts, scores, others = [p.text for p in prompts], [], []
    kinds = list(dict.fromkeys(texts))
    another = dict(zip(kinds, kinds[len(kinds) // 2 :] + kinds[: len(kinds) // 2], strict=True))
    for start in range(0, len(texts), asked.batch_size):
        some = range(start, min(start + asked.batch_size, len(texts)))
        pictures = found.drawn.pictures(some, found.side)
        scores.append(judge(pictures, [texts[i] for i in some], asked.batch_size))
        others.append(judge(pictures, [another[texts[i]] for i in some], asked.batch_size))
        progress("CLIP score", some[-1] + 1, len(texts))
    rows = list(range(min(len(held_out), len(texts))))
    real_ones = judge(held_out.pictures(rows), [held_out.captions[i] for i in rows], asked.batch_size)
    name = f"clip_score:{asked.clip}" if asked.clip else "clip_score_own"
    figure = m.mean_figure(torch.cat(scores), groups, asked.seed)
    of_another = torch.cat(others).mean().item() if len(kinds) > 1 else None
    found.figures[name] = _figure(figure, held_out_pictures=real_ones.mean().item(), of_another_prompt=of_another)


def _take_model(
    found: Evaluated,
    wanted: Sequence[str],
    asked: Asked,
    painter: Painter,
    held_out: Rows,
    folder: Path | None,
    progress: Progress,
) -> None:
    seed = asked.seed
    parts = painter.in_float32() if {"loss", "bits"} & {*wanted} else painter.pipeline.parts
    if "loss" in wanted:
        from .measures_model import held_out_losses, levels

        each, of_train = (
            held_out_losses(parts, rows, seed, asked.batch_size, progress) for rows in (held_out, found.train)
        )
        at = [m.mean_figure(column, seed=seed)._asdict() for column in each.T]
        more = {"levels": [{"t": t, **f} for t, f in zip(levels(), at, strict=True)], "rows": len(each)}
        more |= {"training_pictures": of_train.mean().item(), "training_levels": of_train.mean(0).tolist()}
        found.figures["held_out_loss"] = _figure(m.mean_figure(each.mean(1), seed=seed), **more)
    if "bits" in wanted:
        from .measures_model import bits

        of_held, of_train = (
            bits(parts, rows, found.train, asked.likelihoods, seed, progress) for rows in (held_out, found.train)
        )
        more = {k: v.mean().item() for k, v in of_held._asdict().items() if k != "total"}
        more |= {"training_pictures": of_train.total.mean().item(), "rows": len(of_held.total)}
        found.figures["bits_per_dim"] = _figure(m.mean_figure(of_held.total, seed=seed), **more)
    if "throughput" in wanted and folder is not None:
        pictures, seconds = speeds(folder, asked.where)
        if len(pictures):
            figure = m.throughput(pictures, seconds, seed)
            found.figures["pictures_per_second"] = _figure(
                figure, batches=len(pictures), batch_size=int(pictures.max())
            )
        else:
            found.notes.append("throughput is left out: no picture was drawn on this device.")
