"""The optimizers, their schedules and the moving averages."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from .base import AboveZero, Positive, Section, Share, or_kind

Decay = Annotated[float, Field(ge=0)]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


def _rules(text: str | None) -> str | None:
    """``1:10000,0.1:20000,0.01``: factors of the learning rate, each up to so many images; the last for the rest."""
    if text is not None:
        *steps, last = [part.strip() for part in text.split(",")]
        try:
            ends = [int(end) for _, end in (step.split(":") for step in steps)]
            factors = [float(factor) for factor in [*(step.split(":")[0] for step in steps), last]]
        except ValueError as error:
            raise ValueError(f"{text!r}: expected FACTOR:IMAGES,…,FACTOR, as 1:10000,0.1:20000,0.01") from error
        if min(factors) < 0 or ends != sorted(set(ends)) or not ends:
            raise ValueError(f"{text!r}: expected factors of 0 or more, each up to more images than the one before")
    return text


Pattern = Annotated[str, AfterValidator(_compiles)]


class Group(Section):
    """Parameters that train otherwise than the rest: those in whose name ``pattern`` is found (``re.search``) and that
    no group before this one took. ``{pattern: "bias|norm|embed", weight_decay: 0}`` spares these the decay."""

    pattern: Pattern
    learning_rate: AboveZero | None = None  # before the schedule's factor
    learning_rate_factor: AboveZero | None = None  # or as a multiple of the optimizer's
    weight_decay: Decay | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Group:
        if self.learning_rate and self.learning_rate_factor:
            raise ValueError("learning_rate or learning_rate_factor, not both")
        if self.learning_rate is None and self.learning_rate_factor is None and self.weight_decay is None:
            raise ValueError(f"the group {self.pattern!r} changes nothing: set learning_rate or weight_decay")
        return self


class AnyOptimizer(Section):
    """What all kinds have. The schedules are diffusers', counted in images; all end with the run."""

    package: ClassVar[str | None] = None  # that must be installed beside ours
    state_bytes: ClassVar[float] = 8.0  # of the optimizer's memory for each trained weight
    sharded: ClassVar[bool] = True  # takes FSDP2's weights

    name: str

    learning_rate: AboveZero = 1e-4
    adam_weight_decay: Decay = 0.01  # of all parameters, as in diffusers' scripts; groups may say otherwise
    max_grad_norm: AboveZero = 1.0
    groups: tuple[Group, ...] = ()
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = "constant_with_warmup"
    lr_warmup_images: Annotated[int, Field(ge=0)] = 0
    lr_num_cycles: Positive = 1  # of cosine_with_restarts
    lr_power: AboveZero = 1.0  # of polynomial, which ends at a learning rate of 1e-7
    lr_step_rules: Annotated[str | None, AfterValidator(_rules)] = None  # of piecewise_constant: "1:10000,0.1"

    @model_validator(mode="after")
    def _schedule_is_told(self) -> AnyOptimizer:
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise ValueError(
                'lr_scheduler piecewise_constant goes with lr_step_rules ("1:10000,0.1"), and only it does'
            )
        if self.lr_scheduler == "polynomial" and self.learning_rate <= 1e-7:
            raise ValueError("lr_scheduler polynomial ends at a learning rate of 1e-7: start above it")
        return self


class _Adam(AnyOptimizer):
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: AboveZero = 1e-8


