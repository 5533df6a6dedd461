"""LoRA as numbers: the neutral form that all files are read into and written from.

Layers are named by component (``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2``, ``text_encoder_3``) and
by the stock class's module names; those of a text encoder without ``text_model.``, which files have and transformers'
classes only partly have.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..convert_files import shape


@dataclass(frozen=True)
class Layer:
    """The change of one linear or convolution layer's weight: ``scale * up @ down`` (LoRA, arXiv:2106.09685, eq. 3).

    Raises:
        ValueError: the rank is 0, or the shapes do not go together.
    """

    down: Tensor  # (r, in) or (r, in, k, k)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    alpha: float  # rslora (arXiv:2312.03732) is alpha * sqrt(r) here
    magnitude: Tensor | None = None  # DoRA's (out,): the new weight's norms, arXiv:2402.09353

    def __post_init__(self) -> None:
        down, up = shape(self.down), shape(self.up)
        if down[:1] == (0,) or up[1:2] == (0,):
            raise ValueError(f"a LoRA of rank 0: down is {down}, up {up}")
        if (len(down), len(up)) not in ((2, 2), (4, 4)) or up[1] != down[0] or up[2:] not in ((), (1, 1)):
            raise ValueError(f"down {down} and up {up} do not go together; expected (r, in) and (out, r)")
        if self.magnitude is not None and shape(self.magnitude) != up[:1]:
            raise ValueError(f"magnitude {shape(self.magnitude)} does not go with up {up}; expected ({up[0]},)")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes: (out, in) or (out, in, k, k)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """Change of the weight, of its shape, in single precision or that of the tensors if it is higher. DoRA's
        magnitude is not in it."""
        dtype = torch.promote_types(self.up.dtype, torch.float32)
        return (self.scale * (self.up.to(dtype).flatten(1) @ self.down.to(dtype).flatten(1))).reshape(self.shape)


Component = dict[str, Layer]  # by module name


@dataclass(frozen=True)
class LoraFile:
    components: dict[str, Component]
    metadata: dict[str, str] = field(default_factory=dict)  # of the file, without what the layers say

    def layers(self) -> dict[str, Layer]:
        """All of them, by component and module."""
        return {f"{name}.{key}": layer for name, part in self.components.items() for key, layer in part.items()}
