"""What the parent process tells a worker, and how a row says that it cannot be had. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """
    Args:
        folder: for files; it goes away with the process.
        lines: file that gets a line of JSON when a row begins, and one when it is done.
        device: ``cuda`` or ``cpu``.
        tiny: tiny networks.
        deadline: ``time.time()`` at which the process is killed.
        estimates: seconds that each row is expected to take, in the order in which they are measured.
        peak_tflops: bf16 matrix products on this device, as measured; None: not measured.
    """

    folder: str
    lines: str
    device: str
    tiny: bool
    deadline: float
    estimates: dict[str, float]
    peak_tflops: float | None = None


class Skipped(Exception):
    """A row that this machine does not have, and why."""
