"""Between two prompts, and between two seeds: what lies on the way is drawn like any picture.

both = encode(text, ["a red apple", "a green pear"])
a, b = (both.map(lambda x: x[i : i + 1]) for i in (0, 1))
cond = mix(a, b, [0, 0.25, 0.5, 0.75, 1])  # five rows
noise = slerp(start_latents(shape, seed_7), start_latents(shape, seed_8), [0, 0.25, 0.5, 0.75, 1])
pictures = decode(parts.vae, sample_latents(parts, cond, text.null(), noise, steps=20, guidance_scale=5.0))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from ldm.cond import Cond

MIXED = ("tokens", "bias", "pooled")
Share = float | Sequence[float] | Tensor  # of the second; one for all rows, or one for each


def mix(a: Cond, b: Cond, share: Share) -> Cond:
    """What lies between two prompts: (1 - share) a + share b of ``tokens`` (B, L, D) and ``pooled`` (B, P).

    ``bias`` says how often a token is there (0 once, log n as n of them, -inf not at all): these numbers are mixed.
    A token that only one of the two shows is that one's own, and is there the more the nearer the mixture is.

    Args:
        a, b: B rows each, or one; of one call of ``encode``, which gives all prompts one length.
        share: 0 gives a, 1 gives b, exactly; a list of B numbers one row for each.
    Raises:
        ValueError: what does not fit together, or is no prompt (sizes, shown pictures) and differs; a share outside
            [0, 1].
    """
    if a.tokens.shape[1:] != b.tokens.shape[1:]:
        raise ValueError(
            f"mix: tokens {tuple(a.tokens.shape)} and {tuple(b.tokens.shape)}; encode both prompts in one call, which "
            "makes them equally long"
        )
    s = _shares(share, a.tokens)  # (B,) or (1,)
    rows = max(len(a), len(b), len(s))
    if not ((s >= 0) & (s <= 1)).all():
        raise ValueError(f"mix: share is {s.tolist()}, expected numbers from 0 to 1")
    if any(len(x) not in (1, rows) for x in (a, b, s)):
        raise ValueError(f"mix: {len(a)} rows, {len(b)} rows and {len(s)} shares; expected {rows} of each, or one")
    for name in (x.name for x in fields(Cond) if x.name not in MIXED):
        one, other = getattr(a, name), getattr(b, name)
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            raise ValueError(f"mix: the two differ in {name}, which is no part of a prompt; give both the same")
    if (a.pooled is None) != (b.pooled is None):
        raise ValueError("mix: only one of the two has pooled; encode both with one model")
    a, b = (c.map(lambda x: x.expand(rows, *x.shape[1:])) for c in (a, b))
    s = s.expand(rows)
    tokens, other = a.tokens, b.tokens
    bias = None
    if (a.bias is None) != (b.bias is None):
        raise ValueError("mix: only one of the two has bias; encode both prompts in one call")
    if a.bias is not None and b.bias is not None:
        only_a, only_b = b.bias == -torch.inf, a.bias == -torch.inf  # (B, L)
        tokens = torch.where((only_b & ~only_a)[..., None], b.tokens, a.tokens)
        other = torch.where((only_a & ~only_b)[..., None], a.tokens, b.tokens)
        bias = torch.logaddexp(a.bias + (1 - s).log()[:, None], b.bias + s.log()[:, None])
    pooled = None if a.pooled is None or b.pooled is None else torch.lerp(a.pooled, b.pooled, s[:, None])
    return replace(a, tokens=torch.lerp(tokens, other, s[:, None, None]), bias=bias, pooled=pooled)


def slerp(a: Tensor, b: Tensor, share: Share) -> Tensor:
    """What lies between two noises, on the arc from one to the other (Shoemake 1985, section 3.3).

    Noise of so many numbers lies on a sphere; half-way on a straight line its norm would be a third too small, and
    the pictures grey and empty. Here the norm goes evenly from that of a to that of b.

    Args:
        a, b: (B, C, h, w), or one row.
        share: 0 gives a, 1 gives b, exactly; a list of B numbers one row for each.
    Raises:
        ValueError: shapes that do not fit together, or opposite noises, between which there is no shortest way.
    """
    s = _shares(share, a)
    rows = max(len(a), len(b), len(s))
    if a.shape[1:] != b.shape[1:] or any(len(x) not in (1, rows) for x in (a, b, s)):
        raise ValueError(f"slerp: {tuple(a.shape)}, {tuple(b.shape)} and {len(s)} shares do not fit together")
    ones = [1] * (a.ndim - 1)
    flat_a, flat_b = (x.expand(rows, *x.shape[1:]).flatten(1).double() for x in (a, b))
    s = s.expand(rows).double()
    norm_a, norm_b = flat_a.norm(dim=1), flat_b.norm(dim=1)
    cosine = torch.linalg.vecdot(flat_a / norm_a[:, None], flat_b / norm_b[:, None])
    if (cosine < -1 + 1e-6).any():
        raise ValueError("slerp: the two are opposite; there is no shortest way from one to the other")
    angle = cosine.clamp(max=1).acos()
    near = angle < 1e-4  # where an arc is a line
    sine = angle.sin().where(~near, 1.0)
    of_a = torch.where(near, 1 - s, ((1 - s) * angle).sin() / sine)
    of_b = torch.where(near, s, (s * angle).sin() / sine)
    norm = torch.lerp(norm_a, norm_b, s)
    found = (of_a * norm / norm_a).view(-1, *ones) * a + (of_b * norm / norm_b).view(-1, *ones) * b
    return found.to(a.dtype)


def _shares(share: Share, like: Tensor) -> Tensor:
    given = torch.as_tensor(share, dtype=torch.float32, device=like.device).reshape(-1)
    return given.to(like.dtype) if like.is_floating_point() else given
