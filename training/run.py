"""One run from its config: the folder, the data, the task, the loop, the export."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.outputs import check_output

from .config import dump, parse
from .fit import ConfigError, check_together, side_step
from .schema import AdaptConfig, AutoencoderConfig, ClipConfig, Config, DiffusionConfig, LatentRun

if TYPE_CHECKING:
    from .mirror import Mirror

log = logging.getLogger(__name__)
DONE = "done.json"
BESIDE = ("cache", "base", "base.json", "base.lock", "class_pictures")  # what may be there before a run is
# Keys that change no number of what a run makes: it may go on with others.
FREE = {
    "cache.dir", "cache.prune", "data.storage_options", "data.shard_cache", "data.shard_cache_gb",
    "validation", "validation.rows", "validation.levels",
} | {
    "train." + key
    for key in (
        "num_workers", "processes", "timeout_minutes", "sample_every", "checkpoint_every", "keep_last", "keep_every",
        "keep_best", "best_metric", "async_checkpoint", "on_out_of_memory", "spike_factor", "max_spiked_steps",
        "max_skipped_steps", "report_to", "mirror",
    )
}  # fmt: skip


# Schedules of the learning rate that do not depend on the length of the run.
ENDLESS = ("constant", "constant_with_warmup", "piecewise_constant")


def check_folder(config: Config) -> None:
    """A run that has begun may go on with a config that changes no number of what it has made so far, and be extended
    (a larger ``train.images``) where its schedule does not depend on its length.

    Raises:
        ConfigError: ``output_dir`` holds another run or other files.
    """
    run = Path(config.output_dir)
    check_output(run, "output_dir", "folder")
    if isinstance(config, LatentRun) and config.cache.dir:
        check_output(config.cache.dir, "cache.dir", "folder")
    if not run.exists():
        return
    written = run / "config.yaml"
    if not run.is_dir() or (not written.is_file() and any(x.name not in BESIDE for x in run.iterdir())):
        raise ConfigError(f"{run}: is there and holds no run (no config.yaml); choose another output_dir")
    if written.is_file() and begun(config):  # before the first checkpoint nothing is lost by another config
        there = _with_defaults(written.read_text(encoding="utf-8"))
        differing = _differences(there, yaml.safe_load(dump(config)))
        if len(differing) == 1 and config.train.images > there.get("train", {}).get("images", config.train.images):
            if problem := _not_extended(config):
                raise ConfigError(f"{run}: holds a run of {there['train']['images']} images. {problem}")
            differing = []
        if differing:
            raise ConfigError(
                f"{run}: holds a run of another config ({'; '.join(differing[:3])}); choose another output_dir, "
                "or delete the folder to train anew"
            )


def _with_defaults(text: str) -> Any:
    """A run's config.yaml, with the defaults of keys that were not there yet when it began."""
    raw = yaml.safe_load(text)
    try:
        return yaml.safe_load(dump(parse(raw, "config.yaml")))
    except ConfigError:  # of a version that had other keys: what differs is named
        return raw


def _not_extended(config: Config) -> str | None:
    """Why a longer run would not be what this one is so far."""
    start = "start another run from this one (lora.start, or base), in another output_dir"
    kind = config.optimizer.lr_scheduler
    if kind not in ENDLESS:
        return (
            f"Its optimizer.lr_scheduler {kind} is spread over the length of the run: with train.images "
            f"{config.train.images} all rates would have been others. A constant one can be extended; or {start}"
        )
    if config.ema.snapshot_every:
        return f"Its averages (ema.snapshot_every) end there; {start}"
    return None


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{key}.{k}".lstrip("."))]
    return [] if old == new or key in FREE else [f"{key}: {old} there, {new} here"]


def check_mirror(config: Config, resume: str | Path = "auto") -> Mirror | None:
    """``train.mirror``, which can be written and is this run's or empty; None where there is none.

    Raises:
        ConfigError: it is another run's, or ``resume`` is ``never`` and it holds checkpoints.
        RemoteError: it cannot be read or written.
    """
    if config.train.mirror is None:
        return None
    from .mirror import Mirror

    mirror, url = Mirror(config.train.mirror, Path(config.output_dir)), config.train.mirror
    if os.environ.get("RANK", "0") == "0":
        mirror.check()
    if resume == "never" and (names := mirror.names()):
        raise ConfigError(f"train.mirror {url}: holds {names[-1]}, and --resume never was asked for; choose another")
    there = mirror.config()
    differing = _differences(_with_defaults(there), yaml.safe_load(dump(config))) if there else []
    differing = [x for x in differing if not x.startswith("output_dir:")]
    if differing:
        raise ConfigError(
            f"train.mirror {url}: is the mirror of another run ({'; '.join(differing[:3])}); choose another one"
        )
    return mirror


