"""Frozen networks in 4 or 8 bits, to train a LoRA over (QLoRA, Dettmers et al. 2023), by bitsandbytes."""

from __future__ import annotations

import logging
import re
from typing import Any, Literal

import torch
from torch import nn

from ldm.extras import pip_install

from .targets import is_quantized, lora_layers

Kind = Literal["nf4", "int8"]
KINDS: tuple[Kind, ...] = ("nf4", "int8")
# The output, and what turns the time, a size or a pooled text into a vector: small, and every block feels their error.
# T5's wo overflows in half precision, and transformers keeps it apart too.
KEPT = re.compile(
    r"^(proj_out|norm_out\.linear|text_projection|(time_embedding|add_embedding|class_embedding|time_text_embed"
    r"|adaln_single)\..*|.*\.(time_emb_proj|DenseReluDense\.wo))$"
)
OUTLIER = 6.0  # inputs of int8 above it are multiplied in half precision (LLM.int8, Dettmers et al. 2022)


def quantize(module: nn.Module, kind: Kind) -> list[str]:
    """Put bitsandbytes' layers in the place of the linear ones, but for those of ``KEPT``; gradients pass through them.

    Args:
        kind: ``nf4``: 4-bit normal floats, whose scales are quantized too; ``int8``: a scale for each output, and in
            evaluation 8-bit inputs as well.
    Returns:
        The names of the layers that were replaced.
    Raises:
        ValueError: another kind; bitsandbytes is not installed; the network has no such layer, is quantized already,
            holds a LoRA, or its weights are of a type that is not taken.
    """
    name = type(module).__name__
    if kind not in KINDS:
        raise ValueError(f"quantization {kind!r} is not one of {', '.join(KINDS)}")
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        command = pip_install("bitsandbytes")
        raise ValueError(f"quantization {kind!r} needs bitsandbytes ({error}): {command}") from error
    if lora_layers(module):
        raise ValueError(f"this {name} holds a LoRA; quantize it before one is added")
    layers = {place: part for place, part in module.named_modules() if isinstance(part, nn.Linear)}
    if any(is_quantized(layer) for layer in layers.values()):
        raise ValueError(f"this {name} is quantized already")
    chosen = {place: layer for place, layer in layers.items() if not KEPT.match(place.removeprefix("text_model."))}
    if not chosen:
        raise ValueError(f"a {name} has no linear layers to quantize")
    for place, layer in chosen.items():
        if layer.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"quantization {kind!r}: {place} is {layer.weight.dtype}; expected float32 or half")
    for place, layer in chosen.items():
        module.set_submodule(place, _nf4(bnb, layer) if kind == "nf4" else _int8(bnb, layer))
    setattr(module, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)  # peft asks for it
    return list(chosen)


def _nf4(bnb: Any, layer: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    data = layer.weight.detach()
    new.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new)
    new.weight = new.weight.to(data.device)  # quantizes
    new.support_avx512bf16_for_cpu = (
        False  # it would pack the weights anew at the first picture, and not train after it
    )
    return _dressed(new, layer)


def _int8(bnb: Any, layer: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, threshold=OUTLIER, device="meta"
    )
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_news)
    data = layer.weight.detach()
    new.weight = bnb.nn.Int8Params(data.cpu(), requires_grad=False, has_fp16_weights=False).to(data.device)
    return _dressed(new, layer)


def _news(record: logging.LogRecord) -> bool:  # not of every product anew that its inputs are cast
    return "inputs will be cast" not in record.getMessage()


def _dressed(new: nn.Module, layer: nn.Linear) -> nn.Module:
    new.bias = layer.bias
    return new.train(layer.training)
