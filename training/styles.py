"""Data sets to adapt a model with: pictures of a style, and of one subject, that the demo's model has never seen.

The drawn styles are OpenMoji's own drawings (CC BY-SA 4.0) in other colours and lines, so that they need nothing that
is not installed. Google's and Microsoft's emoji come from npm, where that is there and can be reached.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .openmoji import Concept, attribution, caption, choose, draw, read_names
from .shipped import config_files

MARKER = "style.json"  # what a folder was made with


@dataclass(frozen=True)
class Style:
    """Colours of a drawing: each fill becomes one of ``fills`` by its lightness, from dark to light."""

    background: str
    line: str
    fills: tuple[str, ...]
    width: float  # of the lines, times OpenMoji's


STYLES = {
    "ink": Style("#ffffff", "#000000", ("#ffffff",), 1.4),
    "poster": Style("#fcea2b", "#000000", ("#d22f27", "#ffffff"), 1.2),
}
PACKAGES = {  # iconify's, whose icons are named almost as CLDR names them: name, version, licence, author
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft"),
}

# A subject: a thing in a blue that OpenMoji's has not. Turn in degrees, size, mirrored, background.
VIEWS = {
    "train": ((0, 1.0, False, "#ffffff"), (-8, 0.9, False, "#ffffff"), (6, 0.95, True, "#ffffff"),
              (0, 0.9, True, "#ffffff"), (-4, 1.0, False, "#ffffff")),
    "test": ((4, 0.95, False, "#ffffff"), (-6, 0.95, True, "#ffffff"), (7, 0.9, False, "#ffffff"),
             (0, 0.95, False, "#ffffff"), (0, 1.0, True, "#ffffff"), (-5, 0.9, False, "#ffffff"),
             (8, 1.0, True, "#ffffff"), (-2, 0.9, False, "#ffffff")),
}  # fmt: skip
BLUE = ("#1e50a0", "#61b2e4", "#92d3f5")


class Made(NamedTuple):
    """A folder, and how many pictures each split has."""

    folder: Path
    train: int
    test: int

    def __str__(self) -> str:
        return f"{self.folder}: {self.train} pictures to train on, {self.test} held out"


class Picture(NamedTuple):
    concept: Concept
    text: str
    svg: str


def style_pictures(out: Path | str, size: int = 64, count: int = 40, source: str = "ink") -> Made:
    """Pictures of a style, as an imagefolder like ``openmoji.render``'s, with the same columns.

    The concepts are those of configs/openmoji/concepts.txt that the demo's model learns, in an order that a hash gives:
    the first ``count`` are the split train, the others the split test. The same call writes the same bytes.

    The captions name the concept alone, as the base's do: the style is what the adaptation adds to every picture.

    Args:
        out: the folder to make; one that the same call has made is taken up.
        size: side of the pictures in pixels, 8 to 2048.
        source: a key of ``STYLES``, which are drawn here, or of ``PACKAGES``, which npm fetches.
    Raises:
        ValueError: a value out of range, ``out`` holds something else, or npm has not got the package.
    """
    if source not in STYLES and source not in PACKAGES:
        raise ValueError(f"source: {source!r} is not one of {', '.join([*STYLES, *PACKAGES])}")
    known = _ordered()
    if not 1 <= count < len(known):
        raise ValueError(f"count: expected a whole number from 1 to {len(known) - 1}, got {count!r}")
    _check_size(size)
    settings = {"source": source, "size": size, "count": count, "concepts": [c.code for c in known]}

    def pictures() -> dict[str, list[Picture]]:
        if source in STYLES:
            made = [(c, restyled(c.file.read_text(encoding="utf-8"), STYLES[source])) for c in known]
        else:
            drawings = _from_npm(source)
            made = [(c, svg) for c in known if (svg := _find(drawings, c.name))]
            if len(made) <= count:
                raise ValueError(f"{PACKAGES[source][0]} has {len(made)} of the concepts: give a smaller --count")
        pictures = [Picture(c, caption(c.name), svg) for c, svg in made]
        return {"train": pictures[:count], "test": pictures[count:]}

    return _folder(Path(out), settings, pictures, _notice(source, size))


def subject_pictures(out: Path | str, size: int = 64, concept: str = "lemon") -> Made:
    """Five pictures of one subject, a thing in blue, and eight others of it to judge by: no captions, as one takes
    photographs of a toy.

    Args:
        concept: what it is: the name of one of OpenMoji's drawings.
    Raises:
        ValueError: as ``style_pictures``, or no drawing has that name.
    """
    _check_size(size)
    (drawing,) = choose([concept])
    blue = Style("#ffffff", "#000000", BLUE, 1.0)
    settings = {"subject": drawing.name, "size": size, "views": json.loads(json.dumps(VIEWS))}

    def pictures() -> dict[str, list[Picture]]:
        svg = drawing.file.read_text(encoding="utf-8")
        return {
            split: [Picture(drawing, "", _viewed(restyled(svg, blue, background=False), *view)) for view in views]
            for split, views in VIEWS.items()
        }

    return _folder(Path(out), settings, pictures, _notice("subject", size))


def _ordered() -> list[Concept]:
    names = read_names(str(config_files()["openmoji/concepts.txt"]))
    learnt = [c for c in choose(names) if c.split == "train"]
    return sorted(learnt, key=lambda c: hashlib.sha256(f"style {c.code}".encode()).digest())


def _check_size(size: int) -> None:
    if not 8 <= size <= 2048:
        raise ValueError(f"size: expected a whole number of pixels from 8 to 2048, got {size!r}")


# --- drawing ---------------------------------------------------------------------------------------------------------


def restyled(svg: str, style: Style, background: bool = True) -> str:
    """One of OpenMoji's drawings, whose groups are called ``color`` and ``line``, in the style's colours."""
    head, body, tail = _parted(svg)
    color, mark, line = body.partition('<g id="line"')

    def tone(value: str) -> str:
        return style.fills[min(int(_lightness(value) * len(style.fills)), len(style.fills) - 1)]

    def inked(value: str) -> str:
        return style.line if _lightness(value) < 0.5 else tone(value)

    color = re.sub(r'fill="(#\w+)"', lambda m: f'fill="{tone(m[1])}"', color)
    color = re.sub(r'stroke="(#\w+)"', lambda m: f'stroke="{inked(m[1])}"', color)
    line = re.sub(r'(fill|stroke)="(#\w+)"', lambda m: f'{m[1]}="{inked(m[2])}"', line)
    line = re.sub(r'stroke-width="([\d.]+)"', lambda m: f'stroke-width="{float(m[1]) * style.width:.3g}"', line)
    ground = f'<rect width="72" height="72" fill="{style.background}"/>' if background else ""
    return f'{head}{ground}<g fill="{style.line}">{color}{mark}{line}</g>{tail}'


def _viewed(svg: str, turn: float, scale: float, mirrored: bool, background: str) -> str:
    head, body, tail = _parted(svg)
    flip = -1 if mirrored else 1
    move = f"translate(36 36) rotate({turn}) scale({scale * flip} {scale}) translate(-36 -36)"
    return f'{head}<rect width="72" height="72" fill="{background}"/><g transform="{move}">{body}</g>{tail}'


def _parted(svg: str) -> tuple[str, str, str]:
    found = re.fullmatch(r"(.*?<svg[^>]*>)(.*)(</svg>.*)", svg, re.DOTALL)
    assert found is not None, svg[:80]
    return found[1], found[2], found[3]


def _lightness(color: str) -> float:
    """Of #rgb or #rrggbb: Rec. 709's luma, 0 to 1."""
    digits = color[1:] if len(color) == 7 else "".join(2 * x for x in color[1:4])
    r, g, b = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


