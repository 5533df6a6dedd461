"""What the table of stock schedulers refuses, and in what words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from ldm.denoiser import TimeInput
from ldm.paths import NCSN, VE, CosineVP, DiscreteVP, LinearVP, RectifiedFlow, SigmoidVP
from ldm.prediction import X0, Eps, Flow, Karras, Score, V
from pipelines.scheduler_table import IndexOfSigma
from pipelines.schedulers import Schedule, default_schedule, from_stock, stock_scheduler, to_stock, trained_as

CHAIN, ZERO = DiscreteVP(), DiscreteVP(zero_terminal_snr=True)
B: dict[str, Any] = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
DDIM = {"_class_name": "DDIMScheduler", **B}
INTEGER = TimeInput(1000, offset=-1)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart"])
@pytest.mark.parametrize(
    ("path", "prediction"), [(CosineVP(), V()), (LinearVP(), Eps()), (SigmoidVP(), V()), (NCSN(), Score()),
                             (RectifiedFlow(), X0()), (DiscreteVP(), Flow()), (DiscreteVP(), Score()), (VE(), Eps()),
                             (DiscreteVP(), Karras(0.5)), (RectifiedFlow(), Karras(0.5))],
)  # fmt: skip
def test_what_has_no_stock_form_says_so_and_still_has_ours(path, prediction, family) -> None:
    with pytest.raises(ValueError, match=r"no stock form.*TextToImagePipeline"):
        to_stock(path, prediction, family)
    assert len(default_schedule(path, prediction, family).times(5)) == 6


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: to_stock(CHAIN, Eps(), "sd3"), "no stock form in the sd3 pipelines"),
        (lambda: to_stock(VE(), Karras(), "sd3"), "no stock form in the sd3 pipelines"),
        (lambda: to_stock(ZERO, Eps(), "sd"), "alpha = 0"),
        (lambda: default_schedule(CHAIN, Eps(), "sd", 3.0), "shift 3.0"),
        (lambda: default_schedule(RectifiedFlow(), Flow(), "flux"), "'flux' is not one of sd, Stable"),
        (lambda: Schedule(CHAIN, Eps(), INTEGER, "euler", "trailing", start="none"), "'none' is not one of unit"),
        (lambda: IndexOfSigma()(torch.ones(()), RectifiedFlow()), "RectifiedFlow has none"),
    ],
)
def test_schedules(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    "ours",
    [
        Schedule(CHAIN, Eps(), INTEGER, "euler", "trailing"),  # stock's starts with less noise
        Schedule(CHAIN, Eps(), INTEGER, "dpmpp_2m", "linspace"),  # stock's leaves the last point out
        Schedule(CHAIN, Eps(), INTEGER, "dpmpp_3m", "trailing"),  # stock's third order lacks a factor 2
        Schedule(CHAIN, Eps(), INTEGER, "dpmpp_2m", "leading", options={"drop_last": True}),  # without SD's offset
        Schedule(CHAIN, Eps(), TimeInput(1000), "ddim", "trailing"),
        Schedule(CHAIN, Eps(), INTEGER, "ddim", "trailing", sampler_options={"eta": 1.0}),
        Schedule(CHAIN, Eps(), INTEGER, "ddpm", "trailing", sampler_options={"variance": "fixed_large"}),
        Schedule(CHAIN, Eps(), INTEGER, "heun", "explicit", options={"timesteps": [999, 500, 0]}),
        Schedule(CHAIN, Eps(), INTEGER, "euler", "karras", start="sigma"),  # another index between the nodes
        Schedule(RectifiedFlow(), Flow(), TimeInput(1000, floor=True), "unipc", "flow_sigmas"),
        Schedule(VE(), Karras(), TimeInput(0.25, log_sigma=True), "heun", "karras"),
    ],
    ids=lambda s: f"{s.sampler}-{s.spacing}",
)
def test_what_no_scheduler_does_is_not_written(ours: Schedule) -> None:
    with pytest.raises(ValueError, match=r"(no stock form|does not keep).*TextToImagePipeline"):
        stock_scheduler(ours, "sd")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: from_stock(PNDMScheduler(**B), "sd"), "skip_prk_steps=False.*only True"),
        (lambda: from_stock(DDIMScheduler(timestep_spacing="linspace"), "sd"), "'linspace'.*only 'trailing' or 'leadi"),
        (lambda: from_stock(DDIMScheduler(thresholding=True), "sd"), "thresholding=True"),
        (lambda: from_stock(DDIM | {"clip_sample": False, "set_alpha_to_one": False}, "sdxl"), "must fall"),
        (lambda: from_stock(DDIM | {"rescale_betas_zero_snr": True}, "sd"), "Eps: this chain starts where alpha = 0"),
        (lambda: from_stock(EulerDiscreteScheduler(rescale_betas_zero_snr=True), "sd"), "alpha = 0, which no stock"),
        (lambda: from_stock(EulerDiscreteScheduler(final_sigmas_type="sigma_min"), "sd"), "'sigma_min'.*only 'zero'"),
        (lambda: from_stock(EulerDiscreteScheduler(interpolation_type="log_linear"), "sd"), "'log_linear'"),
        (
            lambda: from_stock(EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="leading"), "sd"),
            "timestep_spacing='leading' and use_karras_sigmas=True together",
        ),
        (lambda: from_stock(DPMSolverMultistepScheduler(use_exponential_sigmas=True), "sd"), "use_exponential_sigmas"),
        (
            lambda: from_stock(
                DPMSolverMultistepScheduler(use_karras_sigmas=True, final_sigmas_type="sigma_min"), "sd"
            ),
            "'sigma_min'.*only 'zero'",
        ),
        (lambda: from_stock(DPMSolverMultistepScheduler(solver_order=1), "sd"), "solver_order=1.*only 2 or 3"),
        (
            lambda: from_stock(DPMSolverMultistepScheduler(solver_order=3, algorithm_type="sde-dpmsolver++"), "sd"),
            "solver_order=3 and solver_type='midpoint' together",
        ),
        (lambda: from_stock(DPMSolverMultistepScheduler(variance_type="learned_range"), "pixart"), "'learned_range'"),
        (
            lambda: from_stock(
                DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True), "sd"
            ),
            "squaredcos_cap_v2",
        ),
        (lambda: from_stock(UniPCMultistepScheduler(use_flow_sigmas=True), "sd"), "made for RectifiedFlow"),
        (lambda: from_stock(UniPCMultistepScheduler(predict_x0=False), "sd"), "predict_x0=False"),
        (lambda: from_stock(EDMEulerScheduler(prediction_type="v_prediction"), "sd"), "with betas, or one of"),
        (lambda: from_stock(FlowMatchEulerDiscreteScheduler(), "sd"), "does not work in the stock sd pipelines"),
        (lambda: from_stock(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "sd3"), "use_dynamic_shifting"),
        (lambda: from_stock(to_stock(RectifiedFlow(), Flow(), "sd"), "sd3"), "does not work in the stock sd3"),
        (lambda: from_stock({"_class_name": "KDPM2DiscreteScheduler"}, "sd"), "no exact counterpart.*trained_as"),
        (lambda: from_stock({"_class_name": "UNet2DModel"}, "sd"), "not a scheduler of diffusers"),
        (lambda: from_stock({}, "sd"), "not a scheduler of diffusers"),
        (lambda: trained_as({"_class_name": "VQDiffusionScheduler"}), "with betas"),
        (lambda: trained_as(DDIM | {"prediction_type": "flow"}), "'flow' is not one of"),
        (lambda: trained_as(DDIM | {"beta_schedule": "warmup"}), "'warmup' is not one of"),
    ],
)
def test_settings_are_named(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
