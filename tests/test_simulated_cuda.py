"""Every task, every family and the pipelines on a CUDA device made of CPU tensors (``simulated_cuda``): red for mixed
devices, for what CUDA's kernels refuse, for weights that train in half precision, for waits of the host in the steady
step (the fourth and the fifth of six) or between two steps of a sampler, and for a resume that ends elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest

from tests import simulated_faults
from tests.simulated_cuda import build
from tests.simulated_runs import ADAPT, DRAW, FAMILIES, PRODUCT, SCRATCH

ROOT = Path(__file__).resolve().parent.parent
NAMES = (*SCRATCH, *ADAPT, *DRAW, "command line")
WAYS = ("whole", "lora", "dora", "token", "text", "inpaint")

# Waits of the host that are meant, by kind, file and function: and why.
ALLOWED = {
    ("event.synchronize", "training/guards.py", "Watchman._read"): "for the step before: the device is a step ahead",
    ("item", "training/optimizers.py", "Stepper.step"): "these optimizers count their steps on the host, or read each "
    "tensor themselves; AdamW and Muon do not wait",
    ("D2H copy", "training/ema.py", "EMA._weights.<locals>.<listcomp>"): "ema.device: cpu, which is asked for",
    ("D2H copy", "training/ema.py", "_lerp"): "the flag that goes with these weights",
    ("item", "ldm/models/text.py", "TextEncoder.forward"): "transformers looks whether the mask hides anything in T5; "
    "PixArt's captions that are not cached",
}
# Cases that are known to fail: a pattern of the error, and what it is.
EXPECTED: dict[str, tuple[str, str]] = {}


def ran(folder: Path, names: Iterable[str], seconds: float) -> dict[str, dict[str, Any]]:
    """By case what became of it; all are run in one process, which imports torch after the device is there."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: tests/test_gpu.py runs on it")
    try:
        build.library()
    except build.CannotBuild as error:
        pytest.skip(f"the simulated device cannot be built: {error}")
    command = [sys.executable, "-m", "tests.simulated_runs", str(folder), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    file = folder / "results.jsonl"
    found = {r["name"]: r for r in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}
    missing = {"error": f"the process ended before it ({done.returncode}): {done.stderr[-2000:]}", "waits": []}
    return {name: found.get(name, missing) for name in names}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return ran(tmp_path_factory.mktemp("simulated"), (*NAMES, "rules", *simulated_faults.RUNS), 580)


def problems(result: dict[str, Any]) -> list[str]:
    """What is wrong with a case, in words: its error, and the waits that no one allowed."""
    waits = [w for w in result["waits"] if (w[0], w[1], w[3]) not in ALLOWED]
    found = [f"the host waits: {kind} at {file}:{line} ({function})" for kind, file, line, function in waits]
    return [*([result["error"]] if result["error"] else []), *found]


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_as_cuda_would(name: str, results: dict[str, dict[str, Any]]) -> None:
    found = problems(results[name])
    if name in EXPECTED:
        pattern, what = EXPECTED[name]
        assert re.search(pattern, "\n".join(found)), f"expected fault: {what}; take the mark off: {found}"
        pytest.xfail(what)
    assert not found, "\n".join(found)


def test_the_devices_rules(results: dict[str, dict[str, Any]]) -> None:
    assert not results["rules"]["error"], results["rules"]["error"]


@pytest.mark.parametrize("name", simulated_faults.RUNS)
def test_a_fault_is_seen(name: str, results: dict[str, dict[str, Any]]) -> None:
    expected, result = simulated_faults.RUNS[name], results[name]
    if isinstance(expected, str):
        assert re.search(expected, result["error"]), result["error"] or "nothing was said"
    else:
        assert not result["error"], result["error"]
        told = problems(result)
        wanted = [f"the host waits: {kind} at training/gradients.py" for kind in expected]
        assert [line.partition(".py")[0] + ".py" for line in sorted(told)] == wanted, told


def test_what_is_allowed_still_happens(results: dict[str, dict[str, Any]]) -> None:
    """A wait that has gone leaves the list."""
    seen = {(w[0], w[1], w[3]) for name in NAMES for w in results[name]["waits"]}
    assert not ALLOWED.keys() - seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_product(tmp_path: Path) -> None:
    found = {name: problems(result) for name, result in ran(tmp_path, PRODUCT, 3500).items()}
    assert not any(found.values()), {name: told for name, told in found.items() if told}


@pytest.mark.gpu
def test_the_rules_are_those_of_a_real_device() -> None:
    simulated_faults.check_rules_on_a_gpu()


def test_the_cases_cover() -> None:
    """Each family in each way that it has; both precisions in each family and each way; every optimizer that runs
    without kernels of CUDA's own (8-bit AdamW is bitsandbytes'); a resume in each family and task."""
    from training.schema.optim import OptimizerSection

    union, *_ = get_args(OptimizerSection)
    kinds = {get_args(section.model_fields["name"].annotation)[0] for section in get_args(union)}
    used, halves, resumed = {"adamw"}, set(), set()
    for name, (family, train, sections) in ADAPT.items():
        way = name.split()[1]
        used.add(sections.get("optimizer", {}).get("name", "adamw"))
        halves |= {(family, train["mixed_precision"]), (way, train["mixed_precision"])}
        resumed |= {family} if train.get("resume") else set()
    assert used == kinds - {"adamw_8bit"}
    wanted = {f"{family} {way}" for family in FAMILIES for way in WAYS}
    assert wanted - ADAPT.keys() == {"sd3 inpaint", "pixart inpaint"}  # needs 16 latent channels; there is none
    assert halves >= {(x, half) for x in (*FAMILIES, *WAYS) for half in ("bf16", "fp16")}
    assert resumed == set(FAMILIES)
    assert {family for family, *_ in DRAW.values()} == set(FAMILIES)
