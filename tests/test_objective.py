"""What a diffusion config's sections stand for, and what the task makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.paths import NCSN, PATHS, VE, CosineVP, DiscreteVP, LinearVP, RectifiedFlow, SigmoidVP
from ldm.prediction import PREDICTIONS, Karras, V
from ldm.timesteps import TIMESTEPS, WEIGHTINGS, logit_normal, min_snr, mode, shift
from training.config import parse
from training.objective import path_of, prediction_of, times, weights
from training.schema import DiffusionConfig

BASE = {
    "task": "diffusion", "output_dir": "run", "data": {"path": "pictures"}, "train": {"images": 10, "batch_size": 8},
    "vae": {"pretrained": "vae"}, "text": {"pretrained": "clip"}, "model": {"name": "unet"},
}  # fmt: skip
U = torch.linspace(0.01, 0.99, 32, dtype=torch.float64)
INDEX = torch.arange(100, 132)


def config(**sections: Any) -> DiffusionConfig:
    parsed = parse(BASE | sections, "here.yaml")
    assert isinstance(parsed, DiffusionConfig)
    return parsed


@pytest.mark.parametrize(
    ("section", "path"),
    [
        ({}, RectifiedFlow()),
        ({"name": "cosine"}, CosineVP()),
        ({"name": "linear", "beta_max": 10}, LinearVP(0.1, 10.0)),
        ({"name": "sigmoid", "tau": 0.7}, SigmoidVP(-3.0, 3.0, 0.7)),
        ({"name": "ve", "sigma_max": 20}, VE(20.0)),
        ({"name": "ncsn"}, NCSN()),
        ({"name": "discrete"}, DiscreteVP()),
        (
            {"name": "discrete", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
             "num_train_timesteps": 500, "rescale_betas_zero_snr": True},
            DiscreteVP(schedule="linear", beta_start=1e-4, beta_end=0.02, num_train_timesteps=500,
                       zero_terminal_snr=True),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_path(section: dict, path: Any) -> None:
    assert path_of(config(path=section).path) == path


def test_every_name_of_the_mathematics_is_a_name_of_the_config() -> None:
    for name in PATHS:
        assert type(path_of(config(path={"name": name}).path)) is PATHS[name]
    for name in PREDICTIONS:
        assert type(prediction_of(config(prediction_type=name))) is PREDICTIONS[name]
    for name in TIMESTEPS:
        assert times(config(timesteps={"name": name}).timesteps, 8, RectifiedFlow(), U, INDEX).shape == U.shape
    for name in WEIGHTINGS:
        assert weights(config(weighting={"name": name}), RectifiedFlow(), V(), U).shape == U.shape
    assert prediction_of(config(prediction_type="karras", sigma_data=0.3)) == Karras(0.3)


def test_options_reach_their_function() -> None:
    given = config(timesteps={"mean": 0.7, "std": 0.5, "shift": 3.0})
    expected = shift(logit_normal(U, RectifiedFlow(), mean=0.7, std=0.5), 3.0)
    torch.testing.assert_close(times(given.timesteps, 8, RectifiedFlow(), U, INDEX), expected)
    given = config(timesteps={"name": "mode", "scale": 0.4})
    torch.testing.assert_close(
        times(given.timesteps, 8, RectifiedFlow(), U, INDEX), mode(U, RectifiedFlow(), scale=0.4)
    )
    given = config(weighting={"name": "min_snr", "gamma": 2.0})
    torch.testing.assert_close(weights(given, CosineVP(), V(), U), min_snr(CosineVP(), V(), U, gamma=2.0))


def test_stratified_times_depend_on_the_image_and_not_on_the_batch() -> None:
    given = config(timesteps={"name": "uniform", "stratified": True})

    def at(rows: slice) -> Tensor:
        return times(given.timesteps, 8, RectifiedFlow(), U[rows], INDEX[rows])

    whole = at(slice(None))
    torch.testing.assert_close(torch.cat([at(slice(0, 5)), at(slice(5, 32))]), whole)
    for first in range(0, 32, 8):  # any batch_size images in a row fill the batch_size parts, one each
        assert sorted((whole[first : first + 8] * 8).long().tolist()) == list(range(8))
