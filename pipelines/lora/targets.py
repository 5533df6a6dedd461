"""Which layers a LoRA changes, and how: settings, presets and patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

INITS: dict[str, bool | str] = {  # ours and peft's names
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "olora": "olora",
}
FROM_BASE = ("pissa", "olora")  # start as a part of the weight, which is taken out of it
_ATTENTION = r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|self_attn\.([qkv]|out)_proj|SelfAttention\.[qkvo])$"
_FEED_FORWARD = r"\.(ff(_context)?\.net\.(0\.proj|2)|mlp\.fc[12]|DenseReluDense\.w(i|i_0|i_1|o))$"
_BLOCKS = r"^(down_blocks|mid_block|up_blocks|transformer_blocks|encoder\.layers|encoder\.block)\."
PRESETS: dict[str, tuple[str, type | tuple[type, ...]]] = {  # where a name is found, and of which kinds of layer
    "attention": (_ATTENTION, nn.Linear),
    "attention+ff": (f"{_ATTENTION}|{_FEED_FORWARD}", nn.Linear),
    "all-linear": (r"^(?!(proj_out|text_projection)$)", nn.Linear),  # as peft: all but the output's
    "conv": (_BLOCKS, (nn.Linear, nn.Conv2d)),  # as LoCon: all of the blocks, with their convolutions
}


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA that is to be trained.

    Args:
        rank, alpha: the change is alpha / rank · B A; ``alpha`` None: the rank, so that it counts once.
        dropout: of what enters it, while training.
        rslora: alpha / √rank instead (Kalajdzievski 2023).
        dora: each output's weight vector gets a length that learns by itself (Liu et al. 2024).
        init: ``default`` and ``gaussian`` start at no change, and so do ``pissa`` (Meng et al. 2024) and ``olora``
            (Büyükakyüz 2024), which take a part of the weights out of them and go on training it; ``orthogonal`` does
            not start at zero. The last three are for linear layers. Drawn from torch's global generator.
        targets: a preset of ``PRESETS``, or patterns of module names (``re.search``).
        rank_pattern, alpha_pattern: other ranks and alphas where the pattern is found; the first that is.
    Raises:
        ValueError: a number out of range, an unknown ``init``.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    targets: str | tuple[str, ...] = "attention"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ValueError(f"init {self.init!r} of a LoRA is not one of {', '.join(INITS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} of a LoRA: expected 0 or more and below 1")
        for what, value in (("rank", self.rank), *((f"rank_pattern {k!r}", v) for k, v in self.rank_pattern.items())):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{what} of a LoRA is {value!r}; expected a whole number above 0")
        for what, value in (
            ("alpha", self.alpha),
            *((f"alpha_pattern {k!r}", v) for k, v in self.alpha_pattern.items()),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{what} of a LoRA is {value}; expected above 0")


def target_names(module: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The linear and convolution layers that a preset or patterns name, in the order of the network.

    Raises:
        ValueError: a pattern finds none (the nearest names are told), or is no regular expression.
    """
    layers = {plain(name): layer for name, layer in layers_of(module).items()}
    if isinstance(targets, str) and targets in PRESETS:
        pattern, kinds = PRESETS[targets]
        found = [name for name, layer in layers.items() if isinstance(layer, kinds) and re.search(pattern, name)]
        if not found:
            raise ValueError(f"LoRA targets {targets!r}: a {type(module).__name__} has no such layers")
        return found
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError(f"LoRA targets are empty; expected patterns of module names or one of {', '.join(PRESETS)}")
    hits = {name for pattern in patterns for name in matches(pattern, layers, "LoRA target", PRESETS)}
    return [name for name in layers if name in hits]


def matches(pattern: str, names: Iterable[str], what: str, others: Iterable[str] = ()) -> list[str]:
    """The names in which the pattern is found; ValueError where there is none."""
    names = list(names)
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"{what} {pattern!r} is no regular expression: {error}") from error
    if not found:
        ends = {".".join(parts[i:]) for parts in (name.split(".") for name in names) for i in (-1, -2)}
        ends = sorted(end for end in ends if not end.isdigit()) + list(others)
        near = difflib.get_close_matches(pattern.strip("^$\\."), ends, n=4, cutoff=0.5)
        raise ValueError(f"{what} {pattern!r} matches no layer; near it: {', '.join(near) or ', '.join(ends[:8])}")
    return found


def by_pattern(what: str, settings: LoraSettings, names: Sequence[str]) -> dict[str, Any]:
    """Of each name that a pattern is found in, the first such pattern's value."""
    patterns: Mapping[str, Any] = getattr(settings, f"{what}_pattern")
    values: dict[str, Any] = {}
    for pattern, value in patterns.items():
        for name in matches(pattern, names, f"{what}_pattern"):
            values.setdefault(name, value)
    return values


def check_layer(name: str, layer: nn.Module, rank: int, settings: LoraSettings) -> None:
    out, *rest = shape_of(layer)
    if rank > min(out, prod(rest)):
        raise ValueError(
            f"LoRA rank {rank} is above the size of {name}, {out} x {prod(rest)}; give a smaller rank, leave it out of "
            "the targets, or set one for it by rank_pattern"
        )
    if isinstance(layer, nn.Conv2d) and settings.init not in ("default", "gaussian"):
        raise ValueError(f"LoRA init {settings.init!r} is for linear layers, {name} is a convolution; take 'default'")
    if settings.init == "orthogonal" and rank % 2:
        raise ValueError(f"LoRA init 'orthogonal' needs an even rank, {name} has {rank}")
    if settings.init not in ("default", "gaussian") and is_quantized(layer):
        raise ValueError(f"LoRA init {settings.init!r} needs the weights, but {name} is quantized; take 'default'")
    if settings.dora and getattr(layer.weight, "dtype", None) == torch.int8:  # peft forgets its scales on a CPU
        raise ValueError(f"dora over int8, as {name} is, is not taken; take nf4")
    if settings.init == "pissa" and layer.weight.dtype == torch.float64:
        raise ValueError(f"LoRA init 'pissa' takes no float64, which {name} has")


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear and convolution layer by its name in the network; of one that is wrapped, the layer inside."""
    found: dict[str, nn.Module] = {}
    inside = "."
    for name, part in module.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(part, LoraLayer):
            found[name], inside = part.get_base_layer(), f"{name}."
        elif isinstance(part, nn.Linear | nn.Conv2d):
            found[name] = part
    return found


def lora_layers(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, LoraLayer)]


def plain(name: str) -> str:
    return name.removeprefix("text_model.")  # as transformers 5's CLIPTextModel has it


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """Of the weight; a quantized one tells it no more."""
    if isinstance(layer, nn.Conv2d):
        return tuple(layer.weight.shape)
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def is_quantized(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not layer.weight.dtype.is_floating_point
