"""Grids of times for sampling: float64, on the CPU, falling, n + 1 entries of which the last is 0."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..paths import NCSN, VE, DiscreteVP, Path, RectifiedFlow
from ..timesteps import shift as shifted

P = TypeVar("P", bound=Path)


def time_grid(path: Path, n: int, shift: float = 1.0, spacing: str = "uniform", **options: Any) -> Tensor:
    """The n + 1 times between which n steps are taken.

    Args:
        shift: of the times (``timesteps.shift``); for the spacings that take it: uniform and the two flow ones.
        spacing: a name in GRIDS: ``uniform``, ``flow_match``, ``flow_sigmas``, ``trailing``, ``leading``,
            ``linspace``, ``karras``, ``exponential`` or ``explicit``.
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


def flow_sigmas(
    path: Path, n: int, shift: float = 1.0, train_steps: int = 1000, from_pure_noise: bool = False
) -> Tensor:
    """What diffusers does with ``use_flow_sigmas``: n equal steps to 0, shifted. Network times are cut to integers
    there, so the order of operations is theirs, to the last bit.

    Args:
        from_pure_noise: as UniPCMultistepScheduler has it, whose first time is 1 less a millionth in float32, and whose
            others lie 1 / train_steps higher; False: as DPMSolverMultistepScheduler, from 1 - 1 / train_steps.
    """
    _only(path, RectifiedFlow, "flow_sigmas")
    times = torch.tensor(_linspace(1.0, 1 / train_steps, n + 1), dtype=torch.float64)
    if not from_pure_noise:
        return shifted(1.0 - times, shift).flip(0)  # the first was 0
    times = shifted(times[:-1], shift)
    times[0] = torch.tensor(1 - 1e-6, dtype=torch.float32)
    return _then_zero(times)


def trailing(path: Path, n: int, end: int = 0) -> Tensor:
    """From the last node in equal steps (Lin et al. 2024, table 2). ``end``: the node to end at; 0 is clean."""
    steps = _only(path, DiscreteVP, "trailing").num_train_timesteps
    _at_most(n, steps)
    step = (steps - steps / n) - steps  # numpy.arange's order of operations decides how halves are rounded
    return _nodes([round(steps + i * step) for i in range(n)], end, steps)


def leading(path: Path, n: int, offset: int = 0, end: int = 0, drop_last: bool = False) -> Tensor:
    """Whole steps up from the first node, so that the noisiest is left out (DDIM, Stable Diffusion).

    Args:
        offset: diffusers' ``steps_offset``.
        end: the node to end at: 0, or 1 for a scheduler with ``set_alpha_to_one=False``.
        drop_last: n + 1 nodes are laid out and the cleanest is left out, as DPM-Solver's and UniPC's schedulers do.
    """
    steps = _only(path, DiscreteVP, "leading").num_train_timesteps
    _at_most(n + drop_last, steps)
    step = steps // (n + drop_last)
    return _nodes([i * step + offset + 1 for i in reversed(range(drop_last, n + drop_last))], end, steps)


def linspace(path: Path, n: int, end: int = 0, whole: bool = True, drop_last: bool = False) -> Tensor:
    """From the last node to the first in equal steps, both included.

    Args:
        end: the node to end at; 0 is clean.
        whole: at the nearest nodes (diffusers' DDIM, DDPM), or anywhere between them (its Euler, Heun and LMS).
        drop_last: as in ``leading``.
    """
    steps = _only(path, DiscreteVP, "linspace").num_train_timesteps
    _at_most(n + drop_last, steps)
    indices = _linspace(0, steps - 1, n + drop_last)[drop_last:]
    return _nodes([1 + (round(i) if whole else i) for i in reversed(indices)], end, steps)


def karras(
    path: Path, n: int, sigma_min: float | None = None, sigma_max: float | None = None, rho: float = 7.0
) -> Tensor:
    """Equal steps of nu^(1 / rho), nu = sigma / alpha, from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5).

    Args:
        sigma_min: in nu; by default a chain's first node, VE's 0.002 (as EDM has it) and NCSN's own.
        sigma_max: in nu; by default nu at t = 1.
    Raises:
        ValueError: an end that is not given and that the path does not have, or that lies beyond it; rho not above 0.
    """
    if not rho > 0:
        raise ValueError(f"spacing 'karras': rho is {rho}; expected a number above 0")
    low, high = _ends(path, "karras", sigma_min, sigma_max)
    low, high = low ** (1 / rho), high ** (1 / rho)
    return _then_zero(_times_at(path, [(high + w * (low - high)) ** rho for w in _linspace(0.0, 1.0, n)]))


