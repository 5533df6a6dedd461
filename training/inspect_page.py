"""One HTML file about a config's data: what is there, what is left out and why, and what the network will see of it."""

from __future__ import annotations

import html
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .captions import Lengths, lengths, lines_advice
from .data import Rows, crop_shares, together
from .evaluate.report import CSS, _embed, _table
from .folders import plural
from .index import Found, Looked, Skipped, look, look_at, shapes_of
from .pictures import header, one_line, to_rgb
from .schema import AutoencoderConfig, ClipConfig, Config, Data, DiffusionConfig
from .sources import Split
from .tables import DataError

SHOWN = 4  # example pictures of a bucket
NAMED = 50  # rows that are named in a list
SIDE = 160  # pixels of an example
LENGTH = 300  # characters of a caption that is shown
LIMIT = 77  # tokens that CLIP reads
SEVERAL_LINES = 10_000  # captions that are looked at for lines
OF_STREAM = 2000  # rows of a stream that are looked at

OWN_CSS = """
.cuts { display: flex; flex-wrap: wrap; gap: 1rem } .cuts figure { max-width: 21rem; margin: 0 }
.cuts img { border-radius: 2px } .bad { color: #c0392b } li { margin: .15rem 0 } table { margin-bottom: 1rem }
.grid td:not(:first-child) { white-space: nowrap } .grid th { overflow-wrap: normal }
@media (prefers-color-scheme: dark) { .bad { color: #ff7b72 } }
"""


@dataclass
class _Seen:
    """A split: its rows, or why there are none."""

    split: Split
    rows: Rows | None = None
    looked: Looked | None = None
    skipped: list[Skipped] = field(default_factory=list)
    total: int = 0
    error: str | None = None


@dataclass
class Inspection:
    """What ``inspect`` found.

    Attributes:
        note: what is to be known about the buckets, such as that they are a guess.
        caption_lengths: of all captions, and the unit that they are counted in; None without captions.
    """

    config: Config | Data
    data: Data
    seen: list[_Seen]
    note: str = ""
    caption_lengths: tuple[Lengths, str] | None = None

    @property
    def same(self) -> bool:
        """Nothing is held out: both splits are the same rows."""
        rows = [one.rows for one in self.seen if one.rows is not None]
        return self.data.held_out == 0 and len(rows) == 2 and np.array_equal(rows[0].content(), rows[1].content())

    @property
    def parts(self) -> list[Rows]:
        """The rows of each split, once."""
        rows = [one.rows for one in self.seen if one.rows is not None]
        return rows[:1] if self.same else rows


def inspect(config: Config | Data, *, step: int | None = None, note: str = "") -> Inspection:
    """Look at all rows of a config's data. Data that no run would take is described, not raised.

    Args:
        step: what a bucket's sides must be multiples of, where ``data.bucket_step`` is left open.
    Raises:
        DataError: a bucket step that does not fit the resolution.
    """
    data = config if isinstance(config, Data) else config.data
    buckets = False if isinstance(config, AutoencoderConfig | ClipConfig) else None
    shapes = shapes_of(data, buckets, step)
    seen = [_look(data, split, shapes) for split in ("train", "test")]
    result = Inspection(config, data, seen, note)
    if (parts := result.parts) and data.caption_column is not None:
        count, limit, unit = _counter(config)
        result.caption_lengths = lengths(_texts(parts), count, limit, NAMED), unit
    return result


def summary(found: Inspection) -> str:
    """The same in a few lines for the terminal."""
    lines: list[str] = []
    same = found.same
    for one in found.seen:
        if one.split == "test" and same:
            lines.append("test: the rows of train, as none is held out")
        elif one.error is not None:
            lines.append(f"{one.split}: {one.error}")
        elif one.rows is None:
            lines.append(f"{one.split}: none of {plural(one.total, 'row')} is of use")
        else:
            count = sum(len(part.row) for part in one.looked.found) if one.looked else len(one.rows)
            text = f"{one.split}: {plural(count, 'row')}, {_sizes(one.rows)}"
            if count != len(one.rows):
                text += f", {len(one.rows):,} an epoch"
            if enlarged := _enlarged(one.rows):
                text += f", {enlarged:,} smaller than {'its' if enlarged == 1 else 'their'} bucket"
            lines.append(text)
    for one in found.seen:
        if one.rows is not None and one.split == "train":
            counts = np.bincount(one.rows.bucket, minlength=len(one.rows.shapes))
            shapes = (f"{w}×{h} ({n:,})" for (h, w), n in zip(one.rows.shapes, counts.tolist(), strict=True))
            lines.append(f"{plural(len(counts), 'bucket')}: {', '.join(shapes)}")
    if found.note:
        lines.append(found.note)
    if found.caption_lengths is not None:
        known, unit = found.caption_lengths
        text = f"captions: {known.texts:,}, the longest of {plural(known.longest, unit[:-1])}"
        lines.append(f"{text}, {known.long:,} of more than {known.limit}" if known.long else text)
        if advice := lines_advice(islice(_texts(found.parts), SEVERAL_LINES)):
            lines.append(f"captions: {advice}")
    skipped = [] if same else [x for one in found.seen[1:] for x in one.skipped]
    skipped = found.seen[0].skipped + skipped
    if skipped:
        named = "; ".join(f"{x.name}: {_reason(x)}" for x in skipped[:3]) + ("; …" if len(skipped) > 3 else "")
        lines.append(f"left out: {plural(len(skipped), 'row')}: {named}")
    return "\n".join(lines)


