"""One HTML file about one run or several, which opens without a server and without a network."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

POINTS = 600  # of a curve at most
SHEETS = 6  # sample sheets of one kind at most: the first, the last and some between
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")

CSS = """
:root { --ink: #1f2328; --soft: #656d76; --paper: #ffffff; --panel: #f6f8fa; --edge: #d8dee4; color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --panel: #161b22; --edge: #30363d } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--edge) }
h3 { font-size: 1rem; margin-bottom: .4rem }
img { max-width: 100%; height: auto; border-radius: 6px }
figure { margin: 0 0 1rem } figcaption, .soft { color: var(--soft); font-size: .85rem }
.curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
.strip { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)) }
table { border-collapse: collapse; font-size: .9rem } td, th { padding: .2rem .9rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--edge); vertical-align: top; font-variant-numeric: tabular-nums }
th { font-weight: 500; color: var(--soft) }
.number { white-space: nowrap } .curves { margin-top: 1rem }
pre { background: var(--panel); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .8rem }
summary { cursor: pointer }
"""


def write_report(
    runs: str | Path | Sequence[str | Path],
    *,
    title: str,
    out: str | Path | None = None,
    metrics: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    pictures: Mapping[str, str | Path] | None = None,
    attribution: str | None = None,
    sections: Sequence[str] = (),
) -> Path:
    """Write ``RUN/report.html``, or one report of several runs to ``out``; replaces the file at once, never half.

    Each run shows its curves (``log/metrics.jsonl``: every numeric key over ``images``), its sample sheets
    (``samples/*.png``) and its ``config.yaml``. What is absent or broken is left out, and the report says so.

    Args:
        runs: a run's folder, or several (or none) in the order in which to show them.
        out: the file; may be left out for one run.
        metrics: results for the table at the top; mappings inside it are flattened with dots.
        data: what the data are: number of pictures, split, source.
        pictures: heading -> PNG file, shown at the top.
        attribution: licence text of the data.
        sections: HTML that stands above all of it.
    Returns:
        the path of the written file.
    Raises:
        ValueError: no run or several without ``out``.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(r) for r in runs]
    if out is None and len(folders) != 1:
        raise ValueError(f"write_report: {len(folders)} runs need `out`, the file to write")
    path = Path(out) if out is not None else folders[0] / "report.html"
    body = [f"<h1>{html.escape(title)}</h1>", *sections]
    if metrics:
        body += ["<h2>Results</h2>", _table(_flat(metrics))]
    for heading, file in (pictures or {}).items():
        body += [f"<h2>{html.escape(heading)}</h2>", _figure(Path(file), heading, "")]
    for folder in folders:
        body += _run_section(folder)
    if data:
        body += ["<h2>Data</h2>", _table(_flat(data))]
    body += ["<h2>Made with</h2>", _table(_versions())]
    if attribution:
        body += ["<h2>Attribution</h2>", f"<p>{html.escape(attribution).replace(chr(10), '<br>')}</p>"]
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return path


def read_log(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a ``metrics.jsonl`` in order of ``images``, and how many lines could not be read.

    A run that was killed may end in half a line; one that was resumed goes back to its checkpoint: what the later
    attempt wrote again replaces the earlier.
    """
    rows: list[dict[str, Any]] = []
    broken = 0
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], 0
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not _is_number(row.get("images")):
            broken += 1
            continue
        while rows and rows[-1]["images"] > row["images"]:
            rows.pop()
        rows.append(row)
    return rows, broken


def _run_section(folder: Path) -> list[str]:
    parts = [f"<h2>{html.escape(folder.name or str(folder))}</h2>"]
    rows, broken = read_log(folder / "log" / "metrics.jsonl")
    curves = _curves(rows)
    if curves:
        images = rows[-1]["images"]
        parts.append(f'<p class="soft">{images:,} images seen; ' + html.escape(_last(curves)) + "</p>")
        parts += ['<div class="curves">', *_plots(curves), "</div>"]
    else:
        parts.append('<p class="soft">No log/metrics.jsonl with numbers in it.</p>')
    if broken:
        lines = "line" if broken == 1 else "lines"
        parts.append(f'<p class="soft">{broken} {lines} of log/metrics.jsonl could not be read.</p>')
    kinds: dict[str, list[Path]] = {}
    for file in sorted((folder / "samples").glob("*.png")):
        kinds.setdefault(file.stem.rstrip("0123456789").rstrip("_"), []).append(file)
    for kind, files in kinds.items():
        files = _thinned(files, SHEETS)
        parts.append(f"<h3>{'Samples' if kind == 'images' else html.escape(kind or 'Samples')}</h3>")
        parts.append(_sheet(files[-1]))  # the newest, large
        if len(files) > 1:
            parts += ['<div class="strip">', *(_sheet(f) for f in files[:-1]), "</div>"]
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        parts.append(f"<details><summary>config.yaml</summary><pre>{html.escape(config)}</pre></details>")
    except OSError:
        parts.append('<p class="soft">No config.yaml.</p>')
    return parts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curves(rows: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Key -> (images, values), for every numeric key."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "images" and _is_number(value):
                x, y = curves.setdefault(key, ([], []))
                x.append(row["images"])
                y.append(value)
    return curves


def _last(curves: dict[str, tuple[list[float], list[float]]]) -> str:
    values = {label(key): _text(y[-1]) for key, (_, y) in curves.items() if "_at_" not in key}
    return "last values: " + ", ".join(f"{name} {value}" for name, value in values.items())


LABELS = {  # keys of log/metrics.jsonl
    "lr": "learning rate",
    "tflops": "TFLOP/s",
    "mfu": "share of the peak FLOP/s",
    "psnr": "PSNR",
    "step_seconds": "seconds per step",
    "data_wait_seconds": "seconds per step waiting for data",
    "data_wait_seconds_max": "seconds per step waiting for data, slowest process",
    "comm_wait_seconds": "seconds per step waiting for other processes",
    "comm_wait_seconds_max": "seconds per step waiting for other processes, slowest",
    "train_fixed_loss": "training loss at fixed noise",
}
NETWORKS = {"net": "denoiser", "vae": "autoencoder", "clip": "CLIP"}


def label(key: str) -> str:
    """A key of the log in plain words: ``net_grad_norm`` is the gradient norm of the denoiser."""
    if key.startswith("held_out_"):
        return f"held-out {label(key.removeprefix('held_out_'))}"
    if key.endswith("_grad_norm"):
        network = key.removesuffix("_grad_norm")
        return f"gradient norm of the {NETWORKS.get(network, network.replace('_', ' '))}"
    return LABELS.get(key, key.replace("_", " "))


def _plots(curves: dict[str, tuple[list[float], list[float]]]) -> list[str]:
    """One panel for each key; ``held_out_loss`` shares the panel of ``loss``, and what is measured at several times one
    of their own."""
    panels: dict[str, list[str]] = {}
    for key in sorted(curves, key=lambda k: ("loss" not in k, list(curves).index(k))):  # losses first
        if "_at_" in key:
            panels.setdefault(key.partition("_at_")[0] + " at t", []).append(key)
            continue
        base = key.removeprefix("held_out_")
        panels.setdefault(base if base in curves else key, []).append(key)
    return [_panel(name, {k: curves[k] for k in keys}) for name, keys in panels.items()]


def _panel(name: str, curves: dict[str, tuple[list[float], list[float]]]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    grey = "#888888"  # readable on white and on black
    figure = Figure(figsize=(4.4, 2.6), layout="constrained")
    axes = figure.add_subplot()
    drawn: list[float] = []
    colours = _COLOURS if len(curves) <= len(_COLOURS) else [_shade(i / (len(curves) - 1)) for i in range(len(curves))]
    for (key, (x, y)), colour in zip(sorted(curves.items(), key=lambda kv: kv[0] != name), colours, strict=False):
        width = math.ceil(len(x) / POINTS)  # points that are averaged into one
        x, y = _averaged(x, width), _averaged(y, width)
        mark = "o" if len(x) < 3 else ""
        if key == name != "lr" and len(y) >= 40:  # a noisy training curve: faint, with its running mean on it
            axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
            y = _smooth(y, len(y) // 20)
        name_in_legend = key.rpartition("_at_")[2] if "_at_" in key else label(key)
        axes.plot(x, y, color=colour, linewidth=1.5, marker=mark, label=name_in_legend)
        drawn += y
    if min(drawn) > 0 and max(drawn) > 30 * min(drawn) and name != "lr":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = min(drawn), max(drawn)
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # a constant, whose rounding would fill the panel
        axes.set_ylim(low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))
    axes.set_title(label(name), fontsize=10, color=grey)
    axes.set_xlabel("images", fontsize=8, color=grey)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(which="both", labelsize=8, colors=grey)
    axes.grid(color=grey, alpha=0.2)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(grey)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=grey, ncols=1 + len(curves) // 5)
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": name}):  # equal logs, equal bytes
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _embed(file.getvalue(), "image/svg+xml", f"{label(name)} over images", "")


_COLOURS = ("#4c8dd6", "#e08a3c")  # a panel holds a key and its held-out twin


def _shade(share: float) -> tuple[float, float, float]:
    """From the first colour to the second, for curves that are in an order."""
    ends = [[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in _COLOURS]
    r, g, b = ((1 - share) * x + share * y for x, y in zip(*ends, strict=True))
    return r, g, b


def _averaged(values: list[float], width: int) -> list[float]:
    return [math.fsum(values[i : i + width]) / len(values[i : i + width]) for i in range(0, len(values), width)]


def _smooth(values: list[float], half: int) -> list[float]:
    """Running mean over 2 half + 1 values, fewer at the ends, always as many on both sides: a line stays a line."""
    total = [0.0]
    for v in values:
        total.append(total[-1] + v)
    n = len(values)
    sides = [min(half, i, n - 1 - i) for i in range(n)]
    return [(total[i + side + 1] - total[i - side]) / (2 * side + 1) for i, side in enumerate(sides)]


def _thinned(files: list[Path], count: int) -> list[Path]:
    if len(files) <= count:
        return files
    return [files[round(i * (len(files) - 1) / (count - 1))] for i in range(count)]


def _sheet(file: Path) -> str:
    digits = file.stem[len(file.stem.rstrip("0123456789")) :]
    caption = f"after {int(digits):,} images" if digits else file.stem
    return _figure(file, caption, caption)


def _figure(file: Path, alt: str, caption: str) -> str:
    try:
        content = file.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()  # a run that was killed may leave half a file
            kind = f"image/{(picture.format or 'png').lower()}"
    except (OSError, SyntaxError, ValueError):
        return f'<p class="soft">{html.escape(file.name)} is missing or broken.</p>'
    return _embed(content, kind, alt, caption)


def _embed(content: bytes, kind: str, alt: str, caption: str) -> str:
    source = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{source}" alt="{html.escape(alt)}" loading="lazy">{below}</figure>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value)
    return str(value)


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(_text(v))}</td></tr>" for k, v in values.items())
    return f"<table>{''.join(rows)}</table>"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    commit = _commit()
    return versions | ({"git commit": commit} if commit else {})


def _commit() -> str | None:
    """The commit of this package's own checkout; None where it is installed or has no commit."""
    root = Path(__file__).resolve().parents[2]
    try:
        ask = ["git", "-C", str(root)]
        top = subprocess.run([*ask, "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=10)
        head = subprocess.run([*ask, "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, timeout=10)
        state = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if top.returncode or head.returncode or Path(top.stdout.strip()).resolve() != root:
        return None
    return head.stdout.strip() + (" with changes" if state.stdout.strip() else "")
