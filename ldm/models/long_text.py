"""Texts of more tokens than a CLIP reads: cut between words, each piece read by itself with a start and an end of its
own, and all their tokens shown to the network in a row. Training (``data.long_captions: chunk``) and drawing
(``long_prompt="chunk"``) do it by these functions, so that a model is shown what it has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Count = Callable[[list[str]], Sequence[int]]  # tokens of each text, with those at its ends
Word = TypeVar("Word")


def chunks(text: str, count: Count, limit: int) -> list[str]:
    """A text in pieces of at most ``limit`` tokens each, cut between words; a single word that is longer stays whole.

    Each piece counts the tokens at its ends anew. A text without words is one empty piece.
    """
    return [" ".join(some) for some in parted(text.split(), lambda some: count([" ".join(some)])[0] <= limit)] or [""]


def parted(words: Sequence[Word], fits: Callable[[Sequence[Word]], bool]) -> list[Sequence[Word]]:
    """Words in runs of as many as fit, and at least one."""
    pieces = []
    while words:
        low, high = 1, len(words)  # the most words that fit, by halving
        while low < high:
            middle = (low + high + 1) // 2
            if fits(words[:middle]):
                low = middle
            else:
                high = middle - 1
        pieces.append(words[:low])
        words = words[low:]
    return pieces


def joined(pieces: dict[str, Tensor], counts: Tensor, own: int) -> dict[str, Tensor]:
    """Embeddings of texts that were read in pieces: all their tokens in a row, and the first one's ``pooled``.

    Args:
        pieces: ``tokens`` (B, K, L, D), ``pooled`` (B, K, P) and ``bias`` (B, K, L) where there are such; of row b the
            first ``counts[b]`` are its own, the others are hidden by ``bias``.
        counts: (B,).
        own: how many of the L tokens are the piece's; what sd3 has after them is of the whole text, and taken from the
            first piece.
    Returns:
        ``tokens`` (B, K own + L - own, D), ``pooled`` (B, P), and ``bias`` where there was one or K > 1.
    """
    tokens = pieces["tokens"]
    several = tokens.shape[1] > 1
    hidden = torch.arange(tokens.shape[1], device=tokens.device) >= counts.to(tokens.device)[:, None]  # (B, K)

    def in_a_row(x: Tensor, filling: float) -> Tensor:
        mine = x[:, :, :own]
        if several:
            mine = mine.masked_fill(hidden.view(*hidden.shape, *[1] * (x.ndim - 2)), filling)
        return torch.cat([mine.flatten(1, 2), x[:, 0, own:]], dim=1)

    out = {"tokens": in_a_row(tokens, 0.0)}
    if "pooled" in pieces:
        out["pooled"] = pieces["pooled"][:, 0]
    if "bias" in pieces or several:
        bias = pieces.get("bias", tokens.new_zeros(tokens.shape[:3], dtype=torch.float32))
        out["bias"] = in_a_row(bias, -torch.inf)
    return out
