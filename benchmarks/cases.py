"""The networks that are timed: their sizes, and how a stock class and ours are called on the same input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.cond import Cond

Forward = Callable[[], tuple[Tensor, ...]]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A network at one size.

    Args:
        network, size: names to choose it by.
        config: of the stock class.
        shape: (C, H, W) of the input.
        text: tokens that it is told by.
        empty: more tokens, all of them zero: the stock class takes each, ours one that counts as many.
        half: ``encode`` or ``decode``, of an autoencoder.
        batches: of a run that asks for none: on a CPU those that keep the whole of it under four minutes.
        on_request: runs only if its size is asked for by name.
        large: runs on a GPU only, unless its size is asked for by name.
    """

    network: str
    size: str
    config: dict[str, Any]
    shape: Shape
    text: int = 0
    empty: int = 0
    half: str = ""
    batches: tuple[int, ...] = (1,)
    on_request: bool = False
    large: bool = False

    @property
    def name(self) -> str:
        return f"{self.network} {self.half}".strip()


def unet(size: str, widths: Sequence[int], shape: Shape, text: int, config: dict[str, Any], **rest: Any) -> Case:
    """Text at every level but the coarsest, as in SD 1.5, unless ``config`` says otherwise."""
    full, plain = ["CrossAttn{}Block2D"] * (len(widths) - 1), "{}Block2D"
    blocks = {
        "down_block_types": tuple(x.format("Down") for x in [*full, plain]),
        "up_block_types": tuple(x.format("Up") for x in [plain, *full]),
    }
    config = {"sample_size": shape[-1], "block_out_channels": tuple(widths), **blocks, **config}
    return Case("unet", size, config, shape, text, **rest)


def vae(size: str, widths: Sequence[int], pixels: int, config: dict[str, Any], **rest: Any) -> list[Case]:
    levels, side = len(widths), pixels // 2 ** (len(widths) - 1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    config = {"block_out_channels": tuple(widths), "sample_size": pixels, **blocks, **config}
    shapes = {"encode": (3, pixels, pixels), "decode": (config.get("latent_channels", 4), side, side)}
    return [Case("vae", size, config, shape, half=half, **rest) for half, shape in shapes.items()]


def mmdit(size: str, layers: int, heads: int, shape: Shape, text: int, config: dict[str, Any], **rest: Any) -> Case:
    config = {
        "sample_size": shape[-1], "in_channels": shape[0], "out_channels": shape[0], "patch_size": 2,
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 64,
        "caption_projection_dim": 64 * heads, "joint_attention_dim": 512, "pooled_projection_dim": 512,
        "pos_embed_max_size": 32, **config,
    }  # fmt: skip
    return Case("mmdit", size, config, shape, text, **rest)


def dit(size: str, layers: int, heads: int, shape: Shape, text: int, config: dict[str, Any], **rest: Any) -> Case:
    config = {
        "sample_size": shape[-1], "in_channels": shape[0], "out_channels": 2 * shape[0], "patch_size": 2,
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 64,
        "caption_channels": 512, "use_additional_conditions": False, **config,
    }  # fmt: skip
    config["cross_attention_dim"] = heads * config["attention_head_dim"]
    return Case("dit", size, config, shape, text, **rest)


