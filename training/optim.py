"""Optimizer, schedule, and a step that clips and skips without asking the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .schema import Optimizer as OptimizerConfig


class GuardedAdamW:
    """Fused AdamW with its schedule. One call clips, skips a step whose gradient is not finite, and updates.

    The fused kernel takes two tensors, ``grad_scale`` (gradients are divided by it) and ``found_inf`` (the step is
    skipped where it is 1): clipping rides along in the same pass, and the host never waits for the norm.

    Args:
        parameters: those that train.
        config: learning rate, betas, clipping, schedule.
        total_steps, warmup_steps: of the schedule, in optimizer steps.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, total_steps: int, warmup_steps: int
    ):
        from diffusers.optimization import get_scheduler

        self.parameters = [p for p in parameters if p.requires_grad]
        self.max_norm = config.max_grad_norm
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            fused=True,
        )
        self.schedule: Any = get_scheduler(
            config.lr_scheduler, self.adamw, num_warmup_steps=warmup_steps, num_training_steps=total_steps
        )

    @property
    def lr(self) -> float:
        return self.schedule.get_last_lr()[0]

    @property
    def steps(self) -> int:
        """Calls of ``step`` so far, skipped ones included."""
        return self.schedule.last_epoch

    def step(self) -> tuple[Tensor, Tensor]:
        """One update from the gradients that are there; they are cleared.

        Returns:
            the gradient's norm before clipping, and 1.0 where the step was skipped, both scalars on the device.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        skipped = (~torch.isfinite(norm)).float()
        self.adamw.grad_scale = torch.clamp(norm / self.max_norm, min=1.0)  # type: ignore[attr-defined]
        self.adamw.found_inf = skipped  # type: ignore[attr-defined]
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm, skipped

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as flat names, ``index.exp_avg`` and so on."""
        state = self.adamw.state_dict()["state"]
        return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Go on after ``steps`` updates."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})
        self.schedule.last_epoch = steps
        lrs = [base * f(steps) for base, f in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)]
        for group, lr in zip(self.adamw.param_groups, lrs, strict=True):
            group["lr"] = lr
        self.schedule._last_lr = lrs
