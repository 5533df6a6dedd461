"""How a model is to be sampled, and the two-way table to the schedulers of stock diffusers.

| path, prediction                 | pipelines | stock scheduler                          | ours: sampler, spacing    |
|----------------------------------|-----------|------------------------------------------|---------------------------|
| DiscreteVP with Eps, X0, V       | SD        | DDIM, trailing or leading                | ddim, trailing or leading |
| DiscreteVP with Eps, X0, V       | SD        | DPMSolverMultistep, trailing             | dpmpp_2m, trailing        |
| RectifiedFlow with Flow          | SD        | DPMSolverMultistep, flow sigmas          | dpmpp_2m, flow_sigmas     |
| RectifiedFlow with Flow          | SD3       | FlowMatchEulerDiscrete                   | euler, flow_match         |

One thing in it is DDIM's own: with ``trailing`` and a number of steps that does not divide the chain's length, stock
DDIM steps to times other than those at which it next asks the network. Ours does not follow it there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm.denoiser import TimeInput
from ldm.paths import DiscreteVP, Path, RectifiedFlow
from ldm.prediction import X0, Eps, Flow, Prediction, V
from ldm.sampling import time_grid

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

DDIM, DPM, FLOW = "DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
FAMILIES = {"sd": "sd", "sd3": "sd3", "StableDiffusionPipeline": "sd", "StableDiffusion3Pipeline": "sd3"}
STOCK_PREDICTIONS: dict[str, Prediction] = {"epsilon": Eps(), "sample": X0(), "v_prediction": V()}


@dataclass(frozen=True)
class Schedule:
    """What a pipeline has to know beside the networks.

    Args:
        path, prediction, time_input: how the network was trained.
        sampler: a name in ``ldm.sampling.SAMPLERS``.
        spacing, shift, options: of the grid (``ldm.sampling.time_grid``).
    """

    path: Path
    prediction: Prediction
    time_input: TimeInput
    sampler: str
    spacing: str
    shift: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def times(self, n: int) -> Tensor:
        """The n + 1 times of n steps, float64, from noise to data."""
        return time_grid(self.path, n, shift=self.shift, spacing=self.spacing, **self.options)


def default_schedule(path: Path, prediction: Prediction, pipeline: str, shift: float = 1.0) -> Schedule:
    """The schedule to train for: what the stock pipeline does when called with no special arguments, and for a path
    and prediction that no stock scheduler knows, one of ours.

    Args:
        pipeline: ``StableDiffusionPipeline`` or ``StableDiffusion3Pipeline``; or its family, ``sd`` or ``sd3``.
        shift: of the flow's times.
    Raises:
        ValueError: an unknown pipeline, or a shift of a path whose nodes are fixed.
    """
    family = _family(pipeline)
    if isinstance(path, DiscreteVP):
        if shift != 1.0:
            raise ValueError(f"shift {shift}: a DiscreteVP samples at its own nodes and takes none")
        return Schedule(path, prediction, TimeInput(path.num_train_timesteps, offset=-1.0), "ddim", "trailing")
    if isinstance(path, RectifiedFlow) and isinstance(prediction, Flow):
        if family == "sd3":
            return Schedule(path, prediction, TimeInput(1000.0), "euler", "flow_match", shift)
        return Schedule(path, prediction, TimeInput(1000.0, floor=True), "dpmpp_2m", "flow_sigmas", shift)
    return Schedule(path, prediction, TimeInput(1000.0), "dpmpp_2m", "uniform", shift)


def to_stock(path: Path, prediction: Prediction, pipeline: str, *, shift: float = 1.0) -> SchedulerMixin:
    """The diffusers scheduler of ``default_schedule``. Raises ValueError where there is none."""
    return stock_scheduler(default_schedule(path, prediction, pipeline, shift), pipeline)


def stock_scheduler(schedule: Schedule, pipeline: str) -> SchedulerMixin:
    """The diffusers scheduler that samples in this stock pipeline as ``schedule`` says.

    Raises:
        ValueError: there is none.
    """
    import diffusers

    name, config = _stock_config(schedule, _family(pipeline))
    scheduler = getattr(diffusers, name)(**config)
    if from_stock(scheduler, pipeline) != schedule:
        raise ValueError(f"{_say(schedule)} has options that {name} does not keep; {_OURS}")
    return scheduler


def from_stock(scheduler: SchedulerMixin | Mapping[str, Any], pipeline: str) -> Schedule:
    """The schedule that samples as this scheduler does in this stock pipeline.

    Args:
        scheduler: an object, or what a folder's ``scheduler_config.json`` holds.
    Raises:
        ValueError: a scheduler, or a setting of it, that has no exact counterpart here or does not work there.
    """
    name, config, given = _read(scheduler)
    family = _family(pipeline)
    if family == "sd":
        config |= {k: v for k, v in _SD_INSISTS.items() if k in config}
    if name not in _READ:
        raise ValueError(
            f"{name} has no exact counterpart here ({', '.join(_READ)} have): load the model with "
            "DDIMScheduler.from_config, or take the network's own part of it with `trained_as`"
        )
    for key, value in config.items():
        expected = _FIXED[name].get(key, given[key])
        if key not in _READ[name] and key not in _IDLE and value != expected:
            raise ValueError(f"{name} with {key}={value!r} has no exact counterpart here; only {expected!r} has")
    path, prediction, time_input = trained_as(config | {"_class_name": name})
    if (name == FLOW) != (family == "sd3"):
        raise ValueError(f"{name} does not work in the stock {family} pipelines")
    steps = config["num_train_timesteps"]
    options: dict[str, Any] = {} if steps == 1000 else {"train_steps": steps}
    if name == FLOW:
        return Schedule(path, prediction, time_input, "euler", "flow_match", config["shift"], options)
    if isinstance(prediction, Flow):
        return Schedule(path, prediction, time_input, "dpmpp_2m", "flow_sigmas", config["flow_shift"], options)
    spacing = config["timestep_spacing"]
    if spacing not in (("trailing",) if name == DPM else ("trailing", "leading")):
        raise ValueError(f"{name} with timestep_spacing={spacing!r} has no exact counterpart here; 'trailing' has")
    if name == DPM:
        return Schedule(path, prediction, time_input, "dpmpp_2m", spacing)
    options = {} if config["set_alpha_to_one"] else {"end": 1}
    if spacing == "leading":
        options["offset"] = config["steps_offset"]
    return Schedule(path, prediction, time_input, "ddim", spacing, options=options)


def trained_as(scheduler: SchedulerMixin | Mapping[str, Any]) -> tuple[Path, Prediction, TimeInput]:
    """The part of a scheduler that a fine-tune has to keep, whatever it is sampled with: path, prediction and time
    convention. Exact for every scheduler that is defined by betas (PNDM, DDIM, Euler …) or is a flow's.

    Raises:
        ValueError: other schedulers, an unknown prediction or beta schedule.
    """
    name, config, _ = _read(scheduler)
    kind = config.get("prediction_type", "epsilon")
    if name == FLOW:
        return RectifiedFlow(), Flow(), TimeInput(float(config["num_train_timesteps"]))
    if kind == "flow_prediction" and config.get("use_flow_sigmas"):
        return RectifiedFlow(), Flow(), TimeInput(float(config["num_train_timesteps"]), floor=True)
    if "beta_schedule" not in config:
        raise ValueError(f"{name}: expected a scheduler with betas, or one of a rectified flow")
    if kind not in STOCK_PREDICTIONS:
        raise ValueError(f"{name}: prediction_type {kind!r} is not one of {', '.join(STOCK_PREDICTIONS)}")
    path = DiscreteVP(
        config.get("trained_betas"),
        schedule=config["beta_schedule"],
        num_train_timesteps=config["num_train_timesteps"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
    )
    return path, STOCK_PREDICTIONS[kind], TimeInput(float(path.num_train_timesteps), offset=-1.0)


_OURS = "only our own pipelines.TextToImagePipeline can sample it"
_SD_INSISTS = {"steps_offset": 1, "clip_sample": False}  # StableDiffusionPipeline rewrites a scheduler to these
_BETAS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"}
_SPACED = {"prediction_type", "timestep_spacing", "steps_offset"}
_READ = {
    DDIM: _BETAS | _SPACED | {"set_alpha_to_one", "rescale_betas_zero_snr"},
    DPM: _BETAS | _SPACED | {"use_flow_sigmas", "flow_shift"},
    FLOW: {"num_train_timesteps", "shift"},
}
_FIXED: dict[str, dict[str, Any]] = {DDIM: {"clip_sample": False}, DPM: {}, FLOW: {}}
_IDLE = {  # settings of what is switched off
    "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "base_shift", "max_shift",
    "base_image_seq_len", "max_image_seq_len", "time_shift_type",
}  # fmt: skip


def _stock_config(schedule: Schedule, family: str) -> tuple[str, dict[str, Any]]:
    path, prediction, sampler = schedule.path, schedule.prediction, schedule.sampler
    kind = next((name for name, known in STOCK_PREDICTIONS.items() if known == prediction), None)
    steps = schedule.options.get("train_steps", 1000)
    match sampler, schedule.spacing:
        case "euler", "flow_match" if isinstance(prediction, Flow) and family == "sd3":
            return FLOW, dict(shift=schedule.shift, num_train_timesteps=steps)
        case "dpmpp_2m", "flow_sigmas" if isinstance(prediction, Flow) and family == "sd":
            flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=schedule.shift)
            return DPM, flow | dict(num_train_timesteps=steps, steps_offset=1)
    if isinstance(path, DiscreteVP) and kind is not None and family == "sd":
        if path.ends_at_zero and (prediction.needs_signal or sampler != "ddim"):
            raise ValueError(
                f"{_say(schedule)} starts where alpha = 0, which no stock scheduler takes but DDIM with V or X0"
            )
        betas = dict(trained_betas=path.betas.tolist(), num_train_timesteps=path.num_train_timesteps)
        common = betas | dict(prediction_type=kind, timestep_spacing=schedule.spacing)
        if sampler == "ddim" and schedule.spacing in ("trailing", "leading"):
            clean = not schedule.options.get("end", 0)
            return DDIM, common | dict(clip_sample=False, set_alpha_to_one=clean, steps_offset=1)
        if sampler == "dpmpp_2m" and schedule.spacing == "trailing":
            return DPM, common | dict(steps_offset=1)
    raise ValueError(f"{_say(schedule)} has no stock form in the {family} pipelines; {_OURS}")


def _read(scheduler: SchedulerMixin | Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Class name, its whole config, and the defaults of its fields."""
    import diffusers

    if isinstance(scheduler, Mapping):
        config, name = dict(scheduler), str(scheduler.get("_class_name"))
    else:
        config, name = dict(getattr(scheduler, "config")), type(scheduler).__name__  # noqa: B009 (unknown to pyright)
    kind = getattr(diffusers, name, None)
    if not (name.endswith("Scheduler") and inspect.isclass(kind)):
        raise ValueError(f"_class_name {name!r} is not a scheduler of diffusers")
    parameters = inspect.signature(kind.__init__).parameters.items()
    defaults = {key: p.default for key, p in parameters if key != "self"}
    return name, {key: config.get(key, default) for key, default in defaults.items()}, defaults


def _family(pipeline: str) -> str:
    if pipeline not in FAMILIES:
        raise ValueError(f"pipeline {pipeline!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[pipeline]


def _say(s: Schedule) -> str:
    return f"{type(s.path).__name__} with {type(s.prediction).__name__}, sampled by {s.sampler} ({s.spacing})"
