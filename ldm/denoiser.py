"""Network + path + prediction + time convention: one object gives x0, eps and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from .cond import Cond
from .paths import Path, check_shapes
from .prediction import Prediction


class Denoised(NamedTuple):
    """What is known of a noisy x_t (B, …): the clean x0, the noise eps, the network's own output, and with learned
    variance where between beta tilde (0) and beta (1) the log-variance of a step back lies (``learned_variance``)."""

    x0: Tensor
    eps: Tensor
    output: Tensor
    var_frac: Tensor | None = None


@dataclass(frozen=True)
class TimeInput:
    """What the network's time embedding sees: scale t + offset, and with ``floor`` the integer below.

    DDPM's chain of T steps: ``TimeInput(T, offset=-1)``. SD3: ``TimeInput(1000)``. A flow in Stable Diffusion's
    pipelines, whose schedulers cut the time to an integer: ``TimeInput(1000, floor=True)``. EDM, which is told
    log(sigma) / 4 and not t: ``TimeInput(0.25, log_sigma=True)``.
    """

    scale: float = 1000.0
    offset: float = 0.0
    floor: bool = False
    log_sigma: bool = False  # of log(sigma / alpha) in the place of t

    def __call__(self, t: Tensor, path: Path) -> Tensor:
        time = self.scale * (-path.log_snr(t) / 2 if self.log_sigma else t) + self.offset
        return time.floor() if self.floor else time


class Denoiser(nn.Module):
    """A network that knows what its output means.

    Args:
        net: called as ``net(x, time, cond)``; may be wrapped (DDP, FSDP, compiled).
        path, prediction: what x_t is and what the output is.
        time_input: what the network is told of t; SD3's convention if not given.
        learned_variance: the network gives twice the channels, the second half v in [-1, 1] for the variance of a
            step back, exp(f log beta + (1 - f) log beta tilde) with f = (v + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        path: Path,
        prediction: Prediction,
        time_input: TimeInput | None = None,
        *,
        learned_variance: bool = False,
    ):
        super().__init__()
        self.net = net
        self.path = path
        self.prediction = prediction
        self.time_input = TimeInput() if time_input is None else time_input
        self.learned_variance = learned_variance

    @overload
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, one_batch: bool = True) -> Denoised: ...

    @overload
    def forward(self, x_t: Tensor, t: Tensor, cond: Sequence[Cond], *, one_batch: bool = True) -> list[Denoised]: ...

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Cond | Sequence[Cond], *, one_batch: bool = True
    ) -> Denoised | list[Denoised]:
        """Denoise x_t (B, …) at t, () or (B,), as told by ``cond`` (B rows, or one row for all).

        With several Conds there is one answer for each; ``one_batch=False`` asks the network in turns, which needs
        less memory.

        Raises:
            ValueError: shapes do not fit, or a t of shape () on the CPU lies outside [0, 1] or where this
                prediction says nothing of x0.
        """
        check_shapes(x_t, t)
        self._check_time(t)
        conds = [cond] if isinstance(cond, Cond) else list(cond)
        x = x_t.to(_wide(x_t))
        if one_batch:
            outputs = self._ask(x, t, conds)
        else:
            outputs = [output for one in conds for output in self._ask(x, t, [one])]
        answers = [self.interpret(x, t, output) for output in outputs]
        return answers[0] if isinstance(cond, Cond) else answers

    def interpret(self, x_t: Tensor, t: Tensor, output: Tensor) -> Denoised:
        """x0 and eps from an output of the network, in float32 at least. With learned variance an output of x_t's
        own channels is taken as the first half, and ``var_frac`` is left out."""
        x_t = x_t.to(_wide(x_t))
        output, var_frac = self._split(x_t, output.to(_wide(x_t)))
        check_shapes(x_t, t, output=output)
        c = self.path.coeffs(_on(t, x_t), x_t.ndim)
        x0, eps = self.prediction.to_x0(x_t, output, c), self.prediction.to_eps(x_t, output, c)
        return Denoised(x0, eps, output, var_frac)

    def _split(self, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output proper, and the fraction of ``Denoised.var_frac`` where the network tells it."""
        if not self.learned_variance or output.shape == x.shape:
            return output, None
        if output.ndim != x.ndim or output.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"learned_variance: the network gave {tuple(output.shape)} for latents {tuple(x.shape)}; expected "
                "twice their channels"
            )
        output, v = output.chunk(2, dim=1)
        return output, (v + 1) / 2

    def loss(self, x0: Tensor, t: Tensor, cond: Cond, *, eps: Tensor) -> Tensor:
        """Mean squared error against the prediction's target, (B,): a mean over all but the rows.

        Args:
            x0: (B, …) data. eps: the same shape, standard normal. t: () or (B,).
        Raises:
            ValueError: shapes do not fit.
        """
        check_shapes(x0, t, eps=eps)
        x0, eps = x0.to(_wide(x0)), eps.to(_wide(x0))
        c = self.path.coeffs(_on(t, x0), x0.ndim)
        x_t = c.alpha * x0 + c.sigma * eps
        target = self.prediction.target(x0, eps, c)
        (output,) = self._ask(x_t, t, [cond])
        output, _ = self._split(x_t, output)
        if output.shape != target.shape:
            raise ValueError(f"the network gave {tuple(output.shape)} for latents {tuple(target.shape)}")
        return (output.to(target.dtype) - target).square().flatten(1).mean(1)

    def _ask(self, x_t: Tensor, t: Tensor, conds: list[Cond]) -> list[Tensor]:
        """One call of the network for all Conds: rows of the first, then of the second, …"""
        rows, n = x_t.shape[0], len(conds)
        c = self.path.coeffs(_on(t, x_t), x_t.ndim)
        x = (self.prediction.scale_input(c) * x_t).to(self._net_dtype(x_t))
        time = self.time_input(t, self.path)
        if t.ndim == 0 and t.device.type == "cpu":
            time = torch.full((rows,), time.item(), device=x_t.device)  # a fill: a copy from the CPU would wait
        else:
            time = time.to(x_t.device, torch.float32).expand(rows)
        conds = [_rows(one, rows) for one in conds]
        if n == 1:
            return [self.net(x, time, conds[0])]
        try:
            together = Cond.cat(conds)
        except RuntimeError as error:
            raise ValueError(f"the Conds do not fit into one batch ({error}); ask with one_batch=False") from error
        return list(self.net(torch.cat([x] * n), time.repeat(n), together).chunk(n))

    def _net_dtype(self, x: Tensor) -> torch.dtype:
        parameters = self.net.parameters() if isinstance(self.net, nn.Module) else iter(())
        return next((p.dtype for p in parameters if p.is_floating_point()), x.dtype)

    def _check_time(self, t: Tensor) -> None:
        if t.ndim or t.device.type != "cpu":  # to look would make the host wait for the device
            return
        if not 0 <= t.item() <= 1:
            raise ValueError(f"t is {t.item()}; expected a time in [0, 1], 0 at the data and 1 at the noise")
        if self.prediction.needs_signal and self.path.alpha(t).item() == 0:
            name, path = type(self.prediction).__name__, type(self.path).__name__
            raise ValueError(
                f"{name} says nothing of x0 at t = {t.item():g}, where {path} has alpha = 0: start the grid below, "
                "or train with V, X0 or Flow"
            )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _on(t: Tensor, x: Tensor) -> Tensor:
    """t where x is; a scalar stays on the CPU (torch takes it as a number), so that nothing waits for a copy."""
    return t if t.ndim == 0 else t.to(x.device)


def _rows(cond: Cond, rows: int) -> Cond:
    if len(cond) not in (1, rows):
        raise ValueError(f"cond has {len(cond)} rows for a batch of {rows}; expected {rows}, or 1 for all")
    return cond if len(cond) == rows else cond.map(lambda x: x.expand(rows, *x.shape[1:]))