def _texts(parts: Sequence[Rows]) -> Iterator[str]:
    return (text for rows in parts for some in rows.texts for text in some)


def _sizes(rows: Rows) -> str:
    sizes = rows.sizes.astype(np.int64)
    area = sizes.prod(1)
    small, large = sizes[area.argmin()], sizes[area.argmax()]
    if (small == large).all():
        return f"{small[1]}×{small[0]} pixels"
    return f"{small[1]}×{small[0]} to {large[1]}×{large[0]} pixels"


def write_data_page(
    config: Config | Data, out: Path, *, step: int | None = None, found: Inspection | None = None
) -> Path:
    """Write what ``inspect`` finds into one HTML file that opens without a server.

    Args:
        out: the file; it is replaced at once, never half.
        step: as in ``inspect``.
        found: of an earlier call; None: made here.
    Returns:
        ``out``.
    Raises:
        DataError: as ``inspect``.
    """
    found = found or inspect(config, step=step)
    data, seen = found.data, found.seen
    title = f"Data: {', '.join(place.path for place in data.places)}"
    body = [f"<h1>{html.escape(title)}</h1>", *_overview(data, seen)]
    body += _left_out(data, seen)
    for one in seen:
        if one.rows is not None and one.split == "train":
            body += _buckets(one.rows, found.note)
    body += _captions(found)
    body += _duplicates(seen)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}{OWN_CSS}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    beside.write_text(page, encoding="utf-8", errors="replace")
    os.replace(beside, out)
    return out


def _look(data: Data, split: Split, shapes: list[tuple[int, int]]) -> _Seen:
    try:
        looked = _look_at_stream(data, shapes) if data.streaming and split == "train" else None
        looked = looked or look_at(data, split, shapes, hold=False)
    except DataError as error:
        return _Seen(split, error=str(error))
    rows = together(data, looked, "test") if any(len(part.row) for part in looked.found) else None
    return _Seen(split, rows, looked, looked.skipped, looked.total)


def _look_at_stream(data: Data, shapes: list[tuple[int, int]]) -> Looked:
    from .shards import shards

    looked, left = Looked(shapes, [], [], [], 0, True), OF_STREAM
    for shard in shards(data, "train"):
        table = shard.open(data)
        some = np.arange(min(left, len(table)))
        found: Found = look(table, some, data, shapes, verify=True, held=False)
        looked.places.append(shard.place)
        looked.tables.append(table)
        looked.found.append(found)
        looked.total, left = looked.total + len(some), left - len(some)
        if left == 0:
            break
    return looked


# ---- sections


def _overview(data: Data, seen: Sequence[_Seen]) -> list[str]:
    body = ["<h2>What was found</h2>"]
    rows = []
    for one in seen:
        if one.looked is None:
            body.append(f'<p class="bad">{one.split}: {html.escape(one.error or "")}</p>')
            continue
        for place, part in zip(one.looked.places, one.looked.found, strict=True):
            repeats = f"{place.repeats:g}" if one.split == "train" else "1"
            rows.append((place.path, one.split, len(part.row), len(part.skipped), repeats))
    if rows:
        body.append(_grid(("source", "split", "rows", "left out", "shown per epoch"), rows))
    told: dict[str, Any] = {}
    for one in seen:
        if one.rows is not None:
            told[f"{one.split}: sizes"] = _sizes(one.rows)
            enlarged = plural(_enlarged(one.rows), "picture is", "pictures are")
            told[f"{one.split}: enlarged"] = f"{enlarged} smaller than the bucket"
    if data.streaming:
        told["stream"] = f"of the training files, their first {OF_STREAM:,} rows were looked at"
    elif any(one.looked is not None and not one.looked.verified for one in seen):
        told["pixels"] = "not decoded: the headers alone were looked at (data.verify)"
    return [*body, _table(told)]


