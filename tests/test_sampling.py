"""Samplers against a Gaussian's exact denoiser, and against stock schedulers step by step with one network."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoised, Denoiser, TimeInput
from ldm.guidance import classifier_free
from ldm.paths import CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow
from ldm.prediction import PREDICTIONS, Eps, Flow, V
from ldm.sampling import SAMPLERS, noise_like, time_grid
from tests.gmm import flow_of_gaussian, gaussian

NONE = Cond(torch.zeros(1, 1, 1))
CHAIN, ZERO = DiscreteVP(), DiscreteVP(zero_terminal_snr=True)
INTEGER = TimeInput(1000, offset=-1)


# --- a Gaussian, whose denoiser and whose flow are known -----------------------------------------------------------

MEAN, STD = 1.5, 0.6  # of that Gaussian


PATHS = {"flow": RectifiedFlow(), "cosine": CosineVP(), "linear": LinearVP(), "chain": CHAIN, "zero_snr": ZERO}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_ode_samplers_find_the_flow_at_their_order(path: Path, name: str, order: int) -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)

    def error(times: Tensor) -> float:
        end = SAMPLERS[name](gaussian(path), path, x, times)
        return (end - flow_of_gaussian(path, x, times[0], times[-1])).abs().max().item()

    # Halving the steps divides the error by 2^order. The grid stops short of the data: the last step there is of
    # first order for all, and over noise that grows as sqrt(t) it decides.
    coarse, fine = (error(torch.linspace(1, 0.1, n + 1, dtype=torch.float64)) for n in (100, 200))
    assert 1.8 < coarse / fine < 2.2 if order == 1 else coarse / fine > 3.5, (coarse, fine)
    grid = time_grid(path, 200, spacing="trailing" if isinstance(path, DiscreteVP) else "uniform")
    assert error(grid) < 0.03


@pytest.mark.parametrize("path", [RectifiedFlow(), LinearVP(), ZERO], ids=repr)
@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5})])
def test_stochastic_samplers_find_mean_and_variance(path: Path, name: str, options: dict) -> None:
    g, rows, n = torch.Generator().manual_seed(0), 20_000, 200
    times = time_grid(path, n, spacing="trailing" if isinstance(path, DiscreteVP) else "uniform")
    alpha, sigma = path.alpha(times[0]), path.sigma(times[0])
    spread = torch.sqrt(alpha**2 * STD**2 + sigma**2)
    x = alpha * MEAN + spread * torch.randn(rows, generator=g, dtype=torch.float64)  # the true marginal at times[0]
    end = SAMPLERS[name](gaussian(path), path, x, times, generator=g, **options)
    # 4 standard errors (STD / sqrt(rows) = 0.004), and for the spread what 200 steps leave of order 1 / n
    assert abs(end.mean().item() - MEAN) < 4 * STD / math.sqrt(rows)
    assert abs(end.std().item() - STD) < 0.02
    assert abs(((end - end.mean()) ** 3).mean().item()) / STD**3 < 0.07  # no skew


def bounded(name: str, g: float) -> dict[str, float]:
    """The forward SDE's own g has no bound at alpha = 0, where Euler-Maruyama asks for another."""
    return {"g": g} if name == "euler_maruyama" else {}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_at_the_answer_of_a_network_that_knows_it(name: str) -> None:
    """One data point: the denoiser says it at every time, and n = 1 already gives it exactly."""
    point = torch.randn(2, 3, dtype=torch.float64)
    for n in (1, 2, 5):

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            return Denoised(point, (x - (1 - t) * point) / t, x)

        start = torch.randn(2, 3, dtype=torch.float64)
        end = SAMPLERS[name](denoise, RectifiedFlow(), start, time_grid(RectifiedFlow(), n), **bounded(name, 0.0))
        torch.testing.assert_close(end, point, rtol=0, atol=1e-12)


def test_euler_is_one_line_on_the_straight_path() -> None:
    denoise, times = gaussian(RectifiedFlow()), time_grid(RectifiedFlow(), 7, shift=2.0)
    x = expected = torch.linspace(-2, 2, 5, dtype=torch.float64)
    for t, s in pairwise(times):
        d = denoise(expected, t)
        expected = expected + (s - t) * (d.eps - d.x0)
    torch.testing.assert_close(SAMPLERS["euler"](denoise, RectifiedFlow(), x, times), expected)


# --- stock schedulers ----------------------------------------------------------------------------------------------

WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 0.4
START = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def network(x: Tensor, time: Tensor) -> Tensor:
    """Depends strongly on the time: one step off in 1000 moves the result by more than the tolerance."""
    mixed = torch.tanh(torch.einsum("ij,bjhw->bihw", WEIGHT, x))
    return 0.8 * mixed + 0.5 * torch.cos(time.view(-1, 1, 1, 1) / 20) * x


