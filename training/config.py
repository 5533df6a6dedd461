"""The typed config: one small model per section, YAML with dotted overrides. Knows no torch: a bad config is refused
before torch is imported."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class ConfigError(ValueError):
    """A config that cannot be run; the message names file and key."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Data(Section):
    """Where the pictures and captions come from, and how they are cut."""

    path: str  # imagefolder, parquet file or folder, or hub:owner/name
    resolution: Positive = 64  # pixels, both sides
    image_column: str = "image"
    caption_column: str = "text"
    center_crop: bool = True  # False: squeeze to a square
    random_crop: Positive | None = None  # autoencoder: train on random crops of this many pixels
    random_flip: bool = False
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05  # share kept for validation where the source has one split


class Optimizer(Section):
    """Fused AdamW (Loshchilov & Hutter 2019) with the usual schedules."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    adam_weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    lr_warmup_images: Annotated[int, Field(ge=0)] = 0


class Train(Section):
    """How long, and how often what. The clock counts images."""

    images: Positive  # how many pictures are seen in all
    batch_size: Positive = 16  # pictures per process and micro-batch
    gradient_accumulation_steps: Positive = 1
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # auto: bf16 where the hardware has units for it
    num_workers: Annotated[int, Field(ge=0)] = 0
    log_every: Positive = 1_000
    validate_every: Positive = 10_000
    sample_every: Positive = 20_000
    checkpoint_every: Positive = 20_000
    keep_last: Positive = 2
    max_skipped_steps: Positive = 20  # this many steps in a row without a finite gradient end the run


class Run(Section):
    """What every task has."""

    output_dir: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    train: Train
    optimizer: Optimizer = Optimizer()
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999  # warmed up as (1 + step) / (10 + step); 0 turns it off


class VAEModel(Section):
    """Fields of diffusers' AutoencoderKL."""

    latent_channels: Positive = 4
    block_out_channels: tuple[Positive, ...] = (32, 64, 64)
    layers_per_block: Positive = 1
    norm_num_groups: Positive = 8
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @property
    def factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderLoss(Section):
    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    perceptual: str | None = None  # "lpips", or "clip:FOLDER" for the vision tower of that CLIP
    perceptual_weight: Annotated[float, Field(ge=0)] = 1.0
    gan_weight: Annotated[float, Field(ge=0)] = 0.0
    gan_start: Annotated[int, Field(ge=0)] = 0  # images seen before the critic joins
    critic_channels: Positive = 64
    critic_layers: Positive = 3
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-4


class AutoencoderConfig(Run):
    task: Literal["autoencoder"]
    model: VAEModel = VAEModel()
    loss: AutoencoderLoss = AutoencoderLoss()
    latent_shift: bool = False  # store the latents' mean too: only SD3's pipeline honours it


class Tower(Section):
    hidden_size: Positive = 192
    num_hidden_layers: Positive = 4
    num_attention_heads: Positive = 4
    intermediate_size: Positive = 768


class VisionTower(Tower):
    patch_size: Positive = 8


class Tokenizer(Section):
    vocab_size: Annotated[int, Field(ge=514)] = 4096  # 512 byte symbols, start and end come first
    max_length: Annotated[int, Field(ge=4, le=512)] = 77


class ClipModel(Section):
    text: Tower = Tower()
    vision: VisionTower = VisionTower()
    projection_dim: Positive = 192
    tokenizer: Tokenizer = Tokenizer()


class ClipConfig(Run):
    task: Literal["clip"]
    model: ClipModel = ClipModel()


class UNetModel(Section):
    """Fields of diffusers' UNet2DConditionModel."""

    name: Literal["unet"]
    block_out_channels: tuple[Positive, ...] = (64, 128, 192)
    layers_per_block: Positive = 2
    attention_levels: tuple[bool, ...] | None = None  # which levels attend to the text; all but the finest if absent
    attention_head_dim: Positive = 4  # the number of heads, as in SD's configs
    norm_num_groups: Positive = 32
    use_linear_projection: bool = True
    transformer_layers_per_block: Positive = 1
    cross_attention_dim: Positive | None = None  # taken from the text encoder