def _left_out(data: Data, seen: Sequence[_Seen]) -> list[str]:
    body = ["<h2>Left out</h2>"]
    total, skipped = sum(one.total for one in seen), [x for one in seen for x in one.skipped]
    if not skipped:
        return [*body, "<p>No row.</p>"]
    share = len(skipped) / total
    over = [x for x in seen if len(x.skipped) > data.max_skipped * x.total or 0 < len(x.skipped) == x.total]
    told = ", ".join(f"{len(one.skipped):,} of the {one.total:,} in split {one.split}" for one in over)
    verdict = f": {told}; data.max_skipped is {data.max_skipped:.1%}, a run would be refused" if over else ""
    body.append(f"<p{' class=bad' if over else ''}>{len(skipped):,} of {total:,} rows, {share:.1%}{verdict}.</p>")
    kinds: dict[str, list[Skipped]] = {}
    for x in skipped:
        kinds.setdefault(_kind(x.reason), []).append(x)
    for kind, some in sorted(kinds.items(), key=lambda item: -len(item[1])):
        some = sorted(some, key=lambda x: x.name)
        items = "".join(f"<li>{html.escape(x.name)}: {html.escape(_reason(x))}</li>" for x in some[:NAMED])
        more = f"<li>… and {len(some) - NAMED:,} more</li>" if len(some) > NAMED else ""
        body.append(f"<details open><summary>{kind}: {len(some):,}</summary><ul>{items}{more}</ul></details>")
    return body


def _reason(skipped: Skipped) -> str:
    return "is not there" if skipped.reason.startswith("[Errno 2]") else skipped.reason


def _kind(reason: str) -> str:
    if "bomb" in reason:
        return "Pictures that claim to be too large"
    for word, kind in (("its caption", "Captions"), ("its .json", "Captions"), ("its mask", "Masks")):
        if reason.startswith(word):
            return kind
    return "Broken or missing pictures"


def _buckets(rows: Rows, note: str = "") -> list[str]:
    counts, shares = np.bincount(rows.bucket, minlength=len(rows.shapes)), crop_shares(rows)
    how = "what is dark is cut off" if rows.center_crop else "the whole picture is squeezed"
    body = ["<h2>Buckets and crops</h2>", f'<p class="soft">Each picture, and beside it what is learnt; {how}.</p>']
    body += [f'<p class="bad">{html.escape(note)}</p>'] if note else []
    table = []
    for b, (h, w) in enumerate(rows.shapes):
        own = shares[rows.bucket == b]
        table.append((f"{w}×{h}", f"{w / h:.2f}", int(counts[b]), f"{own.mean():.1%}", f"{own.max():.1%}"))
    body.append(_grid(("width × height", "ratio", "rows", "cut off, mean", "cut off, most"), table))
    for b, (h, w) in enumerate(rows.shapes):
        own = np.flatnonzero(rows.bucket == b)
        order = own[np.argsort(-shares[own], kind="stable")]
        some = [int(order[0]), *(int(i) for i in own if i != order[0])][:SHOWN]  # the one that loses most, and others
        body.append(f"<h3>{w}×{h}: {len(own):,} rows</h3><div class='cuts'>")
        body += [_example(rows, i, float(shares[i])) for i in some] + ["</div>"]
    return body


def _captions(inspection: Inspection) -> list[str]:
    if inspection.caption_lengths is None:
        return []
    data, (found, unit) = inspection.data, inspection.caption_lengths
    parts = inspection.parts
    count, limit, _ = _counter(inspection.config)
    advice = lines_advice(islice(_texts(parts), SEVERAL_LINES))
    variants = Counter(len(some) for rows in parts for some in islice(rows.texts, 10_000))
    told = {
        "captions": found.texts,
        "of a picture": ", ".join(f"{n} (of {k:,})" for n, k in sorted(variants.items())[:6]),
        f"longest, in {unit}": found.longest,
        f"over {limit} {unit}": f"{found.long:,} ({found.long / max(1, found.texts):.1%})",
        "what becomes of those": {
            "cut": "their ends are cut off",
            "chunk": "they are read in pieces",
            "refuse": "a run would be refused" if found.long else "a run would be refused if there were one",
        }[data.long_captions],
    }
    body = ["<h2>Captions</h2>", _table(told)]
    body += [f'<p class="bad">{html.escape(advice)}.</p>'] if advice else []
    body += ["<h3>The first</h3>", _listed(map(_short, islice(_texts(parts), 10)))]
    if found.long:
        shown = _listed(_cut(text, limit, count) for text in found.examples)
        body += [
            f"<h3>Longer than {limit} {unit}: what is behind the bar is over</h3>",
            f"<details><summary>{len(found.examples):,} of {found.long:,}</summary>{shown}</details>",
        ]
    return body