def _restore(config: Config, resume: str | Path) -> None:
    """Bring back from ``train.mirror`` what is newer there than in ``output_dir``. Raises as ``check_mirror``."""
    mirror = check_mirror(config, resume)
    if mirror is not None and resume == "auto":
        mirror.restore(dump(config), BESIDE)


def is_done(config: Config, inputs: dict[str, str]) -> bool:
    """The run has ended, as long as the config says, and what it was made from is still the same."""
    file, written = Path(config.output_dir) / DONE, Path(config.output_dir) / "config.yaml"
    if not file.is_file() or json.loads(file.read_text())["inputs"] != inputs:
        return False
    images = yaml.safe_load(written.read_text())["train"]["images"] if written.is_file() else config.train.images
    return images >= config.train.images


def begun(config: Config) -> bool:
    """There is something in the run's folder to go on from, or it is made."""
    run = Path(config.output_dir)
    return (run / DONE).is_file() or any(run.glob("checkpoints/images_*/manifest.json"))


def inputs_of(config: Config, train_rows: Any) -> dict[str, str]:
    """Hashes of all that a run is made from beside its config: the data and the local folders that it builds on."""
    return {**_given(config), "data": train_rows.fingerprint}


def _given(config: Config) -> dict[str, str]:
    """Hashes of the local folders that a run builds on, as far as they can be told without opening them."""
    names: dict[str, str] = {}
    if isinstance(config, DiffusionConfig):
        names = {"vae": config.vae.pretrained, "text": config.text.pretrained}
    if isinstance(config, AdaptConfig):
        from .base import base_of

        names = {"base": str(base_of(config).folder)}
        if config.lora is not None:
            names |= {"lora.start": config.lora.start} if config.lora.start else {}
            names |= {f"lora.adapters.{i}": other.path for i, other in enumerate(config.lora.adapters)}
    if isinstance(config, AutoencoderConfig) and (config.loss.perceptual or "").startswith("clip:"):
        names = {"perceptual": (config.loss.perceptual or "").removeprefix("clip:")}
    given = {}
    for key, name in names.items():
        inner = (Path(name) / what for what in ("pipeline", "adapter"))
        place = next((folder for folder in inner if folder.is_dir()), Path(name))
        digest = hashlib.sha256()
        for file in [place] if place.is_file() else sorted(place.rglob("*.safetensors")):
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        given[key] = digest.hexdigest()
    return given


def train_all(
    configs: Sequence[Config], resume: str | Path = "auto", *, opened: dict[str, tuple[Any, Any]] | None = None
) -> None:
    """Run the configs in order; what is already made is taken up.

    Args:
        resume: ``auto``: from each run's newest checkpoint, if any; ``never``; or a checkpoint's folder, of one config.
        opened: rows that ``preflight.report`` has looked at already, by ``source_of``.
    Raises:
        ConfigError: before anything is computed, if any of them cannot be run.
        Interrupted: asked to stop; a run of which it came in the last step is done, and the next one is not begun.
    """
    if resume not in ("auto", "never") and len(configs) > 1:
        raise ConfigError(f"--resume {resume}: a checkpoint is of one run; give one config")
    from . import device
    from .guards import Stages
    from .optim import check_optimizer
    from .processes import check_launcher

    check_launcher()
    check_together(configs)
    device.prepare(configs)
    for config in configs:
        _restore(config, resume)
        check_folder(config)
        check_optimizer(config.optimizer)
        if isinstance(config, ClipConfig) and config.train.on_out_of_memory == "halve":
            raise ConfigError("train.on_out_of_memory halve: CLIP's loss is over whole batches; set a smaller one")
    opened = {} if opened is None else opened  # stages with the same data share the rows
    sources = [source_of(config, configs[:i]) for i, config in enumerate(configs)]
    for i, (config, source) in enumerate(zip(configs, sources, strict=True)):
        if source not in opened or config.data.streaming:  # a stream that was read from is not at its beginning
            opened[source] = open_data(config, configs[:i])
    stages = Stages()
    for config, source in zip(configs, sources, strict=True):
        rows = opened[source]
        inputs = _inputs_from_one(config, rows[0])
        if is_done(config, inputs):
            log.info("%s: already made, taken up", config.output_dir)
        else:
            stages.begin(config.output_dir)
            with device.kernels(config.train, len(rows[0].shapes)):
                train_one(config, *rows, inputs=inputs, resume=resume)


