"""The table of stock schedulers, read both ways, and whole trajectories through what it gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoiser, TimeInput
from ldm.paths import CosineVP, DiscreteVP, LinearVP, RectifiedFlow
from ldm.prediction import X0, Eps, Flow, Karras, Score, V
from ldm.sampling import SAMPLERS
from pipelines.schedulers import Schedule, default_schedule, from_stock, stock_scheduler, to_stock, trained_as

START = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
# scheduler_config.json of Stable Diffusion 1.5
SD15 = json.loads("""{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": false,
    "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null, "clip_sample": false}""")


def network(x: Tensor, time: Tensor) -> Tensor:
    return 0.6 * torch.sin(2 * x.roll(1, 1)) + 0.5 * torch.cos(time.view(-1, 1, 1, 1) / 20) * x


def stock_run(scheduler, n: int) -> tuple[Tensor, list[float]]:
    scheduler.set_timesteps(n)
    x, seen = START * float(getattr(scheduler, "init_noise_sigma", 1.0)), []
    for t in scheduler.timesteps:
        seen.append(float(t))
        x = scheduler.step(network(x, t.float().expand(2)), t, x).prev_sample
    return x, seen


def our_run(schedule: Schedule, n: int) -> tuple[Tensor, list[float]]:
    seen: list[float] = []

    def net(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        seen.append(time[0].item())
        return network(x, time)

    d, none = Denoiser(net, schedule.path, schedule.prediction, schedule.time_input), Cond(torch.zeros(1, 1, 1))
    sampler = SAMPLERS[schedule.sampler]
    return sampler(lambda x, t: d(x, t, none), schedule.path, START, schedule.times(n)), seen


ROWS = [
    ("sd", RectifiedFlow(), Flow(), 1.0, DPMSolverMultistepScheduler),
    ("sd", RectifiedFlow(), Flow(), 3.0, DPMSolverMultistepScheduler),
    ("sd3", RectifiedFlow(), Flow(), 1.0, FlowMatchEulerDiscreteScheduler),
    ("sd3", RectifiedFlow(), Flow(), 3.0, FlowMatchEulerDiscreteScheduler),
    ("sd", DiscreteVP(), Eps(), 1.0, DDIMScheduler),
    ("sd", DiscreteVP(schedule="squaredcos_cap_v2"), V(), 1.0, DDIMScheduler),
    ("sd", DiscreteVP(schedule="linear", num_train_timesteps=500, beta_end=0.03), X0(), 1.0, DDIMScheduler),
    ("sd", DiscreteVP(zero_terminal_snr=True), V(), 1.0, DDIMScheduler),
]


@pytest.mark.parametrize(("family", "path", "prediction", "shift", "kind"), ROWS)
def test_the_default_is_what_stock_does(family, path, prediction, shift, kind, tmp_path) -> None:
    schedule = default_schedule(path, prediction, family, shift)
    scheduler = to_stock(path, prediction, family, shift=shift)
    assert type(scheduler) is kind and from_stock(scheduler, family) == schedule
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert from_stock(config, family) == schedule
    reopened = kind.from_pretrained(tmp_path)
    for n in (5, 10, 20):
        ours, stock = our_run(schedule, n), stock_run(reopened, n)
        assert ours[1] == stock[1]
        # float32 coefficients there, float64 here
        torch.testing.assert_close(ours[0], stock[0], rtol=0, atol=1e-5 * max(1.0, stock[0].abs().max().item()))


def test_pipelines_may_be_named_as_diffusers_names_them() -> None:
    for family, name in (("sd", "StableDiffusionPipeline"), ("sd3", "StableDiffusion3Pipeline")):
        ours = default_schedule(RectifiedFlow(), Flow(), name, 3.0)
        assert ours == default_schedule(RectifiedFlow(), Flow(), family, 3.0)
        assert from_stock(to_stock(RectifiedFlow(), Flow(), name, shift=3.0), name) == ours


OTHERS = [
    DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    ),
    DDIMScheduler.from_config(SD15),
    DDIMScheduler.from_config(SD15, set_alpha_to_one=True, prediction_type="v_prediction"),
    DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0, num_train_timesteps=400
    ),
]


@pytest.mark.parametrize("scheduler", OTHERS, ids=lambda s: type(s).__name__)
def test_other_schedulers_are_read_and_written_back(scheduler) -> None:
    schedule = from_stock(scheduler, "sd")
    again = stock_scheduler(schedule, "sd")
    assert type(again) is type(scheduler)
    for n in (5, 10, 20):
        ours, stock, written = our_run(schedule, n), stock_run(scheduler, n), stock_run(again, n)
        assert ours[1] == stock[1] == written[1]
        for one in (stock[0], written[0]):
            torch.testing.assert_close(ours[0], one, rtol=0, atol=1e-5 * max(1.0, one.abs().max().item()))


