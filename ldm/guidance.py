"""Guidance: a function ``denoise(x_t, t) -> Denoised`` out of a Denoiser and Conds, or out of other such functions,
so that the kinds compose:

    guided = classifier_free(denoiser, cond, uncond, 4.0)
    guided = interval(guided, partial(denoiser, cond=cond), low=0.2, high=0.8)
    guided = dynamic_thresholding(guided, path)

x_t is (B, …); t is () or (B,), as the sampler has it. x_t = alpha x0 + sigma eps holds for every answer. ``var_frac``
(learned variance) is the conditional answer's. What a kind remembers between calls is in the function that it makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .cond import Cond
from .denoiser import Denoised, Denoiser
from .paths import Coeffs, Path

Denoise = Callable[[Tensor, Tensor], Denoised]


def classifier_free(
    denoiser: Denoiser, cond: Cond, uncond: Cond, guidance_scale: float, *, rescale: float = 0.0, one_batch: bool = True
) -> Denoise:
    """uncond + w (cond - uncond) on the network's output (Ho & Salimans 2022, eq. 6, who write (1 + w) cond - w uncond:
    their w is this one less 1, which is diffusers' and Imagen's, where 1 is the conditional model).

    Away from w = 1 neither the ODE nor the SDE samples the tilted law p(x) p(y | x)^w in general: the ODE makes of
    Gaussians with spreads s_c and s_u a variance of s_c^(2w) s_u^(2 - 2w), not 1 / (w / s_c^2 + (1 - w) / s_u^2).

    Args:
        guidance_scale: w; at 1 and below the network is asked for ``cond`` alone, as diffusers does. For the weights
            of a w below 1 as they are, mix with ``autoguidance``.
        rescale: φ in [0, 1] of Lin et al. 2024, section 3.4: how far the guided output is brought back to the
            standard deviation of the conditional one.
        one_batch: both halves in one call of the network; False needs half the memory.
    Raises:
        ValueError: rescale outside [0, 1].
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}; expected a number in [0, 1]")
    if guidance_scale <= 1:
        return lambda x_t, t: denoiser(x_t, t, cond)

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        without, with_ = denoiser(x_t, t, [uncond, cond], one_batch=one_batch)
        output = without.output + guidance_scale * (with_.output - without.output)
        if rescale:
            output = rescaled(output, with_.output, rescale)
        return denoiser.interpret(x_t, t, output)._replace(var_frac=with_.var_frac)

    return denoise