def exponential(path: Path, n: int, sigma_min: float | None = None, sigma_max: float | None = None) -> Tensor:
    """Equal steps of log nu, nu = sigma / alpha, from sigma_max to sigma_min, then 0: steps of one ratio, as NCSN's
    ladder has. Arguments and errors are those of ``karras``."""
    low, high = _ends(path, "exponential", sigma_min, sigma_max)
    return _then_zero(_times_at(path, [math.exp(x) for x in _linspace(math.log(high), math.log(low), n)]))


def explicit(
    path: Path, n: int, *, sigmas: Sequence[float] | None = None, timesteps: Sequence[int] | None = None
) -> Tensor:
    """A list that somebody has optimized, such as those of Align Your Steps (Sabour et al. 2024), then 0. For another
    n than the list has, log nu is interpolated over its places, as they recommend.

    Args:
        sigmas: falling values of nu = sigma / alpha; a 0 at the end is no step.
        timesteps: falling indices 0 … T-1 of a chain's nodes, as diffusers counts them.
    Raises:
        ValueError: not exactly one list, an empty one, or one that does not fall or lies beyond the path.
    """
    if (sigmas is None) == (timesteps is None):
        raise ValueError("spacing 'explicit': expected one list, either sigmas or timesteps")
    if timesteps is not None:
        steps = _only(path, DiscreteVP, "explicit").num_train_timesteps
        times = _nodes([i + 1 for i in timesteps], 0, steps)
    else:
        values = [float(x) for x in (() if sigmas is None else sigmas)]
        times = _then_zero(_times_at(path, values[:-1] if values[-1:] == [0.0] else values))
    times = check_times(times)
    if len(times) == n + 1:
        return times
    log_nu = -path.log_snr(times[:-1]) / 2
    if not log_nu.isfinite().all() or n < 2 or len(log_nu) < 2:
        raise ValueError(
            f"spacing 'explicit': a list of {len(log_nu)} cannot be interpolated to {n} steps; both must have at least "
            "2, and the first an alpha above 0"
        )
    place = torch.tensor(_linspace(0.0, len(log_nu) - 1.0, n), dtype=torch.float64)
    k = place.long().clamp(max=len(log_nu) - 2)
    return _then_zero(_times_at(path, torch.lerp(log_nu[k], log_nu[k + 1], place - k).exp().tolist()))


def _linspace(start: float, stop: float, n: int) -> list[float]:
    """numpy's order of operations: i * step + start, the last one exact."""
    step = (stop - start) / max(n - 1, 1)
    values = [i * step + start for i in range(n)]
    return [*values[:-1], stop] if n > 1 else values


def _nodes(nodes: Sequence[float], end: int, steps: int) -> Tensor:
    return torch.tensor([*nodes, end], dtype=torch.float64) / steps


def _ends(path: Path, spacing: str, low: float | None, high: float | None) -> tuple[float, float]:
    """sigma_min and sigma_max: given, or the path's own."""
    if high is None:
        high = _last_nu(path)
        if high == math.inf:
            raise ValueError(f"spacing {spacing!r}: {type(path).__name__} ends at alpha = 0, so give sigma_max")
    if low is None and isinstance(path, DiscreteVP | VE | NCSN):
        chain = isinstance(path, DiscreteVP)
        low = path.betas[0].item() if chain else 0.002 if isinstance(path, VE) else path.sigma_min
        low = math.sqrt(low / (1 - low)) if chain else low  # nu at the first node
    if low is None:
        raise ValueError(f"spacing {spacing!r}: {type(path).__name__} has no least noise of its own, so give sigma_min")
    if not 0 < low < high:
        raise ValueError(f"spacing {spacing!r}: expected 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    return low, high


def _last_nu(path: Path) -> float:
    return torch.exp(-path.log_snr(torch.ones((), dtype=torch.float64)) / 2).item()


def _times_at(path: Path, nu: list[float]) -> Tensor:
    """The times at which sigma / alpha has these values. What lies beyond the path by less than a thousandth is taken
    for its end: lists are printed with few digits."""
    last = _last_nu(path)
    for x in nu:
        if not 0 < x <= last * 1.001:
            raise ValueError(f"sigma / alpha = {x:g} is asked for; {type(path).__name__} has it in (0, {last:g}]")
    return path.time_at(-2 * torch.tensor(nu, dtype=torch.float64).log()).clamp(max=1.0)


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
    "karras": karras,
    "exponential": exponential,
    "explicit": explicit,
}
