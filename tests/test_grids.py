"""Grids of times, against those of stock schedulers and against their own equations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import AysSchedules
from torch import Tensor

from ldm.denoiser import TimeInput
from ldm.paths import NCSN, VE, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow
from ldm.sampling import GRIDS, check_times, time_grid

CHAIN, ZERO = DiscreteVP(), DiscreteVP(zero_terminal_snr=True)
INTEGER = TimeInput(1000, offset=-1)
BETAS: dict[str, Any] = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
# numpy's arange gives stock one step too many at some of these: n = 61 is the first
COUNTS = [*range(1, 61), 75, 100, 150, 250, 333, 500]
SPACINGS = ["trailing", "leading", "linspace"]


def nu(path: Path, times: Tensor) -> Tensor:
    return path.sigma(times) / path.alpha(times)


def assert_sigmas(ours: Tensor, stock: Any) -> None:
    """Theirs come from 1 - alpha^2 in float32, which starts at beta = 8.5e-4: known to 3e-8 / beta / 2."""
    torch.testing.assert_close(ours, torch.as_tensor(stock).double(), rtol=2e-5, atol=0)


# --- flows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, 1.15])
def test_flow_grids_are_the_stock_ones(shift: float) -> None:
    path, flow = RectifiedFlow(), dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    dpm, unipc = (kind(**flow) for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler))
    for n in [*COUNTS, 1000]:
        euler.set_timesteps(n)
        times = time_grid(path, n, shift=shift, spacing="flow_match")
        assert torch.equal(times.float(), torch.as_tensor(euler.sigmas))
        assert torch.equal(TimeInput(1000)(times[:-1], path).float(), euler.timesteps)
        for stock, options in ((dpm, {}), (unipc, {"from_pure_noise": True})):
            stock.set_timesteps(n)
            times = time_grid(path, n, shift=shift, spacing="flow_sigmas", **options)
            assert torch.equal(times.float(), torch.as_tensor(stock.sigmas))
            asked = TimeInput(1000, floor=True)(times[:-1], path)
            assert torch.equal(asked.long(), stock.timesteps)  # integers: no tolerance


def test_flow_match_shifts_its_low_end_twice() -> None:
    times = time_grid(RectifiedFlow(), 7, shift=3.0, spacing="flow_match")
    assert abs(1000 * times[-2].item() - 8.9) < 0.1


def test_uniform_grid_and_its_shift() -> None:
    assert time_grid(CosineVP(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    torch.testing.assert_close(time_grid(CosineVP(), 2, shift=3.0), torch.tensor([1, 0.75, 0], dtype=torch.float64))


# --- the nodes of a chain --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
def test_chain_grids_are_the_stock_ones(spacing: Any) -> None:
    for n in [*COUNTS, 1000]:
        stock = DDIMScheduler(timestep_spacing=spacing)
        stock.set_timesteps(n)
        times = time_grid(CHAIN, n, spacing=spacing)
        assert torch.equal(INTEGER(times[:-1], CHAIN).round().long(), stock.timesteps) and times[-1] == 0


def test_stock_trailing_has_a_step_too_many_at_61() -> None:
    stock = DDIMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(61)
    times = time_grid(CHAIN, 61, spacing="trailing")
    assert len(stock.timesteps) == 62 and len(times) == 62  # theirs goes on to -1; ours counts the end
    assert torch.equal(INTEGER(times[:-1], CHAIN).round().long(), stock.timesteps[:-1])
    assert stock.timesteps[-1] == -1


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_solvers_lay_out_one_point_more(kind: Any, spacing: str, offset: int) -> None:
    stock = kind(**BETAS, timestep_spacing=spacing, steps_offset=offset)
    options = {"offset": offset} if spacing == "leading" else {}
    for n in COUNTS:
        stock.set_timesteps(n)
        times = time_grid(CHAIN, n, spacing=spacing, drop_last=True, **options)
        assert torch.equal(INTEGER(times[:-1], CHAIN).round().long(), stock.timesteps)
        assert_sigmas(nu(CHAIN, times), stock.sigmas)


def test_linspace_between_the_nodes() -> None:
    stock = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    for n in COUNTS:
        stock.set_timesteps(n)
        times = time_grid(CHAIN, n, spacing="linspace", whole=False)
        # an index of float32 below 1000 is known to 3e-5
        torch.testing.assert_close(INTEGER(times[:-1], CHAIN), stock.timesteps.double(), rtol=0, atol=6e-5)
        assert_sigmas(nu(CHAIN, times), stock.sigmas)


def test_the_end_may_be_the_first_node() -> None:
    for spacing, options in (("trailing", {}), ("leading", {"offset": 1}), ("linspace", {"drop_last": True})):
        times = time_grid(CHAIN, 10, spacing=spacing, end=1, **options)
        assert times[-1] == 0.001 and torch.equal(times[:-1], time_grid(CHAIN, 10, spacing=spacing, **options)[:-1])


# --- sigma / alpha ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_sigmas_of_a_chain_are_the_stock_ones(kind: str, schedule: Any) -> None:
    path = DiscreteVP(schedule=schedule)
    for stock_kind in (DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        stock = stock_kind(**BETAS | {"beta_schedule": schedule, f"use_{kind}_sigmas": True})
        for n in COUNTS[1:]:  # with 1 step, stock Euler starts at the least noise
            stock.set_timesteps(n)
            times = time_grid(path, n, spacing=kind)
            rtol = 5e-4 if schedule == "squaredcos_cap_v2" else 2e-5  # as above; the cosine starts at beta = 4e-5
            torch.testing.assert_close(nu(path, times), stock.sigmas.double(), rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize("given", [{}, {"sigma_min": 0.01, "rho": 5.0}, {"sigma_max": 20.0}])
def test_sigmas_of_edm(kind: Any, given: dict[str, float]) -> None:
    if kind == "exponential":
        given = {key: value for key, value in given.items() if key != "rho"}
    stock = EDMEulerScheduler(sigma_schedule=kind, **given)
    for n in COUNTS[1:]:
        stock.set_timesteps(n)
        for path in (VE(80.0), VE(given.get("sigma_max", 80.0))):
            assert_sigmas(nu(path, time_grid(path, n, spacing=kind, **given)), stock.sigmas)


def test_karras_is_equation_5_on_any_path() -> None:
    n, low, high, rho = 6, 0.01, 30.0, 7.0
    i = np.arange(n)
    expected = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    for path in (RectifiedFlow(), CosineVP(), LinearVP(), VE(), NCSN(), ZERO):
        times = time_grid(path, n, spacing="karras", sigma_min=low, sigma_max=high, rho=rho)
        assert times.dtype == torch.float64 and times[-1] == 0
        torch.testing.assert_close(nu(path, times[:-1]), torch.from_numpy(expected), rtol=1e-9, atol=0)


def test_exponential_steps_are_of_one_ratio() -> None:
    values = nu(NCSN(), time_grid(NCSN(), 10, spacing="exponential")[:-1])
    assert math.isclose(values[-1].item(), 0.01, rel_tol=1e-9)  # the path's own ends
    ratios = values[1:] / values[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(9), rtol=1e-9, atol=0)
    assert len(time_grid(VE(), 1, spacing="exponential")) == 2


# --- lists -----------------------------------------------------------------------------------------------------------

SIGMAS, TIMESTEPS = AysSchedules["StableDiffusionSigmas"], AysSchedules["StableDiffusionTimesteps"]


@pytest.mark.parametrize("model", ["StableDiffusion", "StableDiffusionXL"])
def test_align_your_steps(model: str) -> None:
    timesteps, sigmas = AysSchedules[f"{model}Timesteps"], AysSchedules[f"{model}Sigmas"]
    times = time_grid(CHAIN, 10, spacing="explicit", timesteps=timesteps)
    assert INTEGER(times[:-1], CHAIN).round().long().tolist() == timesteps and times[-1] == 0
    by_sigma = time_grid(CHAIN, 10, spacing="explicit", sigmas=sigmas)
    # the first, 14.615, is a hair past the chain's end
    torch.testing.assert_close(nu(CHAIN, by_sigma), torch.tensor(sigmas, dtype=torch.float64), rtol=1e-4, atol=0)
    stock = EulerDiscreteScheduler(**BETAS)
    stock.set_timesteps(timesteps=timesteps)
    assert_sigmas(nu(CHAIN, times), stock.sigmas)
    assert (by_sigma - times).abs().max() < 0.015  # one list, given in two ways


@pytest.mark.parametrize("n", [2, 5, 9, 11, 20, 40])
def test_a_list_is_interpolated_in_log_nu(n: int) -> None:
    times = time_grid(VE(), n, spacing="explicit", sigmas=SIGMAS)
    given = np.log(SIGMAS[:-1])
    expected = np.exp(np.interp(np.linspace(0, len(given) - 1, n), np.arange(len(given)), given))
    torch.testing.assert_close(nu(VE(), times[:-1]), torch.from_numpy(expected), rtol=1e-12, atol=0)
    assert len(times) == n + 1 and times[-1] == 0
    chain = time_grid(CHAIN, n, spacing="explicit", timesteps=TIMESTEPS)
    assert chain[0] == 1 and math.isclose(chain[-2].item(), 0.025)  # both ends are kept


def test_a_zero_snr_chain_takes_a_list_of_its_own_length() -> None:
    assert time_grid(ZERO, 10, spacing="explicit", timesteps=TIMESTEPS)[0] == 1
    with pytest.raises(ValueError, match="alpha above 0"):
        time_grid(ZERO, 20, spacing="explicit", timesteps=TIMESTEPS)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_every_grid_is_float64_and_falls_to_0() -> None:
    for name in GRIDS:
        path = RectifiedFlow() if name in ("flow_match", "flow_sigmas") else CHAIN
        options = {"sigmas": SIGMAS} if name == "explicit" else {}
        times = time_grid(path, 12, spacing=name, **options)
        assert times.dtype == torch.float64 and times.shape == (13,) and times[-1] == 0 and (times.diff() < 0).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: time_grid(CHAIN, 5, spacing="karass"), "'karass' is not one of uniform"),
        (lambda: time_grid(CHAIN, 0), "0 steps"),
        (lambda: time_grid(CHAIN, 1001, spacing="trailing"), "only 1000"),
        (lambda: time_grid(CHAIN, 1000, spacing="linspace", drop_last=True), "only 1000"),
        (lambda: time_grid(RectifiedFlow(), 5, spacing="trailing"), "made for DiscreteVP, not for RectifiedFlow"),
        (lambda: time_grid(CHAIN, 5, spacing="flow_match"), "made for RectifiedFlow"),
        (lambda: time_grid(CHAIN, 5, shift=3.0, spacing="trailing"), "takes no 'shift'"),
        (lambda: time_grid(RectifiedFlow(), 5, offset=1), "takes no 'offset'"),
        (lambda: time_grid(CHAIN, 1000, spacing="trailing", end=1), "must fall"),
        (lambda: time_grid(CHAIN, 10, spacing="linspace", end=1), "must fall"),
        (lambda: time_grid(CHAIN, 1000, spacing="leading", offset=1), r"\[0, 1\]"),
        (lambda: time_grid(RectifiedFlow(), 5, shift=-1.0), "shift is -1"),
        (lambda: time_grid(RectifiedFlow(), 5, spacing="karras"), "ends at alpha = 0, so give sigma_max"),
        (lambda: time_grid(ZERO, 5, spacing="exponential"), "ends at alpha = 0, so give sigma_max"),
        (lambda: time_grid(CosineVP(), 5, spacing="karras", sigma_max=9.0), "so give sigma_min"),
        (lambda: time_grid(VE(), 5, spacing="karras", sigma_min=90.0), "0 < sigma_min < sigma_max, got 90 and 80"),
        (lambda: time_grid(VE(), 5, spacing="exponential", sigma_min=0.0), "got 0 and 80"),
        (lambda: time_grid(CHAIN, 5, spacing="karras", sigma_max=20.0), r"= 20 is asked for.*\(0, 14\.6"),
        (lambda: time_grid(VE(), 5, spacing="karras", rho=0.0), "rho is 0"),
        (lambda: time_grid(VE(), 5, spacing="exponential", rho=3.0), "takes no 'rho'"),
        (lambda: time_grid(CHAIN, 10, spacing="explicit"), "either sigmas or timesteps"),
        (lambda: time_grid(CHAIN, 10, spacing="explicit", sigmas=SIGMAS, timesteps=TIMESTEPS), "expected one list"),
        (lambda: time_grid(VE(), 10, spacing="explicit", timesteps=TIMESTEPS), "made for DiscreteVP"),
        (lambda: time_grid(VE(), 10, spacing="explicit", sigmas=SIGMAS[::-1]), "0 is asked for"),
        (lambda: time_grid(VE(), 3, spacing="explicit", sigmas=[1.0, 2.0, 0.5]), r"entry 1 .* is not below entry 0"),
        (lambda: time_grid(CHAIN, 3, spacing="explicit", timesteps=[1000, 500, 0]), r"\[0, 1\]"),
        (lambda: time_grid(VE(), 3, spacing="explicit", sigmas=[]), r"\(n \+ 1,\)"),
        (lambda: time_grid(VE(), 1, spacing="explicit", sigmas=SIGMAS), "10 cannot be interpolated to 1 step"),
        (lambda: check_times(torch.tensor([1.0, 0.5, 0.5, 0.0])), r"entry 2 \(0\.5\) is not below entry 1"),
        (lambda: check_times(torch.tensor([0.0, 1.0])), "must fall"),
        (lambda: check_times(torch.tensor([1.5, 0.0])), r"\[0, 1\]"),
        (lambda: check_times(torch.tensor([float("nan"), 0.0])), r"\[0, 1\]"),
        (lambda: check_times(torch.tensor([1.0])), r"\(n \+ 1,\)"),
    ],
)
def test_bad_input_is_named(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
