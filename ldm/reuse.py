"""What of a network's work can be taken over within one sampling run.

    with reuse(cond, uncond) as run:
        x = sampler(denoise, …)

Exactly: ``once(make, *sources)`` keeps the first answer of ``make(*sources)`` where every source lasts: the Conds that
the run was told, their tensors, and whatever ``once`` made of these alone. Without a source it is made of weights
alone, which do not change in a run; where they did, ``forget``.

Inexactly, if the run has a ``StepCache``: ``seldom`` takes what is far inside the network from a step before.

Nothing is kept after the run, in another thread, where a gradient is recorded, or in what torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from .cond import Cond

T = TypeVar("T")


@dataclass(frozen=True)
class StepCache:
    """Inner layers are computed at every n-th step only; between, what they gave last stands in (DeepCache, Ma et al.
    2024; in a transformer what the blocks add to their input, Δ-DiT, Chen et al. 2024).

    Args:
        every: n. A step is one of the sampler's, however often that asks the network.
        depth: layers that are computed at every step besides the outermost: in a UNet on the way down and on the way
            up, in a transformer blocks at the beginning.
    Raises:
        ValueError: every below 2, or depth below 0.
    """

    every: int = 2
    depth: int = 1

    def __post_init__(self) -> None:
        for name, least in (("every", 2), ("depth", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"step_cache: {name} is {value!r}, expected a whole number from {least}")


class Run:
    """What one sampling run keeps. What is kept is held, so that no other object has its id."""

    def __init__(self, told: tuple[Cond, ...], cache: StepCache | None):
        self.told, self.cache, self.step = told, cache, 0
        self.forget()

    def forget(self) -> None:
        self.answers: dict[Any, Any] = {}
        self.inner: dict[Any, tuple[int, Tensor]] = {}  # of the step cache: when it was made, and what
        self.lasting: dict[int, Any] = {}
        for x in self.told:
            self.keep(x)

    def keep(self, x: Any) -> None:
        self.lasting[id(x)] = x
        parts = [getattr(x, field.name) for field in fields(x)] if isinstance(x, Cond) else x
        for part in parts if isinstance(parts, list | tuple) else ():
            self.keep(part)

    def lasts(self, x: Any) -> bool:
        return id(x) in self.lasting

    def counting(self, callback: Callable[..., Any] | None) -> Callable[..., Any]:
        """A sampler's callback, by which the steps are counted."""

        def counted(i: int, *told: Any) -> Any:
            self.step = i + 1
            return None if callback is None else callback(i, *told)

        return counted


_RUN: ContextVar[Run | None] = ContextVar("sampling run", default=None)


@contextmanager
def reuse(*told: Cond, cache: StepCache | None = None) -> Iterator[Run]:
    """One sampling run, in which these Conds and the weights do not change. A step cache has to know of the steps:
    ``callback=run.counting(callback)``."""
    run = Run(told, cache)
    token = _RUN.set(run)
    try:
        yield run
    finally:
        _RUN.reset(token)


def current() -> Run | None:
    """The run that is under way, where anything can be kept."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return _RUN.get()


def forget() -> None:
    """Make everything anew: in the middle of a run a weight was changed, or a LoRA."""
    if (run := current()) is not None:
        run.forget()


def once(make: Callable[..., T], *sources: Any) -> T:
    """``make(*sources)``, or what it gave before in this run.

    Args:
        make: a module, a method of one, or a function that is no closure.
        sources: tensors and Conds, which have to be the same objects, and hashable values, which have to be equal.
    """
    run = current()
    known = [isinstance(x, Tensor | Cond) for x in sources]
    if run is None or not all(run.lasts(x) for x, is_one in zip(sources, known, strict=True) if is_one):
        return make(*sources)
    key = (make, *(id(x) if is_one else x for x, is_one in zip(sources, known, strict=True)))
    if key not in run.answers:
        run.answers[key] = made = make(*sources)
        run.keep(made)
    return run.answers[key]


def cached_depth() -> int | None:
    """The depth of this run's step cache; None where there is none."""
    run = current()
    return None if run is None or run.cache is None else run.cache.depth


def seldom(make: Callable[[Tensor], Tensor], x: Tensor, net: Any, tokens: Tensor, *, change: bool = False) -> Tensor:
    """``make(x)``, or between every n-th step what ``make`` gave before for this network and these tokens.

    Args:
        change: keep what was added to x, and add it to the new one.
    """
    run, key = current(), (net, id(tokens), x.shape)
    if run is None or run.cache is None or not run.lasts(tokens):
        return make(x)
    at, kept = run.inner.get(key, (run.step, x))
    if 0 < run.step - at < run.cache.every:  # made in an earlier step, not in this one's first call
        return x + kept if change else kept
    y = make(x)
    run.inner[key] = run.step, y - x if change else y
    return y