def test_dpm_solver_follows_for_any_number_of_steps_and_ddim_where_it_divides_the_chain() -> None:
    dpm, ddim = OTHERS[0], to_stock(DiscreteVP(), Eps(), "sd")
    for n in (3, 7, 30):
        torch.testing.assert_close(our_run(from_stock(dpm, "sd"), n)[0], stock_run(dpm, n)[0], rtol=1e-4, atol=1e-3)
    apart = [(our_run(from_stock(ddim, "sd"), n)[0] - stock_run(ddim, n)[0]).abs().max().item() for n in (25, 30)]
    assert apart[0] < 1e-3 < apart[1]  # stock DDIM at n = 30 steps to times that it does not ask at


def test_sd_pipelines_rewrite_two_settings() -> None:
    """StableDiffusionPipeline sets steps_offset to 1 and clip_sample to False, whatever the folder says."""
    old = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    schedule = from_stock(old, "sd")
    assert schedule.options == {"offset": 1} and schedule.spacing == "leading"
    rewritten = DDIMScheduler.from_config(old, steps_offset=1, clip_sample=False)
    torch.testing.assert_close(our_run(schedule, 10)[0], stock_run(rewritten, 10)[0], rtol=1e-5, atol=1e-4)


def test_what_a_fine_tune_keeps_of_sd15() -> None:
    path, prediction, time_input = trained_as(SD15)
    assert (path, prediction, time_input) == (DiscreteVP(), Eps(), TimeInput(1000, offset=-1))
    pndm: Any = PNDMScheduler.from_config(SD15)
    assert trained_as(pndm) == (path, prediction, time_input)
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert trained_as(flow) == (RectifiedFlow(), Flow(), TimeInput(1000, floor=True))
    assert trained_as(FlowMatchEulerDiscreteScheduler()) == (RectifiedFlow(), Flow(), TimeInput(1000))


@pytest.mark.parametrize(
    ("path", "prediction"), [(CosineVP(), V()), (LinearVP(), Eps()), (RectifiedFlow(), X0()), (DiscreteVP(), Flow()),
                             (DiscreteVP(), Score()), (DiscreteVP(), Karras(0.5)), (RectifiedFlow(), Karras(0.5))],
)  # fmt: skip
def test_what_has_no_stock_form_says_so_and_still_has_ours(path, prediction) -> None:
    with pytest.raises(ValueError, match=r"no stock form.*TextToImagePipeline"):
        to_stock(path, prediction, "sd")
    x, _ = our_run(default_schedule(path, prediction, "sd"), 5)
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: to_stock(DiscreteVP(), Eps(), "sd3"), "no stock form in the sd3 pipelines"),
        (lambda: to_stock(DiscreteVP(zero_terminal_snr=True), Eps(), "sd"), "alpha = 0"),
        (lambda: default_schedule(DiscreteVP(), Eps(), "sd", 3.0), "shift 3.0"),
        (lambda: default_schedule(RectifiedFlow(), Flow(), "sdxl"), "'sdxl' is not one of sd, sd3"),
        (lambda: from_stock(SD15, "sd"), "PNDMScheduler has no exact counterpart.*trained_as"),
        (lambda: from_stock(DDIMScheduler(timestep_spacing="linspace"), "sd"), "'linspace'"),
        (lambda: from_stock(DDIMScheduler(thresholding=True), "sd"), "thresholding=True"),
        (lambda: from_stock(DPMSolverMultistepScheduler(), "sd"), "'linspace'"),
        (lambda: from_stock(DPMSolverMultistepScheduler(use_karras_sigmas=True), "sd"), "use_karras_sigmas=True"),
        (lambda: from_stock(DPMSolverMultistepScheduler(solver_order=3), "sd"), "solver_order=3"),
        (lambda: from_stock(FlowMatchEulerDiscreteScheduler(), "sd"), "does not work in the stock sd pipelines"),
        (lambda: from_stock(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "sd3"), "use_dynamic_shifting"),
        (lambda: from_stock(to_stock(RectifiedFlow(), Flow(), "sd"), "sd3"), "does not work in the stock sd3"),
        (lambda: from_stock({"_class_name": "UNet2DModel"}, "sd"), "not a scheduler of diffusers"),
        (lambda: from_stock({}, "sd"), "not a scheduler of diffusers"),
        (lambda: trained_as({"_class_name": "VQDiffusionScheduler"}), "with betas"),
        (
            lambda: trained_as(SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "flow"}),
            "'flow' is not one of",
        ),
        (lambda: trained_as(SD15 | {"beta_schedule": "warmup"}), "'warmup' is not one of"),
    ],
)
def test_bad_input_is_named(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