def _inputs_from_one(config: Config, train_rows: Any) -> dict[str, str]:
    """What ``inputs_of`` gives; the main process reads the files and sends the hashes to the others.

    Raises:
        OSError: a file cannot be read; RuntimeError in the other processes.
    """
    from accelerate.utils import broadcast_object_list

    from . import processes
    from .fail_together import all_fail_together
    from .preflight import precision

    accelerator = processes.started(config.train, precision(config.train.mixed_precision))
    inputs: list[dict[str, str] | None] = [None]
    with all_fail_together(accelerator):
        if accelerator.is_main_process:
            inputs[0] = inputs_of(config, train_rows)
        if accelerator.num_processes > 1:
            broadcast_object_list(inputs)
    assert inputs[0] is not None
    return inputs[0]


def train_one(
    config: Config, train_rows: Any, test_rows: Any, *, inputs: dict[str, str], resume: str | Path = "auto"
) -> None:
    """Train on what ``open_data`` gives, going on from a checkpoint, and export.

    Args:
        inputs: what ``inputs_of`` gives, the same in every process.
    Raises:
        ConfigError: a launcher started another number of processes, or a file of what the run builds on is missing.
        and what ``loop.train`` raises.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from . import loop, measure, processes
    from .arithmetic import training_flops
    from .card import write_card
    from .evaluate.report import write_report
    from .mirror import Mirror
    from .preflight import held_out_rows, precision
    from .sizes import network_of

    run, start = Path(config.output_dir), time.perf_counter()
    mixed = precision(config.train.mixed_precision)
    transformers_logging.disable_progress_bar()  # ours is the one that tells
    accelerator = processes.started(config.train, mixed, run)
    main, world = accelerator.is_main_process, accelerator.num_processes
    measure.reset_peak(accelerator.device)
    torch.manual_seed(config.seed)
    run.mkdir(parents=True, exist_ok=True)
    processes.check_shared(run, "output_dir", accelerator)
    if isinstance(config, LatentRun) and config.cache.dir:
        processes.check_shared(Path(config.cache.dir), "cache.dir", accelerator)
    if main:
        log.info(
            "%s: %s on %s (%s), %s%s, %s",
            run, config.task, "a stream" if config.data.streaming else f"{len(train_rows)} pictures",
            held_out_rows(config, train_rows, test_rows), f"{world} processes, " if world > 1 else "",
            accelerator.device, mixed if mixed != "no" else "float32",
        )  # fmt: skip
    task = build(config, train_rows, test_rows, run, accelerator)
    if main:  # not before: a config that cannot be built leaves the folder free for a better one
        (run / DONE).unlink(missing_ok=True)  # of a shorter run, which this one extends
        (run / "config.yaml").write_text(dump(config))
        if config.train.mirror:
            Mirror(config.train.mirror, run).put_config(dump(config))
    accelerator.wait_for_everyone()
    accelerator.init_trackers(run.name, config={"config": dump(config)})
    loop.train(
        task, config.train, run=run, seed=config.seed, accelerator=accelerator, inputs=inputs, resume=resume,
        flops=training_flops(*network_of(config)) if main else None,
    )  # fmt: skip
    with loop.whole(task.players, accelerator):  # under FSDP2 the main process gets whole weights
        if main:
            try:
                task.export()
            except BaseException:  # Ctrl-C too
                shutil.rmtree(run / "pipeline.partial", ignore_errors=True)
                raise
    if main:
        if isinstance(config, AdaptConfig | DiffusionConfig):
            write_card(result_of(config), config, data=_summary(train_rows), samples=_last_grid(run))
        write_report(run, title=f"{config.task}: {run.name}", data=_summary(train_rows))
        took = {"seconds": time.perf_counter() - start, "memory": measure.peak(accelerator.device)}
        (run / DONE).write_text(json.dumps({"inputs": inputs, "took": took}))
        done = result_of(config), took["seconds"] / 60, took["memory"] / 2**30
        log.info("%s: done, in %.1f minutes and %.2f GiB", *done)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:  # end_training would also end the process group, which the next run needs
        tracker.finish()
    accelerator.free_memory()


def cache_all(configs: Sequence[Config]) -> None:
    """Encode what the diffusion configs train on, ahead of the training; all processes of a launcher share it out.

    Raises:
        ConfigError: none of them is a diffusion config, or what they build on is missing.
    """
    from . import device, processes
    from .cache import make_cache, root_of
    from .preflight import precision

    wanted = [config for config in configs if isinstance(config, LatentRun) and not config.data.streaming]
    if not wanted:
        raise ConfigError("nothing to cache: no config of a diffusion task among those given, or it streams its data")
    check_together(configs)
    device.prepare(wanted)
    opened = [open_data(config, configs) for config in wanted]
    for config, rows in zip(wanted, opened, strict=True):
        accelerator = processes.started(config.train, precision(config.train.mixed_precision))
        processes.check_shared(root_of(config), "cache.dir", accelerator)
        with _in_one_line(), device.kernels(config.train, len(rows[0].shapes)):  # those of the run, to the bit
            made = make_cache(config, *rows, accelerator)
        if accelerator.is_main_process:
            told = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in made.items())
            log.info("%s: cached, %s", config.output_dir, told)


def result_of(config: Config) -> Path:
    """What the run makes: a pipeline, or a small file that goes with its base."""
    small = isinstance(config, AdaptConfig) and not config.whole
    return Path(config.output_dir) / ("adapter" if small else "pipeline")


def _last_grid(run: Path) -> Path | None:
    return max((run / "samples").glob("images_*.png"), default=None)


def _summary(rows: Any) -> dict[str, Any]:
    """What the report says of the data."""
    from .data import Rows, check_rows

    return check_rows(rows) if isinstance(rows, Rows) else {}


@contextmanager
def _in_one_line() -> Iterator[None]:
    """A library that misses a file of a pretrained model tells it in a screenful; here it is a line of ours."""
    try:
        yield
    except OSError as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"a part that the run builds on cannot be opened: {text}") from error


def open_data(config: Config, earlier: Sequence[Config] = (), *, draw: bool = True) -> tuple[Any, Any]:
    """Training and held-out rows; with ``data.streaming`` a stream of batches and the held-out rows.

    Args:
        earlier: configs whose runs this one builds on.
        draw: what is missing of DreamBooth's class pictures; else they are left out.
    Raises:
        DataError: naming folder, column or file.
        ConfigError: a task that cannot stream.
    """
    from .data import open_rows

    if draw and isinstance(config, AdaptConfig) and config.prior:
        config = _with_prior(config)
    diffusion = isinstance(config, LatentRun)
    how: dict[str, Any] = {"buckets": None if diffusion else False, "step": side_step(config, earlier)}
    if not config.data.streaming:
        return open_rows(config.data, split="train", **how), open_rows(config.data, split="test", **how)
    if not diffusion:
        raise ConfigError(
            f"{config.output_dir}: data.streaming is for the diffusion task; {config.task} needs its rows"
        )
    from .streams import RowStream

    stream = RowStream(config.data, seed=config.seed, batch=config.train.batch_size, **how)
    return stream, open_rows(config.data, split="test", **how)


def _with_prior(config: AdaptConfig) -> AdaptConfig:
    """With class pictures, drawn by the base as it is where they are missing."""
    from . import device, processes
    from .base import base_of, frozen_dtype
    from .preflight import precision
    from .prior import class_pictures, with_prior

    mixed = precision(config.train.mixed_precision)
    accelerator = processes.started(config.train, mixed)
    given = config.prior.class_data_dir if config.prior else None
    folder, key = Path(given or config.output_dir).expanduser(), "prior.class_data_dir" if given else "output_dir"
    processes.check_shared(folder, key, accelerator)
    parts = base_of(config).opened(frozen_dtype(config, accelerator.device, mixed), accelerator.device)
    rank, world, wait = accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
    with device.kernels(config.train, 1):
        return with_prior(config, class_pictures(config, parts, rank=rank, world=world, wait=wait))


def source_of(config: Config, earlier: Sequence[Config]) -> str:
    """What of a config decides which rows there are; random crops and flips come later."""
    given = [config.data.model_dump(mode="json", exclude={"random_crop", "random_flip"})]
    streamed = (config.seed, config.train.batch_size) if config.data.streaming else None
    if isinstance(config, AdaptConfig) and config.prior:
        given += [config.prior.model_dump(mode="json"), config.base, config.seed, config.output_dir]
    return json.dumps([given, isinstance(config, LatentRun), side_step(config, earlier), streamed])


@_in_one_line()
def build(config: Config, train_rows: Any, test_rows: Any, run: Path, accelerator: Any) -> Any:
    """The task that a config asks for. Raises ConfigError where a part that it builds on cannot be opened."""
    if isinstance(config, ClipConfig):
        from .tasks.clip import ClipTask

        return ClipTask(config, train_rows, test_rows, run, accelerator)
    if isinstance(config, AutoencoderConfig):
        from .tasks.autoencoder import AutoencoderTask

        return AutoencoderTask(config, train_rows, test_rows, run, accelerator)
    from .tasks.diffusion import DiffusionTask

    return DiffusionTask(config, train_rows, test_rows, run, accelerator)
