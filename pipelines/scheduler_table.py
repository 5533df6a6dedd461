"""Which schedulers of stock diffusers have an exact counterpart here: one row for each class, read in both directions.

| stock class            | our sampler                  | on betas: timestep_spacing, or sigmas    | else             |
|------------------------|------------------------------|------------------------------------------|------------------|
| DDIM                   | ddim                         | trailing, leading                        |                  |
| DDPM                   | ddpm                         | trailing, leading, linspace              |                  |
| PNDM                   | pndm (eps only)              | leading                                  |                  |
| EulerDiscrete          | euler                        | trailing, leading, linspace; karras, exp |                  |
| EulerAncestralDiscrete | euler_ancestral (eps, v)     | trailing, leading, linspace              |                  |
| HeunDiscrete           | heun                         | trailing, leading, linspace; karras, exp |                  |
| LMSDiscrete            | lms                          | trailing, leading, linspace; karras, exp |                  |
| DPMSolverMultistep     | dpmpp_2m, _2m_sde, _3m       | trailing, leading, linspace; karras      | flow sigmas      |
| UniPCMultistep         | unipc                        | trailing, leading, linspace; karras      | flow sigmas      |
| FlowMatchEulerDiscrete | euler                        |                                          | flow, SD3's pipe |
| FlowMatchHeunDiscrete  | flow_heun                    |                                          | flow, SD3's pipe |
| EDMEuler               | euler                        |                                          | VE: karras, exp  |

What is refused, and why: PNDM with v averages the v of several times and then reads the mean as if it were of the last;
the third order of sde-dpmsolver++ has a wrong sign in its last term; DPM-Solver with variance_type="learned_range" cuts
the network's output to three channels, which latents do not have; Euler ends at final_sigmas_type="sigma_min" with
x / alpha; Karras's sigmas between the ends of a leading or trailing grid depend on the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import TimeInput
from ldm.paths import VE, DiscreteVP, Path, RectifiedFlow


@dataclass(frozen=True)
class IndexOfSigma(TimeInput):
    """What stock schedulers tell the network of a time between two nodes of a chain when they walk down Karras's or
    exponential sigmas: the index in which log sigma, not sigma, is straight; ``nearest``: rounded."""

    nearest: bool = False

    def __call__(self, t: Tensor, path: Path) -> Tensor:
        if not isinstance(path, DiscreteVP):
            raise ValueError(f"IndexOfSigma counts the nodes of a DiscreteVP, {type(path).__name__} has none")
        nodes, log_nu = path.table(t)[1:].log(), -path.log_snr(t.double()) / 2
        k = (torch.searchsorted(nodes, log_nu.contiguous(), right=True) - 1).clamp(0, len(nodes) - 2)
        index = (k + (log_nu - nodes[k]) / (nodes[k + 1] - nodes[k])).clamp(0, len(nodes) - 1)
        return (index.round() if self.nearest else index).to(t.dtype)


class Choice(NamedTuple):
    """Settings of a stock class, and the fields of a Schedule that say the same."""

    stock: Mapping[str, Any]
    ours: Mapping[str, Any]


class Row(NamedTuple):
    """A stock class: how it steps, and when."""

    samplers: tuple[Choice, ...]
    grids: tuple[Choice, ...]
    end: tuple[str, Any, Any] | None = None  # the setting for where it ends: its value for clean, for the first node
    predictions: frozenset[str] = frozenset({"epsilon", "sample", "v_prediction", "flow_prediction"})
    from_no_signal: bool = False  # does it take a chain that ends at alpha = 0?
    only: str | None = None  # the one family whose pipelines can call it
    paths: tuple[type[Path], ...] = (DiscreteVP,)
    read: frozenset[str] = frozenset()  # numbers that no other class has


def _choice(stock: Mapping[str, Any], **ours: Any) -> Choice:
    return Choice(stock, ours)


def _spaced(name: str, **ours: Any) -> Choice:
    """``timestep_spacing`` and our grid of the same name."""
    return Choice({"timestep_spacing": name}, {"spacing": name, **ours})


_NODES = (_spaced("trailing"), _spaced("leading"), _spaced("linspace"))
# The family that works in x / alpha starts from sigma / alpha times the noise, but for leading: sqrt(1 + …^2) times.
_SIGMAS = (
    _spaced("trailing", start="sigma"),
    _spaced("leading"),
    _spaced("linspace", options={"whole": False}, start="sigma"),
    *(
        _choice(
            {"timestep_spacing": "linspace", f"use_{kind}_sigmas": True},
            spacing=kind, start="sigma", time_input=IndexOfSigma(),
        )
        for kind in ("karras", "exponential")
    ),
)  # fmt: skip
# Here n + 1 points are laid out and the last is left out.
_SOLVER = (
    _spaced("trailing"),
    _spaced("leading", options={"drop_last": True}),
    _spaced("linspace", options={"drop_last": True}),
    *(
        _choice(
            {"timestep_spacing": spacing, "use_karras_sigmas": True},
            spacing="karras", time_input=IndexOfSigma(nearest=True),
        )
        for spacing in ("linspace", "leading", "trailing")  # idle
    ),
)  # fmt: skip
_FLOW_MATCH = (_choice({}, spacing="flow_match"),)
_CLEAN, _SIGMA_LAST = ("set_alpha_to_one", True, False), ("final_sigmas_type", "zero", "sigma_min")


def _flow_sigmas(**options: Any) -> tuple[Choice, ...]:
    return tuple(
        _choice({"timestep_spacing": spacing, "use_flow_sigmas": True}, spacing="flow_sigmas", options=options)
        for spacing in ("linspace", "leading", "trailing")  # idle
    )


def _dpm(algorithm: str, order: int, **ours: Any) -> Choice:
    solver = "midpoint" if ours.get("sampler_options", {}).get("midpoint", True) else "heun"
    return _choice({"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}, **ours)


TABLE: dict[str, Row] = {
    "DDIMScheduler": Row((_choice({"clip_sample": False}, sampler="ddim"),), _NODES[:2], _CLEAN, from_no_signal=True),
    "DDPMScheduler": Row((_choice({"clip_sample": False}, sampler="ddpm"),), _NODES, from_no_signal=True),
    "PNDMScheduler": Row(
        (_choice({"skip_prk_steps": True}, sampler="pndm"),), _NODES[1:2], _CLEAN, frozenset({"epsilon"})
    ),
    "EulerDiscreteScheduler": Row((_choice({}, sampler="euler"),), _SIGMAS),
    "EulerAncestralDiscreteScheduler": Row(
        (_choice({}, sampler="euler_ancestral"),), _SIGMAS[:3], None, frozenset({"epsilon", "v_prediction"})
    ),
    "HeunDiscreteScheduler": Row((_choice({}, sampler="heun"),), _SIGMAS),
    "LMSDiscreteScheduler": Row((_choice({}, sampler="lms"),), _SIGMAS),
    "DPMSolverMultistepScheduler": Row(
        (
            _dpm("dpmsolver++", 2, sampler="dpmpp_2m"),
            _dpm("dpmsolver++", 2, sampler="dpmpp_2m", sampler_options={"midpoint": False}),
            _dpm("dpmsolver++", 3, sampler="dpmpp_3m", sampler_options={"curvature": 0.5}),
            _dpm("sde-dpmsolver++", 2, sampler="dpmpp_2m_sde"),
            _dpm("sde-dpmsolver++", 2, sampler="dpmpp_2m_sde", sampler_options={"midpoint": False}),
        ),
        (*_SOLVER, *_flow_sigmas()),
        _SIGMA_LAST,
        paths=(DiscreteVP, RectifiedFlow),
    ),
    "UniPCMultistepScheduler": Row(
        tuple(
            _choice({"solver_order": order}, sampler="unipc", sampler_options={} if order == 2 else {"order": order})
            for order in (2, 1, 3)
        ),
        (*_SOLVER, *_flow_sigmas(from_pure_noise=True)),
        _SIGMA_LAST,
        paths=(DiscreteVP, RectifiedFlow),
    ),
    "FlowMatchEulerDiscreteScheduler": Row(
        (_choice({}, sampler="euler"),), _FLOW_MATCH, only="sd3", paths=(RectifiedFlow,)
    ),
    "FlowMatchHeunDiscreteScheduler": Row(
        (_choice({}, sampler="flow_heun"),), _FLOW_MATCH, only="sd3", paths=(RectifiedFlow,)
    ),
    "EDMEulerScheduler": Row(
        (_choice({}, sampler="euler"),),
        tuple(_choice({"sigma_schedule": kind}, spacing=kind) for kind in ("karras", "exponential")),
        paths=(VE,),
        read=frozenset({"sigma_min", "sigma_max", "sigma_data", "rho"}),
    ),
}  # fmt: skip

# What decides path, prediction and numbers of the grid, and is read wherever a class has it.
READ = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "steps_offset", "shift", "flow_shift",
}  # fmt: skip
# Settings of what is switched off.
IDLE = {
    "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "base_shift", "max_shift",
    "base_image_seq_len", "max_image_seq_len", "time_shift_type",
}  # fmt: skip
