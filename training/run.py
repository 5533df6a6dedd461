"""One run from its config: the folder, the data, the task, the loop, the export."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .config import dump
from .fit import ConfigError, check_together
from .schema import AutoencoderConfig, ClipConfig, Config, DiffusionConfig

log = logging.getLogger(__name__)
DONE = "done.json"


def check_folder(config: Config) -> None:
    """Raises ConfigError where ``output_dir`` holds another run or other files."""
    run = Path(config.output_dir)
    if not run.exists():
        return
    written = run / "config.yaml"
    if not run.is_dir() or (not written.is_file() and any(run.iterdir())):
        raise ConfigError(f"{run}: is there and holds no run (no config.yaml); choose another output_dir")
    if written.is_file():
        differing = _differences(yaml.safe_load(written.read_text()), yaml.safe_load(dump(config)))
        if differing:
            raise ConfigError(
                f"{run}: holds a run of another config ({'; '.join(differing[:3])}); choose another output_dir, "
                "or delete the folder to train anew"
            )


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{key}.{k}".lstrip("."))]
    return [] if old == new else [f"{key}: {old} there, {new} here"]


def is_done(config: Config, inputs: dict[str, str]) -> bool:
    """The run has ended, and what it was made from is still the same."""
    file = Path(config.output_dir) / DONE
    return file.is_file() and json.loads(file.read_text())["inputs"] == inputs


def inputs_of(config: Config, train_rows: Any) -> dict[str, str]:
    """Hashes of all that a run is made from beside its config: the data and the local folders that it builds on."""
    return {**_given(config), "data": train_rows.fingerprint}


def _given(config: Config) -> dict[str, str]:
    """Hashes of the local folders that a run builds on, as far as they can be told without opening them."""
    names = {}
    if isinstance(config, DiffusionConfig):
        names = {"vae": config.vae.pretrained, "text": config.text.pretrained}
    if isinstance(config, AutoencoderConfig) and (config.loss.perceptual or "").startswith("clip:"):
        names = {"perceptual": (config.loss.perceptual or "").removeprefix("clip:")}
    given = {}
    for key, name in names.items():
        folder = Path(name) / "pipeline" if (Path(name) / "pipeline").is_dir() else Path(name)
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*.safetensors")):
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        given[key] = digest.hexdigest()
    return given


def train_all(configs: Sequence[Config]) -> None:
    """Run the configs in order; what is already made is taken up.

    Raises:
        ConfigError: before anything is computed, if any of them cannot be run.
    """
    check_together(configs)
    for config in configs:
        check_folder(config)
    opened: dict[str, tuple[Any, Any]] = {}  # stages with the same data share the rows
    for config in configs:
        source = json.dumps(_source(config))
        opened[source] = opened.get(source) or open_data(config)
    for config in configs:
        rows = opened[json.dumps(_source(config))]
        if is_done(config, inputs_of(config, rows[0])):
            log.info("%s: already made, taken up", config.output_dir)
        else:
            train_one(config, *rows)


def train_one(config: Config, train_rows: Any, test_rows: Any) -> None:
    """Train on what ``open_data`` gives, going on from the newest checkpoint, and export."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from transformers.utils import logging as transformers_logging

    from . import loop
    from .evaluate.report import write_report
    from .preflight import precision

    run = Path(config.output_dir)
    mixed = precision(config.train.mixed_precision)
    transformers_logging.disable_progress_bar()  # ours is the one that tells
    AcceleratorState._reset_state()  # a run before this one may have had another precision
    accelerator = Accelerator(mixed_precision=mixed)
    torch.manual_seed(config.seed)
    _one_process_as_asked(accelerator.num_processes)
    run.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        (run / "config.yaml").write_text(dump(config))
    accelerator.wait_for_everyone()
    log.info(
        "%s: %s on %d pictures (%d held out), %s, %s",
        run, config.task, len(train_rows), len(test_rows), accelerator.device, mixed if mixed != "no" else "float32",
    )  # fmt: skip
    task = build(config, train_rows, test_rows, run, accelerator)
    inputs = inputs_of(config, train_rows)
    loop.train(task, config.train, run=run, seed=config.seed, accelerator=accelerator, inputs=inputs)
    if accelerator.is_main_process:
        task.export()
        write_report(run, title=f"{config.task}: {run.name}")
        (run / DONE).write_text(json.dumps({"inputs": inputs}))
        log.info("%s: done", run / "pipeline")
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def open_data(config: Config) -> tuple[Any, Any]:
    """Training and held-out rows. Raises DataError naming folder, column or file."""
    from .data import open_rows

    source = _source(config)
    return open_rows(**source, split="train"), open_rows(**source, split="test")


def _source(config: Config) -> dict[str, Any]:
    """What of a config decides which rows there are; crops and flips come later."""
    keys = ("path", "image_column", "caption_column", "resolution", "center_crop", "held_out")
    return {key: getattr(config.data, key) for key in keys}


def build(config: Config, train_rows: Any, test_rows: Any, run: Path, accelerator: Any) -> Any:
    """The task that a config asks for."""
    if isinstance(config, ClipConfig):
        from .tasks.clip import ClipTask

        return ClipTask(config, train_rows, test_rows, run, accelerator)
    if isinstance(config, AutoencoderConfig):
        from .tasks.autoencoder import AutoencoderTask

        return AutoencoderTask(config, train_rows, test_rows, run, accelerator)
    from .tasks.diffusion import DiffusionTask

    return DiffusionTask(config, train_rows, test_rows, run, accelerator)


def _one_process_as_asked(running: int) -> None:
    """A launcher that starts another number of processes than asked is found here."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != running:
        raise ConfigError(f"the launcher set WORLD_SIZE={asked}, but {running} processes train together")
