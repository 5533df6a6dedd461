"""The layouts of single files: which parts, under which prefix, and the configs that no tensor holds.

A CompVis-style file has weights alone; its readers know head counts, activation, latent scale and noise schedule by
the model's family. ``infer`` does the same: sizes from shapes, the rest as published. ``unheard`` says where a model
departs from what such a reader will take for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from typing import Any, NamedTuple

from torch import Tensor

from .key_maps import MMDIT, OPEN_CLIP, PLAIN, UNET, VAE, Row

Config = dict[str, Any]
Like = Mapping[str, Tensor]  # names in the file without their prefix; shapes and dtypes count


class Part(NamedTuple):
    name: str  # its folder
    library: str
    kind: str  # the stock class
    prefix: str  # in the file
    table: Sequence[Row]
    act: str = ""  # of a CLIP
    optional: bool = False
    unused: str = r"(?!)"  # names in others' files that this layout has no use for; {layers} is the text model's


class Layout(NamedTuple):
    name: str
    pipeline: str
    parts: tuple[Part, ...]
    mark: str  # a name that only files of this layout have
    resolution: int
    unet: Config
    vae: Config
    scheduler: Config
    index: Config  # what else a model_index.json of this pipeline holds


def _clip(name: str, prefix: str, kind: str = "CLIPTextModel", act: str = "quick_gelu", unused: str = r"(?!)") -> Part:
    return Part(name, "transformers", kind, prefix, PLAIN, act, unused=unused)


def _open_clip(name: str, prefix: str, kind: str, unused: str = r"(?!)") -> Part:
    return Part(name, "transformers", kind, prefix, OPEN_CLIP, "gelu", unused=unused)


_UNET = Part("unet", "diffusers", "UNet2DConditionModel", "model.diffusion_model.", UNET)
_MMDIT = Part("transformer", "diffusers", "SD3Transformer2DModel", "model.diffusion_model.", MMDIT)
_VAE = Part("vae", "diffusers", "AutoencoderKL", "first_stage_model.", VAE)
_T5 = Part("text_encoder_3", "transformers", "T5EncoderModel", "text_encoders.t5xxl.transformer.", PLAIN, optional=True)
_NONE = [None, None]
_DISCRETE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "trained_betas": None, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
    "timestep_spacing": "leading",
}  # fmt: skip
_PROJECTION = r"text_projection\.weight$"  # ComfyUI writes it for every CLIP

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "sd15",
            "StableDiffusionPipeline",
            (_UNET, _VAE, _clip("text_encoder", "cond_stage_model.transformer.", unused=_PROJECTION)),
            mark="cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
            resolution=512,
            unet={},
            vae={"scaling_factor": 0.18215},
            scheduler={"_class_name": "PNDMScheduler", "skip_prk_steps": True, **_DISCRETE},
            index={"safety_checker": _NONE, "feature_extractor": _NONE, "requires_safety_checker": False},
        ),
        Layout(
            "sd21",
            "StableDiffusionPipeline",
            # the published text encoder stops before the last of OpenCLIP's blocks, as the network was trained
            (
                _UNET,
                _VAE,
                _open_clip(
                    "text_encoder",
                    "cond_stage_model.model.",
                    "CLIPTextModel",
                    r"text_projection$|transformer\.resblocks\.{layers}\.",
                ),
            ),
            mark="cond_stage_model.model.positional_embedding",
            resolution=768,
            unet={"use_linear_projection": True, "upcast_attention": True},
            vae={"scaling_factor": 0.18215},
            scheduler={"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", **_DISCRETE},
            index={"safety_checker": _NONE, "feature_extractor": _NONE, "requires_safety_checker": False},
        ),
        Layout(
            "sdxl",
            "StableDiffusionXLPipeline",
            (
                _UNET,
                _VAE,
                _clip("text_encoder", "conditioner.embedders.0.transformer.", unused=_PROJECTION),
                _open_clip("text_encoder_2", "conditioner.embedders.1.model.", "CLIPTextModelWithProjection"),
            ),
            mark="conditioner.embedders.1.model.positional_embedding",
            resolution=1024,
            unet={"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256},
            vae={"scaling_factor": 0.13025, "force_upcast": True},
            scheduler={"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", **_DISCRETE},
            index={"image_encoder": _NONE, "feature_extractor": _NONE, "force_zeros_for_empty_prompt": True},
        ),
        Layout(
            "sd3",
            "StableDiffusion3Pipeline",
            (
                _MMDIT,
                _VAE,
                _clip("text_encoder", "text_encoders.clip_l.transformer.", "CLIPTextModelWithProjection"),
                _clip("text_encoder_2", "text_encoders.clip_g.transformer.", "CLIPTextModelWithProjection", "gelu"),
                _T5,
            ),
            mark="model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
            resolution=1024,
            unet={},
            vae={"scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True},
            scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
            index={"image_encoder": _NONE, "feature_extractor": _NONE},
        ),
    )
}

LIKELY = (  # how a file's names begin or go on, and what has such names
    ("double_blocks.", "a Flux model"),
    ("control_model.", "a ControlNet"),
    ("lora_unet_", "a LoRA in kohya's form"),
    (".lora_A.", "a LoRA"),
    ("conditioner.embedders.0.model.", "an SDXL refiner"),
    ("edm_mean", "Playground v2.5"),
    ("joint_blocks.", "an SD3 transformer alone"),
    ("input_blocks.", "a UNet without its autoencoder and text encoder"),
    ("encoder.down.", "an autoencoder alone"),
    ("down_blocks.", "one part of a pipeline folder: convert the folder that holds it"),
    ("transformer_blocks.", "one part of a pipeline folder: convert the folder that holds it"),
    ("text_model.", "a text encoder alone"),
)


def recognise(where: object, names: Sequence[str]) -> Layout:
    """The layout whose mark is there (SDXL's before SD 1.5's: a file can have only one).

    Raises:
        ValueError: none is: the first names, and the model that has such.
    """
    for layout in LAYOUTS.values():
        if layout.mark in names:
            return layout
    likely = next((model for sign, model in LIKELY if any(sign in name for name in names)), None)
    raise ValueError(
        f"{where}: not a layout known here ({', '.join(LAYOUTS)}); it begins with {', '.join(sorted(names)[:3])}"
        + (f"; it looks like {likely}" if likely else "")
        + ". A file that lacks its text encoder needs --layout"
    )


# --- configs from shapes ---------------------------------------------------------------------------------------------


def infer(layout: Layout, part: Part, like: Like) -> Config:
    """A stock config for these weights: sizes from the shapes, what they do not show as the layout's family has it.

    Raises:
        ValueError: a scaled-down model, whose head count or norm groups cannot be those of its family; or names that
            are no such network at all.
    """
    try:
        return _INFER[part.kind](layout, part, like)
    except KeyError as error:
        raise ValueError(f"{part.prefix}{error.args[0]}: missing; {layout.name} has it") from error


def _count(like: Like, pattern: str) -> int:
    """How many numbers from 0 on have a name that begins so."""
    n = 0
    while any(name.startswith(pattern.format(n)) for name in like):
        n += 1
    return n


def _heads(width: int, part: Part) -> int:
    if width % 64:
        raise ValueError(f"{part.prefix}*: a width of {width} is not in heads of 64: give --config with the right one")
    return width // 64


def _groups(widths: Sequence[int], part: Part) -> None:
    if odd := [w for w in widths if w % 32]:
        raise ValueError(f"{part.prefix}*: a width of {odd[0]} is not in 32 norm groups: give --config with the right")


def _unet(layout: Layout, part: Part, like: Like) -> Config:
    n = _count(like, "input_blocks.{}.")
    first = next((i for i in range(n) if f"input_blocks.{i}.0.op.weight" in like), n)  # of the downsamplers
    layers, levels = first - 1, n // first
    starts = [first * i + 1 for i in range(levels)]
    widths = [like[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in starts]
    _groups(widths, part)
    blocks = "{}.1.transformer_blocks.{{}}."
    depths = [_count(like, blocks.format(f"input_blocks.{i}")) for i in starts]
    middle = _count(like, "middle_block.1.transformer_blocks.{}.")
    # where a level has no attention its depth is not used, but for the last: it is the middle's
    used = [*(d or 1 for d in depths[:-1]), middle]
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths]
    up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)]
    context = like["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    config: Config = {
        "in_channels": like["input_blocks.0.0.weight"].shape[1],
        "out_channels": like["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": context,
        "transformer_layers_per_block": used if max(used) > 1 else 1,
        "attention_head_dim": 8 if layout.name == "sd15" else [_heads(w, part) for w in widths],
        "norm_num_groups": 32,
        "use_linear_projection": like["middle_block.1.proj_in.weight"].ndim == 2,
        "sample_size": layout.resolution // 8,
    }
    if layout.name == "sdxl":
        config["projection_class_embeddings_input_dim"] = like["label_emb.0.0.weight"].shape[1]
    return layout.unet | config


def _vae(layout: Layout, part: Part, like: Like) -> Config:
    levels = _count(like, "encoder.down.{}.")
    widths = [like[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    _groups(widths, part)
    return {
        "in_channels": like["encoder.conv_in.weight"].shape[1],
        "out_channels": like["decoder.conv_out.weight"].shape[0],
        "latent_channels": like["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": _count(like, "encoder.down.0.block.{}."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in like,
        "use_post_quant_conv": "post_quant_conv.weight" in like,
        "sample_size": layout.resolution,
        **layout.vae,
    }


def _text(layout: Layout, part: Part, like: Like) -> Config:
    if part.table is PLAIN:
        place = like["text_model.embeddings.position_embedding.weight"].shape
        words = like["text_model.embeddings.token_embedding.weight"].shape[0]
        wide = like["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        layers, projection = _count(like, "text_model.encoder.layers.{}."), like.get("text_projection.weight")
        projected = projection.shape[0] if projection is not None else place[1]
    else:
        place = like["positional_embedding"].shape
        words = like["token_embedding.weight"].shape[0]
        wide = like["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        layers, projection = _count(like, "transformer.resblocks.{}."), like.get("text_projection")
        projected = projection.shape[1] if projection is not None else place[1]
        if layout.name == "sd21" and projection is not None:
            layers -= 1  # OpenCLIP's whole tower, of which the last block and the projection are not used
    return {
        "vocab_size": words,
        "hidden_size": place[1],
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(place[1], part),
        "max_position_embeddings": place[0],
        "projection_dim": projected,
        "hidden_act": part.act,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": 1,
    }


def _mmdit(layout: Layout, part: Part, like: Like) -> Config:
    hidden, channels, patch, _ = like["x_embedder.proj.weight"].shape
    layers = _count(like, "joint_blocks.{}.")
    blocks = [f"joint_blocks.{i}.x_block." for i in range(layers)]
    return {
        "sample_size": layout.resolution // 8,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": like["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": _heads(hidden, part),
        "joint_attention_dim": like["context_embedder.weight"].shape[1],
        "caption_projection_dim": like["context_embedder.weight"].shape[0],
        "pooled_projection_dim": like["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": isqrt(like["pos_embed"].shape[1]),
        "dual_attention_layers": [i for i, block in enumerate(blocks) if f"{block}attn2.qkv.weight" in like],
        "qk_norm": "rms_norm" if f"{blocks[0]}attn.ln_q.weight" in like else None,
    }


def _t5(layout: Layout, part: Part, like: Like) -> Config:
    first, dense = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."
    buckets, heads = like[f"{first}relative_attention_bias.weight"].shape
    gated = f"{dense}wi_0.weight" in like
    return {
        "vocab_size": like["shared.weight"].shape[0],
        "d_model": like["shared.weight"].shape[1],
        "d_kv": like[f"{first}q.weight"].shape[0] // heads,
        "d_ff": like[f"{dense}wo.weight"].shape[1],
        "num_layers": _count(like, "encoder.block.{}."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


_INFER: dict[str, Callable[[Layout, Part, Like], Config]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _mmdit,
    "AutoencoderKL": _vae,
    "CLIPTextModel": _text,
    "CLIPTextModelWithProjection": _text,
    "T5EncoderModel": _t5,
}


# --- what a reader of the file alone will not know -------------------------------------------------------------------

_UNHEARD = (
    "attention_head_dim",
    "num_attention_heads",
    "norm_num_groups",
    "scaling_factor",
    "shift_factor",
    "hidden_act",
)
_SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas", "shift")


def unheard(layout: Layout, configs: Mapping[str, Config], scheduler: Config, likes: Mapping[str, Like]) -> list[str]:
    """Where this model is not what a reader that has no configs takes for granted by its family."""
    found = []
    for part in layout.parts:
        if part.name not in configs or part.kind == "T5EncoderModel":
            continue
        have = configs[part.name]
        try:
            assumed = infer(layout, part, likes[part.name])
        except ValueError:
            found.append(f"{part.name} is of a size of its own")
            continue
        for key in _UNHEARD:
            there, here = assumed.get(key), have.get(key)
            if isinstance(there, list) and isinstance(here, int):
                here = [here] * len(there)
            if key in assumed and there != here:
                found.append(f"{part.name}.{key} is {here}, not {there}")
        if part.act and have["vocab_size"] != 49408:
            found.append(f"{part.name} reads a vocabulary of {have['vocab_size']}, not CLIP's")
    for key in _SCHEDULE:
        if key in layout.scheduler and scheduler.get(key) != layout.scheduler[key]:
            found.append(f"scheduler.{key} is {scheduler.get(key)}, not {layout.scheduler[key]}")
    if layout.name != "sd3" and prediction(scheduler) not in ("epsilon", "v_prediction"):
        found.append(f"the network predicts {prediction(scheduler)}")
    return found


def prediction(scheduler: Config) -> str:
    return (
        "flow_prediction"
        if "FlowMatch" in scheduler.get("_class_name", "")
        else scheduler.get("prediction_type", "epsilon")
    )
