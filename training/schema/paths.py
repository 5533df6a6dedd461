"""Paths from data to noise, the times to train at, and what each counts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import AboveZero, Positive, Section, or_kind


class RectifiedFlowPath(Section):
    name: Literal["rectified_flow"] = "rectified_flow"


class CosinePath(Section):
    name: Literal["cosine"]


class LinearPath(Section):
    name: Literal["linear"]
    beta_min: AboveZero = 0.1
    beta_max: AboveZero = 20.0


class SigmoidPath(Section):
    name: Literal["sigmoid"]
    start: float = -3.0
    end: float = 3.0
    tau: AboveZero = 1.0


class VEPath(Section):
    name: Literal["ve"]
    sigma_max: AboveZero = 80.0


class NCSNPath(Section):
    name: Literal["ncsn"]
    sigma_min: AboveZero = 0.01
    sigma_max: AboveZero = 50.0


class DiscretePath(Section):
    """The betas of diffusers' schedulers, under their names."""

    name: Literal["discrete"]
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "scaled_linear"
    beta_start: AboveZero = 0.00085
    beta_end: AboveZero = 0.012
    num_train_timesteps: Positive = 1000
    rescale_betas_zero_snr: bool = False


PathSection = Annotated[
    RectifiedFlowPath | CosinePath | LinearPath | SigmoidPath | VEPath | NCSNPath | DiscretePath,
    Field(discriminator="name"),
    or_kind("rectified_flow"),
]


class Times(Section):
    shift: AboveZero = 1.0  # SD3's, in training and in the exported scheduler
    stratified: bool = False  # one time in each of batch_size equal parts: less noise in a batch's loss


class UniformTimes(Times):
    name: Literal["uniform"]


class LogitNormalTimes(Times):
    name: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: AboveZero = 1.0


class ModeTimes(Times):
    name: Literal["mode"]
    scale: float = 1.29


class LogNormalTimes(Times):
    """EDM's P_mean and P_std, of log(sigma / alpha)."""

    name: Literal["log_normal"]
    mean: float = -1.2
    std: AboveZero = 1.2


Timesteps = Annotated[
    UniformTimes | LogitNormalTimes | ModeTimes | LogNormalTimes,
    Field(discriminator="name"),
    or_kind("logit_normal"),
]


class UnitWeight(Section):
    name: Literal["unit"] = "unit"


class MinSNRWeight(Section):
    name: Literal["min_snr"]
    gamma: AboveZero = 5.0


class P2Weight(Section):
    name: Literal["p2"]
    gamma: Annotated[float, Field(ge=0)] = 1.0
    k: AboveZero = 1.0


class DebiasedWeight(Section):
    name: Literal["debiased"]


class SigmoidWeight(Section):
    name: Literal["sigmoid"]
    bias: float = 0.0


class EDMWeight(Section):
    name: Literal["edm"]
    sigma_data: AboveZero = 0.5


class CosmapWeight(Section):
    name: Literal["cosmap"]


Weighting = Annotated[
    UnitWeight | MinSNRWeight | P2Weight | DebiasedWeight | SigmoidWeight | EDMWeight | CosmapWeight,
    Field(discriminator="name"),
    or_kind("unit"),
]