class AdamW(_Adam):
    """Fused AdamW (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"


class AdamW8bit(_Adam):
    """AdamW with its moments in 8 bits (Dettmers et al. 2022); tensors of under 4096 weights keep theirs in 32."""

    package: ClassVar[str | None] = "bitsandbytes"
    state_bytes: ClassVar[float] = 2.03
    sharded: ClassVar[bool] = False

    name: Literal["adamw_8bit"]


class Adafactor(AnyOptimizer):
    """Shazeer & Stern 2018, transformers' class, with the schedule's learning rate in place of its own. Its second
    moments of a matrix are one row and one column (of a 3 x 3 convolution, two thirds of the whole)."""

    state_bytes: ClassVar[float] = 0.1  # of a transformer
    sharded: ClassVar[bool] = False

    name: Literal["adafactor"]
    adam_weight_decay: Decay = 0.0
    adafactor_beta1: Annotated[float, Field(ge=0, lt=1)] | None = None  # None: no first moment
    decay_rate: Annotated[float, Field(lt=0)] = -0.8
    clip_threshold: AboveZero = 1.0
    scale_parameter: bool = False  # learning rates as multiples of each tensor's root mean square


class Prodigy(_Adam):
    """Finds its step size itself (Mishchenko & Defazio 2024); options as diffusers' scripts set them."""

    package: ClassVar[str | None] = "prodigyopt"
    state_bytes: ClassVar[float] = 16.0
    sharded: ClassVar[bool] = False

    name: Literal["prodigy"]
    learning_rate: AboveZero = 1.0  # a factor of the step size that is found
    prodigy_beta3: Share | None = None
    prodigy_use_bias_correction: bool = True
    prodigy_safeguard_warmup: bool = True
    prodigy_d_coef: AboveZero = 1.0

    @model_validator(mode="after")
    def _one_rate(self) -> Prodigy:
        if any(group.learning_rate or group.learning_rate_factor for group in self.groups):
            raise ValueError("prodigy finds one step size for all groups: give them no learning_rate of their own")
        return self


class ScheduleFree(_Adam):
    """Schedule-free AdamW (Defazio et al. 2024): it averages its weights instead of lowering the learning rate.
    Samples and exports use that average: with ``ema_decay: 0``; else the moving average of the training weights."""

    package: ClassVar[str | None] = "schedulefree"

    name: Literal["schedule_free"]
    adam_beta1: Annotated[float, Field(gt=0, lt=1)] = 0.9
    learning_rate: AboveZero = 2.5e-3
    lr_scheduler: Literal["constant", "constant_with_warmup"] = "constant_with_warmup"


class Muon(_Adam):
    """Muon (Jordan et al. 2024; torch's) for hidden weights of two or more dimensions, a convolution's flattened to
    (out, rest); fused AdamW for all others: vectors, and those in whose name ``adamw_pattern`` is found."""

    state_bytes: ClassVar[float] = 4.5

    name: Literal["muon"]
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    muon_nesterov: bool = True
    muon_steps: Annotated[int, Field(gt=0, lt=100)] = 5  # of Newton and Schulz
    # match_rms_adamw (Liu et al. 2025): learning rate and decay as for AdamW; original: a larger rate, as 0.02
    muon_adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    # first and last layers, embeddings and tables, under the stock classes' names
    adamw_pattern: Pattern = (
        r"(^|\.)(conv_in|conv_out|quant_conv|post_quant_conv|norm_out)\.|^(net\.)?proj_out\."
        r"|embed|_projection\.|_table$"
    )


OptimizerSection = Annotated[
    AdamW | AdamW8bit | Adafactor | Prodigy | ScheduleFree | Muon,
    Field(discriminator="name"),
    or_kind("adamw"),
]
Optimizer = AdamW  # the kind that is meant where none is named


class EMA(Section):
    """The averages of the weights beside ``ema_decay``'s, and how all are kept: in float32.

    ``snapshot_every`` turns on post-hoc averages (Karras et al. 2024, EDM2): those of ``sigma_rels`` are tracked and
    stored in RUN/ema, and an average of any width can be put together of them afterwards."""

    update_every: Positive = 1  # optimizer steps; ema_decay still counts every step
    device: Literal["same", "cpu"] = "same"  # cpu saves GPU memory; each update then waits for a copy of the weights
    snapshot_every: Positive | None = None  # images
    # widths, as shares of the run's length; two are enough
    sigma_rels: Annotated[tuple[Annotated[float, Field(gt=0, lt=0.28)], ...], Field(min_length=1)] = (0.05, 0.1)
    snapshot_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _distinct(self) -> EMA:
        if len(set(self.sigma_rels)) != len(self.sigma_rels):
            raise ValueError("sigma_rels: the same width twice")
        return self