def stock_run(scheduler, n: int, start: Tensor = START, **step) -> tuple[Tensor, list[float]]:
    scheduler.set_timesteps(n)
    x, seen = start * float(getattr(scheduler, "init_noise_sigma", 1.0)), []
    for t in scheduler.timesteps:
        seen.append(float(t))
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(model_input, t.float().expand(2)), t, x, **step).prev_sample
    return x, seen


def our_run(
    name: str, path: Path, prediction, time_input: TimeInput, times: Tensor, start: Tensor = START, **options
) -> tuple[Tensor, list[float]]:
    seen: list[float] = []

    def net(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        seen.append(time[0].item())
        return network(x, time)

    d = Denoiser(net, path, prediction, time_input)
    return SAMPLERS[name](lambda x, t: d(x, t, NONE), path, start, times, **options), seen


def assert_same(ours: tuple[Tensor, list[float]], stock: tuple[Tensor, list[float]]) -> None:
    assert ours[1] == stock[1]  # the times that the network saw
    assert stock[0].isfinite().all() and ours[0].dtype == torch.float32
    # stock keeps its coefficients in float32, some as products of 1000 factors: 1e-5 of the largest value
    torch.testing.assert_close(ours[0], stock[0], rtol=0, atol=1e-5 * max(1.0, stock[0].abs().max().item()))


def chain(path: DiscreteVP = CHAIN, **kw: Any) -> dict[str, Any]:
    return dict(trained_betas=path.betas.tolist(), **kw)


KINDS = ["epsilon", "sample", "v_prediction"]
STEPS = pytest.mark.parametrize("n", [5, 10, 20])


@STEPS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("end", [0, 1])
def test_ddim(n: int, kind: str, spacing: str, end: int) -> None:
    named: dict[str, Any] = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    config: dict[str, Any] = dict(timestep_spacing=spacing, set_alpha_to_one=not end, steps_offset=1, clip_sample=False)
    stock = stock_run(DDIMScheduler(**{**named, **config, "prediction_type": kind}), n)
    options = {"offset": 1} if spacing == "leading" else {}
    times = time_grid(CHAIN, n, spacing=spacing, end=end, **options)
    assert_same(our_run("ddim", CHAIN, PREDICTIONS[kind](), INTEGER, times), stock)


@STEPS
def test_ddim_from_no_signal_at_all(n: int) -> None:
    config = chain(ZERO, timestep_spacing="trailing", clip_sample=False, prediction_type="v_prediction")
    times = time_grid(ZERO, n, spacing="trailing")
    assert_same(our_run("ddim", ZERO, V(), INTEGER, times), stock_run(DDIMScheduler(**config), n))


@STEPS
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_the_same_noise(n: int, eta: float) -> None:
    config = chain(timestep_spacing="trailing", clip_sample=False, prediction_type="v_prediction")
    stock = stock_run(DDIMScheduler(**config), n, eta=eta, generator=torch.Generator().manual_seed(3))
    times = time_grid(CHAIN, n, spacing="trailing")
    options: dict[str, Any] = dict(eta=eta, generator=torch.Generator().manual_seed(3))
    assert_same(our_run("ddim", CHAIN, V(), INTEGER, times, **options), stock)


@STEPS
def test_ddpm(n: int) -> None:
    config = chain(timestep_spacing="trailing", clip_sample=False, prediction_type="v_prediction")
    stock = stock_run(DDPMScheduler(**config), n, generator=torch.Generator().manual_seed(3))
    times = time_grid(CHAIN, n, spacing="trailing")
    assert_same(our_run("ddpm", CHAIN, V(), INTEGER, times, generator=torch.Generator().manual_seed(3)), stock)


@pytest.mark.parametrize("n", [1, 5, 7, 10, 20, 30])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(n: int, shift: float) -> None:
    stock = stock_run(FlowMatchEulerDiscreteScheduler(shift=shift), n)
    times = time_grid(RectifiedFlow(), n, shift=shift, spacing="flow_match")
    assert_same(our_run("euler", RectifiedFlow(), Flow(), TimeInput(1000), times), stock)


@pytest.mark.parametrize("n", [1, 2, 5, 7, 10, 14, 15, 20, 30])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_solver_on_flow_sigmas(n: int, shift: float) -> None:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    times = time_grid(RectifiedFlow(), n, shift=shift, spacing="flow_sigmas")
    ours = our_run("dpmpp_2m", RectifiedFlow(), Flow(), TimeInput(1000, floor=True), times)
    assert_same(ours, stock_run(scheduler, n))
    assert all(time == int(time) for time in ours[1])


@pytest.mark.parametrize("n", [1, 2, 5, 7, 10, 14, 15, 20, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_dpm_solver_on_betas(n: int, kind: str) -> None:
    scheduler = DPMSolverMultistepScheduler(**chain(timestep_spacing="trailing", prediction_type=kind))
    times = time_grid(CHAIN, n, spacing="trailing")
    assert_same(our_run("dpmpp_2m", CHAIN, PREDICTIONS[kind](), INTEGER, times), stock_run(scheduler, n))


@STEPS
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_heun(n: int, kind: str) -> None:
    scheduler = HeunDiscreteScheduler(**chain(timestep_spacing="trailing", prediction_type=kind))
    stock = stock_run(scheduler, n)
    times = time_grid(CHAIN, n, spacing="trailing")
    # stock works in x / alpha and starts at sigma / alpha times its noise: in our x, at sigma times it
    ours = our_run("heun", CHAIN, PREDICTIONS[kind](), INTEGER, times, START * CHAIN.sigma(times[0]))
    assert len(ours[1]) == 2 * n - 1
    assert_same(ours, stock)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SAMPLERS["ddim"](gaussian(CHAIN), CHAIN, START, time_grid(CHAIN, 2), eta=1.5), r"eta is 1\.5"),
        (lambda: SAMPLERS["euler"](gaussian(CHAIN), CHAIN, START, torch.linspace(0, 1, 5)), "must fall"),
        (lambda: our_run("ddim", RectifiedFlow(), Eps(), INTEGER, time_grid(RectifiedFlow(), 4)), "alpha = 0"),
        (lambda: noise_like(START, [torch.Generator()]), "1 generators for 2 rows"),
    ],
)
def test_bad_input_is_named(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# --- the loop --------------------------------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch() -> None:
    times = time_grid(CHAIN, 6, spacing="trailing")
    both = [torch.Generator().manual_seed(s) for s in (5, 6)]
    together, _ = our_run("ddpm", CHAIN, V(), INTEGER, times, generator=both)
    for row, seed in enumerate((5, 6)):
        alone, _ = our_run(
            "ddpm", CHAIN, V(), INTEGER, times, START[row : row + 1], generator=torch.Generator().manual_seed(seed)
        )
        torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=1e-5)
    assert torch.equal(noise_like(START, torch.Generator().manual_seed(1)), START)


