"""The moving averages of the weights: the one that samples and exports use, and those that others are made of later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .optim import Parameters, named_parameters, placed
from .posthoc import forget_after, sigma_rel_to_gamma, snapshot_name
from .schema.optim import EMA as EMAConfig
from .sharded import gathered, is_part, kept, like, local, own
from .tensor_files import Stored


@dataclass
class _Profile:
    """A power-function average, weight (t/T)^gamma at time t of T (Karras et al. 2024, eq. 2 of EDM2)."""

    sigma_rel: float
    gamma: float
    average: list[Tensor] = field(default_factory=list)


class EMA:
    """Averages of the trained weights, kept in float32.

    ``average``: avg <- avg + (1 - d) (weights - avg), with d = min(decay, (1 + step) / (10 + step)).
    ``profiles``, where the config asks for snapshots: the same with d = (1 - 1/t)^(gamma + 1), t in images.

    Args:
        parameters: ``module.named_parameters()``; what does not train is left out. Snapshots need the names.
        decay: in [0, 1); 0 keeps no such average: the weights themselves are used.
        how: where and how often, and which others.
        start: images seen before the first step.
        end: images at which the run ends; a snapshot is due there.
    """

    def __init__(
        self,
        parameters: Parameters,
        decay: float,
        how: EMAConfig | None = None,
        *,
        start: int = 0,
        end: int | None = None,
    ):
        self.how = how or EMAConfig()
        named = named_parameters(parameters)
        self.names, self.parameters = list(named), list(named.values())
        self.decay, self.start, self.end = decay, start, end
        self.images = start  # at the last update
        self.average: list[Tensor] = self._copies() if decay else []
        widths = self.how.sigma_rels if self.how.snapshot_every else ()
        self.profiles = [_Profile(x, sigma_rel_to_gamma(x), self._copies()) for x in widths]

    def _weights(self) -> list[Tensor]:
        """In float32, where the averages are."""
        device = torch.device("cpu") if self.how.device == "cpu" else None
        return [own(p).detach().to(device=device, dtype=torch.float32) for p in self.parameters]

    def _copies(self) -> list[Tensor]:
        return [w.clone() for w in self._weights()]

    @torch.no_grad()
    def update(self, step: int, images: int, skipped: Tensor | None = None) -> None:
        """After an optimizer step.

        Args:
            step: its number; 0 is the first.
            images: seen after it.
            skipped: the optimizer's flag: where it is 1 the averages stay bit for bit as they are. The host does not
                wait for it, but on the CPU's account where the averages are there and the weights are not.
        """
        every = self.how.update_every
        if (step + 1) % every or not (self.average or self.profiles):
            return
        weights = self._weights()
        if self.average:
            steps = range(step + 1 - every, step + 1)
            keep = 1.0
            for k in steps:
                keep *= min(self.decay, (1 + k) / (10 + k))
            _lerp(self.average, weights, 1 - keep, skipped)
        if self.profiles:
            before, now = self.images - self.start, images - self.start
            if now <= before:
                raise ValueError(f"the averages have seen {self.images} images, the update says {images}")
            for profile in self.profiles:
                _lerp(profile.average, weights, 1 - (before / now) ** (profile.gamma + 1), skipped)
        self.images = images

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within this context the network bears the averaged weights."""
        if not self.average:
            yield
            return
        weights, average = local(self.parameters), local(self.average)
        kept = [w.clone() for w in weights]
        try:
            torch._foreach_copy_(weights, average)
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    # --- going on ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All averages as flat names: ``3`` of the parameters' order, ``0.1/3`` of the profile of that width."""
        flat = {name: kept(p, x) for name, (x, p) in self._averages().items()}
        return {**flat, "images": torch.tensor(self.images)} if self.profiles else flat

    def _averages(self) -> dict[str, tuple[Tensor, nn.Parameter]]:
        """Each with its parameter."""
        flat = {str(i): pair for i, pair in enumerate(zip(self.average, self.parameters, strict=False))}
        for profile in self.profiles:
            pairs = enumerate(zip(profile.average, self.parameters, strict=True))
            flat |= {f"{profile.sigma_rel!r}/{i}": pair for i, pair in pairs}
        return flat

    @torch.no_grad()
    def load(self, tensors: Stored) -> None:
        """Raises ValueError where they are not those of these parameters and widths."""
        averages = self._averages()
        names = averages.keys() | ({"images"} if self.profiles else set())
        if tensors.keys() != names:
            odd = min(tensors.keys() ^ names)
            raise ValueError(f"the average has {len(tensors)} tensors, the network {len(names)}; first: {odd}")
        for name, (x, p) in averages.items():
            x.copy_(like(tensors[name], p) if is_part(p) else placed(tensors[name], x))
        self.images = int(tensors["images"]) if self.profiles else self.images

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot_due(self, before: int, after: int) -> bool:
        """From ``before`` to ``after`` images a multiple of ``snapshot_every`` was passed, or the run's end."""
        every = self.how.snapshot_every
        if not every or after <= self.start:
            return False
        ended = self.end is not None and before < self.end <= after
        return ended or after // every != before // every

    def write_snapshot(self, folder: Path, images: int, *, write: bool = True) -> None:
        """One file for each profile, written beside and renamed.

        Args:
            folder: RUN/ema/PLAYER.
            images: seen so far.
            write: False on all processes but one; where parameters are sharded, all must call this together.
        Raises:
            OSError: the disk is full; nothing half-written is left.
        """
        dtype = getattr(torch, self.how.snapshot_dtype)
        for profile in self.profiles:
            whole = [gathered(p, x) for x, p in zip(profile.average, self.parameters, strict=True)]
            if not write:
                continue
            flat = {name: x.to("cpu", dtype).contiguous() for name, x in zip(self.names, whole, strict=True)}
            about = {"images": str(images), "time": str(images - self.start), "sigma_rel": repr(profile.sigma_rel)}
            folder.mkdir(parents=True, exist_ok=True)
            final = folder / snapshot_name(images, profile.sigma_rel)
            partial = final.with_suffix(".partial")
            try:
                save_file(flat, partial, metadata={"format": "pt", **about})
                with partial.open("rb") as handle:
                    os.fsync(handle.fileno())
                partial.replace(final)
            except BaseException as error:
                partial.unlink(missing_ok=True)
                if isinstance(error, SafetensorError):  # safetensors has its own for a full disk
                    raise OSError(f"{final}: could not be written ({error}); make room") from error
                raise

    def forget_after(self, folder: Path, images: int) -> None:
        """Delete what a killed run wrote past the point from which it goes on, and what it left half written."""
        forget_after(folder, images)


def _lerp(averages: list[Tensor], weights: list[Tensor], share: float, skipped: Tensor | None) -> None:
    """averages += share (weights - averages), in one pass; not where ``skipped`` is 1."""
    averages, weights = local(averages), local(weights)
    if skipped is None:
        torch._foreach_lerp_(averages, weights, share)
    else:
        part = (share * (1 - skipped)).to(averages[0].device)
        torch._foreach_lerp_(averages, weights, [part] * len(averages))
