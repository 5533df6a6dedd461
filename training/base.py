"""The finished pipeline that a run starts from: where it is, what it says of itself, and its parts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.hub import hub_error
from pipelines.precision import DTYPES

from .fit import ConfigError
from .schema import AdaptConfig, Times
from .schema.paths import LogitNormalTimes, LogNormalTimes, UniformTimes
from .sizes import Sizes
from .tasks.common import made

if TYPE_CHECKING:
    from ldm.models.base import Network
    from ldm.models.text import TextEncoder
    from ldm.models.vae import VAE
    from pipelines.core import Parts
    from pipelines.schedulers import Schedule
    from pipelines.stock import Form

INDEX = "model_index.json"


@dataclass(frozen=True)
class Base:
    """A pipeline folder that can be trained on. Only its configs are read until a part is opened."""

    folder: Path
    variant: str | None
    form: Form
    index: dict[str, Any]
    net: dict[str, Any]  # config.json of the denoiser
    vae: dict[str, Any]
    schedule: Schedule

    @property
    def family(self) -> str:
        return self.form.family

    @property
    def factor(self) -> int:
        """Pixels to a latent's side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.vae["latent_channels"]

    @property
    def step(self) -> int:
        """Pixels of which a picture's sides must be multiples."""
        levels = self.net.get("block_out_channels")
        return self.factor * (2 ** (len(levels) - 1) if levels else self.net["patch_size"])

    @property
    def resolution(self) -> int | None:
        """Side of the square in pixels that the network was made for, if it says."""
        side = self.net.get("sample_size")
        side = side[0] if isinstance(side, list | tuple) else side
        return side * self.factor if side else None

    # --- parts -------------------------------------------------------------------------------------------------------

    def open_net(self, dtype: torch.dtype) -> Network:
        return self._opened(self.form.net, self.form.net_name, dtype)

    def stored_dtype(self) -> torch.dtype:
        """Of the denoiser's weights in their files; float32 where they are of several."""
        from safetensors import safe_open

        from ldm.models.loading import STEM
        from ldm.models.text_files import which_variant

        place = self.folder / self.form.net_name
        variant = which_variant(place, self.variant)
        names: set[str] = set()
        for file in place.glob(f"{STEM}*.safetensors"):
            middle = file.name.removeprefix(STEM).removesuffix(".safetensors")
            if re.sub(r"-\d+-of-\d+", "", middle) != (f".{variant}" if variant else ""):
                continue
            with safe_open(file, "pt") as weights:
                names |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        known = {"BF16": torch.bfloat16, "F16": torch.float16}
        return known.get(names.pop(), torch.float32) if len(names) == 1 else torch.float32

    def open_vae(self, dtype: torch.dtype) -> VAE:
        from ldm.models.vae import VAE

        return self._opened(VAE, "vae", dtype)

    def opened(self, dtype: torch.dtype, device: torch.device) -> Parts:
        """All parts as they are, frozen: to draw with."""
        from pipelines.core import Parts

        made = self.open_net(dtype), self.open_vae(torch.float32), self.open_text(dtype)
        net, vae, text = (part.to(device).eval().requires_grad_(False) for part in made)
        return Parts(net, vae, text, self.schedule)  # type: ignore[arg-type]

    def _opened(self, kind: Any, name: str, dtype: torch.dtype) -> Any:
        from ldm.models.text_files import which_variant

        place = self.folder / name
        return kind.from_diffusers(place, dtype=dtype, variant=which_variant(place, self.variant))

    def open_text(self, dtype: torch.dtype) -> TextEncoder:
        from ldm.models.text import TextEncoder
        from ldm.models.text_files import quiet_transformers
        from pipelines.stock import text_settings

        settings = text_settings(self.form, self.bare, self.index)
        with quiet_transformers():
            return TextEncoder.from_pretrained(self.folder, self.family, dtype=dtype, variant=self.variant, **settings)

    def restore_frozen(self, net: Network, text: TextEncoder) -> None:
        """Give networks that do not train, and that a run holds in half precision, the base's own weights
        in float32: stock's pipelines open each part in its stored dtype, and do not mix two."""
        if _frozen_half(net):
            net.float().load_state_dict(self.open_net(torch.float32).state_dict())
        half = {name: tower for name, (_, tower) in text.towers().items() if _frozen_half(tower)}
        stored = self.open_text(torch.float32).towers() if half else {}
        for name, tower in half.items():
            tower.float().load_state_dict(stored[name][1].state_dict())

    def blank(self) -> Network:
        """The denoiser with no weights of its own."""
        from ldm.models.loading import check_config

        return self.form.net(**check_config(self.form.net, self.net))

    def blank_text(self) -> TextEncoder:
        """The text encoders with no weights of their own."""
        from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

        from ldm.models.text import FAMILIES, TextEncoder
        from ldm.models.text_files import is_empty_folder, load_tokenizer
        from pipelines.stock import text_settings, tokenizer_of

        towers: dict[str, Any] = {}
        for name, kinds in FAMILIES[self.family].items():
            place = self.folder / name
            if not place.is_dir() or (self.family == "sd3" and is_empty_folder(place)):
                continue
            (kind,) = (kind for kind in kinds if kind.__name__ == self.index[name][1])
            words = T5Tokenizer if kind is T5EncoderModel else CLIPTokenizer
            tokenizer = load_tokenizer(self.folder / tokenizer_of(name), words)
            made: Any = kind
            towers[name] = tokenizer, made(made.config_class.from_pretrained(place))
        return TextEncoder.from_towers(towers, self.family, **text_settings(self.form, self.bare, self.index))

    @cached_property
    def bare(self) -> Network:
        """The denoiser on the meta device, for its sizes and names."""
        with torch.device("meta"):
            return self.blank()

    def sizes(self) -> Sizes:
        """Of what the denoiser is told, from the configs alone."""
        from pipelines.folder import read_json

        net, clip = self.net, self.family in ("sd", "sdxl", "sd3")
        kind = {"sd3": "joint_attention_dim", "pixart": "caption_channels"}.get(self.family, "cross_attention_dim")
        words = next(place for place in (self.folder / "tokenizer", self.folder / "tokenizer_2") if place.is_dir())
        tokenizer = read_json(words / "tokenizer_config.json")
        longest = min(tokenizer.get("model_max_length", 77), 77 if clip else self.form.text_tokens or 120)
        longest += self._t5_tokens() if self.family == "sd3" else 0
        pooled = net.get("pooled_projection_dim")
        if self.family == "sdxl":
            pooled = net["projection_class_embeddings_input_dim"] - 6 * net["addition_time_embed_dim"]
        return Sizes(self.factor, self.channels, net[kind], longest, pooled)

    def _t5_tokens(self) -> int:
        """Of an SD3; one stands for all where there is no T5."""
        from ldm.models.text_files import is_empty_folder

        place = self.folder / "text_encoder_3"
        return 256 if place.is_dir() and not is_empty_folder(place) else 1


