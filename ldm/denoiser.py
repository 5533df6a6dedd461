"""Network + path + prediction + time convention: one object gives x0, eps and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from .bound import step_bound
from .cond import Cond
from .paths import Coeffs, DiscreteVP, Path, check_shapes
from .prediction import Prediction
from .reuse import once


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
        vb_weight: lambda of their hybrid loss (eq. 16), which ``loss`` then is.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        path: Path,
        prediction: Prediction,
        time_input: TimeInput | None = None,
        *,
        learned_variance: bool = False,
        vb_weight: float = 0.001,
    ):
        super().__init__()
        self.net = net
        self.path = path
        self.prediction = prediction
        self.time_input = TimeInput() if time_input is None else time_input
        self.learned_variance = learned_variance
        self.vb_weight = vb_weight

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
            ValueError: shapes do not fit, or a t on the CPU lies outside [0, 1] or where this prediction says
                nothing of x0.
        """
        check_shapes(x_t, t)
        self._check_time(t, self.prediction.needs_signal)
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
        c = self._coeffs(t, x_t)
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

    def loss(
        self,
        x0: Tensor,
        t: Tensor,
        cond: Cond,
        *,
        eps: Tensor,
        noisy_eps: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error against the prediction's target, (B,): L_simple, a mean over all but the rows.

        With learned variance L_simple + vb_weight T L_{t-1} (Nichol & Dhariwal 2021, eq. 16): one term of the bound,
        in bits/dim as in their code, stands for all T, and does not move the mean. T is the chain's, 1000 on a path
        that is none; a t between two nodes is taken up to the next.

        Args:
            x0: (B, …) data. eps: the same shape, standard normal. t: () or (B,).
            noisy_eps: what x_t is made with in the place of eps, while the target stays eps': input perturbation (Ning
                et al. 2023, algorithm 1), where it is eps and a little more noise.
            mask: (B, 1, …) in [0, 1], what each place counts in L_simple: mean(mask * error²) / mean(mask) of each
                row, 0 where all of its mask is. The term of the bound, which moves no mean, takes all places alike.
        Raises:
            ValueError: shapes do not fit, or a t on the CPU lies outside [0, 1], or with learned variance where this
                prediction says nothing of x0.
        """
        check_shapes(x0, t, eps=eps, **({} if noisy_eps is None else {"noisy_eps": noisy_eps}))
        self._check_time(t)
        if self.learned_variance:
            t = self._node(t)
            self._check_time(t, self.prediction.needs_signal)
        x0, eps = x0.to(_wide(x0)), eps.to(_wide(x0))
        c = self._coeffs(t, x0)
        x_t = c.alpha * x0 + c.sigma * (eps if noisy_eps is None else noisy_eps.to(eps.dtype))
        target = self.prediction.target(x0, eps, c)
        (told,) = self._ask(x_t, t, [cond])
        output, var_frac = self._split(x_t, told.to(target.dtype))
        if output.shape != target.shape:
            raise ValueError(f"the network gave {tuple(output.shape)} for latents {tuple(target.shape)}")
        square = (output - target).square()
        if mask is not None:
            square = square * _share(mask.to(square.dtype), square)
        simple = square.flatten(1).mean(1)
        if not self.learned_variance:
            return simple
        if var_frac is None:
            raise ValueError(f"learned_variance: the network gave {tuple(told.shape)}; expected twice the channels")
        fixed = self.interpret(x_t, t, output.detach())._replace(var_frac=var_frac)  # the mean is L_simple's business
        before = (t * self._steps - 1).round() / self._steps
        bound = step_bound(self.path, x0, x_t, fixed, before, t, variance="learned")
        return simple + self.vb_weight * self._steps * bound

    @property
    def _steps(self) -> int:
        return self.path.num_train_timesteps if isinstance(self.path, DiscreteVP) else 1000

    def _node(self, t: Tensor) -> Tensor:
        """t, or the chain's next node above, in float64. One told in float32 is not taken for a time above it."""
        return (t.double() * self._steps - 1e-3).ceil().clamp(1, self._steps) / self._steps

    def _ask(self, x_t: Tensor, t: Tensor, conds: list[Cond]) -> list[Tensor]:
        """One call of the network for all Conds: rows of the first, then of the second, …"""
        rows, n = x_t.shape[0], len(conds)
        c = self._coeffs(t, x_t)
        x = (self.prediction.scale_input(c) * x_t).to(self._net_dtype(x_t))
        time = self.time_input(t, self.path)
        if t.ndim == 0 and t.device.type == "cpu":
            # a fill: a copy from the CPU would wait
            time = torch.full((rows,), time.item(), device=x.device, dtype=_wide(x))
        else:
            time = time.to(x.device, _wide(x)).expand(rows)
        together = once(_together, rows, *conds)
        if n == 1:
            return [self.net(x, time, together)]
        return list(self.net(torch.cat([x] * n), time.repeat(n), together).chunk(n))

    def _net_dtype(self, x: Tensor) -> torch.dtype:
        parameters = self.net.parameters() if isinstance(self.net, nn.Module) else iter(())
        return next((p.dtype for p in parameters if p.is_floating_point()), x.dtype)

    def _coeffs(self, t: Tensor, x: Tensor) -> Coeffs:
        """At t, for x and in its dtype. A scalar stays on the CPU (torch takes it as a number), so that nothing waits
        for a copy."""
        if t.ndim == 0:
            return self.path.coeffs(t, x.ndim)
        return Coeffs(*(v.to(x.dtype) for v in self.path.coeffs(t.to(x.device), x.ndim)))

    def _check_time(self, t: Tensor, needs_signal: bool = False) -> None:
        if t.device.type != "cpu" or torch.compiler.is_compiling():  # to look would make the host wait for the device
            return
        wrong = t[~((t >= 0) & (t <= 1))]
        if len(wrong):
            raise ValueError(f"t is {wrong[0].item()}; expected a time in [0, 1], 0 at the data and 1 at the noise")
        if needs_signal and not self.path.alpha(t).all():
            name, path = type(self.prediction).__name__, type(self.path).__name__
            raise ValueError(
                f"{name} says nothing of x0 at t = {t.max().item():g}, where {path} has alpha = 0: start the grid "
                "below, or train with V, X0 or Flow"
            )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _share(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (B, 1, …) over its mean, or 0 where all of it is."""
    expected = (len(like), 1, *like.shape[2:])
    if mask.shape != expected:
        raise ValueError(f"mask of shape {tuple(mask.shape)} for latents {tuple(like.shape)}; expected {expected}")
    mean = mask.mean(tuple(range(1, mask.ndim)), keepdim=True)
    return mask / mean.clamp(min=torch.finfo(mask.dtype).tiny)


def _together(rows: int, *conds: Cond) -> Cond:
    """One batch: ``rows`` of each."""
    each = [_rows(one, rows) for one in conds]
    if len(each) == 1:
        return each[0]
    try:
        return Cond.cat(each)
    except RuntimeError as error:
        raise ValueError(f"the Conds do not fit into one batch ({error}); ask with one_batch=False") from error


def _rows(cond: Cond, rows: int) -> Cond:
    if len(cond) not in (1, rows):
        raise ValueError(f"cond has {len(cond)} rows for a batch of {rows}; expected {rows}, or 1 for all")
    return cond if len(cond) == rows else cond.map(lambda x: x.expand(rows, *x.shape[1:]))
