"""What every pipeline is called with: its rarer keywords, and prompts or embeddings -> what the network is told."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from diffusers import PixArtAlphaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from ldm.cond import Cond
from ldm.models.base import Network
from ldm.models.text import TextEncoder

from .core import with_sizes
from .fast import StepCaching
from .guiding import Guidance
from .prompts import LongPrompt, encode, one_length

Texts = str | Sequence[str]
OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
Size = tuple[int, int]


class More(TypedDict, total=False):
    """The rarer keywords of a call, the same for all pipelines.

    Args:
        prompt_2, prompt_3, negative_prompt_2, negative_prompt_3: what the second and third text encoder read, where it
            is not the same.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: (B, P), in SDXL and SD3 beside the other embeddings.
        prompt_attention_mask, negative_prompt_attention_mask: (B, L), in PixArt beside the other embeddings; 0 at the
            padding.
        max_sequence_length: T5's tokens, in SD3 and PixArt.
        long_prompt: ``cut``, ``chunk`` or ``refuse``: what becomes of a prompt of more tokens than an encoder reads
            (``prompts.encode``); stock cuts.
        weighting: read ``(word:1.3)`` and ``[word]`` as what counts more and less. In a stock call, and by default,
            brackets are letters.
        clean_caption: in PixArt, take what is no text of a picture out of the prompts; on, where bs4 and ftfy are
            there, as in stock.
        original_size, crops_coords_top_left, target_size: SDXL's (height, width) or corner (top, left) in pixels; by
            default those of the picture. ``negative_…``: of what is led away from, if both sizes are given.
        guidance: a name in ``ldm.guidance.GUIDANCE``, or it and its options, or a list of these (``guiding.guide``).
        one_batch: both halves of guidance in one call of the network; False needs half the memory.
        step_cache: compute inner layers at every so many steps only (``fast``); faster, and not the same picture.
        sampler: a name in ``ldm.sampling.SAMPLERS``; by default the one that the folder's scheduler stands for.
            ``sampler_options``: what its signature takes (``{"s_churn": 10}`` of ``heun``).
    """

    prompt_2: Texts | None
    prompt_3: Texts | None
    negative_prompt_2: Texts | None
    negative_prompt_3: Texts | None
    pooled_prompt_embeds: Tensor | None
    negative_pooled_prompt_embeds: Tensor | None
    prompt_attention_mask: Tensor | None
    negative_prompt_attention_mask: Tensor | None
    max_sequence_length: int | None
    long_prompt: LongPrompt
    weighting: bool
    clean_caption: bool
    original_size: Size | None
    crops_coords_top_left: Size
    target_size: Size | None
    negative_original_size: Size | None
    negative_crops_coords_top_left: Size
    negative_target_size: Size | None
    guidance: Guidance
    one_batch: bool
    step_cache: StepCaching | None
    sampler: str | None
    sampler_options: Mapping[str, Any]


SIZES = (
    "original_size", "crops_coords_top_left", "target_size",
    "negative_original_size", "negative_crops_coords_top_left", "negative_target_size",
)  # fmt: skip
ENCODERS = {"sd": 1, "sdxl": 2, "sd3": 3, "pixart": 1}
SAMPLING = ("guidance", "one_batch", "step_cache", "sampler", "sampler_options")  # what ``sample_latents`` takes


def check_more(more: Mapping[str, Any], own: Collection[str]) -> None:
    """Raises TypeError for a keyword that no pipeline has, naming the nearest of them and of its ``own``."""
    known = {*More.__annotations__, *own}
    for key in more:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise TypeError(f"there is no argument {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def given(more: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Of these keywords those that are there."""
    return {key: more[key] for key in keys if key in more}


class Prompts(NamedTuple):
    """The texts of a call, or their embeddings (B, L, D)."""

    prompt: Texts | None
    negative_prompt: Texts | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None

    def told(self, net: Network, text: TextEncoder, guided: bool, more: More) -> tuple[Cond, Cond | None]:
        """A row for each prompt, and where guidance needs it what it leads away from, a row for each or one for all.

        Raises:
            ValueError: texts and embeddings both, or neither; shapes that do not fit; another number of negatives.
        """
        embeds = (self.prompt_embeds, more.get("pooled_prompt_embeds"), more.get("prompt_attention_mask"))
        texts = (self.prompt, more.get("prompt_2"), more.get("prompt_3"))
        _check_company("prompt", text.family, texts, embeds)
        cond = _told("prompt", net, text, texts, embeds, more)
        if not guided:
            return cond, None
        embeds = (
            self.negative_prompt_embeds,
            more.get("negative_pooled_prompt_embeds"),
            more.get("negative_prompt_attention_mask"),
        )
        first, *others = (self.negative_prompt, more.get("negative_prompt_2"), more.get("negative_prompt_3"))
        _check_company("negative_prompt", text.family, [first, *others], embeds)
        if _is_null(text, [first, *others], embeds[0]):
            uncond = _null(text, cond, more.get("max_sequence_length"))
        else:
            first = "" if first is None and embeds[0] is None else first
            uncond = _told("negative_prompt", net, text, [first, *others], embeds, more)
        if len(uncond) not in (1, len(cond)):
            raise ValueError(f"negative_prompt: {len(uncond)} for {len(cond)} prompts; expected 1, or one for each")
        cond, uncond = one_length(cond, uncond)
        return cond, uncond


