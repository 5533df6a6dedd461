"""What `ldm check` tells is what the run then shows, and the run does not notice that it was asked."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file

from tests import forecasts
from tests.forecasts import TASKS, apart, config_of
from training import measure
from training.arithmetic import parameters
from training.cache import make_cache
from training.fit import ConfigError
from training.guards import STOPS, Interrupted
from training.journal import TIMED
from training.preflight import DoesNotFit, cached, report
from training.rehearsal import Rehearsal, Timed, times_due
from training.run import open_data, train_all
from training.sizes import network_of, sizes
from training.tasks import autoencoder, clip, diffusion

assert autoencoder and clip and diffusion  # imported before anything is timed, or forked

QUIET = Console(quiet=True)

QUICK = ("unet",)  # peaks of forked processes depend on what the test process holds: one here, the others alone


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return forecasts.pictures(tmp_path_factory.mktemp("data") / "pictures", 150)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return forecasts.parts(tmp_path_factory.mktemp("parts"))


def small(name: str, run: Path, data: Path, parts: Path, /, **sections: Any) -> Any:
    model = {
        "unet": {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 2},
        "mmdit": {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2},
        "dit": {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2},
        "autoencoder": {"block_out_channels": [8, 8]},
    }[name]
    sections = {"model": {**TASKS[name].get("model", {}), **model}, **sections}
    if name == "autoencoder":
        sections["loss"] = {"critic_layers": 1, **sections.get("loss", {})}
    return config_of(name, run, data, parts, 32, 4, 16, **sections)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TASKS])
def test_memory_and_time_are_those_of_the_run(name: str, tmp_path: Path, data: Path, parts: Path):
    """Memory within 15%; of what the run adds to Python and its libraries, within a third. Time is measured on a
    machine that others use too, and loosely here: benchmarks/forecast.py is for that."""
    config = config_of(name, tmp_path / "run", data, parts, 64)
    told, seen = apart(forecasts.told, config), apart(forecasts.seen, config)
    assert told["bytes"] == pytest.approx(seen["bytes"], rel=0.15)
    assert told["bytes"] - told["before"] == pytest.approx(seen["bytes"] - seen["before"], rel=0.34)
    assert seen["seconds"] / 4 < told["seconds"] < 4 * seen["seconds"]


def test_a_small_one_takes_seconds_and_says_nothing_but_its_table(tmp_path: Path, data: Path, parts: Path, capfd):
    config = small("unet", tmp_path / "run", data, parts)
    report([config], console=QUIET)  # imports what it needs
    capfd.readouterr()
    spent = time.process_time()
    (found,) = report([config], console=Console(width=120))
    assert found is not None and time.process_time() - spent < 10  # a core that others share counts double and more
    out, err = capfd.readouterr()
    assert err == "" and out.strip().splitlines()[0].strip() == f"{tmp_path / 'run'}: diffusion"
    assert "135 to train on, 15 held out" in out
    assert list(tmp_path.iterdir()) == []


def test_the_run_after_it_is_the_same_bit_for_bit(tmp_path: Path, data: Path, parts: Path):
    """Weights, log and checkpoints; random numbers, signals and loggers are as they were."""
    one, two = (small("mmdit", tmp_path / name / "run", data, parts) for name in ("one", "two"))
    train_all([one])
    root = logging.getLogger()
    before = (
        torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
        [signal.getsignal(s) for s in STOPS], root.level, list(root.handlers), torch.is_grad_enabled(),
    )  # fmt: skip
    report([two], console=QUIET)
    after = (
        torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
        [signal.getsignal(s) for s in STOPS], root.level, list(root.handlers), torch.is_grad_enabled(),
    )  # fmt: skip
    assert after == before
    train_all([two])
    first, second = (
        load_file(next((tmp_path / n / "run/pipeline/transformer").glob("*.safetensors"))) for n in ("one", "two")
    )
    assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)
    logs = [
        [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in file.open()]
        for file in (tmp_path / n / "run/log/metrics.jsonl" for n in ("one", "two"))
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "sections",
    [
        {"cache": {"latents": False, "text": False}},
        {"cache": {"precision": "bf16"}, "data": {"random_flip": True}},
        {"train": {"gradient_accumulation_steps": 2, "num_workers": 1}},
        {"data": {"caption_templates": ["a photo of {}", "{}"]}},
    ],
)
def test_what_the_cache_will_hold(sections: dict[str, Any], tmp_path: Path, data: Path, parts: Path):
    config = small("mmdit", tmp_path / "run", data, parts, **sections)
    assert report([config], console=QUIET)[0] is not None
    rows = open_data(config)
    pictures, captions, size = cached(config, sizes(config), rows)
    made = make_cache(config, *rows, Accelerator(cpu=True))
    assert (pictures, captions + config.cache.text) == (
        made["pictures_made"],
        made["texts_made"],
    )  # and the null prompt
    assert size == pytest.approx(made["bytes"], rel=0.1)


def test_a_large_network_is_rehearsed_briefly(tmp_path: Path, data: Path, parts: Path, monkeypatch):
    """One picture encoded, trained on and drawn, with lines of progress; the rest is scaled up."""
    monkeypatch.setattr("training.preflight.LONG", 0.0)
    monkeypatch.setattr("training.loop.train", None)  # no loop
    monkeypatch.setattr(diffusion.DiffusionTask, "held_out", None)  # no validation
    rows: list[int] = []
    loss = diffusion.DiffusionTask.loss
    monkeypatch.setattr(
        diffusion.DiffusionTask, "loss", lambda self, b, n: (rows.append(len(b["index"])), loss(self, b, n))[1]
    )
    config = small("mmdit", tmp_path / "run", data, parts, sample={"prompts": ["a", "b"]})
    console = Console(width=120, record=True, file=io.StringIO())
    (found,) = report([config], console=console)
    text = console.export_text()
    assert found is not None and found.brief and rows == [1]
    order = ["│ forecast", "check, 1 of 3: opens", "check, 2 of 3: trains", "check, 3 of 3: draws", "│ a step"]
    assert [text.index(x) for x in order] == sorted(text.index(x) for x in order) and "s left)" in text
    assert min(found.step, found.picture, found.caption, *(found.once[k] for k in ("validation", "samples"))) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("long", [0.0, 1e9])  # a brief rehearsal, and the whole one
def test_a_signal_in_a_rehearsal_ends_it_and_leaves_nothing(
    long: float, tmp_path: Path, data: Path, parts: Path, monkeypatch, caplog
):
    def drawing(self: Any, file: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr("training.preflight.LONG", long)
    monkeypatch.setattr(diffusion.DiffusionTask, "sample", drawing)
    before = [signal.getsignal(s) for s in STOPS]
    with caplog.at_level("WARNING", "training"), pytest.raises(Interrupted) as stopped:
        report([small("mmdit", tmp_path / "run", data, parts)], console=QUIET)
    assert stopped.value.code == 75 and "nothing has begun" in caplog.text
    assert list(tmp_path.iterdir()) == [] and [signal.getsignal(s) for s in STOPS] == before


def test_a_critic_that_joins_later_counts_from_then_on(tmp_path: Path, data: Path, parts: Path):
    config = small("autoencoder", tmp_path / "run", data, parts, loss={"gan_weight": 0.5, "gan_start": 10_000_000})
    (never,) = report([config], console=QUIET)
    assert never is not None and never.alone == never.step
    config = config.model_copy(update={"train": config.train.model_copy(update={"images": 40_000_000})})
    (later,) = report([config], console=QUIET)
    assert later is not None
    assert later.spent["steps"] == pytest.approx(2_500_000 * later.alone + 7_500_000 * later.step)


def test_a_run_that_builds_on_one_that_does_not_fit(tmp_path: Path, data: Path, parts: Path, monkeypatch):
    vae = small("autoencoder", tmp_path / "a/run", data, parts)
    unet = small("unet", tmp_path / "b/run", data, parts, vae={"pretrained": str(tmp_path / "a/run")})
    assert all(found is not None for found in report([vae, unet], console=QUIET))  # folders of one name, too
    monkeypatch.setattr(measure, "free_memory", lambda device: 2**20)
    monkeypatch.setattr("training.run.build", None)  # nothing is built
    with pytest.raises(DoesNotFit) as refusal:
        report([vae, unet], console=QUIET)
    first, second, last = str(refusal.value).splitlines()
    assert "a/run: does not fit: a step takes" in first and "b/run: does not fit" in second  # both are named
    assert "1.0 MiB that are free on cpu" in first and "--no-check" in last
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_one_that_is_not_made_is_no_refusal(tmp_path: Path, data: Path, parts: Path):
    """The first of two was stopped: what builds on it cannot be rehearsed, and its size is known."""
    vae = small("autoencoder", tmp_path / "a/run", data, parts)
    unet = small("unet", tmp_path / "b/run", data, parts, vae={"pretrained": str(tmp_path / "a/run")})
    assert report([unet], earlier=[vae], console=QUIET) == [None]


@pytest.mark.parametrize("world", [1, 8])
def test_gradients_travel_in_buckets(world: int, tmp_path: Path, data: Path, parts: Path, monkeypatch):
    """DDP holds each of them a second time."""
    monkeypatch.setattr("training.preflight.rehearse", lambda *a: Rehearsal(1.0, 1.0, 0))
    config = small("unet", tmp_path / "run", data, parts, train={"processes": world})
    with torch.device("meta"):
        trained, _ = parameters(network_of(config)[0]())
    console = Console(width=300, record=True, file=io.StringIO())
    report([config], console=console)
    assert (f"buckets {4 * trained / 2**20:.1f} MiB" in console.export_text()) == (world > 1)


def test_a_missing_package_or_file_is_one_line(tmp_path: Path, data: Path, parts: Path):
    broken = tmp_path / "vae"
    broken.mkdir()
    (broken / "config.json").write_text((parts / "vae/config.json").read_text())
    config = small("unet", tmp_path / "run", data, parts, vae={"pretrained": str(broken)})
    with pytest.raises(ConfigError, match="a part that the run builds on cannot be opened"):
        report([config], console=QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


def test_how_often_something_is_due_is_what_the_loop_does():
    for every in (1, 7, 16, 24, 32, 1000):
        for per_step in (4, 16, 20):
            for steps in (1, 5, 9):
                clock = [per_step * (i + 1) for i in range(steps)]
                due = [n for n in clock if n // every != (n - per_step) // every or n == clock[-1]]
                assert times_due(every, per_step, steps) == len(due)


def test_a_step_is_the_median_without_the_first():
    timed = object.__new__(Timed)
    timed.starts = [(0, 0.0), (4, 9.0), (8, 10.0), (12, 11.0), (16, 12.0), (20, 22.0), (24, 25.0), (28, 28.0)]
    assert timed.step(0, 16) == 1.0 and timed.step(16) == 3.0
