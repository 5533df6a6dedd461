"""What a picture's captions are, which of them an image shows, and what becomes of one that is too long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldm import rng
from ldm.models.long_text import Count

from .schema import Data
from .tables import AT_ONCE, DataError, batched

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
    if data.split_captions_at:
        listed = [part for text in listed if text for part in text.split(data.split_captions_at)]
    texts = list(dict.fromkeys(text.strip() for text in listed if text and text.strip()))
    if not texts:
        raise ValueError("is empty")
    return tuple(template.replace("{}", text) for text in texts for template in data.caption_templates or ("{}",))


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
        have = "has" if self.long == 1 else "have"
        return f"{self.long} of {self.texts} captions {have} more than {self.limit} tokens, the longest {self.longest}"


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
