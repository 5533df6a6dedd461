"""LoRA with random numbers for the tiny stock pipelines of ``families.py``, and what they make of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from pipelines.lora.files import Component, Layer, LoraFile
from tests import families

PIPES: dict[str, Callable[[], Any]] = {"sd15": families.sd, "sdxl": families.sdxl, "sd3": families.sd3}
UNET = r"(to_[qkv]|to_out\.0|proj_in|proj_out|conv1|time_emb_proj)$"
TEXT = r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"


@cache
def stock(family: str) -> Any:
    return PIPES[family]()


def parts(family: str) -> dict[str, nn.Module]:
    """The denoiser and CLIPs of the stock pipeline."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return {name: part for name in names if (part := getattr(stock(family), name, None)) is not None}


def module_names(family: str) -> dict[str, list[str]]:
    return {part: [name for name, _ in module.named_modules()] for part, module in parts(family).items()}


def layers(
    module: nn.Module, pattern: str = ".", *, varied: bool = False, dora: bool = False, seed: int = 0
) -> Component:
    """One for each linear or convolution layer whose name the pattern finds; alpha is never the rank.

    Args:
        varied: ranks and alphas that differ from layer to layer.
    """
    generator, found = torch.Generator().manual_seed(seed), {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    for i, (name, part) in enumerate(module.named_modules()):
        if not isinstance(part, nn.Linear | nn.Conv2d) or not re.search(pattern, name):
            continue
        weight = part.weight.detach()
        rank, alpha = (1 + i % 3, 0.5 + i % 4) if varied else (2, 3.0)
        ends = (1, 1) * (weight.ndim == 4)
        layer = Layer(draw(rank, *weight.shape[1:]), draw(weight.shape[0], rank, *ends), alpha)
        if dora:
            length = (weight + layer.delta()).flatten(1).norm(dim=1) * (1 + draw(weight.shape[0]))
            layer = Layer(layer.down, layer.up, alpha, length)
        found[name.removeprefix("text_model.")] = layer
    assert found
    return found


def lora(family: str, pattern: str = UNET, text: str | None = TEXT, *, seed: int = 0, **kw: Any) -> LoraFile:
    """A LoRA of the denoiser and of all CLIPs."""
    made = {}
    for i, (name, module) in enumerate(parts(family).items()):
        if not name.startswith("text") or text:
            made[name] = layers(module, text if text and name.startswith("text") else pattern, seed=10 * i + seed, **kw)
    return LoraFile(made)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): p.detach().clone() for name, p in module.named_parameters()}


def changed(before: dict[str, Tensor], component: Component, w: float = 1.0) -> dict[str, Tensor]:
    """All weights with the LoRA in them, by its definition, in double precision."""
    after = {name: x.double() for name, x in before.items()}
    for name, layer in component.items():
        up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
        x = after[f"{name}.weight"]
        x = x + (w * layer.alpha / len(down) * (up @ down)).reshape(x.shape)
        if layer.magnitude is not None:
            rows = x.flatten(1)
            x = (rows * (layer.magnitude.double() / rows.square().sum(1).sqrt())[:, None]).reshape(x.shape)
        after[f"{name}.weight"] = x
    return after


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any number."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def same(a: LoraFile, b: LoraFile) -> None:
    """Bit for bit."""
    one, two = a.layers(), b.layers()
    assert one.keys() == two.keys()
    for name, x in one.items():
        y = two[name]
        assert x.alpha == y.alpha and (x.magnitude is None) == (y.magnitude is None), name
        for p, q in ((x.down, y.down), (x.up, y.up), (x.magnitude, y.magnitude)):
            assert p is None or q is None or (p.dtype == q.dtype and torch.equal(p, q)), name


@contextmanager
def quiet() -> Iterator[None]:
    """Without stock's reports on weights that it does not load because they are there already."""
    levels = transformers.logging.get_verbosity(), diffusers_logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(levels[0])
        diffusers_logging.set_verbosity(levels[1])
        transformers.logging.enable_progress_bar()
