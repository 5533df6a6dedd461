"""The four forms in which our own models are exported, with tiny parts, and the tools of the tests of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ldm.paths import VE, DiscreteVP, RectifiedFlow
from ldm.prediction import Flow, Karras, V
from pipelines.core import Parts
from pipelines.folder import export
from pipelines.schedulers import default_schedule
from pipelines.text_to_image import TextToImagePipeline
from tests import tiny

FORMS = ["unet", "mmdit", "unet_v", "unet_edm"]
PROMPTS, NEGATIVE = ["a red apple", "grinning face", "a zebra in a fire engine and much more than fits"], "green"
CALL = dict(num_inference_steps=20, guidance_scale=3.0)
PICTURE = (4, 8, 8)  # latents of one picture


def parts(form: str, **kw) -> Parts:
    family = "sd3" if form == "mmdit" else "sd"
    path, prediction = RectifiedFlow(), Flow()
    if form == "unet_v":
        path, prediction = DiscreteVP(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), V()
    if form == "unet_edm":
        path, prediction = VE(80.0), Karras(0.7)
    shift = {"unet": 2.0, "mmdit": 3.0}.get(form, 1.0)
    schedule = default_schedule(path, prediction, family, shift)
    net = tiny.mmdit() if form == "mmdit" else tiny.unet()
    return Parts(net, tiny.vae(shift_factor=0.3 if form == "mmdit" else None, **kw), tiny.text(family), schedule)


def exported(tmp_path_factory: Any) -> dict[str, SimpleNamespace]:
    """Of each form the parts and their exported folder."""
    made = {}
    for form in FORMS:
        given, place = parts(form), tmp_path_factory.mktemp(form)
        s = given.schedule
        folder = export(
            place / "pipeline", net=given.net, vae=given.vae, text=given.text, path=s.path, prediction=s.prediction,
            shift=s.shift,
        )  # fmt: skip
        made[form] = SimpleNamespace(form=form, parts=given, folder=folder, place=place)
    return made


def noise(rows: int = len(PROMPTS), seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, *PICTURE, generator=torch.Generator().manual_seed(seed))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(form: str) -> TextToImagePipeline:
    return quiet(TextToImagePipeline.from_parts(parts(form)))