# --- npm -------------------------------------------------------------------------------------------------------------


def _from_npm(source: str) -> dict[str, str]:
    """A package's drawings by their iconify names, as whole SVGs."""
    name, version = PACKAGES[source][:2]
    advice = f"the styles {' and '.join(STYLES)} need no network"
    with tempfile.TemporaryDirectory() as room:
        try:
            subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=room, check=True, capture_output=True, timeout=300)
        except FileNotFoundError:
            raise ValueError(f"source {source}: npm is not installed; {advice}") from None
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            told = (error.stderr or b"").decode(errors="replace").strip().splitlines()
            raise ValueError(
                f"source {source}: npm cannot fetch {name}@{version} ({' '.join(told[:2])}); {advice}"
            ) from (error)
        (archive,) = Path(room).glob("*.tgz")
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            icons = json.load(member)
    width, height = icons.get("width", 16), icons.get("height", 16)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    return {key: f"{head}{icon['body']}</svg>" for key, icon in icons["icons"].items()}


def _find(drawings: dict[str, str], name: str) -> str | None:
    key = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("'", "")).strip("-")
    return drawings.get(key)


# --- files -----------------------------------------------------------------------------------------------------------


def _folder(out: Path, settings: dict, pictures: Callable[[], dict[str, list[Picture]]], notice: str) -> Made:
    """Written beside and renamed."""
    goal = out.expanduser().resolve()
    if goal.is_file() or (goal.is_dir() and any(goal.iterdir())):
        marker = goal / MARKER
        there = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
        if there is None or there.get("settings") != settings:
            what = "pictures made otherwise" if there else "something else"
            raise ValueError(f"{out}: is there already and holds {what}; choose another --out, or remove it")
        counts = {split: len(list((goal / split).glob("*.png"))) for split in ("train", "test")}
        if counts != there["counts"]:
            raise ValueError(f"{out}: some of its pictures are gone; remove it, or choose another --out")
        return Made(out, **counts)
    made = pictures()
    goal.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{goal.name}.", dir=goal.parent))
    try:
        beside.chmod(0o755)
        for split, part in made.items():
            (beside / split).mkdir()
            rows = []
            for i, picture in enumerate(part):
                name = f"{picture.concept.code}.png" if picture.text else f"{i + 1}.png"
                (beside / split / name).write_bytes(draw(picture.svg, settings["size"]))
                row = {"file_name": name, "text": picture.text, "concept": picture.concept.name}
                rows.append(json.dumps(row | {"code": picture.concept.code}, ensure_ascii=False) + "\n")
            if part[0].text:
                (beside / split / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
        counts = {split: len(part) for split, part in made.items()}
        (beside / "ATTRIBUTION.md").write_text(notice, encoding="utf-8")
        (beside / MARKER).write_text(json.dumps({"settings": settings, "counts": counts}, indent=1), encoding="utf-8")
        os.replace(beside, goal)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return Made(out, **counts)


def _notice(source: str, size: int) -> str:
    if source in PACKAGES:
        name, version, licence, author = PACKAGES[source]
        return (
            f"# Attribution\n\nEmoji by {author}, under {licence}, from the npm package {name} {version}, rendered to "
            f"{size} × {size} pixel PNG on white; captions made from the Unicode CLDR short names.\n"
        )
    return attribution(size) + "\nFurther changes: colours, lines and backgrounds are not OpenMoji's.\n"
