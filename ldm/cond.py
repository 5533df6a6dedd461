"""What the network is told besides the noisy latents: one value object for every model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """Conditioning of a batch.

    Args:
        tokens: (B, L, D) text embeddings, diffusers' ``encoder_hidden_states``.
        bias: (B, L) added to the attention logits of these tokens' keys: 0 for a plain token,
            -inf hides a padded one, log n makes one token count as n equal ones.
        pooled: (B, P) one vector per prompt, diffusers' ``pooled_projections`` / ``text_embeds``.
        size_ids: (B, 6) SDXL's ``time_ids``: original size, crop corner, target size, in pixels; (B, 3) PixArt-α's
            height, width and height / width.
        extra: (B, C', H, W) channels set beside the latents (masks, low-resolution pictures).
        class_labels: (B,) whole numbers (the x4 upscaler's noise level), or (B, P) one vector per picture (unCLIP's
            image embedding), as the network's ``class_embed_type`` says.
        guidance: (B,) the guidance scale that a distilled network (LCM) imitates.
    """

    tokens: Tensor
    bias: Tensor | None = None
    pooled: Tensor | None = None
    size_ids: Tensor | None = None
    extra: Tensor | None = None
    class_labels: Tensor | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def map(self, f: Callable[[Tensor], Tensor]) -> Cond:
        """Apply ``f`` to every tensor that is there."""
        given = {x.name: getattr(self, x.name) for x in fields(self)}
        return replace(self, **{name: f(value) for name, value in given.items() if value is not None})

    def to(self, *args, **kwargs) -> Cond:
        """``Tensor.to`` of every tensor; whole numbers keep their type (a label of 999 would be 1000 in bfloat16)."""

        def move(x: Tensor) -> Tensor:
            moved = x.to(*args, **kwargs)
            return moved if x.is_floating_point() else x.to(moved.device)

        return self.map(move)

    def beside(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) with the channels of ``extra`` after its own; x itself where there are none.

        Raises:
            ValueError: ``extra`` has other rows or sides.
        """
        if self.extra is None:
            return x
        if self.extra.ndim != x.ndim or (len(self.extra), *self.extra.shape[2:]) != (len(x), *x.shape[2:]):
            given, wanted = tuple(self.extra.shape), ", ".join(map(str, (len(x), "C'", *x.shape[2:])))
            raise ValueError(f"Cond.extra: shape {given}, expected ({wanted}): as large as the latents")
        return torch.cat([x, self.extra.to(x.dtype)], dim=1)

    def repeat_interleave(self, n: int) -> Cond:
        """Each row n times in a row: prompts 0, 0, …, 1, 1, …"""
        return self.map(lambda x: x.repeat_interleave(n, dim=0))

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Stack batches: rows of the first, then of the second, … Raises ValueError where fields differ."""
        joined = {}
        for x in fields(Cond):
            values = [getattr(c, x.name) for c in conds]
            if any(v is None for v in values) != all(v is None for v in values):
                raise ValueError(f"Conds do not fit together: `{x.name}` is given in some of them only")
            joined[x.name] = None if values[0] is None else torch.cat(values)
        return Cond(**joined)
