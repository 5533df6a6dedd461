"""Our parts and the objects of a stock pipeline: the same weights in either form."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from ldm.latents import LatentScale
from ldm.models.base import Network
from ldm.models.bpe import clip_tokenizer
from ldm.models.dit import DiT
from ldm.models.grow import latent_channels
from ldm.models.mmdit import MMDiT
from ldm.models.text import EMPTY_TOKENS, FAMILIES, TextEncoder
from ldm.models.text_files import SECOND_WIDTH, is_empty
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.paths import RectifiedFlow

from .core import Parts
from .kinds import KINDS, extra_channels, kind_of
from .schedulers import Schedule, default_schedule, from_stock, stock_scheduler, trained_as

log = logging.getLogger(__name__)
POOLED = "the width of the pooled text"
UPSCALER_SCALE = 0.08333  # which StableDiffusionUpscalePipeline writes into its VAE's config, whatever stood there
LOW_RES: dict[str, Any] = {  # the betas by which the x4 upscaler's small pictures get their noise
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
}


class Form(NamedTuple):
    """How one kind of network is written down."""

    pipeline: type[DiffusionPipeline]
    net: type[Network]
    net_name: str  # the subfolder
    family: str  # of its text encoders
    text_tokens: int | None = None  # of T5, where the pipelines of one family differ
    kind: str | None = None  # of ``kinds``: what the network is shown beside the latents


FORMS = {
    "StableDiffusionPipeline": Form(StableDiffusionPipeline, UNet, "unet", "sd"),
    "StableDiffusionXLPipeline": Form(StableDiffusionXLPipeline, UNet, "unet", "sdxl"),
    "StableDiffusion3Pipeline": Form(StableDiffusion3Pipeline, MMDiT, "transformer", "sd3"),
    # read, and written as the three before
    "StableDiffusionImg2ImgPipeline": Form(StableDiffusionImg2ImgPipeline, UNet, "unet", "sd"),
    "StableDiffusionXLImg2ImgPipeline": Form(StableDiffusionXLImg2ImgPipeline, UNet, "unet", "sdxl"),
    "StableDiffusion3Img2ImgPipeline": Form(StableDiffusion3Img2ImgPipeline, MMDiT, "transformer", "sd3"),
    "StableDiffusionInpaintPipeline": Form(StableDiffusionInpaintPipeline, UNet, "unet", "sd", kind="inpaint"),
    "StableDiffusionXLInpaintPipeline": Form(StableDiffusionXLInpaintPipeline, UNet, "unet", "sdxl", kind="inpaint"),
    "StableDiffusion3InpaintPipeline": Form(
        StableDiffusion3InpaintPipeline, MMDiT, "transformer", "sd3", kind="inpaint"
    ),
    "StableDiffusionInstructPix2PixPipeline": Form(
        StableDiffusionInstructPix2PixPipeline, UNet, "unet", "sd", kind="image"
    ),
    "StableDiffusionXLInstructPix2PixPipeline": Form(
        StableDiffusionXLInstructPix2PixPipeline, UNet, "unet", "sdxl", kind="image"
    ),
    "StableDiffusionUpscalePipeline": Form(StableDiffusionUpscalePipeline, UNet, "unet", "sd", kind="low_resolution"),
    "PixArtAlphaPipeline": Form(PixArtAlphaPipeline, DiT, "transformer", "pixart", 120),
    "PixArtSigmaPipeline": Form(PixArtSigmaPipeline, DiT, "transformer", "pixart", 300),
}


# --- out ---------------------------------------------------------------------------------------------------------


def to_stock_pipeline(parts: Parts) -> DiffusionPipeline:
    """The stock pipeline around these weights (shared, not copied). Raises ValueError as ``save_parts`` does."""
    parts = as_written(parts)
    net, vae, text = parts.net, parts.vae, parts.text
    form = form_of(net, text)
    check_fit(net, vae, text)
    for name, module in (("the network", net), ("the VAE", vae), ("the text encoder", text)):
        if bad := [key for key, p in module.named_parameters() if not p.isfinite().all()]:
            raise ValueError(f"{name} has NaN or infinity in {bad[0]}: such a model is not written")
    stock_vae: Any = vae.to_diffusers()
    given: dict[str, Any] = {
        "vae": stock_vae,
        form.net_name: net.to_diffusers(),
        "scheduler": stock_scheduler(parts.schedule, form.family),
    }
    for name in FAMILIES[form.family]:
        given[tokenizer_of(name)], given[name] = text.towers().get(name, (None, None))
    if form.text_tokens not in (None, text.max_length):
        log.warning("call %s with max_sequence_length=%d", form.pipeline.__name__, text.max_length)
    if form.kind == "low_resolution":
        given |= dict(low_res_scheduler=DDPMScheduler(**LOW_RES), safety_checker=None, feature_extractor=None)
    elif form.family == "sd":
        given |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if form.family == "sdxl":
        given["force_zeros_for_empty_prompt"] = text.zeros_for_empty
    if form.family == "sd3":
        stock_vae.register_to_config(shift_factor=vae.latent_scale.shift)  # SD3's pipeline wants a number
        clip_2, tokenizer_3, t5 = empty_encoders(text)
        empty = {"text_encoder_2": (text.tokenizer, clip_2), "text_encoder_3": (tokenizer_3, t5)}
        for name in empty.keys() - text.towers().keys():
            given[tokenizer_of(name)], given[name] = empty[name]
    return form.pipeline(**given)


def as_written(parts: Parts) -> Parts:
    """The parts in the numbers in which the stock form holds them: the upscaler's VAE has the one scale that its
    pipeline decodes by. The pictures are the same, to rounding."""
    if kind_of(parts.net) != "low_resolution" or parts.vae.latent_scale.scale == UPSCALER_SCALE:
        return parts
    return replace(parts, vae=rescaled(parts.vae, UPSCALER_SCALE))


@torch.no_grad()
def rescaled(vae: VAE, scale: float) -> VAE:
    """A copy of an autoencoder whose raw latents are larger or smaller, so that ``scaling_factor`` is ``scale`` and the
    normalized ones stay."""
    vae, channels = copy.deepcopy(vae), vae.config["latent_channels"]
    old = vae.latent_scale
    ratio = old.scale / scale
    last: Any = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    last.weight[:channels] *= ratio  # the means; the rest are log variances
    last.bias[:channels] *= ratio
    last.bias[channels:] += 2 * math.log(ratio)
    first: Any = vae.decoder.conv_in if vae.post_quant_conv is None else vae.post_quant_conv
    first.weight /= ratio
    vae.set_latent_scale(LatentScale(scale, old.shift * ratio))
    return vae


def tokenizer_of(text_encoder: str) -> str:
    """``text_encoder_2`` -> ``tokenizer_2``."""
    return text_encoder.replace("text_encoder", "tokenizer")


def empty_encoders(text: TextEncoder) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel]:
    """Second CLIP, third tokenizer and T5 for stock SD3, which answer with zeros whatever the prompt."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids: dict[str, Any] = {name: getattr(text.tokenizer, name) for name in names}
    clip = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(text.tokenizer),
            hidden_size=SECOND_WIDTH,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=text.max_length,
            projection_dim=SECOND_WIDTH,
            **ids,
        )
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=8, d_model=text.width, d_kv=1, d_ff=1, num_layers=1, num_heads=1, dropout_rate=0.0)
    )
    models: list[nn.Module] = [clip, t5]
    for model in models:
        for p in model.parameters():
            nn.init.zeros_(p)
        model.to(device=text.device, dtype=text.dtype).eval()
    return clip, clip_tokenizer([], [], EMPTY_TOKENS), t5  # this tokenizer knows start and end, and no word


