"""Trajectories of the exponential integrators and of PNDM against stock diffusers, as in tests/test_peers.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from peers import (
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
    network,
    our_run,
    seeded,
    stock_run,
)
from torch import Tensor

from ldm.denoiser import TimeInput
from ldm.paths import DiscreteVP, RectifiedFlow
from ldm.prediction import PREDICTIONS, Eps, Flow, V
from ldm.sampling import time_grid

FLOW = RectifiedFlow()


# --- exponential integrators -----------------------------------------------------------------------------------------


class Mended(DPMSolverMultistepScheduler):
    """With noise and order 3, stock has -1/2 where its own ODE form has +1/2: each step is off by alpha D2, D2 being
    the second difference of x0, so that the drift is right to first order only."""

    def multistep_dpm_solver_third_order_update(self, model_output_list: list[Tensor], *args, **kw) -> Tensor:
        x = super().multistep_dpm_solver_third_order_update(model_output_list, *args, **kw)
        if self.config.algorithm_type != "sde-dpmsolver++":
            return x
        assert self.step_index is not None
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas[self.step_index - 2 : self.step_index + 2].double())
        h1, h0, h = (alpha / sigma).log().diff().tolist()
        m2, m1, m0 = model_output_list
        second = h**2 * ((m0 - m1) / h0 - (m1 - m2) / h1) / (h0 + h1)
        return x + alpha[-1].item() * second


def dpm_options(order: int, algorithm: str) -> dict[str, Any]:
    """Order 3 in stock leaves out the 2 of its second difference (tests/test_solvers.py counts what that costs)."""
    options: dict[str, Any] = {"curvature": 0.5} if order == 3 else {}
    return {**options, "generator": seeded()} if algorithm.startswith("sde") else options


DPM = {
    (1, "dpmsolver++"): "ddim", (2, "dpmsolver++"): "dpmpp_2m", (3, "dpmsolver++"): "dpmpp_3m",
    (1, "sde-dpmsolver++"): "ddpm", (2, "sde-dpmsolver++"): "dpmpp_2m_sde", (3, "sde-dpmsolver++"): "dpmpp_3m_sde",
}  # fmt: skip
DPMS = pytest.mark.parametrize(("order", "algorithm"), DPM)


def noise(algorithm: str) -> dict[str, Any]:
    return dict(generator=seeded()) if algorithm.startswith("sde") else {}


@STEPS
@SPACINGS
@KINDS
@DPMS
def test_dpm_solver(n: int, spacing: str, kind: str, order: int, algorithm: str) -> None:
    scheduler = Mended(**config(spacing, kind, solver_order=order, algorithm_type=algorithm))
    times = grid(n, spacing, drop_last=True)
    ours = our_run(DPM[order, algorithm], CHAIN, PREDICTIONS[kind](), INTEGER, times, **dpm_options(order, algorithm))
    assert_same(ours, stock_run(scheduler, n, **noise(algorithm)))


@STEPS
@pytest.mark.parametrize("shift", [1.0, 3.0])
@DPMS
def test_dpm_solver_on_flow_sigmas(n: int, shift: float, order: int, algorithm: str) -> None:
    scheduler = Mended(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order,
        algorithm_type=algorithm,
    )  # fmt: skip
    times = time_grid(FLOW, n, shift=shift, spacing="flow_sigmas")
    ours = our_run(
        DPM[order, algorithm], FLOW, Flow(), TimeInput(1000, floor=True), times, **dpm_options(order, algorithm)
    )
    assert_same(ours, stock_run(scheduler, n, **noise(algorithm)))


@STEPS
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_solver_with_its_straight_line_integrated(n: int, algorithm: str) -> None:
    scheduler = DPMSolverMultistepScheduler(**config("trailing", algorithm_type=algorithm, solver_type="heun"))
    ours = our_run(
        DPM[2, algorithm], CHAIN, Eps(), INTEGER, grid(n, "trailing"), midpoint=False, **dpm_options(2, algorithm)
    )
    assert_same(ours, stock_run(scheduler, n, **noise(algorithm)))


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_stock_third_order_is_not_ours(algorithm: str) -> None:
    """Ours has the whole second difference. Stock has half of it, and with noise minus as much again."""
    scheduler = DPMSolverMultistepScheduler(**config("trailing", solver_order=3, algorithm_type=algorithm))
    stock, times = stock_run(scheduler, 25, **noise(algorithm)), grid(25, "trailing")
    ours = our_run(DPM[3, algorithm], CHAIN, Eps(), INTEGER, times, **noise(algorithm))
    assert distance(ours, stock) > 3 * TOLERANCE
    if algorithm.startswith("sde"):
        halved = our_run(DPM[3, algorithm], CHAIN, Eps(), INTEGER, times, curvature=0.5, **noise(algorithm))
        assert distance(halved, stock) > 10 * TOLERANCE


@STEPS
@SPACINGS
@KINDS
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(n: int, spacing: str, kind: str, order: int) -> None:
    stock = stock_run(UniPCMultistepScheduler(**config(spacing, kind, solver_order=order)), n)
    times = grid(n, spacing, drop_last=True)
    assert_same(our_run("unipc", CHAIN, PREDICTIONS[kind](), INTEGER, times, order=order), stock)


@STEPS
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_on_flow_sigmas(n: int, shift: float, order: int) -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order
    )
    times = time_grid(FLOW, n, shift=shift, spacing="flow_sigmas", from_pure_noise=True)
    ours = our_run("unipc", FLOW, Flow(), TimeInput(1000, floor=True), times, order=order)
    assert_same(ours, stock_run(scheduler, n))


@STEPS
@pytest.mark.parametrize(
    ("name", "kind_of"), [("dpmpp_2m", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)]
)
def test_solvers_from_no_signal_at_all(n: int, name: str, kind_of: Any) -> None:
    """Stock gives a chain with zero terminal SNR the alpha^2 of 2^-24 instead, and remembers that step. On such a chain
    ours does the same; on the true one it begins with DDIM's step."""
    scheduler = kind_of(**config("trailing", "v_prediction", rescale_betas_zero_snr=True))
    stock = stock_run(scheduler, n)
    betas = scheduler.betas.double()
    betas[-1] = 1 - 2.0**-24 / (1 - betas[:-1]).prod()
    almost = DiscreteVP(betas)
    times = grid(n, "trailing", almost)
    assert_same(our_run(name, almost, V(), INTEGER, times), stock)
    ours = our_run(name, ZERO, V(), INTEGER, times)
    first = our_run("ddim", ZERO, V(), INTEGER, times)
    assert torch.allclose(ours.states[0], first.states[0], atol=1e-6) and distance(ours, stock) > 3 * TOLERANCE


