"""What a picture's captions are, which of them an image shows, and what becomes of one that is too long."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldm import rng
from ldm.models.long_text import Count

from .folders import plural
from .schema import Data
from .tables import AT_ONCE, DataError, batched

# A line with its language in front: "de.utf8=", "de=", "pt_BR: " or "[de]".
LANGUAGE = re.compile(
    r"^\s*(?:([A-Za-z]{2,3}(?:[-_][A-Za-z]{2,4})?)(?:\.[\w-]+)?\s*[=:]|\[([A-Za-z]{2,3}(?:[-_][A-Za-z]{2,4})?)\])(.*)$"
)
VARIANT, TAGS = 6, 7  # streams of ``batches.Stream``: which caption, in which order its tags


def variants(raw: Any, data: Data) -> tuple[str, ...]:
    """All captions of one picture: those of its row, parted and stripped, in each template.

    Raises:
        ValueError: there is none, with what is there instead.
    """
    listed = raw if isinstance(raw, list | tuple) else [raw]
    for text in listed:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"is {text!r}, not text")
    if data.caption_lines != "all":
        listed = [line_of(text, data.caption_lines) for text in listed if text and text.strip()]
    if data.split_captions_at:
        listed = [part for text in listed if text for part in text.split(data.split_captions_at)]
    texts = list(dict.fromkeys(text.strip() for text in listed if text and text.strip()))
    if not texts:
        raise ValueError("is empty")
    return tuple(template.replace("{}", text) for text in texts for template in data.caption_templates or ("{}",))


def line_of(text: str, lines: str) -> str:
    """One line of a caption.

    Args:
        lines: ``first``, or a language: the text behind ``de.utf8=``, ``de=``, ``de:`` or ``[de]``.
            ``de`` also takes ``de_AT=``.
    Raises:
        ValueError: no line of that language.
    """
    listed = [line.strip() for line in text.splitlines() if line.strip()]
    if lines == "first":
        return listed[0] if listed else ""
    tagged = [match.groups() for line in listed if (match := LANGUAGE.match(line))]
    languages = {(a or b).lower().replace("_", "-"): words.strip() for a, b, words in reversed(tagged)}
    wanted = lines.lower().replace("_", "-")
    if wanted in languages:
        return languages[wanted]
    for name, words in languages.items():
        if name.split("-")[0] == wanted:
            return words
    there = f"; there are: {', '.join(sorted(languages)[:8])}" if languages else ""
    raise ValueError(f"has no line of language {lines!r} (data.caption_lines){there}")


def languages_in(text: str) -> list[str]:
    """Languages of a text in which each line names its own; empty for any other text."""
    listed = [line for line in text.splitlines() if line.strip()]
    tagged = [match for line in listed if (match := LANGUAGE.match(line))]
    if len(tagged) < 2 or len(tagged) < len(listed):
        return []
    return [match[1] or match[2] for match in tagged]


def lines_advice(texts: Iterable[str]) -> str:
    """What to say of captions with several lines; empty where none has."""
    several = total = 0
    languages: list[str] = []
    for text in texts:
        total += 1
        several += len([line for line in text.splitlines() if line.strip()]) > 1
        languages = languages or languages_in(text)
    if not several:
        return ""
    known = f"{several} of {plural(total, 'caption')} {'has' if several == 1 else 'have'} several lines"
    if languages:
        code = languages[0]
        return f"{known}, each in a language ({', '.join(languages[:8])}); data.caption_lines: {code} takes one"
    return f"{known}, which are read as one text; data.caption_lines: first takes the first line"


def chosen(texts: Sequence[tuple[str, ...]], index: Tensor, seed: int, data: Data) -> list[str]:
    """The captions that images show: one of each one's variants, its tags shuffled where that is asked for.

    Args:
        texts: (B) variants of each.
        index: (B,) image indices in the run; with the seed they decide everything.
    """
    u = rng.uniform(seed, index, (), VARIANT).tolist()
    picked = [some[int(x * len(some))] for some, x in zip(texts, u, strict=True)]
    if not data.shuffle_tags:
        return picked
    most = max(text.count(data.tag_separator) for text in picked) + 1
    keys = rng.uniform(seed, index, (most,), TAGS)  # (B, most)
    return [shuffled(text, data.tag_separator, data.keep_tags, key) for text, key in zip(picked, keys, strict=True)]


def shuffled(text: str, separator: str, keep: int, keys: Tensor) -> str:
    """The tags after the first ``keep`` in the order of their keys (at least as many as there are tags)."""
    tags = [tag.strip() for tag in text.split(separator)]
    tags = [tag for tag in tags if tag]
    order = torch.argsort(keys[: max(0, len(tags) - keep)]).tolist()
    joined = separator if separator.isspace() else separator.strip() + " "
    return joined.join(tags[:keep] + [tags[keep + i] for i in order])


@dataclass(frozen=True)
class Lengths:
    """How long captions are: ``texts`` of them, ``long`` with more than ``limit`` tokens, the ``longest``."""

    texts: int
    long: int
    longest: int
    limit: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        of = f"{self.long} of {plural(self.texts, 'caption')} {'has' if self.long == 1 else 'have'}"
        return f"{of} more than {self.limit} tokens, the longest {self.longest}"


def lengths(texts: Iterable[str], count: Count, limit: int, examples: int = 5) -> Lengths:
    """Count the tokens of captions, some at a time.

    Args:
        count: the tokenizer's, for a list of texts (``TextEncoder.count_tokens``).
        limit: as many as the text encoder reads.
    """
    total = long = longest = 0
    some: list[str] = []
    for part in batched(texts, AT_ONCE):
        for text, n in zip(part, count(part), strict=True):
            total, longest = total + 1, max(longest, int(n))
            if n > limit:
                long += 1
                some = [*some, text] if len(some) < examples else some
    return Lengths(total, long, longest, limit, tuple(some))


def check_lengths(texts: Iterable[str], count: Count, limit: int, policy: Literal["cut", "chunk", "refuse"]) -> Lengths:
    """``lengths``, and what the policy says of it.

    Raises:
        DataError: the policy is ``refuse`` and a caption is longer than ``limit``.
    """
    found = lengths(texts, count, limit)
    if found.long and policy == "refuse":
        raise DataError(
            f"{found}; the first: {found.examples[0][:200]!r}. Shorten them, or set data.long_captions to cut or chunk"
        )
    return found