class MMDiTModel(Section):
    """Fields of diffusers' SD3Transformer2DModel."""

    name: Literal["mmdit"]
    patch_size: Positive = 2
    num_layers: Positive = 8
    attention_head_dim: Positive = 64
    num_attention_heads: Positive = 6
    joint_attention_dim: Positive | None = None  # text width + 2, or more: the rest is zeros
    qk_norm: Literal["rms_norm"] | None = "rms_norm"
    pos_embed_max_size: Positive = 32


class PathSection(Section):
    name: Literal["rectified_flow", "discrete"] = "rectified_flow"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"  # discrete only
    num_train_timesteps: Positive = 1000


class Timesteps(Section):
    name: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 1.0  # SD3's, in training and in the exported scheduler


class Pretrained(Section):
    pretrained: str  # a folder, the output_dir of another config, or a hub name


class Sample(Section):
    prompts: tuple[str, ...] = ()
    num_inference_steps: Positive = 20
    guidance_scale: Annotated[float, Field(ge=0)] = 4.0
    seed: int = 0


class DiffusionConfig(Run):
    task: Literal["diffusion"]
    vae: Pretrained
    text: Pretrained
    model: Annotated[UNetModel | MMDiTModel, Field(discriminator="name")]
    path: PathSection = PathSection()
    prediction_type: Literal["flow_prediction", "epsilon", "v_prediction", "sample"] = "flow_prediction"
    timesteps: Timesteps = Timesteps()
    caption_dropout: Share = 0.1
    sample: Sample = Sample()


Config = AutoencoderConfig | ClipConfig | DiffusionConfig
_ADAPTER: TypeAdapter[Config] = TypeAdapter(Annotated[Config, Field(discriminator="task")])
_TASKS = {"autoencoder": AutoencoderConfig, "clip": ClipConfig, "diffusion": DiffusionConfig}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats and booleans: 1e-4 is a number, `no` a word."""


class _Dumper(yaml.SafeDumper):
    """Quotes the words that ``_Loader`` would take for numbers."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [x for x in resolvers if x[0] != _BOOL] for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?|\.inf|\.nan)$"
        ),
        list("-+0123456789."),
    )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply ``key.key=value`` overrides, check it.

    Raises:
        ConfigError: the file is not there or not YAML, a key is unknown (with a suggestion), a value has the wrong type
            or range, or sizes cannot work together.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; `ldm init` lists those that come with the package")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    return parse(raw, str(path))


