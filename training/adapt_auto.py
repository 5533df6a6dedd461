"""A config for somebody's pictures: defaults by the family of the base, the number of pictures and the memory there is.

What is chosen is what people take who train such models often; it is written down as a config and can be changed there.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from .config import Dumper, parse, put
from .fit import ConfigError
from .schema import AdaptConfig
from .tables import DataError

log = logging.getLogger(__name__)

Method = Literal["lora", "dreambooth", "textual_inversion", "finetune"]
METHODS = ("lora", "dreambooth", "textual_inversion", "finetune")
VIEWS = ("a photo of {}", "a close-up of {}", "a bright picture of {}", "a rendering of {}")  # textual inversion's
BATCHES = (16, 8, 4, 2, 1)
SMALL = 100_000_000  # parameters of a denoiser: below, a LoRA needs a higher rank and rate (Stable Diffusion 1.5: 860M)
HOST_ROOM = 0.5  # of a machine's free memory, which other programs and the disk's cache need too
SHOWN = 256  # side in pixels of what goes through the autoencoder; of smaller pictures several
LOWEST_PSNR = 17.0  # dB. Stable Diffusion's autoencoder on COCO at 256 px: 23.4 on average, with a deviation of 3.8
FEW = 20  # pictures, of which none is spared for validation


class Habits(NamedTuple):
    """Of a family: resolution where the base tells none, and how it is sampled."""

    resolution: int
    steps: int
    guidance_scale: float


HABITS = {
    "sd": Habits(512, 30, 7.5),
    "sdxl": Habits(1024, 30, 6.0),
    "sd3": Habits(1024, 28, 5.0),
    "pixart": Habits(512, 20, 4.5),
}


class Pictures(NamedTuple):
    """How many there are, and where their captions come from."""

    count: int
    captions: Literal["metadata", "files", "none"]
    told: bool  # the trigger is in some of them


def adapt_config(
    base: str,
    images: str | Path,
    trigger: str,
    out: str | Path | None = None,
    *,
    method: Method = "lora",
    overrides: Sequence[str] = (),
    fitted: bool = True,
) -> AdaptConfig:
    """The config that ``ldm adapt`` runs.

    Numbers of Stable Diffusion's users, or of the demo's base where the denoiser has less than 100M parameters: it
    learns by higher ranks and rates, and more images.

    Args:
        base: as of a config: a pipeline folder, a run, a hub name or a single file.
        images: folder of pictures, with a caption in a.txt beside each a.jpg, with a metadata.jsonl, or with neither.
        trigger: what a prompt is to say, as "sks dog".
        out: of the run; outputs/ and the trigger if not given.
        method: ``dreambooth`` takes the trigger without its first word for the class.
        overrides: ``key=value`` of the config, which have the last word.
        fitted: try batches and gradient checkpointing until a step fits into the memory that is free.
    Raises:
        ConfigError: the base is not there or no pipeline, the trigger says nothing to its tokenizer, or has no class.
        DataError: no folder, no pictures in it, or captions beside some of them alone.
    """
    if method not in METHODS:
        raise ConfigError(f"--method {method}: expected one of {', '.join(METHODS)}")
    trigger = " ".join(trigger.split())
    if not trigger:
        raise ConfigError("--trigger: says nothing; give a rare word and what it is, as 'sks dog'")
    found = look(Path(images).expanduser(), trigger)
    out = Path(out) if out is not None else Path("outputs") / (re.sub(r"\W+", "_", trigger).strip("_") or "adapted")
    raw = _choices(base, Path(images), trigger, out, method, found)
    opened = _opened(raw)
    small = sum(p.numel() for p in opened.bare.parameters()) < SMALL
    if small:
        _for_small_base(raw, method, found.count)
    raw["data"]["resolution"] = opened.resolution or HABITS[opened.family].resolution
    how = HABITS[opened.family]
    flow = opened.net.get("_class_name", "").startswith("UNet") and not _is_chain(opened)
    raw["sample"] |= {"num_inference_steps": how.steps, "guidance_scale": 3.0 if flow else how.guidance_scale}
    if _is_chain(opened) and method != "textual_inversion":
        raw["weighting"] = {"name": "min_snr", "gamma": 5.0}
    _check_trigger(opened.folder, trigger)
    for text in overrides:
        put(raw, text)
    config = _parsed(raw)
    said = {text.split("=")[0] for text in overrides}
    most = max(1, min(16 if small else 8, found.count, config.train.images))
    return _fitted(config, said, most) if fitted else config


def look(images: Path, trigger: str) -> Pictures:
    """At a folder of pictures, by its names and captions alone."""
    from .captions import lines_advice
    from .folders import metadata_in, pictures_in, plural, report_others, survey
    from .tables import Beside

    if not images.is_dir():
        raise DataError(f"--images {images}: no such folder")
    found = survey([images])
    metadata, ending = metadata_in(images), found.ending(".txt")
    if not found.pictures:
        others = f"; there are {x}" if (x := found.describe_others(None)) else ""
        report_others(str(images), found, None)
        raise DataError(
            f"--images {images}: no pictures in it, whose names end in .jpg, .png, .webp and the like{others}"
        )
    if metadata:
        texts = [x.read_text(encoding="utf-8", errors="replace") for x in metadata if x.suffix != ".parquet"]
        log.info("captions: %s has those of the pictures", metadata[0])
        return Pictures(found.pictures, "metadata", any(trigger.lower() in text.lower() for text in texts))
    has = "has" if found.captions[ending] == 1 else "have"
    known = f"{found.captions[ending]:,} of {plural(found.pictures, 'picture')} {has} a"
    if not found.captions[ending]:
        log.info(
            "captions: no picture has a file beside it, as in %s%s; each is trained on the trigger alone",
            found.expected(ending),
            found.unused_text(ending),
        )
        return Pictures(found.pictures, "none", False)
    beside = Beside(*found.variants(ending), text=False)
    files = [(path, beside.file(path)) for path in pictures_in(images)]
    without = next((file for _, file in files if not file.is_file()), None)
    if without is not None:
        raise DataError(
            f"--images {images}: {known} caption in a {ending} file beside {'it' if has == 'has' else 'them'}, "
            f"{without.name} is missing; write the others, or take all away"
        )
    log.info("captions: %s %s file", known, ending)
    texts = [file.read_text(encoding="utf-8", errors="replace") for _, file in files]
    if advice := lines_advice(texts):
        log.warning("captions: %s", advice)
    return Pictures(found.pictures, "files", any(trigger.lower() in text.lower() for text in texts))


# --- what is chosen --------------------------------------------------------------------------------------------------


def _choices(base: str, images: Path, trigger: str, out: Path, method: Method, found: Pictures) -> dict[str, Any]:
    n = found.count
    data: dict[str, Any] = {"path": str(images)}
    raw: dict[str, Any] = {"task": "adapt", "output_dir": str(out), "base": base, "data": data}
    prompts = [trigger, f"a photo of {trigger}", f"{trigger} in the snow", f"a drawing of {trigger}"]
    optimizer: dict[str, Any] = {"learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_images": 200}
    seen = min(max(100 * n, 1_600), 20_000)  # a hundred times each, and not fewer than a style takes
    if found.captions == "none":
        data["instance_prompt"] = trigger
    elif not found.told:
        data["caption_templates"] = [f"{trigger}, {{}}"]
    if method in ("lora", "dreambooth"):
        raw["lora"] = {"rank": 8 if n < 10 else 16 if n < 100 else 32, "target_modules": "attention"}
        raw["caption_dropout"] = 0.05
    if method == "dreambooth":
        _, _, kind = trigger.partition(" ")
        if not kind:
            raise ConfigError(f"--trigger {trigger}: dreambooth needs the class too, as '{trigger} dog'")
        raw |= {"prior": {"class_prompt": kind, "num_class_images": max(50, 20 * n)}, "caption_dropout": 0.0}
        prompts[-1] = kind
        seen *= 2  # half of them are of the class
    if method == "textual_inversion":
        *rare, last = trigger.split()
        token = rare[0] if rare else last
        token = token if token.startswith("<") else f"<{token}>"
        sources = [{"path": str(images), "instance_prompt": view.format(token)} for view in VIEWS]
        raw["data"] = {"sources": sources}  # captions would tell what the new word is to tell
        raw |= {"train_denoiser": False, "new_tokens": [{"token": token, "num_vectors": 4}], "caption_dropout": 0.0}
        optimizer = {"learning_rate": 5e-3, "lr_scheduler": "constant", "adam_weight_decay": 0.0}
        prompts = [view.format(token) for view in VIEWS]
        seen = 8_000
    if method == "finetune":
        optimizer = {"learning_rate": 1e-5, "lr_warmup_images": min(2_000, seen // 10)}
        raw |= {"caption_dropout": 0.1}
        seen = min(max(50 * n, 4_000), 500_000)
    if n < FEW:
        raw["data"]["held_out"] = 0.0
        raw["validation"] = {"rows": 4, "levels": 4}
    often = max(seen // 4, 1)
    train = {"images": seen, "log_every": max(seen // 50, 1), "checkpoint_every": often}
    train |= {"validate_every": often, "sample_every": often}
    return raw | {"optimizer": optimizer, "train": train, "sample": {"prompts": prompts}}


def _for_small_base(raw: dict[str, Any], method: Method, count: int) -> None:
    """What the demo's base of 13M parameters learns by (configs/openmoji), in place of what suits a large one."""
    if method not in ("lora", "dreambooth"):
        return
    raw["lora"]["rank"] = max(16, raw["lora"]["rank"])
    raw["optimizer"] |= {"learning_rate": 1e-3, "lr_warmup_images": 400, "adam_beta2": 0.99}
    seen = min(max(100 * count, 6_000), 20_000)
    often = seen // 4
    raw["train"] |= {"images": seen, "log_every": seen // 50}
    raw["train"] |= {"checkpoint_every": often, "validate_every": often, "sample_every": often}


def _parsed(raw: dict[str, Any]) -> AdaptConfig:
    config = parse(raw, "ldm adapt")
    assert isinstance(config, AdaptConfig)
    return config


def _opened(raw: dict[str, Any]) -> Any:
    """The base, before it is known what resolution it is for."""
    from .base import found

    try:
        return found(_parsed(raw))
    except ConfigError as error:
        raise ConfigError(f"--base: {error}".replace("--base: base: ", "--base: ")) from error


def _is_chain(base: Any) -> bool:
    from ldm.paths import DiscreteVP

    return isinstance(base.schedule.path, DiscreteVP)


def _check_trigger(folder: Path, trigger: str) -> None:
    """Every tokenizer of the base reads something of the trigger, without the encoders' weights."""
    from transformers import AutoTokenizer

    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if not (folder / name / "tokenizer_config.json").is_file():
            continue
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder / name))
        nothing = {tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("▁")}
        if set(tokenizer(trigger, add_special_tokens=False).input_ids) <= nothing:
            raise ConfigError(
                f"--trigger {trigger!r}: says nothing to the base's {name}, which finds nothing in it that it knows; "
                "choose letters that it knows, as 'sks dog'"
            )


