"""Every sampler with every family of models, by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from ldm.sampling import SAMPLERS
from pipelines.core import Parts, sample_latents
from pipelines.stock import from_stock_pipeline
from pipelines.text_to_image import TextToImagePipeline
from tests import families, forms

FAMILIES = {name: families.PIPELINES[name] for name in ("sd", "sdxl", "sd3", "pixart alpha")}
NOISY = {  # those that add noise
    "ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_2s_sde", "dpmpp_3m_sde", "euler_maruyama", "predictor_corrector",
    "annealed_langevin",
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"annealed_langevin": {"steps": 2}, "rk45": {"rtol": 0.05, "atol": 0.05}}


@cache
def parts_of(family: str) -> Parts:
    return from_stock_pipeline(FAMILIES[family]()) if family in FAMILIES else forms.parts(family)


def drawn(parts: Parts, sampler: str, **options: Any) -> torch.Tensor:
    """Three rows that begin alike; the first two have like generators, the third another."""
    with torch.no_grad():
        cond, uncond = parts.text.encode(["a red apple"]), parts.text.null()
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    return sample_latents(
        parts, cond, uncond, forms.noise(1).expand(3, -1, -1, -1), steps=3, guidance_scale=2.0, sampler=sampler,
        generator=generators, sampler_options=OPTIONS.get(sampler, {}) | options,
    )  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", [*FAMILIES, "unet_v", "unet_edm"])
def test_every_sampler_draws_with_every_family(family: str, sampler: str) -> None:
    parts, options = parts_of(family), {}
    if sampler == "euler_maruyama" and family == "sd3":  # the forward SDE has no bound where alpha = 0: said, not NaN
        with pytest.raises(ValueError, match=r"g has no bound at t = 1, where RectifiedFlow has alpha = 0.*or give g"):
            drawn(parts, sampler)
        options["g"] = 0.5
    x = drawn(parts, sampler, **options)
    assert x.shape == (3, *forms.PICTURE) and x.isfinite().all() and x.std() > 0.01
    size = x.abs().max().item()
    # a row of a batch is computed in another order than the next: rounding, of values as large as the largest
    torch.testing.assert_close(x[0], x[1], rtol=0, atol=1e-4 * size)
    apart = (x[2] - x[0]).abs().max().item() / size
    assert apart > 1e-2 if sampler in NOISY else apart < 1e-4


def test_options_reach_the_sampler() -> None:
    pipe = forms.ours("unet_edm")
    call: dict[str, Any] = dict(num_inference_steps=4, guidance_scale=1.0, output_type="latent", sampler="heun")

    def draw(**kw: Any) -> Any:
        return pipe("zebra", generator=torch.Generator().manual_seed(0), **call, **kw).images

    assert torch.equal(draw(), draw(sampler_options={"s_churn": 0.0}))
    assert not torch.allclose(draw(), draw(sampler_options={"s_churn": 2.0}))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"sampler": "dpmpp2m"}, "sampler 'dpmpp2m' is not one of ddpm, .*; did you mean 'dpmpp_2m'"),
        ({"sampler": "ddim", "sampler_options": {"etta": 1}}, "sampler ddim has no option 'etta'.*did you mean 'eta'"),
        ({"sampler": "midpoint", "sampler_options": {"eta": 1}}, "sampler midpoint has no option 'eta'; it takes none"),
        ({"sampler": "ddim", "sampler_options": {"times": 1}}, "sampler ddim has no option 'times'"),
        ({"sampler": "ddim", "sampler_options": {"eta": 3.0}}, r"eta is 3\.0; expected a number in \[0, 1\]"),
    ],
)
def test_what_is_refused(told: dict[str, Any], message: str) -> None:
    pipe = TextToImagePipeline.from_parts(parts_of("unet_v"))
    with pytest.raises(ValueError, match=message):
        pipe("zebra", num_inference_steps=2, **told)
