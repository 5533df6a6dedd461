"""Our parts and the objects of a stock pipeline: the same weights in either form."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from ldm.models.base import Network
from ldm.models.bpe import clip_tokenizer
from ldm.models.mmdit import MMDiT
from ldm.models.text import EMPTY_TOKENS, SECOND_WIDTH, TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.paths import RectifiedFlow

from .core import Parts
from .schedulers import Schedule, default_schedule, from_stock, stock_scheduler, trained_as

log = logging.getLogger(__name__)
NOT_EMPTY = "is a real text encoder; SD3 is read in the form with one CLIP, where the second and third are all zeros"


class Form(NamedTuple):
    """How one kind of network is written down."""

    pipeline: type[DiffusionPipeline]
    net: type[Network]
    net_name: str  # the subfolder
    family: str  # of its text encoder


FORMS = {
    "StableDiffusionPipeline": Form(StableDiffusionPipeline, UNet, "unet", "sd"),
    "StableDiffusion3Pipeline": Form(StableDiffusion3Pipeline, MMDiT, "transformer", "sd3"),
}


def to_stock_pipeline(parts: Parts) -> DiffusionPipeline:
    """The stock pipeline around these weights (shared, not copied). Raises ValueError as ``save_parts`` does."""
    net, vae, text = parts.net, parts.vae, parts.text
    form = form_of(net)
    check_fit(net, vae, text)
    for name, module in (("the network", net), ("the VAE", vae), ("the text encoder", text)):
        if bad := [key for key, p in module.named_parameters() if not p.isfinite().all()]:
            raise ValueError(f"{name} has NaN or infinity in {bad[0]}: such a model is not written")
    stock_vae: Any = vae.to_diffusers()
    given = {
        "vae": stock_vae,
        form.net_name: net.to_diffusers(),
        "text_encoder": text.model,
        "tokenizer": text.tokenizer,
        "scheduler": stock_scheduler(parts.schedule, form.family),
    }
    if form.family == "sd":
        absent = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        return StableDiffusionPipeline(**given, **absent)  # type: ignore[arg-type]
    stock_vae.register_to_config(shift_factor=vae.latent_scale.shift)  # SD3's pipeline wants a number
    clip_2, tokenizer_3, t5 = empty_encoders(text)
    more = dict(text_encoder_2=clip_2, tokenizer_2=text.tokenizer, text_encoder_3=t5, tokenizer_3=tokenizer_3)
    return StableDiffusion3Pipeline(**given, **more)  # type: ignore[arg-type]


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


def form_of(net: Network) -> Form:
    for form in FORMS.values():
        if isinstance(net, form.net):
            return form
    known = " and ".join(form.net.__name__ for form in FORMS.values())
    raise ValueError(f"{type(net).__name__} has no stock pipeline; {known} have one")


def check_fit(net: Network, vae: VAE, text: TextEncoder) -> None:
    """Raises ValueError naming the two sizes or kinds that do not go together."""
    form, c = form_of(net), net.config
    if text.family != form.family:
        raise ValueError(f"{type(net).__name__} takes text family {form.family!r}, the text encoder is {text.family!r}")
    if c.get("addition_embed_type"):
        raise ValueError(f"addition_embed_type {c['addition_embed_type']!r}: SDXL's pipelines are not written or read")
    width = "cross_attention_dim" if form.family == "sd" else "joint_attention_dim"
    latents = ("the VAE's latent_channels", vae.config["latent_channels"])
    pairs = [
        ("in_channels", c["in_channels"], *latents),
        ("out_channels", c["out_channels"] or c["in_channels"], *latents),
        (width, c[width], "the text encoder's width", text.width),
    ]
    if form.family == "sd3":
        pooled = ("the width of the pooled text", text.pooled_width)
        pairs.append(("pooled_projection_dim", c["pooled_projection_dim"], *pooled))
    for name, ours, what, theirs in pairs:
        if ours != theirs:
            raise ValueError(f"the network's {name} is {ours}, {what} is {theirs}: they must be equal")
    if form.family == "sd" and vae.latent_scale.shift:
        shift = vae.latent_scale.shift
        raise ValueError(f"{form.pipeline.__name__} ignores the VAE's shift_factor, which is {shift}: it must be 0")


def from_stock_pipeline(pipeline: DiffusionPipeline) -> Parts:
    """Our parts around a stock pipeline's weights (shared, not copied). Raises ValueError as ``load_parts`` does."""
    name, stock = type(pipeline).__name__, pipeline.components
    if name not in FORMS:
        raise ValueError(f"a {name} cannot be taken over; {' and '.join(FORMS)} can")
    form = FORMS[name]
    net, vae = form.net.from_diffusers(stock[form.net_name]), VAE.from_diffusers(stock["vae"])
    width = net.config["joint_attention_dim"] if form.family == "sd3" else None
    if form.family == "sd3":
        for part in ("text_encoder_2", "text_encoder_3"):
            if stock[part] is not None and not is_empty(part, stock[part].config.to_dict(), stock[part].state_dict()):
                raise ValueError(f"{name}: {part} {NOT_EMPTY}")
    text = TextEncoder(stock["tokenizer"], stock["text_encoder"], form.family, width)
    check_fit(net, vae, text)
    return Parts(net, vae, text, read_schedule(dict(stock["scheduler"].config), form.family))


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


def is_empty(part: str, config: dict[str, Any], state: dict[str, Tensor]) -> bool:
    """Does it answer with zeros whatever the text?"""
    if part == "text_encoder_2":
        return config.get("hidden_size") == SECOND_WIDTH and not any(value.any() for value in state.values())
    return not state["encoder.final_layer_norm.weight"].any()
