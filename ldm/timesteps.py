"""At which t to train, and how much each t counts.

Time samplers are functions ``(u, path, **options)`` of uniform numbers u in (0, 1), so that the caller owns the
randomness; each is monotone in u. ``stratified`` goes before them, on u, and ``shift`` after them, on t:
``shift(logit_normal(stratified(u), path), 3.0)``.

Weightings are functions ``(path, prediction, t, **options)`` whose value multiplies ``Denoiser.loss``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .prediction import Eps, Flow, Prediction
from .process import Coeffs, Path

# --- time samplers: u (B,) -> t (B,) in [0, 1], of u's dtype ---------------------------------------------------------


def uniform(u: Tensor, path: Path) -> Tensor:
    """Every t alike (DDPM, rectified flow). On NCSN's path: every log sigma of the ladder alike."""
    return u


def logit_normal(u: Tensor, path: Path, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """logit(t) is normal, so that the middle is seen most (SD3, Esser et al. 2024, eq. 19). Rises with u.

    Raises:
        ValueError: std is not above 0.
    """
    _above_zero("logit_normal", std=std)
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, path: Path, scale: float = 1.29) -> Tensor:
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u): heavy tails, and the middle favoured by a scale above 0, the ends by
    one below (SD3, Esser et al. 2024, eq. 20). Falls with u; 1 - u gives 1 - t.

    Raises:
        ValueError: scale is outside [-1, 2 / (pi - 2)], where t would turn back.
    """
    most = 2 / (math.pi - 2)
    if not -1 <= scale <= most:
        raise ValueError(f"mode: scale is {scale}; expected a number from -1 to 2 / (pi - 2) = {most:.4f}")
    return 1 - u + scale * (torch.sin(math.pi / 2 * u) ** 2 - u)  # sin^2: 1 - cos^2 would cancel where t is near 1


def log_normal(u: Tensor, path: Path, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """log(sigma / alpha) is normal: EDM's P_mean and P_std (Karras et al. 2022, table 1), on any path. Rises with u;
    noise beyond the path's last, sigma(1) / alpha(1), is taken as t = 1.

    Raises:
        ValueError: std is not above 0.
    """
    _above_zero("log_normal", std=std)
    log_nu = mean + std * torch.special.ndtri(u)
    return path.time_at(-2 * log_nu).clamp(0, 1)


def shift(t: Tensor, s: float) -> Tensor:
    """Later times for larger pictures: s t / (1 + (s - 1) t) (SD3, Esser et al. 2024, eq. 23); 1 changes nothing.

    Raises:
        ValueError: s is not above 0.
    """
    if not s > 0:
        raise ValueError(f"shift is {s}; expected a number above 0, 1 for no shift")
    return (s * t / (1 + (s - 1) * t)).clamp(max=1)  # which rounding may overstep


def stratified(u: Tensor, index: Tensor | None = None, parts: int | None = None) -> Tensor:
    """One u in each of B equal parts of (0, 1) for a batch (B,): each part once, so the batch's loss varies less. For
    the u of a time sampler, whose t is then spread as evenly under its own density. (Kingma et al. 2021, appendix
    I.1, use one u for all parts; here each row keeps its own.) Still uniform over batches if rows come in random
    order.

    Args:
        u: (B,) in (0, 1), as is the answer.
        index: (B,) whole numbers, the images' own: image i takes part i mod ``parts``, in whatever batch it comes. The
            row in the batch if not given.
        parts: how many; B if not given.
    """
    index = torch.arange(len(u), device=u.device) if index is None else index
    parts = len(u) if parts is None else parts
    below_one = 1 - torch.finfo(u.dtype).eps / 2  # to which the last part's end may be rounded
    return ((index % parts + u) / parts).clamp(max=below_one)


# --- weightings: t () or (B,) -> the weight of Denoiser.loss, of t's shape -------------------------------------------
#
# Each paper weighs the squared error of one quantity: x0, eps or a velocity. x_t is known, so an error e of x0 comes
# with one of -(alpha / sigma) e of eps, and every target, being linear in (x0, eps), is wrong by its own multiple of e.
# That multiple, squared, is ``gain``; a weight w of the x0 error is w / gain on the network's output, and one of the
# eps error w gain(Eps) / gain. At t = 0 and 1 the weight is its limit; where that is infinite, it is very large.


def gain(prediction: Prediction, c: Coeffs) -> Tensor:
    """|o - o*|^2 / |x0 - x0*|^2 at one x_t: how much larger than that of the x0 it implies the squared error of the
    output o is. Of c's shape, which must have alpha > 0 and sigma > 0."""
    return prediction.target(torch.ones_like(c.alpha), -c.alpha / c.sigma, c) ** 2