STEPWISE = [name for name in SAMPLERS if name != "rk45"]  # that one chooses its own steps: tests/test_ode.py


@pytest.mark.parametrize("name", STEPWISE)
def test_callback_sees_every_step_and_may_change_it(name: str) -> None:
    path, times = RectifiedFlow(), time_grid(RectifiedFlow(), 4)
    x = torch.linspace(-1, 1, 3, dtype=torch.float64)
    steps: list[tuple[int, float]] = []
    states: list[Tensor] = []

    def watch(i: int, t: Tensor, x: Tensor, denoised: Denoised) -> None:
        steps.append((i, t.item()))
        states.append(x)
        assert denoised.x0.shape == x.shape

    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    given = bounded(name, 0.5)
    end = SAMPLERS[name](gaussian(path), path, x, times, callback=watch, generator=seeded[0], **given)
    assert steps == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)] and torch.equal(states[-1], end)

    add = lambda i, t, x, d: x + 7 if i == 3 else None  # noqa: E731
    changed = SAMPLERS[name](gaussian(path), path, x, times, callback=add, generator=seeded[1], **given)
    torch.testing.assert_close(changed, end + 7)


@pytest.mark.parametrize("name", STEPWISE)
def test_nothing_is_read_back_from_the_device(name: str) -> None:
    """A meta tensor has no values: whatever looks at one raises."""
    x, cond = torch.empty(2, 4, 6, 6, device="meta"), Cond(torch.empty(2, 1, 1, device="meta"))
    d = Denoiser(lambda x, time, cond: x * time.view(-1, 1, 1, 1), CHAIN, V(), INTEGER)
    denoise = classifier_free(d, cond, cond, 3.0, rescale=0.5)
    end = SAMPLERS[name](denoise, CHAIN, x, time_grid(CHAIN, 4, spacing="trailing"))
    assert end.is_meta and end.dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_low_precision_latents_are_stepped_in_float32(name: str) -> None:
    times = time_grid(CHAIN, 5, spacing="trailing")
    g = [torch.Generator().manual_seed(0) for _ in range(2)]
    start = START.bfloat16()
    low, _ = our_run(name, CHAIN, V(), INTEGER, times, start, generator=g[0])
    exact, _ = our_run(name, CHAIN, V(), INTEGER, times, start.float(), generator=g[1])
    assert low.dtype == torch.float32 and torch.equal(low, exact)