def base_of(config: AdaptConfig) -> Base:
    """What the config's ``base`` is, by its configs alone. A hub name is fetched, a single file is turned into a folder
    in the run's own (RUN/base), once.

    Raises:
        ConfigError: it is not there, no pipeline, or of a kind that cannot be trained on; or the config contradicts it.
    """
    base = found(config)
    base = replace(base, schedule=_agreed(config, base))
    _check(config, base)
    return base


def found(config: AdaptConfig) -> Base:
    """The config's ``base`` as it is, with which the rest of the config is not compared.

    Raises:
        ConfigError: it is not there, no pipeline, or of a kind that cannot be trained on.
    """
    folder = _folder(config)
    try:
        return _read(folder, config.variant)
    except (ValueError, OSError) as error:
        raise ConfigError(f"base: {error}") from error


def times_of(config: AdaptConfig, schedule: Schedule) -> Times:
    """The config's, or what fits the base's path: each step of a chain alike (DDPM), the middle of a flow (SD3) under
    the base's shift, EDM's."""
    from ldm.paths import VE, DiscreteVP

    if config.timesteps is not None:
        return config.timesteps
    if isinstance(schedule.path, DiscreteVP):
        return UniformTimes(name="uniform")
    return (
        LogNormalTimes(name="log_normal") if isinstance(schedule.path, VE) else LogitNormalTimes(shift=schedule.shift)
    )


def frozen_dtype(config: AdaptConfig, device: torch.device, mixed: str) -> torch.dtype:
    """Of weights that do not train.

    Args:
        mixed: the run's precision: ``no``, ``bf16`` or ``fp16``.
    Raises:
        ConfigError: half precision is asked for where the step runs in float32.
    """
    asked = config.base_dtype
    if asked == "auto":
        asked = mixed if device.type == "cuda" and mixed != "no" else "fp32"
    if asked != "fp32" and mixed == "no":
        raise ConfigError(f"base_dtype {asked}: needs train.mixed_precision bf16 or fp16, here it is no")
    return DTYPES[asked]


def frozen_bytes(config: AdaptConfig, device: torch.device, mixed: str) -> float:
    """Of each weight that does not train; of a quantized base about, since some layers are left as they are."""
    quantized = {"nf4": 0.52, "int8": 1.0}
    if config.lora is not None and config.lora.quantization:
        return quantized[config.lora.quantization]
    return frozen_dtype(config, device, mixed).itemsize


# --- where -----------------------------------------------------------------------------------------------------------


