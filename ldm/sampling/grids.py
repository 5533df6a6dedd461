"""Grids of times for sampling: float64, on the CPU, falling, n + 1 entries of which the last is 0."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..paths import DiscreteVP, Path, RectifiedFlow
from ..timesteps import shift as shifted

P = TypeVar("P", bound=Path)


def time_grid(path: Path, n: int, shift: float = 1.0, spacing: str = "uniform", **options: Any) -> Tensor:
    """The n + 1 times between which n steps are taken.

    Args:
        shift: of the times (``timesteps.shift``); for the spacings that take it: uniform and the two flow ones.
        spacing: ``uniform``, ``flow_match``, ``flow_sigmas``, ``trailing``, ``leading`` or ``linspace``: GRIDS.
        options: the spacing's own.
    Raises:
        ValueError: an unknown spacing or option, one that the path does not have, or no steps.
    """
    if spacing not in GRIDS:
        raise ValueError(f"spacing {spacing!r} is not one of {', '.join(GRIDS)}")
    if n < 1:
        raise ValueError(f"{n} steps asked for; at least 1 is needed")
    grid, known = GRIDS[spacing], inspect.signature(GRIDS[spacing]).parameters
    if shift != 1.0:
        options["shift"] = shift
    for name in options:
        if name not in known or name in ("path", "n"):
            raise ValueError(f"spacing {spacing!r} takes no {name!r}; it takes {', '.join(list(known)[2:])}")
    return check_times(grid(path, n, **options))


def check_times(times: Tensor) -> Tensor:
    """The grid in float64 on the CPU.

    Raises:
        ValueError: fewer than two times, not 1-D, outside [0, 1], or not falling.
    """
    times = torch.as_tensor(times).detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times have shape {tuple(times.shape)}; expected (n + 1,) with n >= 1")
    if not ((times >= 0) & (times <= 1)).all():
        raise ValueError(f"times lie in [{times.min():g}, {times.max():g}]; expected [0, 1], 1 at the noise")
    falls = times[1:] < times[:-1]
    if not falls.all():
        i = int((~falls).nonzero()[0])
        raise ValueError(f"times must fall, but entry {i + 1} ({times[i + 1]:g}) is not below entry {i} ({times[i]:g})")
    return times


def uniform(path: Path, n: int, shift: float = 1.0) -> Tensor:
    """Equal steps from 1 to 0, then the shift."""
    return shifted(torch.linspace(1, 0, n + 1, dtype=torch.float64), shift)


def flow_match(path: Path, n: int, shift: float = 1.0, train_steps: int = 1000) -> Tensor:
    """What diffusers' FlowMatchEulerDiscreteScheduler does when called with n alone: equal steps down to the last
    *shifted* training time, all shifted once more, then 0. In float32, as there."""
    _only(path, RectifiedFlow, "flow_match")
    low = shifted(torch.tensor(1 / train_steps, dtype=torch.float32), shift).item()
    times = torch.tensor(_linspace(float(train_steps), low * train_steps, n), dtype=torch.float64) / train_steps
    return _then_zero(shifted(times, shift).float().double())


def flow_sigmas(path: Path, n: int, shift: float = 1.0, train_steps: int = 1000) -> Tensor:
    """What diffusers' DPMSolverMultistepScheduler does with ``use_flow_sigmas``: equal steps from 1 - 1/train_steps
    down, shifted. Network times are cut to integers there, so the order of operations is theirs, to the last bit."""
    _only(path, RectifiedFlow, "flow_sigmas")
    times = 1.0 - torch.tensor(_linspace(1.0, 1 / train_steps, n + 1), dtype=torch.float64)
    return shifted(times, shift).flip(0)  # the first was 0


def trailing(path: Path, n: int, end: int = 0) -> Tensor:
    """From the last node in equal steps (Lin et al. 2024, table 2). ``end``: the node to end at; 0 is clean."""
    steps = _only(path, DiscreteVP, "trailing").num_train_timesteps
    _at_most(n, steps)
    step = (steps - steps / n) - steps  # numpy.arange's order of operations decides how halves are rounded
    return _nodes([steps + i * step for i in range(n)], end, steps)


def leading(path: Path, n: int, offset: int = 0, end: int = 0) -> Tensor:
    """Whole steps up from the first node, so that the noisiest is left out (DDIM, Stable Diffusion).

    Args:
        offset: diffusers' ``steps_offset``.
        end: the node to end at: 0, or 1 for a scheduler with ``set_alpha_to_one=False``.
    """
    steps = _only(path, DiscreteVP, "leading").num_train_timesteps
    _at_most(n, steps)
    return _nodes([i * (steps // n) + offset + 1 for i in reversed(range(n))], end, steps)


def linspace(path: Path, n: int, end: int = 0) -> Tensor:
    """From the last node to the first in equal steps, both included."""
    steps = _only(path, DiscreteVP, "linspace").num_train_timesteps
    _at_most(n, steps)
    return _nodes([round(x) + 1 for x in reversed(_linspace(0, steps - 1, n))], end, steps)


def _linspace(start: float, stop: float, n: int) -> list[float]:
    """numpy's order of operations: i * step + start, the last one exact."""
    step = (stop - start) / max(n - 1, 1)
    values = [i * step + start for i in range(n)]
    return [*values[:-1], stop] if n > 1 else values


def _nodes(nodes: list[float], end: int, steps: int) -> Tensor:
    return torch.tensor([*(round(x) for x in nodes), end], dtype=torch.float64) / steps


def _then_zero(times: Tensor) -> Tensor:
    return torch.cat([times, times.new_zeros(1)])


def _only(path: Path, kind: type[P], spacing: str) -> P:
    if not isinstance(path, kind):
        raise ValueError(f"spacing {spacing!r} is made for {kind.__name__}, not for {type(path).__name__}")
    return path


def _at_most(n: int, steps: int) -> None:
    if n > steps:
        raise ValueError(f"{n} steps asked for, but the path has only {steps}")


GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "flow_match": flow_match,
    "flow_sigmas": flow_sigmas,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
}