def form_of(net: Network, text: TextEncoder | None = None) -> Form:
    """The stock form of a network, told by its input channels; a DiT's depends on how many tokens its text has."""
    kind = kind_of(net)
    for form in FORMS.values():
        if not isinstance(net, form.net) or form.kind != kind:
            continue
        if form.net is UNet and bool(net.config["addition_embed_type"]) != (form.family == "sdxl"):
            continue
        if form.text_tokens is None or text is None or text.max_length <= form.text_tokens:
            return form
    if kind is not None and any(isinstance(net, form.net) for form in FORMS.values()):
        what = f"{type(net).__name__} of {net.config['in_channels']} channels, which is shown {KINDS[kind]}"
        raise ValueError(f"no stock pipeline has a {what}")
    if isinstance(net, DiT):
        raise ValueError(f"the text has {text and text.max_length} tokens; PixArt's pipelines read 120 or 300")
    known = " and ".join(sorted({form.net.__name__ for form in FORMS.values()}))
    raise ValueError(f"{type(net).__name__} has no stock pipeline; {known} have one")


def check_fit(net: Network, vae: VAE, text: TextEncoder) -> None:
    """Raises ValueError naming the two sizes or kinds that do not go together."""
    form, c = form_of(net), net.config
    if text.family != form.family:
        raise ValueError(f"{type(net).__name__} takes text family {form.family!r}, the text encoder is {text.family!r}")
    form = form_of(net, text)
    family, out = form.family, c["out_channels"] or c["in_channels"]
    if family == "pixart" and out == 2 * c["in_channels"]:
        out //= 2  # the second half is the variance, which the stock pipelines leave aside
    what, theirs = "the VAE's latent_channels", vae.config["latent_channels"]
    more = 0 if form.kind is None else extra_channels(form.kind, latent_channels(net))
    name = f"in_channels less {more} for what it is shown" if more else "in_channels"
    pairs = [(name, c["in_channels"] - more, what, theirs), ("out_channels", out, what, theirs)]
    name = {"sd3": "joint_attention_dim", "pixart": "caption_channels"}.get(family, "cross_attention_dim")
    pairs.append((name, c[name], "the text encoder's width", text.width))
    if family == "sdxl":
        name, ours = "projection_class_embeddings_input_dim", c["projection_class_embeddings_input_dim"]
        sizes = 6 * c["addition_time_embed_dim"]
        pairs.append((f"{name} less {sizes} for the sizes", ours - sizes, POOLED, text.pooled_width))
    elif family == "sd3":
        pairs.append(("pooled_projection_dim", c["pooled_projection_dim"], POOLED, text.pooled_width))
    for name, ours, what, theirs in pairs:
        if ours != theirs:
            raise ValueError(f"the network's {name} is {ours}, {what} is {theirs}: they must be equal")
    latents, usual = vae.config["latent_channels"], 16 if family == "sd3" else 4
    if form.kind == "inpaint" and latents != usual:
        taken = usual + extra_channels("inpaint", usual)
        raise ValueError(f"{form.pipeline.__name__} takes {taken} channels, {usual} of them latents; not {latents}")
    if family != "sd3" and vae.latent_scale.shift:
        shift = vae.latent_scale.shift
        raise ValueError(f"{form.pipeline.__name__} ignores the VAE's shift_factor, which is {shift}: it must be 0")
    if isinstance(net, DiT) and net.sized and (form.text_tokens, c["sample_size"]) != (120, 128):
        raise ValueError(
            "a DiT with use_additional_conditions is told its size by PixArtAlphaPipeline alone (at most 120 text "
            f"tokens), and at sample_size 128 alone; here they are {text.max_length} and {c['sample_size']}"
        )