def _folder(config: AdaptConfig) -> Path:
    name = made(config.base)
    place = Path(name).expanduser()
    if place.is_file():
        return _converted(config, place)
    if place.is_dir():
        if not (place / INDEX).is_file():
            raise ConfigError(f"base: {place} holds no {INDEX}, so it is no pipeline folder and no finished run")
        return place
    if name.startswith((".", "~", "/")) or name.count("/") != 1 or place.parent.is_dir():
        raise ConfigError(f"base: {name}: no such folder or file (a name on the hub is owner/name)")
    return _fetched(name, config.variant)


@cache
def _fetched(name: str, variant: str | None) -> Path:
    """From the hub, which is asked once."""
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True, variant=variant))
    except (OSError, ValueError) as error:
        raise ConfigError(f"base: {name}: no such folder, and {hub_error(error)}") from error


def _converted(config: AdaptConfig, file: Path) -> Path:
    """The folder of a single file, made anew where the file is another one. Of several processes one makes it, and the
    others wait for it."""
    from filelock import FileLock

    from pipelines.convert import convert

    target = Path(config.output_dir) / "base"
    stamp = target.with_name("base.json")
    now = {"file": str(file.resolve()), "size": file.stat().st_size, "changed": file.stat().st_mtime_ns}
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name("base.lock")):
        if not (target / INDEX).is_file() or not stamp.is_file() or json.loads(stamp.read_text()) != now:
            try:
                convert(file, target, config=config.base_config)
            except ValueError as error:
                raise ConfigError(f"base: {error}") from error
            stamp.write_text(json.dumps(now))
    return target


def _read(folder: Path, variant: str | None) -> Base:
    from pipelines.folder import check_classes, read_index, read_json
    from pipelines.stock import FORMS, read_schedule

    index = read_index(folder)
    name = index.get("_class_name")
    if name not in FORMS:
        raise ConfigError(f"{folder / INDEX}: _class_name is {name!r}; {', '.join(FORMS)} can be trained on")
    form = FORMS[name]
    check_classes(folder, form, index)
    schedule = read_schedule(read_json(folder / "scheduler" / "scheduler_config.json"), form.family)
    net, vae = (read_json(folder / part / "config.json") for part in (form.net_name, "vae"))
    return Base(folder, variant, form, index, net, vae, schedule)


# --- what must agree -------------------------------------------------------------------------------------------------


def _agreed(config: AdaptConfig, base: Base) -> Schedule:
    """The base's schedule, moved to zero terminal SNR if asked for."""
    from ldm.paths import DiscreteVP
    from ldm.prediction import PREDICTIONS
    from pipelines.schedulers import default_schedule

    from .objective import path_of

    schedule = base.schedule
    theirs = next(name for name, kind in PREDICTIONS.items() if isinstance(schedule.prediction, kind))
    if config.prediction_type not in (None, theirs):
        raise ConfigError(
            f"prediction_type {config.prediction_type}: the base {base.folder} predicts {theirs}; leave the key out"
        )
    if config.path is not None and path_of(config.path) != schedule.path:
        raise ConfigError(
            f"path {config.path.name}: the base {base.folder} was trained on {schedule.path}; leave the key out"
        )
    if not config.rescale_betas_zero_snr:
        return schedule
    path = schedule.path
    if not isinstance(path, DiscreteVP) or schedule.prediction.needs_signal:
        raise ConfigError(
            f"rescale_betas_zero_snr: needs a base with betas that predicts v or the sample; {base.folder} predicts "
            f"{theirs} on {path}"
        )
    if path.ends_at_zero:
        return schedule
    if path.named is None:
        raise ConfigError("rescale_betas_zero_snr: the base's scheduler lists its betas one by one; rescale them there")
    name, steps, start, end = path.named
    how = {"schedule": name, "num_train_timesteps": steps, "beta_start": start, "beta_end": end}
    return default_schedule(DiscreteVP(**how, zero_terminal_snr=True), schedule.prediction, base.family)


def _check(config: AdaptConfig, base: Base) -> None:
    from .conditioning import check_conditioning

    check_conditioning(config, base)
    size, step = config.data.resolution, base.step
    if size % step:
        near = max(1, round(size / step)) * step
        raise ConfigError(f"data.resolution {size}: the base needs a multiple of {step}; {near} is the nearest")
    most = base.net.get("pos_embed_max_size")
    if most and size // base.factor // base.net["patch_size"] > most:
        raise ConfigError(
            f"data.resolution {size}: the base has positions for {most * base.factor * base.net['patch_size']} px at "
            "most"
        )


def _frozen_half(module: nn.Module) -> bool:
    """Quantized weights are not: they have no floating point dtype."""
    parameters = list(module.parameters())
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters)
    return half and not any(p.requires_grad or not p.is_floating_point() for p in parameters)