def sized(net: Network, cond: Cond, uncond: Cond | None, height: int, width: int, more: More) -> tuple[Cond, Any]:
    """Both with the sizes that the network is told, where it is one that is told any."""
    for name in SIZES:
        pair: Any = more.get(name)
        if pair is not None and (not hasattr(pair, "__len__") or len(pair) != 2):
            raise ValueError(f"{name} is {pair!r}, expected two whole numbers of pixels")
    size, corner = (height, width), more.get("crops_coords_top_left") or (0, 0)
    told = more.get("original_size"), corner, more.get("target_size")
    cond = with_sizes(net, cond, *size, *told)
    if uncond is not None:
        original, target = more.get("negative_original_size"), more.get("negative_target_size")
        if original is not None and target is not None:
            told = original, more.get("negative_crops_coords_top_left") or (0, 0), target
        uncond = with_sizes(net, uncond, *size, *told)
    return cond, uncond


def _is_null(text: TextEncoder, texts: Sequence[Texts | None], embeds: Tensor | None) -> bool:
    """Is nothing given to lead away from? SDXL's stock pipeline looks at the first negative prompt alone."""
    given = texts[:1] if text.family == "sdxl" and text.zeros_for_empty else texts
    return embeds is None and all(one is None for one in given)


def _null(text: TextEncoder, cond: Cond, length: int | None) -> Cond:
    if text.family == "sdxl" and text.zeros_for_empty:
        return cond.map(torch.zeros_like)  # as long as the embeddings that were given
    return text.null(length)


def _told(
    name: str,
    net: Network,
    text: TextEncoder,
    texts: Sequence[Texts | None],
    embeds: Sequence[Tensor | None],
    more: More,
) -> Cond:
    """A Cond of the texts for each encoder, or of embeddings (B, L, D), pooled ones (B, P) and mask (B, L)."""
    family, (tokens, pooled, mask) = text.family, embeds
    if (texts[0] is None) == (tokens is None):
        raise ValueError(f"give either {name} or {name}_embeds")
    if tokens is None:
        names, clean = (name, f"{name}_2", f"{name}_3"), more.get("clean_caption", True) and family == "pixart"
        lists = [_listed(*one, clean) for one in zip(names, texts, strict=True)]
        rows = max(len(one) for one in lists if one is not None)
        lists = [one * rows if one is not None and len(one) == 1 else one for one in lists]
        how = given(more, "max_sequence_length", "long_prompt", "weighting")
        return encode(text, lists[0] or [], *lists[1:], **how)
    wanted = {"sdxl": "pooled", "sd3": "pooled", "pixart": "mask"}.get(family)
    for what, value, full in (
        ("pooled", pooled, name.replace("prompt", "pooled_prompt_embeds")),
        ("mask", mask, f"{name}_attention_mask"),
    ):
        if (value is not None) != (what == wanted):
            raise ValueError(f"{full}: {'needed' if what == wanted else 'not taken'} with {name}_embeds here")
    if tokens.ndim != 3 or tokens.shape[-1] != text.width:
        raise ValueError(f"{name}_embeds: {tuple(tokens.shape)}, expected (B, L, {text.width})")
    rows, length = tokens.shape[:2]
    if pooled is not None and pooled.shape != (rows, text.pooled_width):
        full, wanted = name.replace("prompt", "pooled_prompt_embeds"), (rows, text.pooled_width)
        raise ValueError(f"{full}: {tuple(pooled.shape)}, expected {wanted}, one for each of {name}_embeds")
    if mask is not None and mask.shape != (rows, length):
        raise ValueError(f"{name}_attention_mask: {tuple(mask.shape)}, expected {rows, length}, as {name}_embeds")
    bias = None if mask is None else torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(mask == 0, -torch.inf)
    return Cond(tokens, bias, pooled).to(net.device, net.dtype)


def _check_company(name: str, family: str, texts: Sequence[Texts | None], embeds: Sequence[Tensor | None]) -> None:
    """Raises ValueError where something is given that nobody would look at."""
    tokens, pooled, mask = embeds
    for value, full in ((pooled, name.replace("prompt", "pooled_prompt_embeds")), (mask, f"{name}_attention_mask")):
        if value is not None and tokens is None:
            raise ValueError(f"{full} goes with {name}_embeds, which is missing")
    for i, other in enumerate(texts[1:], 2):
        if other is not None and tokens is not None:
            raise ValueError(f"{name}_{i}: {name}_embeds say what all encoders do; give texts or embeddings")
        if other is not None and i > (n := ENCODERS[family]):
            raise ValueError(f"{name}_{i}: a model of the family {family!r} reads {n} at most; leave it out")


def _listed(name: str, texts: Any, clean: bool) -> list[str] | None:
    if texts is None:
        return None
    if not isinstance(texts, Sequence) or isinstance(texts, bytes) or (not texts and texts != ""):
        raise ValueError(f"{name} is {texts!r}, expected one or more texts")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if broken := [i for i, x in enumerate(texts) if isinstance(x, str) and any("\ud800" <= c <= "\udfff" for c in x)]:
        raise ValueError(f"{name} {broken[0]}: bytes that are no UTF-8 stand in it, {texts[broken[0]]!a:.60}")
    if clean and is_bs4_available() and is_ftfy_available():
        texts = object.__new__(PixArtAlphaPipeline)._text_preprocessing(texts, clean_caption=True)
    return texts
