"""The table of stock schedulers, read both ways, and whole trajectories through what it gives."""

from __future__ import annotations

import inspect
import json
from typing import Any

import diffusers
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
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoiser, TimeInput
from ldm.paths import VE, DiscreteVP, RectifiedFlow
from ldm.prediction import X0, Eps, Flow, Karras, V
from ldm.sampling import SAMPLERS
from pipelines.scheduler_table import TABLE, IndexOfSigma
from pipelines.schedulers import FAMILIES, Schedule, default_schedule, from_stock, stock_scheduler, to_stock, trained_as

WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 0.4
START = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
COUNTS = (7, 10, 25, 50)


def network(x: Tensor, time: Tensor) -> Tensor:
    """Depends strongly on the time: one step off in 1000 moves the result by more than the tolerance."""
    mixed = torch.tanh(torch.einsum("ij,bjhw->bihw", WEIGHT, x))
    return 0.8 * mixed + 0.5 * torch.cos(time.view(-1, 1, 1, 1) / 20) * x


def stock_run(scheduler: Any, n: int) -> tuple[Tensor, list[float]]:
    scheduler.set_timesteps(n)
    x, seen = START * float(getattr(scheduler, "init_noise_sigma", 1.0)), []
    noisy = "generator" in inspect.signature(scheduler.step).parameters
    more = {"generator": torch.Generator().manual_seed(3)} if noisy else {}
    for t in scheduler.timesteps:
        seen.append(float(t))
        asked = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(asked, t.float().expand(2)), t, x, **more).prev_sample
    return x, seen


