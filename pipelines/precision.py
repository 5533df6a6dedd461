"""The one place that decides the precision in which commands and the trainer's grids draw."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .core import Parts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Module = TypeVar("Module", bound=nn.Module)


def sampling_dtype(device: torch.device | str, name: str | None = None) -> torch.dtype:
    """The dtype of a pipeline's weights for drawing on a device.

    Args:
        name: ``fp32``, ``bf16`` or ``fp16``; None is the default: on CUDA bfloat16 where the card has
            units for it, else float16; elsewhere float32.
    Raises:
        ValueError: another name.
    """
    if name is not None:
        if name not in DTYPES:
            raise ValueError(f"dtype {name}: expected one of {', '.join(DTYPES)}")
        return DTYPES[name]
    device = torch.device(device)
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """``fp32`` for ``torch.float32``, and so on."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def cast_parts(parts: Parts, dtype: torch.dtype) -> Parts:
    """The parts as ``load_parts(folder, dtype)`` opens them once they are saved: what has another dtype is copied, what
    has this one is shared, and the given parts do not change. Quantized networks are shared as they are, and so are
    the hooks of a module's calls.
    """
    net, vae, text = (_cast(module, dtype) for module in (parts.net, parts.vae, parts.text))
    return replace(parts, net=net, vae=vae, text=text)


def _cast(module: Module, dtype: torch.dtype) -> Module:
    if any(not p.is_floating_point() for p in module.parameters()):
        return module
    kept = {id(x) for x in _kept_in_float32(module)} if dtype == torch.float16 else set()
    saved = module.state_dict(keep_vars=True).values()  # other buffers are made anew, and stay in their precision
    casts: dict[int, Any] = {}  # what deepcopy takes in the place of each tensor: no float32 copy in between
    for x in saved:
        if not x.is_floating_point():
            continue
        goal = torch.float32 if id(x) in kept else dtype
        if x.dtype != goal:
            y = x.detach().to(goal)
            casts[id(x)] = nn.Parameter(y, requires_grad=False) if isinstance(x, nn.Parameter) else y
    if not casts:
        return module
    shared = {id(x): x for x in (*module.parameters(), *module.buffers()) if id(x) not in casts}
    # deepcopy would copy the object that a bound method belongs to, and call the copy's
    hooks = {id(h): h for m in module.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())}
    return copy.deepcopy(module, {**shared, **casts, **hooks})


def _kept_in_float32(module: nn.Module) -> Iterator[Tensor]:
    """Weights that transformers keeps in float32 when it opens a model in float16, as T5's ``wo``, which overflow."""
    for model in module.modules():
        names = getattr(model, "_keep_in_fp32_modules", None) or ()
        for path, part in model.named_modules() if names else ():
            if path.rpartition(".")[2] in names:
                yield from part.parameters()
