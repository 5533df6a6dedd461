"""The optimizers behind their names, each with a step that clips and that a gradient without a value cannot spoil."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.extras import pip_install

from .fit import ConfigError
from .schema import optim as schema
from .sharded import local

Groups = list[dict[str, Any]]  # torch's: "params", "lr", "weight_decay"
Counts = dict[str, int | float | bool]


class Stepper:
    """A torch optimizer whose step can be taken back. This one asks the device whether to step: for optimizers that
    count on the host (and most of which read the device for every tensor themselves).

    Args:
        optimizer: steps what it was given.
        counters: entries of its groups that change as it goes, beside "lr".
        kept: our parameter -> the one under which the optimizer keeps its state, where that is another.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        counters: tuple[str, ...] = (),
        kept: Mapping[nn.Parameter, nn.Parameter] | None = None,
    ):
        self.optimizer, self.counters = optimizer, counters
        self.rates = [group["lr"] for group in optimizer.param_groups]
        own = [p for group in optimizer.param_groups for p in group["params"]]
        self.kept: Mapping[nn.Parameter, nn.Parameter] = kept or {p: p for p in own}

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.kept.values() if p.grad is not None]

    def step(self, divisor: Tensor, skipped: Tensor) -> None:
        """Step by the gradients over ``divisor``, unless ``skipped`` is 1; both scalars on the device."""
        if not skipped.item():
            torch._foreach_mul_(self.gradients(), 1 / divisor)
            self.optimizer.step()

    def counts(self) -> list[Counts]:
        return [{name: group[name] for name in self.counters if name in group} for group in self.optimizer.param_groups]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield


class Fused(Stepper):
    """Fused AdamW takes both tensors along: gradients are divided, and nothing is written where ``found_inf`` is 1."""

    def step(self, divisor: Tensor, skipped: Tensor) -> None:
        self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()


class TakenBack(Stepper):
    """Steps always, and puts everything back where it was not to. For optimizers that count nothing on the host."""

    def step(self, divisor: Tensor, skipped: Tensor) -> None:
        for ours, theirs in self.kept.items():
            theirs.grad = ours.grad.view_as(theirs) if ours.grad is not None else None
        moving = [p for p in self.kept.values() if p.grad is not None]
        for p in moving:  # what the first step would make
            self.optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        touched = [p.detach() for p in moving] + [self.optimizer.state[p]["momentum_buffer"] for p in moving]
        before = [x.clone() for x in touched]
        torch._foreach_mul_(self.gradients(), 1 / divisor)
        self.optimizer.step()
        back = skipped.bool()
        for now, old in zip(touched, before, strict=True):
            torch.where(back, old, now, out=now)
        for p in moving:
            p.grad = None


class ScheduleFree(Stepper):
    """Trains at one point (y of the paper) and is judged at another (x)."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The weights are the average; afterwards they are bit for bit what they were (the library's own way back is a
        second interpolation, which rounds)."""
        optimizer: Any = self.optimizer
        weights = local(self.kept)
        before = [w.clone() for w in weights]
        optimizer.eval()
        try:
            yield
        finally:
            torch._foreach_copy_(weights, before)
            for group in optimizer.param_groups:
                group["train_mode"] = True


def package(config: schema.AnyOptimizer) -> Any:
    """The library that an optimizer comes from.

    Raises:
        ConfigError: it is not installed, or does not import.
    """
    name = config.package or "torch"
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken install raises whatever it likes
        kind = config.name
        why = "is not installed" if isinstance(error, ModuleNotFoundError) and error.name == name else f"fails: {error}"
        raise ConfigError(
            f"optimizer.name: {kind} needs the package {name}, which {why}; "
            f"`{pip_install(name)}`, or choose another optimizer"
        ) from error


def steppers(config: schema.AnyOptimizer, groups: Groups, names: Mapping[nn.Parameter, str]) -> list[Stepper]:
    """What steps the groups' parameters, by the config's kind.

    Raises:
        ConfigError: a package is missing.
    """
    library = package(config)
    if isinstance(config, schema.Muon):
        return _muon(config, groups, names)
    if isinstance(config, schema.Adafactor):
        from transformers.optimization import Adafactor

        own = {"beta1": config.adafactor_beta1, "decay_rate": config.decay_rate, "relative_step": False}
        own |= {"clip_threshold": config.clip_threshold, "scale_parameter": config.scale_parameter}
        return [Stepper(Adafactor(groups, lr=config.learning_rate, **own))]
    assert isinstance(config, schema.AdamW | schema.AdamW8bit | schema.Prodigy | schema.ScheduleFree)
    adam = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if isinstance(config, schema.AdamW8bit):
        return [Stepper(library.optim.AdamW8bit(groups, **adam))]
    if isinstance(config, schema.Prodigy):
        own = {"beta3": config.prodigy_beta3, "d_coef": config.prodigy_d_coef}
        own |= {"use_bias_correction": config.prodigy_use_bias_correction}
        own |= {"safeguard_warmup": config.prodigy_safeguard_warmup}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it decays
            prodigy = library.Prodigy(groups, **adam, **own, weight_decay=config.adam_weight_decay)
        return [Stepper(prodigy, ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k"))]
    if isinstance(config, schema.ScheduleFree):
        optimizer = library.AdamWScheduleFree(groups, **adam)
        optimizer.train()
        return [ScheduleFree(optimizer, ("k", "weight_sum", "lr_max", "scheduled_lr"))]
    return [Fused(torch.optim.AdamW(groups, **adam, fused=True))]


def _muon(config: schema.Muon, groups: Groups, names: Mapping[nn.Parameter, str]) -> list[Stepper]:
    flat: dict[nn.Parameter, nn.Parameter] = {}  # ours -> the same memory as a matrix, which is all that Muon takes
    hidden: Groups = []
    rest: Groups = []
    for group in groups:
        mine = [
            p
            for p in group["params"]
            if p.ndim >= 2 and p.is_contiguous() and not re.search(config.adamw_pattern, names[p])
        ]
        for p in mine:
            flat[p] = p if p.ndim == 2 else nn.Parameter(p.detach().view(len(p), -1))
        chosen = set(mine)
        others = [p for p in group["params"] if p not in chosen]
        hidden += [{**group, "params": [flat[p] for p in mine]}] if mine else []
        rest += [{**group, "params": others}] if others else []
    found: list[Stepper] = []
    if hidden:
        muon = torch.optim.Muon(
            hidden,
            lr=config.learning_rate,
            momentum=config.muon_momentum,
            nesterov=config.muon_nesterov,
            ns_steps=config.muon_steps,
            adjust_lr_fn=config.muon_adjust_lr,
        )
        found.append(TakenBack(muon, kept=flat))
    if rest:
        betas = (config.adam_beta1, config.adam_beta2)
        adamw = torch.optim.AdamW(rest, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)
        found.append(Fused(adamw))
    return found