def parse(raw: Mapping[str, Any], where: str) -> Config:
    """Check a plain dictionary; ``where`` is named in the messages."""
    if not isinstance(raw.get("task"), str) or raw["task"] not in _TASKS:
        hint = _did_you_mean(str(raw.get("task")), _TASKS)
        raise ConfigError(f"{where}: task: {raw.get('task')!r} is not one of {', '.join(_TASKS)}{hint}")
    try:
        config = _ADAPTER.validate_python(raw)
    except ValidationError as error:
        lines = [_explain(e, _TASKS[raw["task"]]) for e in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error
    problem = _contradiction(config)
    if problem:
        raise ConfigError(f"{where}: {problem}")
    return config


def relocate(configs: Sequence[Config], root: str | Path) -> list[Config]:
    """The same runs under another folder: each ``output_dir`` becomes ``root/`` and its last name, and what pointed to
    one of them follows."""
    moved = {Path(c.output_dir).resolve(): str(Path(root) / Path(c.output_dir).name) for c in configs}

    def follow(name: str) -> str:
        return moved.get(Path(name).resolve(), name)

    result: list[Config] = []
    for config in configs:
        update: dict[str, Any] = {"output_dir": follow(config.output_dir)}
        if isinstance(config, DiffusionConfig):
            update["vae"] = Pretrained(pretrained=follow(config.vae.pretrained))
            update["text"] = Pretrained(pretrained=follow(config.text.pretrained))
        if isinstance(config, AutoencoderConfig) and (config.loss.perceptual or "").startswith("clip:"):
            source = "clip:" + follow((config.loss.perceptual or "").removeprefix("clip:"))
            update["loss"] = config.loss.model_copy(update={"perceptual": source})
        result.append(config.model_copy(update=update))
    return result


def dump(config: Config) -> str:
    """The whole config as YAML, defaults written out: this text alone repeats the run."""
    return yaml.dump(json.loads(config.model_dump_json()), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _override(raw: dict[str, Any], text: str) -> None:
    key, eq, value = text.partition("=")
    if not eq or not key:
        raise ConfigError(f"override {text!r}: expected key=value, for example train.images=1000")
    *parents, last = key.split(".")
    for part in parents:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {text!r}: {part} is a value, not a section")
    try:
        raw[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: not a YAML value: {error}") from error


def _explain(error: Any, root: type[BaseModel]) -> str:
    loc = [str(x) for x in error["loc"][1:]]  # the first is the task's tag
    tagged = root is DiffusionConfig and loc[0] == "model"
    names = loc[:1] + loc[2:] if tagged else loc  # without the model's name
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        return f"unknown key `{key}`{_did_you_mean(names[-1], _fields_at(root, loc[:-1]))}"
    if error["type"] == "missing":
        return f"`{key}` is missing"
    return f"`{key}`: {error['msg'].lower()}, got {error['input']!r}"


def _fields_at(model: Any, loc: Sequence[str]) -> list[str]:
    for part in loc:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
        elif part in ("unet", "mmdit"):
            model = UNetModel if part == "unet" else MMDiTModel
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _did_you_mean(word: str, names: Any) -> str:
    names = list(names)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; known here: {', '.join(names)}" if names else ""


# --- sizes that must work together -----------------------------------------------------------------------------------


def _contradiction(config: Config) -> str | None:
    """What can be seen in one config alone."""
    data, model = config.data, config.model
    if isinstance(config, ClipConfig):
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
    if isinstance(model, UNetModel):
        bad = [c for c in model.block_out_channels if c % model.attention_head_dim]
        if bad:
            return f"model.block_out_channels {bad[0]} does not divide into {model.attention_head_dim} heads"
        if model.attention_levels is not None and len(model.attention_levels) != len(model.block_out_channels):
            return "model.attention_levels needs one entry for each of model.block_out_channels"
    if isinstance(config, DiffusionConfig):
        if (config.path.name == "rectified_flow") != (config.prediction_type == "flow_prediction"):
            return (
                f"prediction_type {config.prediction_type} with path.name {config.path.name} has no stock pipeline; "
                "rectified_flow goes with flow_prediction, discrete with epsilon, v_prediction or sample"
            )
        if isinstance(model, MMDiTModel) and config.path.name != "rectified_flow":
            return "model.name mmdit needs path.name rectified_flow: SD3's pipeline knows no other"
        if config.path.name == "discrete" and config.timesteps.shift != 1:
            return "timesteps.shift needs path.name rectified_flow"
    return None


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
            part((config.loss.perceptual or "").removeprefix("clip:"), ClipConfig, made, "loss.perceptual")
        if isinstance(config, DiffusionConfig):
            _check_diffusion(config, made)
        made[where] = config


def _check_diffusion(config: DiffusionConfig, made: Mapping[Path, Config]) -> None:
    vae, text = config.vae.pretrained, config.text.pretrained
    source = part(vae, AutoencoderConfig, made, "vae.pretrained")
    factor = shift = None
    if isinstance(source, AutoencoderConfig):
        factor, shift = source.model.factor, source.latent_shift
    elif source:
        factor = 2 ** (len(source.get("block_out_channels", [0])) - 1)
        shift = bool(source.get("shift_factor"))
    model, size = config.model, config.data.resolution
    if factor:
        step = factor * (2 ** (len(model.block_out_channels) - 1) if isinstance(model, UNetModel) else model.patch_size)
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
    if shift and isinstance(model, UNetModel):
        raise ConfigError(
            f"vae.pretrained {vae} has a latent shift, which the UNet's stock pipelines ignore; "
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
