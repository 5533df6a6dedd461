"""How a model is to be sampled, and the way to and from the schedulers of stock diffusers (``scheduler_table``).

Two things in those are their own, and ours does not follow: with ``trailing`` and a number of steps that does not
divide the chain's length, stock DDIM steps to times other than those at which it next asks the network; and for a few
numbers of steps (61, say) the ``trailing`` grid of each has one step too many.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.denoiser import TimeInput
from ldm.paths import VE, DiscreteVP, Path, RectifiedFlow
from ldm.prediction import X0, Eps, Flow, Karras, Prediction, V
from ldm.sampling import time_grid

from .scheduler_table import IDLE, READ, TABLE, Choice, Row

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

FAMILIES = {
    "sd": "sd", "StableDiffusionPipeline": "sd",
    "sdxl": "sdxl", "StableDiffusionXLPipeline": "sdxl",
    "sd3": "sd3", "StableDiffusion3Pipeline": "sd3",
    "pixart": "pixart", "PixArtAlphaPipeline": "pixart", "PixArtSigmaPipeline": "pixart",
}  # fmt: skip
STOCK_PREDICTIONS: dict[str, Prediction] = {"epsilon": Eps(), "sample": X0(), "v_prediction": V()}
EDM_TIME = TimeInput(0.25, log_sigma=True)


@dataclass(frozen=True)
class Schedule:
    """What a pipeline has to know beside the networks.

    Args:
        path, prediction, time_input: how the network was trained.
        sampler: a name in ``ldm.sampling.SAMPLERS``.
        spacing, shift, options: of the grid (``ldm.sampling.time_grid``).
        sampler_options: of the sampler.
        start: how x starts from noise of unit variance: ``unit``, with all the variance that the path has at t = 1;
            ``sigma``, with sigma at the first time, a little less, as diffusers' samplers in sigma / alpha have it.
    Raises:
        ValueError: another start.
    """

    path: Path
    prediction: Prediction
    time_input: TimeInput
    sampler: str
    spacing: str
    shift: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    start: str = "unit"

    def __post_init__(self) -> None:
        if self.start not in ("unit", "sigma"):
            raise ValueError(f"start {self.start!r} is not one of unit, sigma")

    def times(self, n: int) -> Tensor:
        """The n + 1 times of n steps, float64, from noise to data."""
        return time_grid(self.path, n, shift=self.shift, spacing=self.spacing, **self.options)

    def spread(self, times: Tensor) -> float:
        """What noise of unit variance is multiplied with to be the x at times[0]."""
        if self.start == "sigma":
            return self.path.sigma(times[0]).item()
        end = torch.ones((), dtype=torch.float64)
        return torch.hypot(self.path.alpha(end), self.path.sigma(end)).item()  # 1 but for exploding variance


def default_schedule(path: Path, prediction: Prediction, pipeline: str, shift: float = 1.0) -> Schedule:
    """The schedule to train for: what the stock pipeline does when called with no special arguments, and for a path
    and prediction that no stock scheduler knows, one of ours.

    Args:
        pipeline: a class of diffusers, such as ``StableDiffusionPipeline``, or its family, such as ``sd``: FAMILIES.
        shift: of the flow's times.
    Raises:
        ValueError: an unknown pipeline, or a shift of a path whose nodes are fixed.
    """
    family = _family(pipeline)
    if isinstance(path, DiscreteVP):
        if shift != 1.0:
            raise ValueError(f"shift {shift}: a DiscreteVP samples at its own nodes and takes none")
        sampler = "ddim" if path.ends_at_zero else "dpmpp_2m"  # stock takes alpha = 0 in DDIM's steps alone
        return Schedule(path, prediction, TimeInput(path.num_train_timesteps, offset=-1.0), sampler, "trailing")
    if isinstance(path, VE) and isinstance(prediction, Karras) and shift == 1.0:
        return Schedule(path, prediction, EDM_TIME, "euler", "karras")
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

    family, refused = _family(pipeline), ""
    for name, config in _candidates(schedule, family):
        kind = getattr(diffusers, name)
        known = inspect.signature(kind.__init__).parameters
        scheduler = kind(**{key: value for key, value in config.items() if key in known})
        try:
            if from_stock(scheduler, pipeline) == schedule:
                return scheduler
            refused = f"{_say(schedule)} has options that {name} does not keep"
        except ValueError as error:
            refused = str(error)
    refused = refused or f"{_say(schedule)} has no stock form in the {family} pipelines"
    raise ValueError(f"{refused}; only our own pipelines.TextToImagePipeline can sample it")


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
    if name not in TABLE:
        raise ValueError(
            f"{name} has no exact counterpart here ({', '.join(TABLE)} have): load the model with "
            "DPMSolverMultistepScheduler.from_config, or take the network's own part of it with `trained_as`"
        )
    row = TABLE[name]
    if row.only != family if row.only else family == "sd3":
        raise ValueError(f"{name} does not work in the stock {family} pipelines")
    ours = _chosen(name, row.samplers, config, given) | _chosen(name, row.grids, config, given)
    told = READ | IDLE | row.read | {key for choice in (*row.samplers, *row.grids) for key in choice.stock}
    told |= {row.end[0]} if row.end else set()
    for key, value in config.items():
        if key not in told and value != given[key]:
            raise ValueError(f"{name} with {key}={value!r} has no exact counterpart here; only {given[key]!r} has")
    path, prediction, time_input = trained_as(config | {"_class_name": name})
    _check_start(name, row, path, prediction)
    fields = {"path": path, "prediction": prediction, "time_input": time_input} | ours
    fields["options"] = dict(ours.get("options", {})) | _numbers(name, row, config, ours["spacing"])
    for key in ("shift", "flow_shift"):
        if isinstance(path, RectifiedFlow) and key in config:
            fields["shift"] = config[key]
    if name == "DPMSolverMultistepScheduler" and config["use_karras_sigmas"] and config["beta_schedule"] == _UNROUNDED:
        raise ValueError(f"{name} with Karras's sigmas and beta_schedule={_UNROUNDED!r} has no exact counterpart here")
    schedule = Schedule(**fields)
    try:
        schedule.times(1)
    except ValueError as error:
        raise ValueError(f"{name} with these settings has no exact counterpart here: {error}") from error
    return schedule


def trained_as(scheduler: SchedulerMixin | Mapping[str, Any]) -> tuple[Path, Prediction, TimeInput]:
    """The part of a scheduler that a fine-tune has to keep, whatever it is sampled with: path, prediction and time
    convention. Exact for every scheduler that is defined by betas (PNDM, DDIM, Euler …), is a flow's or EDM's.

    Raises:
        ValueError: other schedulers, an unknown prediction or beta schedule.
    """
    name, config, _ = _read(scheduler)
    kind, steps = config.get("prediction_type", "epsilon"), float(config.get("num_train_timesteps", 1000))
    if name.startswith("FlowMatch"):
        return RectifiedFlow(), Flow(), TimeInput(steps)
    if kind == "flow_prediction" and config.get("use_flow_sigmas"):
        return RectifiedFlow(), Flow(), TimeInput(steps, floor=True)
    if "sigma_data" in config and kind == "epsilon":
        return VE(config["sigma_max"]), Karras(config["sigma_data"]), EDM_TIME
    if "beta_schedule" not in config:
        raise ValueError(f"{name}: expected a scheduler with betas, or one of a rectified flow or of EDM")
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


_SD_INSISTS = {"steps_offset": 1, "clip_sample": False}  # StableDiffusionPipeline rewrites a scheduler to these


# --- reading ---------------------------------------------------------------------------------------------------------


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


def _chosen(
    name: str, choices: tuple[Choice, ...], config: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Our side of the first choice that these settings make; what a choice leaves out is the class's default."""
    keys = sorted({key for choice in choices for key in choice.stock})
    for choice in choices:
        if all(config[key] == choice.stock.get(key, given[key]) for key in keys):
            return dict(choice.ours)
    for key in keys:
        allowed = [choice.stock.get(key, given[key]) for choice in choices]
        if config[key] not in allowed:
            has = " or ".join(map(repr, dict.fromkeys(allowed)))
            raise ValueError(f"{name} with {key}={config[key]!r} has no exact counterpart here; only {has} has")
    together = " and ".join(f"{key}={config[key]!r}" for key in keys if config[key] or key == "timestep_spacing")
    raise ValueError(f"{name} with {together} together has no exact counterpart here")