# --- in ----------------------------------------------------------------------------------------------------------


def from_stock_pipeline(pipeline: DiffusionPipeline) -> Parts:
    """Our parts around a stock pipeline's weights (shared, not copied). Raises ValueError as ``load_parts`` does."""
    name, stock = type(pipeline).__name__, pipeline.components
    if name not in FORMS:
        raise ValueError(f"a {name} cannot be taken over; {', '.join(FORMS)} can")
    form = FORMS[name]
    for part in (form.net_name, "vae", "scheduler"):
        if stock.get(part) is None:
            raise ValueError(f"{name}: its {part} is None; without it nothing can be drawn")
    net, vae = form.net.from_diffusers(stock[form.net_name]), VAE.from_diffusers(stock["vae"])
    check_kind(name, net)
    if "low_res_scheduler" in stock:
        check_low_res(dict(stock["low_res_scheduler"].config), f"{name}: its low_res_scheduler")
    towers = {}
    for part in FAMILIES[form.family]:
        tokenizer, model = stock.get(tokenizer_of(part)), stock.get(part)
        if model is None or (form.family == "sd3" and part != "text_encoder" and is_empty(model)):
            continue
        if tokenizer is None:
            raise ValueError(f"{name}: it has a {part}, and no {tokenizer_of(part)}")
        towers[part] = (tokenizer, model)
    text = TextEncoder.from_towers(towers, form.family, **text_settings(form, net, pipeline.config))
    check_fit(net, vae, text)
    scheduler = stock["scheduler"]
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}  # one that was never saved lacks it
    return Parts(net, vae, text, read_schedule(config, form.family))


def check_kind(name: str, net: Network) -> None:
    """Raises ValueError where a network is not shown what a pipeline of this name shows it. The pipelines of inpainting
    take networks too that are shown nothing."""
    kind = kind_of(net)
    if kind == FORMS[name].kind or (kind is None and FORMS[name].kind == "inpaint"):
        return
    fits = next((other for other, form in FORMS.items() if isinstance(net, form.net) and form.kind == kind), "none")
    total = net.config["in_channels"]
    raise ValueError(f"a {name} has no network of {total} input channels; {fits} has one: is the name right?")


def check_low_res(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where an upscaler's small pictures get their noise by other betas than the x4 upscaler's."""
    for key, value in LOW_RES.items():
        if config.get(key, value) != value or config.get("trained_betas") is not None:
            raise ValueError(f"{where} has {key} {config.get(key)!r}; only {LOW_RES} can be had")


def text_settings(form: Form, net: Network, index: Mapping[str, Any]) -> dict[str, Any]:
    """What of a ``TextEncoder`` follows from the pipeline and its network."""
    settings: dict[str, Any] = {"max_sequence_length": form.text_tokens}
    if form.family == "sd3":
        settings["joint_width"] = net.config["joint_attention_dim"]
    if form.family == "sdxl":
        settings["zeros_for_empty"] = index.get("force_zeros_for_empty_prompt", True)
    return settings


def read_schedule(config: dict[str, Any], family: str) -> Schedule:
    """What the scheduler stands for; where it has no counterpart, the network is still known by it."""
    try:
        return from_stock(config, family)
    except ValueError as error:
        path, prediction, time_input = trained_as(config)
        flows = isinstance(path, RectifiedFlow)
        shift = config.get("shift", config.get("flow_shift", 1.0)) if flows else 1.0
        schedule = default_schedule(path, prediction, family, shift)
        log.warning("%s; sampling with %s (%s) instead", error, schedule.sampler, schedule.spacing)
        return replace(schedule, time_input=time_input)
