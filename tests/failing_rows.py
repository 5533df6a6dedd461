"""Rows for ``benchmarks/gpu.py`` that end in every way in which a row can end. Imports no torch: it starts at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_jobs.rows import Settings, Skipped


def good() -> dict[str, Any]:
    return {"pid": os.getpid()}


def bad() -> dict[str, Any]:
    raise ValueError("expected 3 channels,\nfound 4")


def dead() -> dict[str, Any]:
    print("CUDA error: device-side assert triggered", flush=True)
    os._exit(9)


def absent() -> dict[str, Any]:
    raise Skipped("xformers is not installed")


def hung() -> dict[str, Any]:
    time.sleep(600)
    return {}


def rows(settings: Settings) -> dict[str, Callable[[], dict[str, Any]]]:
    functions = {"good": good, "bad": bad, "dead": dead, "absent": absent, "hung": hung, "broken": good}
    return {name: functions[name.split("/")[1].split("-")[0]] for name in settings.estimates}


def finish(settings: Settings) -> None:
    """A device that is of no more use after this row, as after an error that CUDA does not recover from."""
    with open(settings.lines, encoding="utf-8") as file:
        if "broken" in file.read():
            raise RuntimeError("the device is lost")
