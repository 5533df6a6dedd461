"""Does a folder, opened with stock classes alone, hold the same model?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.models.text import EMPTY_TOKENS, TextEncoder

from .core import Parts, with_sizes
from .stock import form_of

PROMPTS = ["", "two things, and a third"]


@torch.no_grad()
def compare(folder: Path, parts: Parts) -> None:
    """Open with stock classes alone and compare: weights bit by bit, answers to rounding.

    Raises:
        RuntimeError: naming what differs.
    """
    net, vae, text = parts.net, parts.vae, parts.text
    form, towers = form_of(net, text), {name: model for name, (_, model) in text.towers().items()}
    pairs: dict[str, Any] = {form.net_name: net, "vae": vae, **towers}
    # each in its own precision: the stock loader would open everything in single
    dtypes = {name: next(module.parameters()).dtype for name, module in pairs.items()} | {"default": text.dtype}
    again: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=dtypes)
    for name, ours in pairs.items():
        stock = getattr(again, name).to(device=next(ours.parameters()).device).eval()
        there = dict(stock.named_parameters()) | stock.state_dict()
        for key, value in ours.state_dict().items():
            if key not in there or there[key].is_meta or not torch.equal(there[key], value):
                raise RuntimeError(f"{folder}: {name}.{key} does not come back as it was; the export is given up")
    again.to(net.device)

    with _evaluating(net, vae, text):
        cond = text.encode(PROMPTS)
        tokens, told = _encode(folder, again, form.family, text, cond)
        levels = len(net.config.get("block_out_channels", (0,)))
        side = 2 * net.config.get("patch_size", 1) * 2 ** (levels - 1)  # small, and divisible as the network asks
        x = _waves(2, net.config["in_channels"], side).to(net.device, net.dtype)
        time = torch.tensor([3.0, 700.0], device=net.device)
        cond = with_sizes(net, cond, 40, 24).to(net.device, net.dtype)
        sizes: dict[str, Any] = {}
        if (labels := net.config.get("num_class_embeds")) is not None:
            sizes["class_labels"] = torch.tensor([0, labels - 1], device=net.device)
            cond = replace(cond, class_labels=sizes["class_labels"])
        if form.family == "sdxl":
            sizes["added_cond_kwargs"] = {"text_embeds": told.pop("pooled").to(net.dtype), "time_ids": cond.size_ids}
        elif form.family == "pixart":
            ids = (None, None) if cond.size_ids is None else (cond.size_ids[:, :2], cond.size_ids[:, 2:])
            sizes["added_cond_kwargs"] = dict(zip(("resolution", "aspect_ratio"), ids, strict=True))
        stock_net, tokens = getattr(again, form.net_name), tokens.to(net.dtype)
        output = stock_net(x, timestep=time, encoder_hidden_states=tokens, **told, **sizes).sample
        _close(folder, form.net_name, net(x, time, cond), output)
        picture = _waves(1, vae.config["in_channels"], 4 * vae.factor).to(vae.device, vae.dtype)
        z = vae.encode(picture).mean
        again.vae.to(vae.device)
        _close(folder, "vae encoder", z, again.vae.encode(picture).latent_dist.mean)
        _close(folder, "vae decoder", vae.decode(z), again.vae.decode(z).sample)


def _encode(folder: Path, again: Any, family: str, text: TextEncoder, cond: Cond) -> tuple[Tensor, dict[str, Any]]:
    """Stock's tokens, compared with those of ``cond``, and what else its network is called with."""
    device, ours, told = again.device, cond.tokens, {}
    if family == "sd":
        if hasattr(again, "encode_prompt"):
            tokens, _ = again.encode_prompt(PROMPTS, device, 1, False)
        else:  # InstructPix2Pix
            tokens = again._encode_prompt(PROMPTS, device, 1, False)
    elif family == "sdxl":
        tokens, null, told["pooled"], _ = again.encode_prompt(PROMPTS, device=device)
        _close(folder, "the omitted negative prompt", text.null().tokens, null[:1])
    elif family == "sd3":
        answer = again.encode_prompt(PROMPTS, None, None, device=device, do_classifier_free_guidance=False)
        tokens, told["pooled_projections"] = answer[0], answer[2].to(again.transformer.dtype)
        if cond.bias is not None:  # the one token that stands for stock's many
            ours = torch.cat([ours[:, :-1], ours[:, -1:].expand(-1, EMPTY_TOKENS, -1)], dim=1)
    else:
        length = dict(max_sequence_length=text.max_length)
        tokens, told["encoder_attention_mask"], *_ = again.encode_prompt(PROMPTS, False, device=device, **length)
    _close(folder, "text_encoder", ours, tokens)
    return tokens, told


def _waves(rows: int, channels: int, side: int) -> Tensor:
    """Something of every frequency, without a random number: (rows, channels, side, side) in [-1, 1]."""
    n = rows * channels * side * side
    return torch.arange(n, dtype=torch.float32).square().mul(0.1).sin().view(rows, channels, side, side)


def _close(folder: Path, name: str, ours: Tensor, stock: Tensor) -> None:
    # kernels sum in another order: some float32 digits, or what half precision (and TF32 on a GPU) leaves of them
    tolerance = 1e-4 if ours.dtype == torch.float32 and ours.device.type == "cpu" else 5e-2
    ours, stock = ours.float(), stock.float().to(ours.device)
    if ours.shape != stock.shape:
        raise RuntimeError(f"{folder}: {name} answers {tuple(stock.shape)} in stock form, ours {tuple(ours.shape)}")
    apart, size = (ours - stock).abs().max().item(), stock.abs().max().item()
    if not apart <= tolerance * max(1.0, size):
        raise RuntimeError(f"{folder}: {name} answers otherwise in stock form, by {apart:.1e}; the export is given up")


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """In evaluation mode, and by a kernel that takes any precision: flash takes no float32 on CUDA."""
    layers: list[Any] = [m for module in modules for m in module.modules() if hasattr(m, "backend")]
    backends = [layer.backend for layer in layers]
    for layer in layers:
        layer.backend = "auto"
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend
