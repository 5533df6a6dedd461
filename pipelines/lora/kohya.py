"""Kohya's names of LoRA layers, which A1111 and ComfyUI read: ``lora_unet_…``, ``lora_te_…``, dots turned into ``_``.

What the underscores were is found by a grammar of the stock classes' module names, in which ``#`` stands for a number,
or in a network's own list of them. SDXL's UNet is named as CompVis names it (``input_blocks_4_1_…``), as sd-scripts and
A1111 have it; Stable Diffusion 3 as OneTrainer does (``lora_transformer_…``), which ComfyUI reads too; sd-scripts' own
names of it (``joint_blocks_0_x_block_attn_qkv``, three layers in one) are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from ..key_maps import MMDIT, SAME, SWAP, UNET, Op, pairs

Names = Mapping[str, Collection[str]]  # of each component: its network's module names
Single = tuple[tuple[str, ...], Op]  # stock modules that one layer of CompVis's is, and how it is taken apart
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = ("unet", "transformer", *TEXT)


class Place(NamedTuple):
    """Where a layer of a file belongs; several modules where the file has them in one (``op`` takes it apart)."""

    component: str
    modules: tuple[str, ...]
    op: Op = SAME


# --- the grammar of module names -------------------------------------------------------------------------------------


def _joined(heads: Iterable[str], tails: Iterable[str]) -> list[str]:
    tails = list(tails)
    return [f"{head}.{tail}" for head in heads for tail in tails]


_FF = ("net.0.proj", "net.2")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
_BLOCK = [*_joined(("attn1", "attn2"), _ATTENTION), *_joined(("ff",), _FF)]  # of a UNet or a PixArt
_SPATIAL = ["proj_in", "proj_out", *_joined(("transformer_blocks.#",), _BLOCK)]
_LEVEL = [*_joined(("resnets.#",), _RESNET), *_joined(("attentions.#",), _SPATIAL)]
_JOINT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", *_ATTENTION]
GRAMMAR = {
    "unet": [
        "conv_in", "conv_out", "time_embedding.linear_#", "add_embedding.linear_#",
        *_joined(("down_blocks.#", "up_blocks.#", "mid_block"), _LEVEL),
        "down_blocks.#.downsamplers.#.conv", "up_blocks.#.upsamplers.#.conv",
    ],
    "transformer": [  # Stable Diffusion 3's and PixArt's
        "pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out",
        *_joined(("time_text_embed.timestep_embedder", "time_text_embed.text_embedder"), ("linear_#",)),
        *_joined(("adaln_single.emb.timestep_embedder", "caption_projection"), ("linear_#",)), "adaln_single.linear",
        *_joined(("adaln_single.emb.resolution_embedder", "adaln_single.emb.aspect_ratio_embedder"), ("linear_#",)),
        *_joined(("transformer_blocks.#",), ("norm1.linear", "norm1_context.linear", *_BLOCK)),
        *_joined(("transformer_blocks.#.attn",), _JOINT), *_joined(("transformer_blocks.#.ff_context",), _FF),
    ],
    "clip": [
        *_joined(("encoder.layers.#.self_attn",), ("q_proj", "k_proj", "v_proj", "out_proj")),
        *_joined(("encoder.layers.#.mlp",), ("fc1", "fc2")), "text_projection",
    ],
    "t5": [
        *_joined(("encoder.block.#.layer.#.SelfAttention",), "qkvo"),
        *_joined(("encoder.block.#.layer.#.DenseReluDense",), ("wi_#", "wi", "wo")),
    ],
}  # fmt: skip
_NUMBER = re.compile(r"(?<=_)\d+(?=_|$)")
_PLACE = re.compile(r"(?<=[._])(#|\d+)(?=[._]|$)")  # of a number in a template


@cache
def _templates(kind: str) -> dict[str, str]:
    found = {_PLACE.sub("#", template).replace(".", "_"): template for template in GRAMMAR[kind]}
    assert len(found) == len(GRAMMAR[kind]), kind  # else one spelling would have two meanings
    return found


def dotted(name: str, kind: str) -> str | None:
    """A module name of this part of the grammar from its spelling with underscores alone; None if there is none."""
    template = _templates(kind).get(_NUMBER.sub("#", name))
    if template is None:
        return None
    numbers = _NUMBER.findall(name)
    wanted = _PLACE.findall(template)
    if any(want not in ("#", number) for want, number in zip(wanted, numbers, strict=True)):
        return None
    rest = iter(numbers)
    return _PLACE.sub(lambda _: next(rest), template)


def kind_of(module: str) -> str | None:
    """The component that has modules of this name, as far as the name tells: ``text_encoder`` for all text encoders."""
    name = module.removeprefix("text_model.").replace(".", "_")
    for kind in GRAMMAR:
        if dotted(name, kind) == module.removeprefix("text_model."):
            return kind if kind in COMPONENTS else "text_encoder"
    return None


# --- CompVis's names -------------------------------------------------------------------------------------------------


def _unet_modules(attending: Sequence[bool], depth: int) -> list[str]:
    """Of a stock UNet with two resnets a level, levels from the fine end, as all the published ones."""
    levels, last = range(len(attending)), len(attending) - 1
    spatial = ["proj_in", "proj_out", *_joined((f"transformer_blocks.{k}" for k in range(depth)), _BLOCK)]
    found = ["conv_in", "conv_out", *_joined(("time_embedding", "add_embedding"), ("linear_1", "linear_2"))]
    for i in levels:
        found += _joined((f"down_blocks.{i}.resnets.{j}" for j in range(2)), _RESNET)
        found += _joined((f"up_blocks.{i}.resnets.{j}" for j in range(3)), _RESNET)
        found += _joined((f"down_blocks.{i}.attentions.{j}" for j in range(2)), spatial) if attending[i] else []
        found += _joined((f"up_blocks.{last - i}.attentions.{j}" for j in range(3)), spatial) if attending[i] else []
        found += [f"down_blocks.{i}.downsamplers.0.conv", f"up_blocks.{i}.upsamplers.0.conv"] if i < last else []
    found += _joined((f"mid_block.resnets.{j}" for j in range(2)), _RESNET)
    return found + _joined(("mid_block.attentions.0",), spatial)


def _mmdit_modules() -> list[str]:
    """Of the largest Stable Diffusion 3, with every layer that any has; block 99 stands for the last one."""
    found = ["pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out", "transformer_blocks.99.norm1.linear"]
    found += _joined(("time_text_embed.timestep_embedder", "time_text_embed.text_embedder"), ("linear_1", "linear_2"))
    for i in range(38):
        layers = ["norm1.linear", "norm1_context.linear", *_joined(("ff", "ff_context"), _FF)]
        layers += [*_joined(("attn",), _JOINT), *_joined(("attn2",), _ATTENTION)]
        found += _joined((f"transformer_blocks.{i}",), layers)
    return found


def _singles(table: Sequence, modules: Iterable[str]) -> dict[str, Single]:
    """CompVis's names, with underscores alone, to stock modules and how to take them apart."""
    found = pairs(table, [f"{module}.weight" for module in modules])
    return {
        pair.single.removesuffix(".weight").replace(".", "_"): (
            tuple(name.removesuffix(".weight") for name in pair.stock),
            pair.op,
        )
        for pair in found
    }


