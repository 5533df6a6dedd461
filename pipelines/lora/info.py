"""What is in a LoRA file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .algebra import norm
from .files import Format, family_of, look_into, read_lora
from .kohya import Names
from .notes import triggers


@dataclass(frozen=True)
class PartInfo:
    layers: int
    convolutions: int
    parameters: int
    ranks: dict[int, int]  # rank: how many layers
    alphas: dict[float, int]
    dora: bool
    norm: float | None  # of all changes together
    largest: tuple[str, float] | None  # the layer that changes its weight most


@dataclass(frozen=True)
class Info:
    """What is in a LoRA file."""

    format: Format
    base: str | None
    components: dict[str, PartInfo]
    dtypes: tuple[str, ...]
    triggers: list[str]
    metadata: dict[str, str]


def info(source: str | Path, *, norms: bool = False, names: Names | None = None) -> Info:
    """What is in a LoRA file, from its header; with ``norms`` from its tensors too."""
    lora, format = look_into(source, names=names)
    full = read_lora(source, names=names) if norms else None
    parts = {}
    for name, layers in lora.components.items():
        each = {} if full is None else {module: norm(layer) for module, layer in full.components[name].items()}
        tensors = [t for x in layers.values() for t in (x.down, x.up, x.magnitude) if t is not None]
        parts[name] = PartInfo(
            layers=len(layers),
            convolutions=sum(layer.down.ndim == 4 for layer in layers.values()),
            parameters=sum(t.numel() for t in tensors),
            ranks=dict(sorted(Counter(layer.rank for layer in layers.values()).items())),
            alphas=dict(sorted(Counter(layer.alpha for layer in layers.values()).items())),
            dora=any(layer.magnitude is not None for layer in layers.values()),
            norm=sum(x**2 for x in each.values()) ** 0.5 if each else None,
            largest=max(each.items(), key=lambda item: item[1]) if each else None,
        )
    kinds = {str(layer.down.dtype).removeprefix("torch.") for layer in lora.layers().values()}
    return Info(format, family_of(lora), parts, tuple(sorted(kinds)), triggers(lora.metadata), lora.metadata)
