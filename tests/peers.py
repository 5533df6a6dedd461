"""Side by side with stock diffusers: one random network, one start, and the whole trajectory of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoised, Denoiser, TimeInput
from ldm.paths import DiscreteVP, Path
from ldm.prediction import Prediction
from ldm.sampling import SAMPLERS, time_grid

NONE = Cond(torch.zeros(1, 1, 1))
CHAIN, ZERO = DiscreteVP(), DiscreteVP(zero_terminal_snr=True)
INTEGER = TimeInput(1000, offset=-1)
T = 1000  # of both

STEPS = pytest.mark.parametrize("n", [7, 10, 25, 50])
SPACINGS = pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
KINDS = pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
OFFSET = 1  # Stable Diffusion's steps_offset

WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 0.4
START = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
# stock keeps its coefficients in float32, some of them as products of 1000 factors, and solves for others in float32:
# 1e-4 of the largest value of a state. At most 2e-5 was seen (UniPC and LMS, whose weights are large and of both signs)
TOLERANCE = 1e-4


# float32 timesteps between two nodes; their neighbours lie 1e-4 apart
BETWEEN = 1e-3


class Run(NamedTuple):
    """The state after each step, and the times that the network saw."""

    states: list[Tensor]
    seen: list[float]


def network(x: Tensor, time: Tensor) -> Tensor:
    """Depends strongly on the time: one step off in 1000 moves the result by more than the tolerance."""
    mixed = torch.tanh(torch.einsum("ij,bjhw->bihw", WEIGHT, x))
    return 0.8 * mixed + 0.5 * torch.cos(time.view(-1, 1, 1, 1) / 20) * x


def two_headed(x: Tensor, time: Tensor) -> Tensor:
    """The network, and a second half for the variance."""
    return torch.cat([network(x, time), torch.sin(3 * x) * torch.cos(time.view(-1, 1, 1, 1) / 30)], 1)


def config(spacing: str, kind: str = "epsilon", path: DiscreteVP = CHAIN, **kw: Any) -> dict[str, Any]:
    offset = OFFSET if spacing == "leading" else 0
    return dict(
        trained_betas=path.betas.tolist(), prediction_type=kind, timestep_spacing=spacing, steps_offset=offset, **kw
    )


def grid(n: int, spacing: str, path: DiscreteVP = CHAIN, **options: Any) -> Tensor:
    """Of the options, those that the spacing knows."""
    known = {"trailing": (), "leading": ("drop_last",), "linspace": ("drop_last", "whole")}[spacing]
    options = {key: value for key, value in options.items() if key in known}
    return time_grid(path, n, spacing=spacing, **options, **({"offset": OFFSET} if spacing == "leading" else {}))


def begin(times: Tensor, spacing: str) -> Tensor:
    """Stock starts at noise times sigma / alpha, or with ``leading`` at a standard deviation one too large for it."""
    return START if spacing == "leading" else START * CHAIN.sigma(times[0]).float()


def gaps_of(times: Tensor) -> list[int]:
    """How far each step goes down, in timesteps; the last beyond the first node, to where there is no noise."""
    return [*(T * (times[:-2] - times[1:-1])).round().long().tolist(), T]


class Gap(int):
    """A number of steps whose quotient T // steps is this number itself: what DDIM and PNDM go down by in stock."""

    def __rfloordiv__(self, other: int) -> int:
        return int(self)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stock_run(
    scheduler: Any,
    n: int,
    start: Tensor = START,
    net: Callable[[Tensor, Tensor], Tensor] = network,
    *,
    gaps: Sequence[int] | None = None,
    told: Sequence[float] | None = None,
    **step: Any,
) -> Run:
    """The stock loop after a plain ``set_timesteps(n)``.

    Args:
        gaps: the way down of each step in timesteps, in the place of the T // n that the scheduler takes.
        told: times for the network, in the place of the scheduler's.
    """
    scheduler.set_timesteps(n)
    x, run = start * float(getattr(scheduler, "init_noise_sigma", 1.0)), Run([], [])
    for i, t in enumerate(scheduler.timesteps):
        if gaps is not None:
            scheduler.num_inference_steps = Gap(gaps[i])
        time = t.float() if told is None else torch.tensor(told[i])
        run.seen.append(float(time))
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(model_input, time.expand(len(x))), t, x, **step).prev_sample
        run.states.append(x)
    return run


def our_run(
    name: str,
    path: Path,
    prediction: Prediction,
    time_input: TimeInput,
    times: Tensor,
    start: Tensor = START,
    net: Callable[[Tensor, Tensor], Tensor] = network,
    *,
    learned_variance: bool = False,
    **options: Any,
) -> Run:
    run = Run([], [])

    def asked(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        run.seen.append(time[0].item())
        return net(x, time)

    def watch(i: int, t: Tensor, x: Tensor, denoised: Denoised) -> None:
        run.states.append(x)

    d = Denoiser(asked, path, prediction, time_input, learned_variance=learned_variance)
    SAMPLERS[name](lambda x, t: d(x, t, NONE), path, start, times, callback=watch, **options)
    return run


def in_our_x(stock: Run, path: Path, times: Tensor) -> Run:
    """Of a scheduler that works in x / alpha."""
    alpha = path.alpha(times[1:]).tolist()
    return Run([a * x for a, x in zip(alpha, stock.states, strict=True)], stock.seen)


def after(stock: Run, steps: Sequence[int]) -> Run:
    """With those states alone in which a whole step has ended."""
    return Run([stock.states[i] for i in steps], stock.seen)


def distance(ours: Run, stock: Run) -> float:
    """The largest difference of two states, relative to the larger of the state's largest value and 1."""
    pairs = zip(ours.states, stock.states, strict=True)
    return max(((a - b).abs().max() / max(1.0, b.abs().max().item())).item() for a, b in pairs)


def assert_same(ours: Run, stock: Run, time: float = 0.0) -> None:
    """States to TOLERANCE, and the network's times to ``time``."""
    assert len(ours.seen) == len(stock.seen)
    assert max(abs(a - b) for a, b in zip(ours.seen, stock.seen, strict=True)) <= time
    assert all(x.isfinite().all() for x in stock.states) and ours.states[-1].dtype == torch.float32
    off = distance(ours, stock)
    assert off <= TOLERANCE, off