def _duplicates(seen: Sequence[_Seen]) -> list[str]:
    parts = [(one.split, one.rows) for one in seen if one.rows is not None]
    if not parts:
        return []
    content = np.concatenate([rows.content() for _, rows in parts]).view("S16")
    part = np.repeat(np.arange(len(parts), dtype=np.uint8), [len(rows) for _, rows in parts])
    own = np.concatenate([np.arange(len(rows)) for _, rows in parts])
    _, inverse, counts = np.unique(content, return_inverse=True, return_counts=True)
    groups = np.flatnonzero(counts > 1)
    body = ["<h2>Duplicates</h2>"]
    if not len(groups):
        return [*body, "<p>No two pictures are the same file.</p>"]
    copies = int((counts[groups] - 1).sum())
    body.append(f"<p>Pictures that are there more than once: {len(groups):,}; rows that are copies: {copies:,}.</p>")
    order, starts = np.argsort(inverse, kind="stable"), np.cumsum(counts) - counts
    both = np.minimum.reduceat(part[order], starts) != np.maximum.reduceat(part[order], starts)
    if both.any():
        body.append(f'<p class="bad">In both splits: {int(both.sum()):,}. What is held out there is trained on.</p>')
    items = []
    for group in sorted(groups, key=lambda g: not both[g])[:NAMED]:
        places = order[starts[group] : starts[group] + min(8, counts[group])]
        some = [(*parts[part[i]], int(own[i])) for i in places]
        lines = (f"{rows.name(i)} ({split}): {rows.captions[i][:200]}" for split, rows, i in some)
        items.append(f"<li>{'<br>'.join(map(html.escape, lines))}</li>")
    return [*body, f"<ul>{''.join(items)}</ul>"]


# ---- parts


def _example(rows: Rows, index: int, share: float) -> str:
    name = rows.name(index)
    try:
        with header(rows.encoded(index)) as picture:
            whole = to_rgb(picture)
        cut = Image.fromarray(rows.pictures([index])[0].permute(1, 2, 0).numpy())
    except (OSError, ValueError, SyntaxError) as error:
        return f'<p class="bad">{html.escape(name)}: {html.escape(one_line(error))}</p>'
    h, w = rows.shapes[rows.bucket[index]]
    if rows.center_crop:
        kept = min(whole.width, whole.height * w / h), min(whole.height, whole.width * h / w)
        dark = Image.new("L", whole.size, 90)
        left, top = (whole.width - kept[0]) / 2, (whole.height - kept[1]) / 2
        ImageDraw.Draw(dark).rectangle((left, top, left + kept[0] - 1, top + kept[1] - 1), fill=255)
        whole = Image.composite(whole, Image.new("RGB", whole.size), dark)
    both = [x.resize(_fit(x.size), Image.Resampling.LANCZOS) for x in (whole, cut)]
    sheet = Image.new("RGBA", (both[0].width + both[1].width + 6, max(x.height for x in both)))
    sheet.paste(both[0], (0, 0))
    sheet.paste(both[1], (both[0].width + 6, 0))
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=85)  # knows transparency: the page may be dark
    height, width = rows.sizes[index]
    caption = f"{Path(name).name}, {width}×{height}, {share:.1%} cut off: {rows.captions[index][:120]}"
    return _embed(file.getvalue(), "image/webp", name, caption)


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    scale = SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _enlarged(rows: Rows) -> int:
    shape = np.array(rows.shapes)[rows.bucket]  # (N, 2)
    return int((shape > rows.sizes).any(1).sum())


def _counter(config: Config | Data) -> tuple[Any, int, str]:
    """What counts the tokens of texts, how many may be, and their name: the text encoder's if it is at hand, else
    words, of which each is a token at least."""
    if isinstance(config, DiffusionConfig):
        from transformers import AutoTokenizer

        name = config.text.pretrained
        for folder in (Path(name) / "pipeline", Path(name), Path(name) / "tokenizer"):
            if (folder / "tokenizer_config.json").is_file():
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                return partial(_tokens, tokenizer), min(tokenizer.model_max_length, 10**6), "tokens"
    limit = config.model.tokenizer.max_length if isinstance(config, ClipConfig) else LIMIT
    return lambda texts: [len(text.split()) for text in texts], limit - 2, "words"


def _tokens(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]


def _cut(text: str, limit: int, count: Any) -> str:
    """The caption with a bar where it ends for the text encoder, as HTML."""
    words = text.split()
    fits = max((n for n in range(len(words) + 1) if count([" ".join(words[:n])])[0] <= limit), default=0)
    return html.escape(" ".join(words[:fits])) + f' | <span class="bad">{_short(" ".join(words[fits:]))}</span>'


def _short(text: str) -> str:
    return html.escape(text if len(text) <= LENGTH else text[:LENGTH] + " …")


def _listed(items: Any) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _grid(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(x)}</th>" for x in names)
    lines = (
        "".join(f"<td>{html.escape(f'{x:,}' if isinstance(x, int) else str(x))}</td>" for x in row) for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="grid"><tr>{head}</tr>{body}</table>'
