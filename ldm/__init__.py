"""Latent diffusion from the mathematics up: paths, predictions, samplers and the networks.

Names are imported on first use, so that ``import ldm`` costs nothing: ``ldm.RectifiedFlow`` brings in torch,
``ldm.UNet.from_diffusers(…)`` diffusers.
"""

from typing import TYPE_CHECKING

from .lazy import attach

if TYPE_CHECKING:
    from .cond import Cond
    from .denoiser import Denoised, Denoiser, TimeInput
    from .guidance import GUIDANCE, apg, autoguidance, classifier, classifier_free, dynamic_thresholding, interval
    from .latents import LatentScale
    from .likelihood import log_likelihood, variational_bound
    from .models import VAE, DiT, MMDiT, TextEncoder, UNet
    from .paths import NCSN, PATHS, VE, Coeffs, CosineVP, DiscreteVP, LinearVP, Path, RectifiedFlow, SigmoidVP
    from .prediction import PREDICTIONS, X0, Eps, Flow, Karras, Prediction, Score, V
    from .sampling import SAMPLERS, time_grid
    from .timesteps import TIMESTEPS, WEIGHTINGS

__getattr__, __dir__ = attach(
    __name__,
    {
        "cond": "Cond",
        "denoiser": "Denoised Denoiser TimeInput",
        "guidance": "GUIDANCE apg autoguidance classifier classifier_free dynamic_thresholding interval",
        "latents": "LatentScale",
        "models": "VAE DiT MMDiT TextEncoder UNet",
        "likelihood": "log_likelihood variational_bound",
        "paths": "NCSN PATHS VE Coeffs CosineVP DiscreteVP LinearVP Path RectifiedFlow SigmoidVP",
        "prediction": "PREDICTIONS X0 Eps Flow Karras Prediction Score V",
        "sampling": "SAMPLERS time_grid",
        "timesteps": "TIMESTEPS WEIGHTINGS",
    },
)
