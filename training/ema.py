"""The moving average of the weights, which is what samples and exports use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """avg <- avg + (1 - d) (weights - avg), with d = min(decay, (1 + step) / (10 + step)).

    Args:
        parameters: the trained weights; the average is kept beside them in float32.
        decay: in [0, 1); 0 keeps no average: the weights themselves are used.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.decay = decay
        self.average: list[Tensor] = [p.detach().float().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number ``step`` (0 is the first)."""
        if self.average:
            weights = [p.detach() for p in self.parameters]
            if weights[0].dtype != torch.float32:
                weights = [w.float() for w in weights]
            torch._foreach_lerp_(self.average, weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within this context the network bears the averaged weights."""
        if not self.average:
            yield
            return
        kept = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.parameters), self.average)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.parameters), kept)

    def state_dict(self) -> dict[str, Tensor]:
        return {str(i): x for i, x in enumerate(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if len(state) != len(self.average):
            raise ValueError(f"the average has {len(state)} tensors, the network {len(self.average)}")
        for i, x in enumerate(self.average):
            x.copy_(state[str(i)])