def _numbers(name: str, row: Row, config: Mapping[str, Any], spacing: str) -> dict[str, Any]:
    """The grid's options that are numbers, where they are not ours by default."""
    options: dict[str, Any] = {}
    if spacing == "leading" and config["steps_offset"]:
        options["offset"] = config["steps_offset"]
    if spacing.startswith("flow_") and config["num_train_timesteps"] != 1000:
        options["train_steps"] = config["num_train_timesteps"]
    if row.read:
        options |= {key: config[key] for key in ("sigma_min", "rho") if config[key] != _EDM[key]}
    if row.end:
        key, clean, first_node = row.end
        if config[key] == first_node and spacing in _NODES:
            options["end"] = 1
        elif config[key] != clean:
            raise ValueError(f"{name} with {key}={config[key]!r} has no exact counterpart here; only {clean!r} has")
    return options


def _check_start(name: str, row: Row, path: Path, prediction: Prediction) -> None:
    kind = _stock_prediction(prediction)
    if isinstance(path, DiscreteVP) and kind not in row.predictions:
        raise ValueError(f"{name} with prediction_type={kind!r} has no exact counterpart here")
    if isinstance(path, DiscreteVP) and path.ends_at_zero and (prediction.needs_signal or not row.from_no_signal):
        raise ValueError(
            f"{name} with {type(prediction).__name__}: this chain starts where alpha = 0, which no stock scheduler "
            "takes as it is but DDIM and DDPM with V or X0"
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def _candidates(schedule: Schedule, family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stock classes that step and walk as the schedule does, and their settings."""
    for name, row in TABLE.items():
        if row.only != family if row.only else family == "sd3":
            continue
        if not isinstance(schedule.path, row.paths) or (numbers := _stock_numbers(schedule, name, row, family)) is None:
            continue
        for sampler in row.samplers:
            for grid in row.grids:
                if _is_so(sampler.ours, schedule) and _is_so(grid.ours, schedule):
                    yield name, {**sampler.stock, **grid.stock, **numbers}
                    break


def _is_so(fields: Mapping[str, Any], schedule: Schedule) -> bool:
    for key, value in fields.items():
        has = getattr(schedule, key)
        subset = isinstance(value, Mapping) and all(has.get(k) == v for k, v in value.items())
        if not subset and value != has:
            return False
    return True


def _stock_numbers(schedule: Schedule, name: str, row: Row, family: str) -> dict[str, Any] | None:
    """What follows from path, prediction and the grid's options; None where the class does not know the prediction."""
    path, options = schedule.path, schedule.options
    if isinstance(path, VE) and isinstance(schedule.prediction, Karras):
        data = {"sigma_max": path.sigma_max, "sigma_data": schedule.prediction.sigma_data}
        return data | {key: options.get(key, default) for key, default in _EDM.items()}
    kind = _stock_prediction(schedule.prediction)
    if kind is None or (kind == "flow_prediction") != isinstance(path, RectifiedFlow):
        return None
    numbers = {"prediction_type": kind, "steps_offset": options.get("offset", int(family == "sd"))}
    if row.end:
        key, clean, first_node = row.end
        numbers[key] = first_node if options.get("end") else clean
    if isinstance(path, DiscreteVP):
        return numbers | _stock_betas(path, name)
    steps = options.get("train_steps", 1000)
    return numbers | {"shift": schedule.shift, "flow_shift": schedule.shift, "num_train_timesteps": steps}


def _stock_betas(path: DiscreteVP, name: str) -> dict[str, Any]:
    if path.named is None or (path.named[0] == "sigmoid" and name != "DDPMScheduler"):
        return {"trained_betas": path.betas.tolist(), "num_train_timesteps": path.num_train_timesteps}
    keys = ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end")
    return dict(zip(keys, path.named, strict=True)) | {"rescale_betas_zero_snr": path.zero_terminal_snr}


def _stock_prediction(prediction: Prediction) -> str | None:
    return next(
        (name for name, known in (*STOCK_PREDICTIONS.items(), ("flow_prediction", Flow())) if known == prediction), None
    )


def _family(pipeline: str) -> str:
    if pipeline not in FAMILIES:
        raise ValueError(f"pipeline {pipeline!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[pipeline]


def _say(s: Schedule) -> str:
    return f"{type(s.path).__name__} with {type(s.prediction).__name__}, sampled by {s.sampler} ({s.spacing})"


_NODES = ("trailing", "leading", "linspace")
_UNROUNDED = "squaredcos_cap_v2"  # where stock cuts Karras's indices to integers, and rounds them elsewhere
_EDM = {"sigma_min": 0.002, "rho": 7.0}
