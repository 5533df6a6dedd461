"""Sizes that must work together, within a config and across stages. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .schema import (
    AdaptConfig,
    AutoencoderConfig,
    ClipConfig,
    Config,
    DiffusionConfig,
    DiscretePath,
    DiTModel,
    LatentRun,
    MMDiTModel,
    Run,
    UNetModel,
    VAEModel,
)

NAMES = {"unet": "UNet", "mmdit": "MMDiT", "dit": "DiT"}


class ConfigError(ValueError):
    """A config that cannot be run; the message names file and key."""


def contradiction(config: Config) -> str | None:
    """What can be seen in one config alone."""
    if problem := _kernels(config):
        return problem
    if isinstance(config, AdaptConfig):
        return _adapting(config)
    data, model = config.data, config.model
    if isinstance(config, ClipConfig):
        for key, unset in (("attention_backend", "auto"), ("gradient_checkpointing", 0)):
            if getattr(config.train, key) != unset:
                return f"train.{key} belongs to the autoencoder and diffusion tasks: the CLIP is transformers' own"
        if data.resolution % config.model.vision.patch_size:
            return f"data.resolution {data.resolution} is not a multiple of model.vision.patch_size"
        for name, tower in (("text", config.model.text), ("vision", config.model.vision)):
            if tower.hidden_size % tower.num_attention_heads:
                heads = tower.num_attention_heads
                return f"model.{name}.hidden_size {tower.hidden_size} does not divide into {heads} heads"
    if data.random_crop and not isinstance(config, AutoencoderConfig):
        return "data.random_crop belongs to the autoencoder task alone"
    if isinstance(model, VAEModel):
        for name in ("resolution", "random_crop"):
            size = getattr(data, name)
            if size and size % model.factor:
                near = max(1, round(size / model.factor)) * model.factor
                return f"data.{name} {size} is not a multiple of the autoencoder's factor {model.factor}; {near} is"
        if data.random_crop and data.random_crop > data.resolution:
            return f"data.random_crop {data.random_crop} is larger than data.resolution {data.resolution}"
    if isinstance(model, VAEModel | UNetModel):
        bad = [c for c in model.block_out_channels if c % model.norm_num_groups]
        if bad:
            return (
                f"model.block_out_channels {bad[0]} is not a multiple of model.norm_num_groups {model.norm_num_groups}"
            )
    if isinstance(model, DiTModel | MMDiTModel) and model.attention_head_dim * model.num_attention_heads % 4:
        return "model.attention_head_dim times model.num_attention_heads is the width: it must be a multiple of 4"
    if isinstance(model, UNetModel):
        levels = len(model.block_out_channels)
        for key in ("attention_head_dim", "transformer_layers_per_block"):
            given = getattr(model, key)
            if isinstance(given, tuple) and len(given) != levels:
                return f"model.{key} needs one number, or one for each of the {levels} model.block_out_channels"
        heads = model.attention_head_dim
        heads = heads if isinstance(heads, tuple) else (heads,) * levels
        bad = [(c, h) for c, h in zip(model.block_out_channels, heads, strict=True) if c % h]
        if bad:
            return f"model.block_out_channels {bad[0][0]} does not divide into {bad[0][1]} heads"
        if model.attention_levels is not None and len(model.attention_levels) != len(model.block_out_channels):
            return "model.attention_levels needs one entry for each of model.block_out_channels"
    return None


def _kernels(config: Config) -> str | None:
    train = config.train
    if train.deterministic and train.attention_backend == "xformers":
        return (
            "train.deterministic: xFormers' backward passes are not deterministic; take train.attention_backend auto, "
            "whose kernels are"
        )
    convolutions = isinstance(config, AdaptConfig) or isinstance(config.model, UNetModel | VAEModel)
    if train.channels_last is True and not convolutions:
        return "train.channels_last is for a UNet or an autoencoder: this model has no convolutions to gain by it"
    if train.channels_last is True and config.optimizer.name == "muon":
        return "train.channels_last: Muon sees convolutions as matrices, which needs them contiguous; leave it out"
    return None


def _adapting(config: AdaptConfig) -> str | None:
    if config.data.random_crop:
        return "data.random_crop belongs to the autoencoder task alone"
    if not (config.train_denoiser or config.train_text_encoder or config.new_tokens):
        return "nothing would train: set train_denoiser, train_text_encoder or new_tokens"
    if config.lora and not (config.train_denoiser or config.train_text_encoder):
        return "lora: of what? set train_denoiser or train_text_encoder, or leave lora out"
    if config.lora and config.conditioning:
        return "conditioning trains the whole denoiser, whose first layer grows: leave lora out"
    if config.conditioning and not config.train_denoiser:
        return "conditioning needs train_denoiser: the denoiser's first layer grows"
    if config.base_config and not config.base.endswith((".safetensors", ".ckpt")):
        return "base_config is of a single file; a folder has configs of its own"
    if config.reads_prompts and config.cache.text:
        return "cache.text: the text encoders train, so that captions are read anew at each step; leave the key out"
    if config.reads_prompts and config.data.long_captions == "chunk":
        return "data.long_captions chunk: not while the text encoders train; take cut or refuse"
    if config.prior and config.data.streaming:
        return "prior: not with data.streaming, whose rows have no numbers; leave one of them out"
    if config.prior and config.conditioning:
        return "prior: the base draws class pictures from a prompt alone; leave conditioning out"
    names = [new.token for new in config.new_tokens]
    twice = next((name for name in names if names.count(name) > 1), None)
    return f"new_tokens: {twice} twice" if twice else None


def check_together(configs: Sequence[Config]) -> None:
    """What can be seen only across stages: latent sizes, text widths, run folders.

    A ``pretrained`` that is the ``output_dir`` of an earlier config in the list is checked against that config; a local
    folder against its ``config.json``; anything else is a hub name, checked when it is loaded.

    Raises:
        ConfigError: two runs share a folder, or a stage cannot work with what it is given.
    """
    made: dict[Path, Config] = {}
    for config in configs:
        where = Path(config.output_dir).resolve()
        if where in made:
            raise ConfigError(f"{config.output_dir}: is the output_dir of two configs")
        if isinstance(config, AutoencoderConfig) and (config.loss.perceptual or "").startswith("clip:"):
            clip = part((config.loss.perceptual or "").removeprefix("clip:"), ClipConfig, made, "loss.perceptual")
            _check_resized(config, clip)
        if isinstance(config, DiffusionConfig):
            _check_diffusion(config, made)
        if isinstance(config, AdaptConfig):
            _check_base(config, made)
        if isinstance(config, LatentRun):
            _check_tags(config)
        made[where] = config


def _check_resized(config: AutoencoderConfig, clip: Any) -> None:
    """Raises ConfigError where a perceptual loss has to resize what the run wants deterministic."""
    side = clip.data.resolution if isinstance(clip, ClipConfig) else None
    if clip and not isinstance(clip, ClipConfig):
        side = clip.get("vision_config", clip).get("image_size", 224)
    here = config.data.random_crop or config.data.resolution
    if config.train.deterministic and side not in (None, here):
        raise ConfigError(
            f"{config.output_dir}: train.deterministic: {config.loss.perceptual} sees pictures of {side} px, and the "
            f"gradient through the resizing from {here} px has no deterministic kernel on CUDA; take a CLIP of {here} "
            "px, or no loss.perceptual"
        )


def no_stock_form(config: DiffusionConfig) -> str | None:
    """Why no stock pipeline could sample what this config trains."""
    path, kind = config.path, config.prediction_type
    known = {
        "rectified_flow": ("flow_prediction",), "discrete": ("epsilon", "v_prediction", "sample"), "ve": ("karras",),
    }  # fmt: skip
    if kind not in known.get(path.name, ()):
        return (
            f"prediction_type {kind} with path.name {path.name} has no stock pipeline; "
            "rectified_flow goes with flow_prediction, discrete with epsilon, v_prediction or sample, ve with karras"
        )
    if isinstance(path, DiscretePath) and path.rescale_betas_zero_snr and kind == "epsilon":
        return (
            "path.rescale_betas_zero_snr: epsilon says nothing at the last step, which has no signal; "
            "take prediction_type v_prediction or sample"
        )
    if isinstance(config.model, MMDiTModel) and path.name != "rectified_flow":
        return "model.name mmdit needs path.name rectified_flow: SD3's pipeline knows no other"
    if config.learned_variance and not (isinstance(config.model, DiTModel) and path.name == "discrete"):
        return "learned_variance needs model.name dit and path.name discrete: PixArt's pipeline alone makes room for it"
    if path.name != "rectified_flow" and config.timesteps.shift != 1:
        return "timesteps.shift needs path.name rectified_flow"
    return None


def _check_tags(config: LatentRun) -> None:
    if config.data.shuffle_tags and config.cache.text and not config.data.streaming:
        raise ConfigError(
            f"{config.output_dir}: data.shuffle_tags makes each caption another one each time, which no cache holds; "
            "set cache.text: false"
        )


def _check_base(config: AdaptConfig, made: Mapping[Path, Config]) -> None:
    from .base import base_of

    if Path(config.base).resolve() in made and not (Path(config.base) / "pipeline").is_dir():
        raise ConfigError(f"base: {config.base} is made by an earlier config; train that one first, by itself")
    try:
        base_of(config)
    except ConfigError as error:
        raise ConfigError(f"{config.output_dir}: {error}") from error


def _check_diffusion(config: DiffusionConfig, made: Mapping[Path, Config]) -> None:
    if problem := no_stock_form(config):
        raise ConfigError(f"{config.output_dir}: {problem}")
    vae, text = config.vae.pretrained, config.text.pretrained
    source = part(vae, AutoencoderConfig, made, "vae.pretrained")
    factor, shift = _factor(source), False
    if isinstance(source, AutoencoderConfig):
        shift = source.latent_shift
    elif source:
        shift = bool(source.get("shift_factor"))
    model, size = config.model, config.data.resolution
    if factor:
        step = factor * _halved(model)
        if size % step:
            near = max(1, round(size / step)) * step
            raise ConfigError(
                f"data.resolution {size}: with the factor-{factor} autoencoder {vae} the {model.name} needs a multiple "
                f"of {step}; {near} is the nearest"
            )
        if isinstance(model, MMDiTModel) and size // factor // model.patch_size > model.pos_embed_max_size:
            raise ConfigError(
                f"model.pos_embed_max_size {model.pos_embed_max_size} is less than the latents' side in patches"
            )
    if shift and not isinstance(model, MMDiTModel):
        raise ConfigError(
            f"vae.pretrained {vae} has a latent shift, which the {NAMES[model.name]}'s stock pipelines ignore; "
            "train it with latent_shift: false"
        )
    source = part(text, ClipConfig, made, "text.pretrained")
    width = None
    if isinstance(source, ClipConfig):
        width = source.model.text.hidden_size
    elif source:
        width = source.get("text_config", source).get("hidden_size")
    if width and isinstance(model, UNetModel) and model.cross_attention_dim not in (None, width):
        raise ConfigError(
            f"model.cross_attention_dim {model.cross_attention_dim}: the text encoder {text} gives {width}; "
            "leave the key out"
        )
    if width and isinstance(model, MMDiTModel) and (model.joint_attention_dim or width + 2) < width + 2:
        raise ConfigError(
            f"model.joint_attention_dim {model.joint_attention_dim}: must be at least text width + 2 = {width + 2}"
        )


def side_step(config: Config, earlier: Sequence[Config] = ()) -> int | None:
    """What the sides of a denoiser's pictures must be multiples of; with an autoencoder of the hub 8 pixels are taken
    for a latent. None of the other tasks."""
    if isinstance(config, AdaptConfig):
        from .base import base_of

        return base_of(config).step
    if not isinstance(config, DiffusionConfig):
        return None
    made = {Path(c.output_dir).resolve(): c for c in earlier}
    return (_factor(part(config.vae.pretrained, AutoencoderConfig, made, "vae.pretrained")) or 8) * _halved(
        config.model
    )


def _factor(vae: Any) -> int | None:
    """Pixels to a latent's side; ``vae`` as ``part`` gives it."""
    if isinstance(vae, AutoencoderConfig):
        return vae.model.factor
    return 2 ** (len(vae.get("block_out_channels", [0])) - 1) if vae else None