DEMO = {  # configs/openmoji/unet.yaml, with the fields that it leaves to their defaults
    "layers_per_block": 1, "cross_attention_dim": 192, "attention_head_dim": 4, "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
CASES = [
    unet("demo", (64, 128, 192), (4, 16, 16), 32, DEMO, batches=(1, 2, 8)),
    unet("small", (64, 128, 192, 192), (4, 32, 32), 77, {"cross_attention_dim": 256, "attention_head_dim": 4},
         batches=(1, 2)),
    unet("sd15", (320, 640, 1280, 1280), (4, 64, 64), 77, {"cross_attention_dim": 768, "attention_head_dim": 8},
         large=True),
    unet("tiny", (16, 32), (4, 8, 8), 5, {"layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 24,
         "attention_head_dim": 2}, on_request=True),
    *vae("demo", (32, 64, 64), 64, {"norm_num_groups": 8, "mid_block_add_attention": False}, batches=(1, 2, 8)),
    *vae("small", (32, 64, 128, 128), 128, {"layers_per_block": 2, "norm_num_groups": 8}),
    *vae("sd", (128, 256, 512, 512), 512, {"layers_per_block": 2}, large=True),
    *vae("tiny", (8, 16), 16, {"norm_num_groups": 4}, on_request=True),
    mmdit("64", 8, 6, (4, 16, 16), 333, {}, batches=(1, 2)),
    mmdit("256", 8, 6, (4, 32, 32), 333, {}),
    mmdit("256-qk-norm", 8, 6, (4, 32, 32), 333, {"qk_norm": "rms_norm"}),
    mmdit("64-folded", 8, 6, (4, 16, 16), 77, {}, empty=256),
    mmdit("256-folded", 8, 6, (4, 32, 32), 77, {}, empty=256),
    mmdit("sd3", 24, 24, (16, 64, 64), 333, {"joint_attention_dim": 4096, "pooled_projection_dim": 2048,
          "pos_embed_max_size": 192}, large=True),
    mmdit("tiny", 2, 1, (4, 8, 8), 5, {"pos_embed_max_size": 8}, empty=4, on_request=True),
    dit("64", 8, 6, (4, 16, 16), 120, {}, batches=(1, 2)),
    dit("256", 8, 6, (4, 32, 32), 120, {}),
    dit("xl", 28, 16, (4, 64, 64), 300, {"attention_head_dim": 72, "caption_channels": 4096}, large=True),
    dit("tiny", 2, 1, (4, 8, 8), 5, {}, on_request=True),
]  # fmt: skip
NETWORKS = tuple(dict.fromkeys(x.network for x in CASES))
SIZES = tuple(dict.fromkeys(x.size for x in CASES))


def stock_of(case: Case) -> nn.Module:
    """The stock network with random weights, the same each time."""
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of every cast, without need
    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "mmdit": diffusers.SD3Transformer2DModel,
        "dit": diffusers.PixArtTransformer2DModel,
    }
    torch.manual_seed(0)
    return classes[case.network](**case.config)


def ours_of(case: Case, stock: Any) -> nn.Module:
    """Ours around the same weights, made anew: nothing that it keeps from call to call is there yet."""
    from ldm.models.dit import DiT
    from ldm.models.mmdit import MMDiT
    from ldm.models.unet import UNet
    from ldm.models.vae import VAE

    return {"unet": UNet, "vae": VAE, "mmdit": MMDiT, "dit": DiT}[case.network].from_diffusers(stock)


def forwards(case: Case, ours: Any, stock: Any, batch: int) -> tuple[Forward, Forward]:
    """The forward pass of ours and of stock on one input, each called as its pipeline calls it."""
    p = next(stock.parameters())
    rng = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(p.device, p.dtype)

    x = normal(batch, *case.shape)
    if case.half == "encode":
        return lambda: tuple(ours.encode(x)), lambda: moments(stock.encode(x, return_dict=False)[0])
    if case.half == "decode":
        return lambda: (ours.decode(x),), lambda: stock.decode(x, return_dict=False)

    t = torch.linspace(20, 980, batch, device=p.device)
    width = {"unet": "cross_attention_dim", "mmdit": "joint_attention_dim", "dit": "caption_channels"}[case.network]
    text = normal(batch, case.text, case.config[width])
    if case.network == "unet":
        cond = Cond(text)
        return lambda: (ours(x, t, cond),), lambda: stock(x, t, text, return_dict=False)
    if case.network == "dit":
        seen = (torch.arange(case.text, device=p.device) < max(1, case.text // 3)).expand(batch, -1)  # then padding
        cond = Cond(text, torch.zeros(seen.shape, device=p.device, dtype=p.dtype).masked_fill(~seen, -math.inf))
        rest = {"timestep": t, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False}
        return lambda: (ours(x, t, cond),), lambda: stock(x, text, encoder_attention_mask=seen, **rest)
    pooled = normal(batch, case.config["pooled_projection_dim"])
    cond = Cond(text, pooled=pooled)
    if case.empty:
        nothing = torch.zeros_like(text[:, :1])
        counts = torch.zeros(batch, case.text + 1, device=p.device, dtype=p.dtype)
        counts[:, -1] = math.log(case.empty)
        cond = Cond(torch.cat([text, nothing], dim=1), counts, pooled)
        text = torch.cat([text, nothing.expand(-1, case.empty, -1)], dim=1)
    return lambda: (ours(x, t, cond),), lambda: stock(x, text, pooled, t, return_dict=False)


def moments(gaussian: Any) -> tuple[Tensor, Tensor]:
    return gaussian.mean, gaussian.logvar
