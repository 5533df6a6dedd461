"""Trajectories against stock diffusers: what a plain ``set_timesteps(n)`` gives there, our grids and samplers give.

Where stock is odd, the test says how, mends it for the comparison, and asserts that stock as it is differs from ours.
The solvers of several steps are in tests/test_peer_solvers.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from peers import (
    BETWEEN,
    CHAIN,
    INTEGER,
    KINDS,
    SPACINGS,
    START,
    STEPS,
    TOLERANCE,
    ZERO,
    Run,
    T,
    after,
    assert_same,
    begin,
    config,
    distance,
    gaps_of,
    grid,
    in_our_x,
    our_run,
    seeded,
    stock_run,
    two_headed,
)

from ldm.denoiser import TimeInput
from ldm.paths import VE, RectifiedFlow
from ldm.prediction import PREDICTIONS, Flow, Karras, V
from ldm.sampling import time_grid

FLOW = RectifiedFlow()


# --- x0 and noise, one step at a time --------------------------------------------------------------------------------


@STEPS
@SPACINGS
@KINDS
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(n: int, spacing: str, kind: str, eta: float) -> None:
    """Stock goes down by T // n timesteps whatever its grid is. Told the grid's own gaps, it is what ours is."""
    times = grid(n, spacing)
    ours = our_run("ddim", CHAIN, PREDICTIONS[kind](), INTEGER, times, eta=eta, generator=seeded())

    def stock(gaps: list[int] | None) -> Run:
        scheduler = DDIMScheduler(**config(spacing, kind, clip_sample=False, set_alpha_to_one=True))
        return stock_run(scheduler, n, gaps=gaps, eta=eta, generator=seeded())

    assert_same(ours, stock(gaps_of(times)))
    if all(gap == T // n for gap in gaps_of(times)[:-1]):
        assert_same(ours, stock(None))
    else:
        assert distance(ours, stock(None)) > 10 * TOLERANCE


@STEPS
def test_ddim_from_no_signal_at_all(n: int) -> None:
    times = grid(n, "trailing", ZERO)
    scheduler = DDIMScheduler(**config("trailing", "v_prediction", ZERO, clip_sample=False))
    assert_same(our_run("ddim", ZERO, V(), INTEGER, times), stock_run(scheduler, n, gaps=gaps_of(times)))


class Quiet(DDPMScheduler):
    """Stock adds noise in the last step, too, unless its timestep is 0: next to none with fixed_small, but sqrt(beta)
    with fixed_large. Ho et al. 2020, algorithm 2, and ours end with the mean."""

    def _get_variance(self, t, *args, **kw):
        variance = super()._get_variance(t, *args, **kw)
        if self.previous_timestep(t) >= 0:
            return variance
        return torch.full_like(variance, -math.inf if self.config.variance_type == "learned_range" else 0.0)


@STEPS
@SPACINGS
@KINDS
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_ddpm(n: int, spacing: str, kind: str, variance: str) -> None:
    net: dict[str, Any] = dict(net=two_headed) if variance == "learned" else {}
    stock_name = "learned_range" if variance == "learned" else variance
    options = config(spacing, kind, clip_sample=False, variance_type=stock_name)
    ours = our_run(
        "ddpm", CHAIN, PREDICTIONS[kind](), INTEGER, grid(n, spacing), variance=variance,
        learned_variance=variance == "learned", generator=seeded(), **net,
    )  # fmt: skip
    assert_same(ours, stock_run(Quiet(**options), n, generator=seeded(), **net))
    as_it_is = stock_run(DDPMScheduler(**options), n, generator=seeded(), **net)
    if variance == "fixed_small" or as_it_is.seen[-1] == 0:
        assert_same(ours, as_it_is)
    elif variance == "fixed_large":
        assert distance(ours, as_it_is) > 10 * TOLERANCE


# --- over sigma / alpha ----------------------------------------------------------------------------------------------


@STEPS
@SPACINGS
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "kind_of"),
    [
        ("euler", EulerDiscreteScheduler),
        ("euler_ancestral", EulerAncestralDiscreteScheduler),
        ("heun", HeunDiscreteScheduler),
        ("lms", LMSDiscreteScheduler),
    ],
)
def test_euler_and_its_family(n: int, spacing: str, kind: str, name: str, kind_of: Any) -> None:
    times = grid(n, spacing, whole=False)
    noise: dict[str, Any] = dict(generator=seeded()) if name == "euler_ancestral" else {}
    stock = stock_run(kind_of(**config(spacing, kind)), n, **noise)
    if name == "heun":
        stock = after(stock, [*range(1, 2 * n - 2, 2), 2 * n - 2])
    noise = dict(generator=seeded()) if noise else {}
    ours = our_run(name, CHAIN, PREDICTIONS[kind](), INTEGER, times, begin(times, spacing), **noise)
    assert_same(ours, in_our_x(stock, CHAIN, times), BETWEEN)


@STEPS
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "kind_of"), [("euler", FlowMatchEulerDiscreteScheduler), ("flow_heun", FlowMatchHeunDiscreteScheduler)]
)
def test_flow_matching(n: int, shift: float, name: str, kind_of: Any) -> None:
    stock = stock_run(kind_of(shift=shift), n)
    if name == "flow_heun":
        stock = after(stock, [*range(1, 2 * n - 2, 2), 2 * n - 2])
    times = time_grid(FLOW, n, shift=shift, spacing="flow_match")
    assert_same(our_run(name, FLOW, Flow(), TimeInput(1000), times), stock, BETWEEN)


@STEPS
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm(n: int, spacing: Any) -> None:
    path, told = VE(80.0), TimeInput(0.25, log_sigma=True)
    stock = stock_run(EDMEulerScheduler(sigma_schedule=spacing), n)
    ours = our_run("euler", path, Karras(0.5), told, time_grid(path, n, spacing=spacing), START * math.hypot(80, 1))
    assert_same(ours, stock, BETWEEN)


# --- the number of steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind_of", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_stock_takes_a_step_too_many(kind_of: Any) -> None:
    """1000 / 61 is not exact, and numpy.arange goes on for once more, to timestep -1. Ours has the 61 asked for."""
    scheduler = kind_of(**config("trailing"))
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps) == 62 and scheduler.timesteps[-1] == -1
    assert len(time_grid(CHAIN, 61, spacing="trailing")) == 62 and T * time_grid(CHAIN, 61, spacing="trailing")[-2] > 1