def our_run(schedule: Schedule, n: int) -> tuple[Tensor, list[float]]:
    seen: list[float] = []

    def net(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        seen.append(time[0].item())
        return network(x, time)

    d, none = Denoiser(net, schedule.path, schedule.prediction, schedule.time_input), Cond(torch.zeros(1, 1, 1))
    times, more = schedule.times(n), dict(schedule.sampler_options, generator=torch.Generator().manual_seed(3))
    start = START * schedule.spread(times)
    return SAMPLERS[schedule.sampler](lambda x, t: d(x, t, none), schedule.path, start, times, **more), seen


def assert_same(ours: tuple[Tensor, list[float]], stock: tuple[Tensor, list[float]], time: float = 0.0) -> None:
    assert len(ours[1]) == len(stock[1])
    assert max(abs(a - b) for a, b in zip(ours[1], stock[1], strict=True)) <= time  # what the network was told
    # float32 coefficients there, some of them products of 1000 factors, and float64 here
    torch.testing.assert_close(ours[0], stock[0], rtol=0, atol=1e-4 * max(1.0, stock[0].abs().max().item()))


# --- the schedulers that shipped with models: their scheduler_config.json -------------------------------------------

SD15 = json.loads("""{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": false,
    "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null, "clip_sample": false}""")
SD21V = json.loads("""{"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false, "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
    "trained_betas": null}""")
SDXL = json.loads("""{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false, "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": false,
    "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": null,
    "use_karras_sigmas": false}""")
SD3 = json.loads("""{"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000, "shift": 3.0}""")
PIXART = json.loads("""{"_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.22.0.dev0",
    "algorithm_type": "dpmsolver++", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995, "euler_at_final": false, "lambda_min_clipped": -Infinity,
    "lower_order_final": true, "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
    "solver_order": 2, "solver_type": "midpoint", "steps_offset": 0, "thresholding": false,
    "timestep_spacing": "linspace", "trained_betas": null, "use_karras_sigmas": false, "use_lu_lambdas": false,
    "variance_type": null}""")
SHIPPED = {
    "StableDiffusionPipeline": (SD15, "pndm", "leading"),
    "sd": (SD21V, "ddim", "leading"),
    "StableDiffusionXLPipeline": (SDXL, "euler", "leading"),
    "StableDiffusion3Pipeline": (SD3, "euler", "flow_match"),
    "PixArtAlphaPipeline": (PIXART, "dpmpp_2m", "linspace"),
    "PixArtSigmaPipeline": (PIXART, "dpmpp_2m", "linspace"),
}


@pytest.mark.parametrize("pipeline", SHIPPED)
def test_what_shipped_with_models_goes_round(pipeline: str) -> None:
    config, sampler, spacing = SHIPPED[pipeline]
    schedule = from_stock(config, pipeline)
    assert (schedule.sampler, schedule.spacing) == (sampler, spacing)
    stock: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    written: Any = stock_scheduler(schedule, pipeline)
    assert type(written) is type(stock) and from_stock(written, pipeline) == schedule
    for key in inspect.signature(type(stock).__init__).parameters.keys() - {"self"}:
        assert written.config[key] == stock.config[key], key  # each field, betas by their name
    for n in COUNTS:
        assert_same(our_run(schedule, n), stock_run(stock, n))


# --- every row -------------------------------------------------------------------------------------------------------

B: dict[str, Any] = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
EVERY: list[tuple[str, Any, dict[str, Any]]] = [
    ("sd", DDIMScheduler, {"timestep_spacing": "leading", "clip_sample": False, "set_alpha_to_one": False}),
    *(("sdxl", DDPMScheduler, {"timestep_spacing": s, "clip_sample": False}) for s in ("trailing", "linspace")),
    ("sdxl", PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    *(
        ("sdxl", kind, {"timestep_spacing": s})
        for kind in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler,
                     LMSDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
        for s in ("trailing", "leading", "linspace")
    ),
    *(
        ("sdxl", kind, {f"use_{sigmas}_sigmas": True, "steps_offset": 0})
        for kind in (EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler)
        for sigmas in ("karras", "exponential")
    ),
    *(
        ("pixart", kind, {"use_karras_sigmas": True, "steps_offset": 0})
        for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
    ),
    *(
        ("pixart", DPMSolverMultistepScheduler, {"timestep_spacing": "linspace", "steps_offset": 0, **more})
        for more in ({"solver_order": 3}, {"solver_type": "heun"}, {"algorithm_type": "sde-dpmsolver++"},
                     {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
                     {"final_sigmas_type": "sigma_min"})
    ),
    *(("sd", UniPCMultistepScheduler, {"timestep_spacing": "leading", "solver_order": order}) for order in (1, 3)),
    ("sd", UniPCMultistepScheduler, {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
]  # fmt: skip


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(str(v) for key, v in value.items() if key != "steps_offset")
    return getattr(value, "__name__", str(value)).removesuffix("Scheduler")


def goes_round(family: str, stock: Any) -> None:
    schedule = from_stock(stock, family)
    written: Any = stock_scheduler(schedule, family)
    assert type(written) is type(stock) and from_stock(written, family) == schedule
    # between two nodes stock finds the index from float32's log sigma
    time = 2e-3 if isinstance(schedule.time_input, IndexOfSigma) else 1e-6
    for n in COUNTS:
        ours = our_run(schedule, n)
        for scheduler in (stock, written):
            assert_same(ours, stock_run(scheduler, n), time)


@pytest.mark.parametrize(("family", "kind", "config"), EVERY, ids=name_of)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_row_on_betas(family: str, kind: Any, config: dict[str, Any], prediction: str) -> None:
    stock = kind(**B | config, prediction_type=prediction)
    if prediction in TABLE[kind.__name__].predictions:
        goes_round(family, stock)
    else:
        with pytest.raises(ValueError, match=f"prediction_type='{prediction}' has no exact counterpart"):
            from_stock(stock, family)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_row_of_flows(shift: float) -> None:
    goes_round("sd3", FlowMatchEulerDiscreteScheduler(shift=shift))
    goes_round("sd3", FlowMatchHeunDiscreteScheduler(shift=shift))
    flow: dict[str, Any] = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    for more in ({}, {"solver_order": 3}, {"num_train_timesteps": 400}):
        goes_round("pixart", DPMSolverMultistepScheduler(**flow | more))
        goes_round("sd", UniPCMultistepScheduler(**flow | more))
    goes_round("sdxl", DPMSolverMultistepScheduler(**flow, algorithm_type="sde-dpmsolver++"))


@pytest.mark.parametrize("config", [{}, {"sigma_max": 50.0, "sigma_data": 1.0}, {"sigma_min": 0.01, "rho": 5.0}])
@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_edm(config: dict[str, Any], kind: Any) -> None:
    stock = EDMEulerScheduler(**config, sigma_schedule=kind)
    if kind == "exponential" and "rho" in config:
        with pytest.raises(ValueError, match="takes no 'rho'"):
            from_stock(stock, "sdxl")
    else:
        goes_round("sdxl", stock)
    assert trained_as(stock)[0] == VE(config.get("sigma_max", 80.0))


def test_each_class_of_the_table_is_tried() -> None:
    flows_and_edm = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler"}
    assert {kind.__name__ for _, kind, _ in EVERY} | flows_and_edm == set(TABLE)
    assert {choice.ours["sampler"] for row in TABLE.values() for choice in row.samplers} <= set(SAMPLERS)


def test_betas_are_written_by_name_where_the_class_knows_it() -> None:
    for path, name in ((DiscreteVP(schedule="linear", beta_end=0.02), "linear"), (DiscreteVP(), "scaled_linear")):
        config = to_stock(path, Eps(), "sd").config
        assert config["beta_schedule"] == name and config["trained_betas"] is None
    for path in (DiscreteVP(schedule="sigmoid"), DiscreteVP(DiscreteVP(num_train_timesteps=300).betas)):
        scheduler = to_stock(path, Eps(), "sd")
        assert len(scheduler.config["trained_betas"]) == path.num_train_timesteps
        assert from_stock(scheduler, "sd").path == path
    ddpm = Schedule(DiscreteVP(schedule="sigmoid"), Eps(), TimeInput(1000, offset=-1), "ddpm", "trailing")
    assert stock_scheduler(ddpm, "sd").config["beta_schedule"] == "sigmoid"
    zero = to_stock(DiscreteVP(zero_terminal_snr=True), V(), "sd").config
    assert zero["rescale_betas_zero_snr"] and zero["trained_betas"] is None


def test_where_stock_starts_with_less_than_unit_noise() -> None:
    for spacing in ("trailing", "linspace", "leading"):
        schedule = from_stock(EulerDiscreteScheduler(**B, timestep_spacing=spacing), "sdxl")
        times = schedule.times(10)
        expected = 1.0 if spacing == "leading" else schedule.path.sigma(times[0]).item()
        assert schedule.spread(times) == pytest.approx(expected, abs=1e-12)
    assert from_stock(EDMEulerScheduler(), "sd").spread(torch.tensor([1.0])) == pytest.approx(6401**0.5)


def test_stock_ddim_trailing_steps_to_times_that_it_does_not_ask_at() -> None:
    ddim = DDIMScheduler(**B, timestep_spacing="trailing", clip_sample=False)
    schedule = from_stock(ddim, "sd")
    apart = [(our_run(schedule, n)[0] - stock_run(ddim, n)[0]).abs().max().item() for n in (25, 30)]
    assert apart[0] < 1e-4 < 1e-3 < apart[1]


def test_what_stock_dpm_solver_does_with_a_learned_range() -> None:
    """It keeps three channels of the output, whatever the latents have."""
    stock: Any = DPMSolverMultistepScheduler.from_config(PIXART, variance_type="learned_range")
    stock.set_timesteps(5)
    with pytest.raises(RuntimeError, match="size"):
        stock.step(START, stock.timesteps[0], START)


def test_stock_pndm_reads_a_mean_of_v_as_one_of_the_last() -> None:
    """So it differs from PNDM by far more than rounding, and the table refuses it."""
    stock = PNDMScheduler.from_config(SD15, prediction_type="v_prediction")
    eps = from_stock(SD15, "sd")
    ours = Schedule(eps.path, V(), eps.time_input, "pndm", "leading", options=eps.options)
    assert (our_run(ours, 25)[0] - stock_run(stock, 25)[0]).abs().max() > 1e-2


# --- defaults --------------------------------------------------------------------------------------------------------

ROWS = [
    ("sd", RectifiedFlow(), Flow(), 1.0, DPMSolverMultistepScheduler),
    ("sd", RectifiedFlow(), Flow(), 3.0, DPMSolverMultistepScheduler),
    ("pixart", RectifiedFlow(), Flow(), 3.0, DPMSolverMultistepScheduler),
    ("sd3", RectifiedFlow(), Flow(), 1.0, FlowMatchEulerDiscreteScheduler),
    ("sd3", RectifiedFlow(), Flow(), 3.0, FlowMatchEulerDiscreteScheduler),
    ("sd", DiscreteVP(), Eps(), 1.0, DPMSolverMultistepScheduler),
    ("sdxl", DiscreteVP(schedule="squaredcos_cap_v2"), V(), 1.0, DPMSolverMultistepScheduler),
    ("sd", DiscreteVP(schedule="linear", num_train_timesteps=500, beta_end=0.03), X0(), 1.0,
     DPMSolverMultistepScheduler),
    ("sd", VE(), Karras(0.5), 1.0, EDMEulerScheduler),
]  # fmt: skip


@pytest.mark.parametrize(("family", "path", "prediction", "shift", "kind"), ROWS)
def test_the_default_is_what_stock_does(family, path, prediction, shift, kind, tmp_path) -> None:
    schedule = default_schedule(path, prediction, family, shift)
    scheduler = to_stock(path, prediction, family, shift=shift)
    assert type(scheduler) is kind and from_stock(scheduler, family) == schedule
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert from_stock(config, family) == schedule
    reopened = kind.from_pretrained(tmp_path)
    for n in (1, 3, 5, 20, *COUNTS):  # the default follows stock at every number of steps
        assert_same(our_run(schedule, n), stock_run(reopened, n), time=1e-6)


@pytest.mark.parametrize("prediction", [V(), X0()])
def test_the_default_of_a_zero_snr_chain_is_ddim(prediction, tmp_path) -> None:
    path = DiscreteVP(zero_terminal_snr=True)
    schedule, scheduler = default_schedule(path, prediction, "sd"), to_stock(path, prediction, "sd")
    assert type(scheduler) is DDIMScheduler and from_stock(scheduler, "sd") == schedule
    scheduler.save_pretrained(tmp_path)
    for n in (1, 5, 10, 20, 25, 50):  # those that divide the chain
        assert_same(our_run(schedule, n), stock_run(DDIMScheduler.from_pretrained(tmp_path), n))


def test_pipelines_may_be_named_as_diffusers_names_them() -> None:
    for name, family in FAMILIES.items():
        assert default_schedule(RectifiedFlow(), Flow(), name, 3.0) == default_schedule(
            RectifiedFlow(), Flow(), family, 3.0
        )
        assert name == family or hasattr(diffusers, name)


def test_sd_pipelines_rewrite_two_settings_and_others_do_not() -> None:
    """StableDiffusionPipeline sets steps_offset to 1 and clip_sample to False, whatever the folder says."""
    old = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    schedule = from_stock(old, "sd")
    assert schedule.options == {"offset": 1} and schedule.spacing == "leading"
    rewritten = DDIMScheduler.from_config(old, steps_offset=1, clip_sample=False)
    assert_same(our_run(schedule, 10), stock_run(rewritten, 10))
    with pytest.raises(ValueError, match="clip_sample=True"):
        from_stock(old, "sdxl")
    kept = from_stock(old | {"clip_sample": False}, "sdxl")
    assert kept.options == {} and stock_scheduler(kept, "sdxl").config["steps_offset"] == 0
    with pytest.raises(ValueError, match="options that DDIMScheduler does not keep"):
        stock_scheduler(kept, "sd")


def test_what_a_fine_tune_keeps_of_sd15() -> None:
    path, prediction, time_input = trained_as(SD15)
    assert (path, prediction, time_input) == (DiscreteVP(), Eps(), TimeInput(1000, offset=-1))
    pndm: Any = PNDMScheduler.from_config(SD15)
    assert trained_as(pndm) == (path, prediction, time_input)
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert trained_as(flow) == (RectifiedFlow(), Flow(), TimeInput(1000, floor=True))
    assert trained_as(FlowMatchEulerDiscreteScheduler()) == (RectifiedFlow(), Flow(), TimeInput(1000))
    karras = DPMSolverMultistepScheduler(**B, use_karras_sigmas=True)
    assert trained_as(karras)[2] == time_input  # where it is sampled is no part of how it was trained