@cache
def _published(kind: str) -> dict[str, Single]:
    if kind == "sdxl":
        return _singles(UNET, _unet_modules([False, True, True], 10))
    if kind == "unet":  # SDXL's, and what Stable Diffusion 1 and 2 have beside it: the same where both have it
        return _singles(UNET, _unet_modules([True, True, True, False], 1)) | _published("sdxl")
    return _singles(MMDIT, _mmdit_modules())


def _own(component: str, names: Names | None) -> tuple[str, ...] | None:
    """The names that a network was said to have, without ``text_model.``; None if nothing was said."""
    given = None if names is None else names.get(component)
    return None if given is None else tuple(name.removeprefix("text_model.") for name in given)


@lru_cache(maxsize=8)
def _flat(own: tuple[str, ...]) -> dict[str, list[str]]:
    """A network's module names by their spelling with underscores alone."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(own):
        found.setdefault(name.replace(".", "_"), []).append(name)
    return found


@lru_cache(maxsize=8)
def _compvis(component: str, own: tuple[str, ...] | None) -> dict[str, Single]:
    if own is None:
        return _published("mmdit" if component == "transformer" else "unet")
    if component == "transformer" and any(".attn1." in name for name in own):
        return {}  # a PixArt, of which there is no such form
    return _singles(MMDIT if component == "transformer" else UNET, [n for n in own if kind_of(n) == component])


@lru_cache(maxsize=8)
def _sdxl(own: tuple[str, ...] | None) -> dict[str, str]:
    """Stock module names of an SDXL UNet to CompVis's."""
    table = _published("sdxl") if own is None else _compvis("unet", own)
    return {stock[0]: single for single, (stock, _) in table.items()}