def unit(path: Path, prediction: Prediction, t: Tensor) -> Tensor:
    """The network's output as it is: L_simple for Eps (Ho et al. 2020, eq. 14), conditional flow matching for Flow
    (Lipman et al. 2023), denoising score matching for Score (Vincent 2011)."""
    return torch.ones_like(t)


def min_snr(path: Path, prediction: Prediction, t: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the x0 error (Hang et al. 2023): min(SNR, gamma) / SNR for Eps, / (SNR + 1) for V with
    alpha^2 + sigma^2 = 1, and for Flow on the straight path, whose error is -1 / t of x0's, t^2 min(SNR, gamma).

    Raises:
        ValueError: gamma is not above 0.
    """
    _above_zero("min_snr", gamma=gamma)
    c = _inside(path, t)
    return _snr(c).clamp(max=gamma) / gain(prediction, c)


def p2(path: Path, prediction: Prediction, t: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """(k + SNR)^-gamma on the eps error (Choi et al. 2022). With gamma = 0 it is L_simple for every prediction: sigma^2
    for Score.

    Raises:
        ValueError: gamma or k is below 0.
    """
    if not (gamma >= 0 and k >= 0):
        raise ValueError(f"p2: gamma is {gamma} and k is {k}; expected numbers of at least 0")
    c = _inside(path, t)
    return (k + _snr(c)) ** -gamma * _eps_gain(prediction, c)


def debiased(path: Path, prediction: Prediction, t: Tensor) -> Tensor:
    """1 / sqrt(SNR) on the eps error (Yu et al. 2023)."""
    c = _inside(path, t)
    return c.sigma / c.alpha * _eps_gain(prediction, c)


def sigmoid(path: Path, prediction: Prediction, t: Tensor, bias: float = 0.0) -> Tensor:
    """-1/2 dl/dt sigmoid(bias - l) on the eps error, with l = log SNR (Kingma & Gao 2023; Hoogeboom et al. 2024). The
    factor -1/2 dl/dt is part of their loss for a uniform t: the mean over t becomes an integral over l, alike on every
    path; with another time sampler it is no longer theirs. The larger the bias, the more do small noises count; at
    infinity it is the variational bound."""
    c = _inside(path, t)
    minus_dl = 2 * (c.dsigma / c.sigma - c.dalpha / c.alpha)
    return minus_dl / 2 * torch.sigmoid(bias - _snr(c).log()) * _eps_gain(prediction, c)


def edm(path: Path, prediction: Prediction, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(nu^2 + d^2) / (nu d)^2 on the x0 error, nu = sigma / alpha and d = ``sigma_data`` (Karras et al. 2022, table 1):
    1 for Karras(d).

    Raises:
        ValueError: sigma_data is not above 0.
    """
    _above_zero("edm", sigma_data=sigma_data)
    c = _inside(path, t)
    nu, d = c.sigma / c.alpha, sigma_data
    return (nu**2 + d**2) / (nu * d) ** 2 / gain(prediction, c)


def cosmap(path: Path, prediction: Prediction, t: Tensor) -> Tensor:
    """2 / (pi (1 - 2 s + 2 s^2)) on the error of eps - x0, the velocity of the straight path (SD3, Esser et al. 2024,
    section 3.1, CosMap). There s = t; on another path s is the time at which the straight one has the same SNR."""
    c = _inside(path, t)
    s = c.sigma / (c.alpha + c.sigma)
    straight = Coeffs(1 - s, s, -torch.ones_like(s), torch.ones_like(s))
    return 2 / (math.pi * (1 - 2 * s + 2 * s**2)) * gain(Flow(), straight) / gain(prediction, c)


def _inside(path: Path, t: Tensor) -> Coeffs:
    """Coefficients at t in float32 at least, and off the ends by no more than a rounding of 1 could hide: there alpha
    and sigma are above 0, rates finite, and all quotients their limits to that precision."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    tiny = torch.finfo(t.dtype).eps
    return path.coeffs(t.clamp(tiny, 1 - tiny), 1)


def _snr(c: Coeffs) -> Tensor:
    return (c.alpha / c.sigma) ** 2


def _eps_gain(prediction: Prediction, c: Coeffs) -> Tensor:
    """What a weight of the eps error is multiplied with to be one of the output's."""
    return gain(Eps(), c) / gain(prediction, c)


def _above_zero(name: str, **options: float) -> None:
    for option, value in options.items():
        if not value > 0:
            raise ValueError(f"{name}: {option} is {value}; expected a number above 0")


TIMESTEPS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "log_normal": log_normal,
}

WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "unit": unit,
    "min_snr": min_snr,
    "p2": p2,
    "debiased": debiased,
    "sigmoid": sigmoid,
    "edm": edm,
    "cosmap": cosmap,
}