@STEPS
@SPACINGS
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_dpm_solver_sde(n: int, spacing: str, kind: str) -> None:
    """Stock draws the noise of the half and of the whole step from one Brownian path in sigma, ours from one along the
    SDE, where the half's noise decays in the second half. Fed with ours, and with the network told our times (stock's
    middles are interpolated over log sigma, ours lie on the path, straight in sigma), it is the same."""
    times = grid(n, spacing, whole=False)
    ours = our_run(
        "dpmpp_2s_sde", CHAIN, PREDICTIONS[kind](), INTEGER, times, begin(times, spacing), generator=seeded()
    )
    generator, halves = seeded(), []

    def brownian(sigma: Tensor, to: Tensor) -> Tensor:
        z = torch.randn(START.shape, generator=generator)
        halves.append((z, to / sigma))
        if len(halves) % 2:
            return z
        half, ratio = halves[-2]  # exp(-h / 2)
        return (ratio * half + z) / (1 + ratio**2).sqrt()

    scheduler = DPMSolverSDEScheduler(**config(spacing, kind))
    set_timesteps = scheduler.set_timesteps

    def plain(n: int) -> None:
        set_timesteps(n)
        scheduler.noise_sampler = brownian

    scheduler.set_timesteps = plain
    stock = stock_run(scheduler, n, told=ours.seen)
    stock = in_our_x(after(stock, [*range(1, 2 * n - 2, 2), 2 * n - 2]), CHAIN, times)
    assert_same(ours, stock)


# --- PNDM -------------------------------------------------------------------------------------------------------------


def pndm(n: int, spacing: str, kind: str, prk: bool, gaps: list[int] | None = None) -> Run:
    scheduler = PNDMScheduler(**config(spacing, kind, skip_prk_steps=not prk, set_alpha_to_one=True))
    if gaps is not None:
        gaps = [gaps[0], gaps[0], *gaps[1:]]  # PLMS makes its first step twice
    stock = stock_run(scheduler, n, gaps=gaps)
    return after(stock, [3, 7, *range(11, len(stock.states))] if prk else range(1, n + 1))


@STEPS
@SPACINGS
def test_pndm(n: int, spacing: str) -> None:
    """As with DDIM, stock goes down by T // n, and is mended by the grid's own gaps."""
    times = grid(n, spacing)
    ours = our_run("pndm", CHAIN, Eps(), INTEGER, times)
    assert len(ours.seen) == n + 1
    assert_same(ours, pndm(n, spacing, "epsilon", False, gaps_of(times)))
    if all(gap == T // n for gap in gaps_of(times)[:-1]):
        assert_same(ours, pndm(n, spacing, "epsilon", False))
    else:
        assert distance(ours, pndm(n, spacing, "epsilon", False)) > TOLERANCE


@STEPS
def test_pndm_after_runge_kutta(n: int) -> None:
    """On ``leading``, where the grid is T // n; stock's middles are whole timesteps, which T // n even makes right."""
    ours = our_run("pndm", CHAIN, Eps(), INTEGER, grid(n, "leading"), prk=True)
    assert len(ours.seen) == n + 9
    assert_same(ours, pndm(n, "leading", "epsilon", True))


@pytest.mark.parametrize("prk", [False, True])
def test_pndm_of_a_velocity_is_that_of_its_noise(prk: bool) -> None:
    """Stock mixes the v of several times, each of which means another eps; ours mixes eps, whatever it is told."""

    def noise_of(x: Tensor, time: Tensor) -> Tensor:
        t = (time[0].double() + 1) / T
        return CHAIN.sigma(t) * x + CHAIN.alpha(t) * network(x, time)

    times = grid(25, "leading")
    ours = our_run("pndm", CHAIN, V(), INTEGER, times, prk=prk)
    assert_same(ours, our_run("pndm", CHAIN, Eps(), INTEGER, times, net=noise_of, prk=prk))
    assert distance(ours, pndm(25, "leading", "v_prediction", prk)) > 10 * TOLERANCE