def _halved(model: UNetModel | MMDiTModel | DiTModel) -> int:
    """Latents to a side of the coarsest map, or of a patch."""
    return 2 ** (len(model.block_out_channels) - 1) if isinstance(model, UNetModel) else model.patch_size


def part(name: str, kind: type[Run], made: Mapping[Path, Config], key: str) -> Any:
    """The earlier config, or the parsed config.json, that a ``pretrained`` points to; None for a hub name."""
    folder = Path(name)
    earlier = made.get(folder.resolve())
    if earlier is not None:
        if not isinstance(earlier, kind):
            raise ConfigError(f"{key}: {name} is made by a {earlier.task} task, which is not what is needed here")
        return earlier
    for file in (folder / "pipeline" / "config.json", folder / "config.json"):
        if file.is_file():
            return _stock_config(file, kind, key)
    local = name.startswith((".", "/")) or name.count("/") > 1  # a hub name is owner/name
    if local or folder.exists() or (folder.parent != Path(".") and folder.parent.is_dir()):
        raise ConfigError(f"{key}: {name} holds no finished model (no config.json), and no earlier config makes it")
    return None


def _stock_config(file: Path, kind: type[Run], key: str) -> dict[str, Any]:
    """A config.json as diffusers or transformers write it, of the kind of model that ``kind`` makes."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{key}: {file} is not valid JSON: {error}") from error
    name = str(found.get("_class_name") or found.get("model_type"))
    if not name.startswith("AutoencoderKL" if kind is AutoencoderConfig else "clip"):
        raise ConfigError(f"{key}: {file} is of another kind of model ({name}) than is needed here")
    return found
