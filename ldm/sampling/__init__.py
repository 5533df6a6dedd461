"""Samplers as free functions, and the grids of times that they walk down."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .common import noise_like
from .dynamics import annealed_langevin, euler_maruyama, langevin, predictor_corrector
from .exponential import dpmpp, dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, dpmpp_2s_sde, dpmpp_3m, dpmpp_3m_sde, unipc
from .grids import GRIDS, check_times, time_grid
from .multistep import lms, pndm
from .ode import ddim_inversion, euler, flow_heun, heun, midpoint, rk45
from .sde import ddim, ddpm

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": ddpm,  # the same step: its sigma_up and sigma_down are the posterior's
    "heun": heun,
    "flow_heun": flow_heun,
    "midpoint": midpoint,
    "rk45": rk45,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2s_sde": dpmpp_2s_sde,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "lms": lms,
    "pndm": pndm,
    "euler_maruyama": euler_maruyama,
    "predictor_corrector": predictor_corrector,
    "annealed_langevin": annealed_langevin,
}

__all__ = [
    "GRIDS", "SAMPLERS", "annealed_langevin", "check_times", "ddim", "ddim_inversion", "ddpm", "dpmpp", "dpmpp_2m",
    "dpmpp_2m_sde", "dpmpp_2s", "dpmpp_2s_sde", "dpmpp_3m", "dpmpp_3m_sde", "euler", "euler_maruyama", "flow_heun",
    "heun", "langevin", "lms", "midpoint", "noise_like", "pndm", "predictor_corrector", "rk45", "time_grid", "unipc",
]  # fmt: skip