def _fitted(config: AdaptConfig, said: set[str], most: int) -> AdaptConfig:
    """With the largest batch up to ``most`` that a step has room for, and gradient checkpointing where two pictures
    have none without it; below four the gradients of four are summed. What the overrides say stays as it is."""
    import torch

    from . import processes
    from .arithmetic import Memory, training_memory
    from .base import frozen_bytes
    from .preflight import ROOM, least_free, precision
    from .sizes import network_of

    mixed = precision(config.train.mixed_precision)
    accelerator = processes.started(config.train, mixed)  # all processes choose the same
    device = accelerator.device
    room = (HOST_ROOM if device.type == "cpu" else ROOM) * least_free(accelerator)[0]
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed)
    batches = (config.train.batch_size,) if "train.batch_size" in said else [n for n in BATCHES if n <= most]
    shares = (config.train.gradient_checkpointing,) if "train.gradient_checkpointing" in said else (0.0, 1.0)
    batch, share = batches[-1], shares[-1]

    def memory_of(rows: int, share: float) -> Memory:
        tried = _trained(config, rows, share)
        return training_memory(
            *network_of(tried), rows, averaged=bool(config.ema_decay),
            accumulated=config.train.gradient_accumulation_steps > 1,
            replicated=accelerator.num_processes > 1, device_type=device.type, autocast=autocast,
            state_bytes=config.optimizer.state_bytes, frozen_bytes=frozen_bytes(tried, device, mixed),
        )  # fmt: skip

    for share in shares:
        large = memory_of(batches[0], share).total
        # What autocast copies of frozen weights does not grow with the batch: two points make the line.
        small = large if large <= room or len(batches) == 1 else memory_of(1, share).total
        each = (large - small) / max(1, batches[0] - 1)
        fits = [n for n in batches if large - (batches[0] - n) * each <= room]
        batch = max(fits, default=batches[-1])
        if fits and batch >= min(2, batches[0]):
            break
    accumulated = said & {"train.batch_size", "train.gradient_accumulation_steps"} or batch >= 4
    steps = max(1, min(4, config.train.images) // batch)
    return _trained(config, batch, share, **({} if accumulated else {"gradient_accumulation_steps": steps}))


def _trained(config: AdaptConfig, batch: int, share: float, **more: int) -> AdaptConfig:
    train = {"batch_size": batch, "gradient_checkpointing": share, **more}
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


# --- the command -----------------------------------------------------------------------------------------------------


def written(config: AdaptConfig) -> str:
    """The config as a person would write it: what is a default is left out."""
    told = json.loads(config.model_dump_json(exclude_defaults=True))
    for section, value in told.items():  # a kind is told by its name, which is a default of it
        kind = getattr(config, section)
        if isinstance(value, dict) and hasattr(kind, "name"):
            told[section] = {"name": kind.name, **value}
    return yaml.dump({"task": config.task, **told}, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def adapt(
    base: str,
    images: Path,
    trigger: str,
    method: Method = "lora",
    out: Path | None = None,
    yes: bool = False,
    overrides: Sequence[str] = (),
    check: bool = True,
) -> Path | None:
    """Write the config to OUT.yaml, show it, check it, ask, train. Returns the run's folder; None if the answer is no.

    A run that has begun goes on, or is taken up where it has ended, without another check and question. Before that a
    config with other settings takes the place of OUT.yaml, which is kept as OUT.yaml.old.

    Args:
        check: forecast, rehearse, and look at the pictures through the base's autoencoder.
    Raises:
        ConfigError, DataError: as ``adapt_config``; or the run has begun with settings that may not change.
        DoesNotFit: the run takes more memory than is free; OUT.yaml is written, and nothing else.
        Interrupted: a signal came; before the training has begun only OUT.yaml is there.
    """
    import typer

    print(f"# base {base}, pictures {images}: chooses settings", flush=True)
    from .fit import check_together
    from .guards import leaving
    from .preflight import report
    from .run import begun, check_folder, open_data, source_of, train_all

    config = adapt_config(base, images, trigger, out, method=method, overrides=overrides, fitted=False)
    going_on = begun(config)
    with leaving("stopped before the training: nothing has begun"):
        if going_on:
            config = _fitted_before(config, {text.split("=")[0] for text in overrides})
        else:
            config = adapt_config(base, images, trigger, out, method=method, overrides=overrides)
    run = Path(config.output_dir)
    file, text = run.with_name(run.name + ".yaml"), written(config)
    check_together([config])
    try:
        check_folder(config)
    except ConfigError as error:
        if not going_on:
            raise
        raise ConfigError(f"{error}. `ldm train {run}/config.yaml` goes on with what is there") from error
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        file.replace(file.with_name(file.name + ".old"))
        print(f"# {file} had other settings; it is kept as {file.name}.old")
    file.write_text(text, encoding="utf-8")
    print(f"# {file}\n{text}", flush=True)
    opened: dict[str, Any] = {}
    if not going_on:
        if check:
            with leaving("stopped before the training: nothing has begun"):
                rows = open_data(config, draw=False)
                print(f"# {shown_by_autoencoder(config, rows[0])}", flush=True)
                if config.prior is None:
                    opened[source_of(config, ())] = rows
            report([config], opened=opened)
        if not yes and not typer.confirm(f"Train? (`ldm train {file}` does so later)", default=True):
            return None
    train_all([config], opened=opened)
    return run


def _fitted_before(config: AdaptConfig, said: set[str]) -> AdaptConfig:
    """With the batch and the gradient checkpointing of the run that has begun, unless the overrides say others."""
    from .config import load

    file = Path(config.output_dir) / "config.yaml"
    if not file.is_file():
        return config
    there = load(file).train
    keys = ("batch_size", "gradient_checkpointing", "gradient_accumulation_steps")
    kept = {key: getattr(there, key) for key in keys if f"train.{key}" not in said}
    return config.model_copy(update={"train": config.train.model_copy(update=kept)})


# --- what the base can show ------------------------------------------------------------------------------------------


def shown_by_autoencoder(config: AdaptConfig, rows: Any) -> str:
    """A line about how well the base's autoencoder gives the pictures back, which nothing that trains here changes:
    few of them, and small ones, so that it takes seconds. A warning where it loses what they show."""
    import torch

    from .base import base_of

    count, decibels = _autoencoder_psnr(config, rows, base_of(config).open_vae(torch.float32))
    some = f"{count} picture{'s' if count > 1 else ''}"
    if decibels >= LOWEST_PSNR:
        return f"the base's autoencoder gives {some} back at {decibels:.1f} dB (PSNR)"
    return (
        f"WARNING: the base's autoencoder gives {some} back at {decibels:.1f} dB only (PSNR; below {LOWEST_PSNR:g} dB "
        "most of what a picture shows is lost). What the base draws comes no nearer to your pictures than that, "
        "whatever trains: take a base that was made from such pictures"
    )


def _autoencoder_psnr(config: AdaptConfig, rows: Any, vae: Any) -> tuple[int, float]:
    """Of the first pictures of one shape, scaled to ``SHOWN`` px at most -> their count and mean PSNR in dB."""
    import torch
    from torch.nn import functional

    from .evaluate.metrics import psnr

    side = min(config.data.resolution, SHOWN)
    same = (rows.bucket == rows.bucket[0]).nonzero()[0][: max(1, SHOWN**2 // side**2)].tolist()
    pictures = rows.pictures(same).float() / 255  # (B, 3, H, W)
    step = vae.factor
    size = [max(1, round(n * side / config.data.resolution) // step) * step for n in pictures.shape[-2:]]
    pictures = functional.interpolate(pictures, size, mode="area")
    with torch.no_grad():
        vae = vae.eval()
        back = vae.decode(vae.encode(2 * pictures - 1).mean)
    return len(same), float(psnr((back / 2 + 0.5).clamp(0, 1), pictures).mean())
