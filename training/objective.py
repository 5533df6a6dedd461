"""What a diffusion config's sections stand for in the mathematics: the path, the prediction, the times and weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm.paths import PATHS, DiscreteVP, Path
from ldm.prediction import PREDICTIONS, Karras, Prediction
from ldm.timesteps import TIMESTEPS, WEIGHTINGS, shift, stratified

from .schema import DiffusionConfig, LatentRun, Times


def times(how: Times, batch: int, path: Path, u: Tensor, index: Tensor) -> Tensor:
    """Uniform numbers (B,) of the images ``index`` (B,) -> the times to train at. On a chain these are its own steps.

    Args:
        batch: rows in a micro-batch, among which stratified times are spread.
    """
    if how.stratified:
        u = stratified(u, index, batch)
    t = shift(TIMESTEPS[how.name](u, path, **options_of(how)), how.shift)  # type: ignore[attr-defined]
    if isinstance(path, DiscreteVP):
        t = (t * path.num_train_timesteps).ceil().clamp(min=1) / path.num_train_timesteps
    return t


def path_of(section: Any) -> Path:
    """The path that a config names; its keys are diffusers' where diffusers has them."""
    renamed = {"beta_schedule": "schedule", "rescale_betas_zero_snr": "zero_terminal_snr"}
    return PATHS[section.name](**{renamed.get(key, key): value for key, value in options_of(section).items()})


def prediction_of(config: DiffusionConfig) -> Prediction:
    kind = PREDICTIONS[config.prediction_type]
    return kind(config.sigma_data) if kind is Karras else kind()


def weights(config: LatentRun, path: Path, prediction: Prediction, t: Tensor) -> Tensor:
    """What the loss at each of the times (B,) counts, (B,)."""
    how = config.weighting
    return WEIGHTINGS[how.name](path, prediction, t, **options_of(how))


def options_of(section: Any) -> dict[str, Any]:
    """What a section says besides which kind it is and what all kinds have."""
    return section.model_dump(exclude={"name", *Times.model_fields})