# --- a file's name -> modules ----------------------------------------------------------------------------------------

_PREFIXES = {
    "lora_unet_": "unet", "lora_transformer_": "transformer", "lora_te1_": "text_encoder", "lora_te_": "text_encoder",
    "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3",
}  # fmt: skip


def is_kohya(stem: str) -> bool:
    return stem.startswith(tuple(_PREFIXES)) and "." not in stem


def place(stem: str, names: Names | None = None) -> Place:
    """Where the layer of this name (a key of the file up to its first dot) belongs.

    Args:
        names: of some components, the module names of their networks; by default those that stock classes have.
    Raises:
        ValueError: naming the key: no module has this name, or two have.
    """
    prefix = next(p for p in _PREFIXES if stem.startswith(p))
    component, rest = _PREFIXES[prefix], stem.removeprefix(prefix)
    own = _own(component, names)
    if component in TEXT:
        rest = rest.removeprefix("text_model_")
    if own is not None:
        found = _flat(own).get(rest, [])
        if len(found) > 1:
            raise ValueError(f"{stem}: could be {found[0]} or {found[1]}")
        if found:
            return Place(component, (found[0],))
    else:
        for kind in ("clip", "t5") if component in TEXT else (component,):
            if name := dotted(rest, kind):
                return Place(component, (name,))
    for side in ("unet", "transformer") if component == "unet" else ():
        if single := _compvis(side, _own(side, names)).get(rest):
            return Place(side, *single)
    whose = "the network's list of modules" if own is not None else f"stock {component}s"
    raise ValueError(f"{stem}: no module of {whose} is called so; a LoRA of another kind of model?")


def taken_apart(stem: str, place: Place, out: int, width: int) -> Op:
    """``place.op``, also where only the shape (out, width) tells that it is Stable Diffusion 3's last block: that one
    only reads the text, with two modulations where others have six, and the stock class has them the other way round.
    """
    last = stem.startswith("lora_unet_") and place.modules[0].endswith(".norm1_context.linear") and out == 2 * width
    return SWAP if last else place.op


# --- and back --------------------------------------------------------------------------------------------------------

FAMILIES = ("sd15", "sd21", "sdxl", "sd3", "pixart")


def kohya_name(component: str, module: str, base: str, names: Names | None = None) -> str:
    """The name that A1111 and ComfyUI read (Stable Diffusion 3: ComfyUI).

    Args:
        names: for an SDXL UNet of other depth than the published one: its module names.
    Raises:
        ValueError: there is none for this module or this family.
    """
    flat = module.replace(".", "_")
    if component in TEXT:
        number = "" if base in ("sd15", "sd21") else str(TEXT.index(component) + 1)
        if component != "text_encoder" and not number:
            raise ValueError(f"{component}: a {base} model has one text encoder")
        return f"lora_te{number}_{with_text_model(module).replace('.', '_')}"
    if base == "pixart":
        raise ValueError("a LoRA of a PixArt has no form of kohya's; ComfyUI reads format 'diffusers'")
    if (component == "unet") == (base == "sd3"):
        raise ValueError(f"{component}: a {base} model has none")
    if base == "sd3":
        return f"lora_transformer_{flat}"
    if base != "sdxl":
        return f"lora_unet_{flat}"
    single = _sdxl(_own("unet", names)).get(module)
    if single is None:
        raise ValueError(f"unet.{module}: the published SDXL has no such module; give the network's names")
    return f"lora_unet_{single}"


def with_text_model(module: str) -> str:
    """A CLIP's module as files have it; a T5's and the projection are called so at the top already."""
    return f"text_model.{module}" if module.startswith("encoder.layers.") else module