def rescaled(guided: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """The guided output (B, …) brought back by φ = ``rescale`` to the standard deviation that the conditional one has
    in each row (Lin et al. 2024, section 3.4)."""
    back = _column(_rows(conditional).std(1) / _rows(guided).std(1), guided)
    return (1 - rescale) * guided + rescale * guided * back


def autoguidance(denoise: Denoise, weak: Denoise, guidance_scale: float) -> Denoise:
    """weak + w (denoise - weak) on x0 and eps: away from a smaller or less trained model (Karras et al. 2024a).

    Any two functions on one path can be mixed, with any w, whatever their networks predict; with the unconditional
    model as ``weak`` this is classifier-free guidance. ``output`` is mixed if the two have one shape.
    """

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        a, b = denoise(x_t, t), weak(x_t, t)
        x0, eps = b.x0 + guidance_scale * (a.x0 - b.x0), b.eps + guidance_scale * (a.eps - b.eps)
        one_shape = a.output.shape == b.output.shape
        output = b.output + guidance_scale * (a.output - b.output) if one_shape else a.output
        return Denoised(x0, eps, output, a.var_frac)

    return guided


def interval(guided: Denoise, plain: Denoise, low: float, high: float) -> Denoise:
    """``guided`` where low < t <= high, ``plain`` elsewhere (Kynkäänniemi et al. 2024).

    One t () on the CPU asks only the one that is needed; a t (B,), or on a device, asks both and picks by row.

    Args:
        low, high: in t. The paper's are in noise over signal: ``sigma_interval``.
    Raises:
        ValueError: not 0 <= low < high <= 1.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"interval: low is {low} and high is {high}; expected 0 <= low < high <= 1, 1 at the noise")

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        if t.ndim == 0 and t.device.type == "cpu":
            return guided(x_t, t) if low < t.item() <= high else plain(x_t, t)
        inside = _column((t > low) & (t <= high), x_t).to(x_t.device)
        a, b = guided(x_t, t), plain(x_t, t)
        x0, eps, output = (torch.where(inside, p, q) for p, q in zip(a[:3], b[:3], strict=True))
        frac = None if a.var_frac is None or b.var_frac is None else torch.where(inside, a.var_frac, b.var_frac)
        return Denoised(x0, eps, output, frac)

    return denoise


def sigma_interval(guided: Denoise, plain: Denoise, path: Path, low: float, high: float) -> Denoise:
    """``interval`` as the paper has it: low and high in noise over signal, sigma / alpha; EDM's and VE's sigma.

    Raises:
        ValueError: not 0 <= low < high < inf, or no time of the path lies between.
    """
    if not 0 <= low < high < math.inf:
        raise ValueError(f"sigma_interval: low is {low} and high is {high}; expected 0 <= low < high, in sigma / alpha")
    times = path.time_at(-2 * torch.tensor([low, high], dtype=torch.float64).log()).clamp(0, 1)
    return interval(guided, plain, *times.tolist())


def classifier(
    denoise: Denoise, path: Path, log_prob: Callable[[Tensor, Tensor], Tensor], guidance_scale: float
) -> Denoise:
    """The score moves by s grad log p(y | x_t) (Dhariwal & Nichol 2021, eq. 14; Song et al. 2021, eq. 14):

        eps - s sigma grad,  x0 + s sigma^2 / alpha grad

    ``output`` stays the network's. It works under the caller's no_grad, and adds no graph to the answer.

    Args:
        log_prob: ``log_prob(x_t, t) -> (B,)``, any differentiable log p(y | x_t) up to a constant: a classifier of
            noisy x_t, or a likelihood of ``denoise(x_t, t).x0``.
        guidance_scale: s; 1 is Bayes' rule.
    Raises:
        ValueError: (when called) alpha(t) = 0; log_prob gives another shape, or does not depend on x_t.
    """

    def guided(x_t: Tensor, t: Tensor) -> Denoised:
        if t.device.type == "cpu" and bool((path.alpha(t) == 0).any()):  # to look elsewhere would wait for the device
            where = f"at t = {t.max().item():g}, where {type(path).__name__} has alpha = 0"
            raise ValueError(f"x0 moves without bound {where}: start below, or leave that time out with `interval`")
        c, d = _coeffs(path, x_t, t), denoise(x_t, t)
        shift = guidance_scale * c.sigma * _gradient(log_prob, x_t, t)
        return d._replace(x0=d.x0 + c.sigma / c.alpha * shift, eps=d.eps - shift)

    return guided


def apg(
    denoiser: Denoiser,
    cond: Cond,
    uncond: Cond,
    guidance_scale: float,
    *,
    eta: float = 0.0,
    norm_threshold: float = 15.0,
    momentum: float = -0.5,
    one_batch: bool = True,
) -> Denoise:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1), on x0: with d = cond - uncond,

        m = d + momentum m_before,  u = m min(1, norm_threshold / |m|),  x0 = cond + (w - 1) (u_⊥ + eta u_∥)

    where ∥ is along the conditional x0, which is what saturates, and ⊥ is the rest, row by row. eta = 1 with the other
    two 0 is classifier-free guidance. ``output`` is the conditional one. The average m lives in the function that is
    given back, and moves at every call: make one function for each sampling run.

    Args:
        guidance_scale, one_batch: as in ``classifier_free``.
        norm_threshold: r; 0 is no bound. |d| grows with the size of x0: the paper has 2.5 for EDM2, 15 for SDXL.
        momentum: β; below 0 leads away from where guidance went before, 0 is none.
    Raises:
        ValueError: norm_threshold below 0; momentum outside (-1, 1); (when called) x_t has another shape than before.
    """
    if not (norm_threshold >= 0 and -1 < momentum < 1):
        told = f"norm_threshold is {norm_threshold} and momentum {momentum}"
        raise ValueError(f"{told}; expected 0 or more, and one in (-1, 1); 0 switches either off")
    if guidance_scale <= 1:
        return lambda x_t, t: denoiser(x_t, t, cond)
    before: Tensor | None = None

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        nonlocal before
        without, with_ = denoiser(x_t, t, [uncond, cond], one_batch=one_batch)
        update = with_.x0 - without.x0
        if momentum:
            if before is not None and before.shape != update.shape:
                was, now = tuple(before.shape), tuple(x_t.shape)
                raise ValueError(f"apg had x_t of shape {was}, now {now}; make one function for each sampling run")
            update = before = update if before is None else update + momentum * before
        if norm_threshold:
            update = update * (norm_threshold / _dot(update, update).sqrt()).clamp(max=1)
        onto = _dot(update, with_.x0) / _dot(with_.x0, with_.x0).clamp(min=torch.finfo(update.dtype).tiny)
        parallel = onto * with_.x0
        x0 = with_.x0 + (guidance_scale - 1) * (update - parallel + eta * parallel)
        return _moved(with_, x0, _coeffs(denoiser.path, x_t, t))

    return denoise


def dynamic_thresholding(
    denoise: Denoise, path: Path, percentile: float = 0.995, max_value: float = math.inf
) -> Denoise:
    """x0 clipped to [-s, s] and divided by s, with s the percentile of |x0| in each row, 1 at least (Saharia et al.
    2022, section 2.3). For data in [-1, 1]: pictures, not latents. eps follows; ``output`` stays.

    Args:
        percentile: as a fraction; diffusers' ``dynamic_thresholding_ratio``.
        max_value: of s, diffusers' ``sample_max_value``; 1, which is its default, is plain clipping to [-1, 1].
    Raises:
        ValueError: percentile outside (0, 1], or max_value below 1.
    """
    if not (0 < percentile <= 1 <= max_value):
        raise ValueError(f"percentile is {percentile} and max_value {max_value}; expected (0, 1], and 1 or more")

    def thresholded(x_t: Tensor, t: Tensor) -> Denoised:
        d = denoise(x_t, t)
        ranked = _rows(d.x0.abs()).sort(dim=1).values  # torch.quantile takes no more than 2^24 numbers
        place = percentile * (ranked.shape[1] - 1)
        s = torch.lerp(ranked[:, math.floor(place)], ranked[:, math.ceil(place)], place % 1)
        s = _column(s.clamp(1, max_value), x_t)
        return _moved(d, d.x0.clamp(-s, s) / s, _coeffs(path, x_t, t))

    return thresholded


def _moved(d: Denoised, x0: Tensor, c: Coeffs) -> Denoised:
    """x0 in the place of d.x0, and eps such that alpha x0 + sigma eps stays; where sigma = 0 there is none to move."""
    per_sigma = torch.where(c.sigma > 0, c.alpha / c.sigma, torch.zeros_like(c.sigma))
    return d._replace(x0=x0, eps=d.eps - per_sigma * (x0 - d.x0))


def _gradient(log_prob: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        value = log_prob(x, t.clone())
        if value.shape != x.shape[:1]:
            raise ValueError(f"log_prob gave shape {tuple(value.shape)}; expected one number a row, ({x.shape[0]},)")
        gradient = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise ValueError("log_prob does not depend on x_t, or hides it (detach, no_grad); no gradient to guide by")
    return gradient


def _coeffs(path: Path, x: Tensor, t: Tensor) -> Coeffs:
    return path.coeffs(t.to(x.device) if t.ndim else t, x.ndim)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return _column(_rows(a * b).sum(1), a)


def _rows(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).flatten(1)  # (B, …) -> (B, N); (B,) -> (B, 1)


def _column(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(-1, *(1,) * (x.ndim - 1))  # (B,) -> (B, 1, …, 1)


GUIDANCE: dict[str, Callable[..., Denoise]] = {
    "classifier_free": classifier_free,
    "autoguidance": autoguidance,
    "interval": interval,
    "sigma_interval": sigma_interval,
    "classifier": classifier,
    "apg": apg,
    "dynamic_thresholding": dynamic_thresholding,
}
