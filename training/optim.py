"""The optimizer that the loop steps: groups, schedule, clipping, loss scaling, and steps that are skipped exactly."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import sharded
from .fit import ConfigError
from .optimizers import Groups, package, steppers
from .schema.optim import AnyOptimizer
from .tensor_files import Stored, StoredTensor, read

Parameters = Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]]  # ``parameters()`` or ``named_parameters()``
FIRST_SCALE, LARGEST_SCALE, GROWS_AFTER = 2.0**16, 2.0**96, 2000  # torch's GradScaler has the first and the last too


class Guarded:
    """An optimizer of any kind with its schedule. One call clips, skips a step whose gradient is not finite, updates.

    AdamW and Muon step without the host's waiting for the norm: the fused kernel takes ``grad_scale`` (gradients are
    divided by it) and ``found_inf`` (nothing is written where it is 1) along in the same pass; Muon's step is put back
    on the device. The others count on the host, so they wait for the one flag; 8-bit AdamW and Prodigy themselves wait
    for every tensor. Either way a skipped step leaves weights and state bit for bit as they were; the schedule goes on.

    Args:
        parameters: ``module.named_parameters()``; those without ``requires_grad`` are left out. Names are needed by
            groups and by Muon alone.
        config: kind, learning rate, groups, clipping, schedule.
        images: how many will be seen in all: where the schedule ends.
        warmup: images until the full learning rate; the config's if None.
        per_step: images of one step, over all processes and micro-batches.
        fp16: scale the loss (``scaled``), so that small gradients do not vanish in half precision.
    Raises:
        ConfigError: a package is missing, or a group's pattern matches nothing.
        ValueError: a parameter that trains is not float32.
    """

    def __init__(
        self,
        parameters: Parameters,
        config: AnyOptimizer,
        images: int,
        warmup: int | None = None,
        *,
        per_step: int = 1,
        fp16: bool = False,
    ):
        named = named_parameters(parameters)
        self.parameters = list(named.values())
        check_float32(named)
        if not config.sharded and any(isinstance(p, DTensor) for p in self.parameters):
            raise ConfigError(f"optimizer.name: {config.name} does not take sharded weights (FSDP2); adamw does")
        self.config, self.per_step, self.steps, self.images = config, per_step, 0, 0
        self.steppers = steppers(config, grouped(named, config), {p: name for name, p in named.items()})
        self._factor = schedule(config, images, config.lr_warmup_images if warmup is None else warmup)
        self._scale: Tensor | None = None
        if fp16:
            device = self.parameters[0].device
            self._scale = torch.tensor(FIRST_SCALE, device=device)
            self._good_steps = torch.zeros((), device=device)
        self._set_rates()

    @property
    def lr(self) -> float:
        """Of the next step, of the parameters that are in no group; Prodigy's with the step size that it found."""
        group = self.steppers[0].optimizer.param_groups[0]
        return group["lr"] * group.get("d", 1.0)

    def _set_rates(self) -> None:
        factor = self._factor(self.images)
        for stepper in self.steppers:
            for group, rate in zip(stepper.optimizer.param_groups, stepper.rates, strict=True):
                group["lr"] = rate * factor

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call ``backward`` of."""
        return loss if self._scale is None else loss * self._scale

    def backward(self, accelerator: Accelerator, loss: Tensor, last: bool) -> None:
        """Of a share of the step's loss; ``last``: the step follows."""
        accelerator.backward(self.scaled(loss))

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        """One update from the gradients that are there; they are cleared.

        Returns:
            the gradient's norm before clipping, and 1.0 where the step was skipped, both scalars on the device.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if isinstance(norm, DTensor):  # of sharded parameters: over all processes
            norm = norm.full_tensor()
        norm = norm.float()  # fused AdamW takes grad_scale and found_inf in float32 only
        skipped = (~torch.isfinite(norm)).float()
        scale = 1.0 if self._scale is None else self._scale.clone()
        norm = norm / scale
        divisor = torch.clamp(norm / self.config.max_grad_norm, min=1.0) * scale
        for stepper in self.steppers:
            stepper.step(divisor, skipped)
        for p in self.parameters:
            p.grad = None
        if self._scale is not None:
            self._update_scale(self._scale, skipped)
        self.steps += 1
        self.images += self.per_step
        self._set_rates()
        return norm, skipped

    def _update_scale(self, scale: Tensor, skipped: Tensor) -> None:
        """Half of it after a step without a finite gradient, twice of it after 2000 good ones (Micikevicius et al.
        2018, §3.2)."""
        good = (self._good_steps + 1) * (1 - skipped)
        grows = (good >= GROWS_AFTER).float()
        scale.mul_((1 + grows) * (1 - 0.5 * skipped)).clamp_(max=LARGEST_SCALE)
        self._good_steps.copy_(good * (1 - grows))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within this context the network bears the weights that the optimizer means to be used: schedule-free's
        average; with all others, those that train."""
        with ExitStack() as stack:
            for stepper in self.steppers:
                stack.enter_context(stepper.evaluating())
            yield

    # --- going on ----------------------------------------------------------------------------------------------------

    def _states(self) -> Iterator[tuple[int, nn.Parameter, dict[str, Any]]]:
        """Number, parameter and the optimizer's state of each parameter that has been stepped."""
        place = {ours: (stepper, theirs) for stepper in self.steppers for ours, theirs in stepper.kept.items()}
        for i, p in enumerate(self.parameters):
            stepper, key = place[p]
            if key in stepper.optimizer.state:
                yield i, p, stepper.optimizer.state[key]

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as flat names, ``index.exp_avg`` and so on, by the parameters' order."""
        flat = {f"{i}.{k}": v for i, _, state in self._states() for k, v in state.items() if isinstance(v, Tensor)}
        return flat if self._scale is None else {**flat, "loss_scale": self._scale, "good_steps": self._good_steps}

    def state(self) -> dict[str, Any]:
        """What is not tensors, as plain JSON."""
        counts = {f"{i}.{k}": v for i, _, state in self._states() for k, v in state.items() if _is_number(v)}
        groups = [stepper.counts() for stepper in self.steppers]
        return {"steps": self.steps, "images": self.images, "counts": counts, "groups": groups}

    def load(self, tensors: Stored, state: Mapping[str, Any]) -> None:
        """Go on from what ``tensors`` and ``state`` of the same config gave.

        Raises:
            ValueError: they are another optimizer's.
        """
        tensors = dict(tensors)
        if self._scale is not None and "loss_scale" in tensors:  # else: the run has not had one until now
            self._scale.copy_(tensors["loss_scale"])
            self._good_steps.copy_(tensors["good_steps"])
        numbers: dict[int, dict[str, Any]] = {}
        for name, value in {**tensors, **state["counts"]}.items():
            i, _, key = name.partition(".")
            if key:
                numbers.setdefault(int(i), {})[key] = value
        groups = [len(stepper.optimizer.param_groups) for stepper in self.steppers]
        if any(i >= len(self.parameters) for i in numbers) or [len(x) for x in state["groups"]] != groups:
            raise ValueError("the optimizer's state is that of other parameters or of another kind")
        place = {p: i for i, p in enumerate(self.parameters)}
        for stepper, counts in zip(self.steppers, state["groups"], strict=True):
            for group, there in zip(stepper.optimizer.param_groups, counts, strict=True):
                group.update(there)
            for ours, theirs in stepper.kept.items():
                stepper.optimizer.state.pop(theirs, None)
                if there := numbers.get(place[ours]):
                    stepper.optimizer.state[theirs] = {k: _float32(placed(v, ours)) for k, v in there.items()}
        self.steps, self.images = state["steps"], state["images"]
        self._set_rates()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _float32(value: Any) -> Any:
    """State of a run whose LoRA trained in half precision goes on in float32."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def placed(value: Any, like: Tensor) -> Any:
    """A tensor, which may be a stored one, where ``like`` is: on its device and, if it has its shape, sharded as it
    is and in its order of memory, which the fused kernels take to be one for weight, gradient and state."""
    if not isinstance(value, Tensor | StoredTensor) or isinstance(value, DTensor):
        return value
    if value.shape != like.shape:
        return read(value).to(like.device)
    value = sharded.like(value, like)
    if value.shape == like.shape and value.stride() != like.stride() and not isinstance(value, DTensor):
        value = torch.empty_like(like, dtype=value.dtype).copy_(value)
    return value


# --- parts -----------------------------------------------------------------------------------------------------------


def named_parameters(parameters: Parameters) -> dict[str, nn.Parameter]:
    """Those that train, by name; by number where no names are given."""
    found: dict[str, nn.Parameter] = {}
    for i, given in enumerate(parameters):
        name, p = given if isinstance(given, tuple) else (str(i), given)
        if p.requires_grad:
            found[name] = p
    return found


def check_float32(named: Mapping[str, nn.Parameter]) -> None:
    """Small updates vanish in half precision: frozen weights may be half, those that train may not.

    Raises:
        ValueError: a parameter is not float32.
    """
    other = {name: p.dtype for name, p in named.items() if p.dtype != torch.float32}
    if other:
        name, dtype = next(iter(other.items()))
        raise ValueError(
            f"optimizer: {len(other)} of {len(named)} parameters that train are not float32, first {name} ({dtype}); "
            "call .float() on what trains, and keep half precision for frozen weights and autocast"
        )


def grouped(named: Mapping[str, nn.Parameter], config: AnyOptimizer) -> Groups:
    """torch's parameter groups: first what no pattern matches, then one group for each pattern.

    Raises:
        ConfigError: a pattern matches nothing, or nothing that is left; near names are told.
    """
    left = dict(named)
    groups: Groups = []
    for number, group in enumerate(config.groups):
        mine = [name for name in left if re.search(group.pattern, name)]
        if not mine:
            taken = any(re.search(group.pattern, name) for name in named)
            words = re.sub(r"[\\^$()|?*+\[\]]+", " ", group.pattern).split() or [""]
            near = difflib.get_close_matches(max(words, key=len), named, n=3, cutoff=0.0)
            why = "only what the groups before it took" if taken else f"no parameter; near are {', '.join(near)}"
            raise ConfigError(f"optimizer.groups.{number}.pattern: {group.pattern!r} matches {why}")
        rate = group.learning_rate or config.learning_rate * (group.learning_rate_factor or 1.0)
        decay = config.adam_weight_decay if group.weight_decay is None else group.weight_decay
        groups.append({"params": [left.pop(name) for name in mine], "lr": rate, "weight_decay": decay})
    rest = {"params": list(left.values()), "lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    return [rest, *groups] if left else groups


def schedule(config: AnyOptimizer, images: int, warmup: int) -> Callable[[int], float]:
    """Images seen -> factor of the learning rate: diffusers' schedule, whose steps are images here. So it is the same
    for any batch, accumulation and number of processes, and goes on right where these change on the way."""
    from diffusers.optimization import get_scheduler

    if config.lr_scheduler == "constant":  # diffusers' lambda returns an int
        return lambda _: 1.0
    bearer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)  # it only bears the schedule
    made: Any = get_scheduler(
        config.lr_scheduler,
        bearer,
        step_rules=config.lr_step_rules,
        num_warmup_steps=warmup,
        num_training_steps=max(images, warmup + 1),
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return cast(Callable[[int], float], made.lr_lambdas[0])


def check_optimizer(config: AnyOptimizer, module: nn.Module | None = None) -> None:
    """What an optimizer needs, before anything is spent.

    Args:
        module: what will train, to try the groups on; it may lie on the meta device.
    Raises:
        ConfigError: a package is not installed, or a group's pattern matches nothing in the module.
    """
    package(config)
    if module is not None:
        grouped(named_parameters(module.named_parameters()), config)
