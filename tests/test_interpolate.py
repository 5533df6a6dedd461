"""Between two prompts and between two seeds: the ends are the plain pictures, the norm of noise is kept."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ldm.cond import Cond
from pipelines.core import decode, latent_shape, sample_latents, start_latents
from pipelines.interpolate import mix, slerp
from pipelines.prompts import encode
from pipelines.stock import from_stock_pipeline
from tests import families


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3 without t5", "pixart alpha"])
def test_the_ends_are_the_plain_prompts(name: str):
    text = from_stock_pipeline(families.PIPELINES[name]()).text
    both = encode(text, ["a red apple", "a zebra and a hot dog and a car " * 2], long_prompt="chunk")
    a, b = ends = [both.map(lambda x, i=i: x[i : i + 1]) for i in (0, 1)]
    found = mix(a, b, [0.0, 0.25, 1.0])
    for row, end in ((0, a), (2, b)):
        assert end.pooled is None or torch.equal(found.pooled[row], end.pooled[0])
        seen = torch.ones(end.tokens.shape[1], dtype=torch.bool) if end.bias is None else end.bias[0] > -torch.inf
        assert torch.equal(found.tokens[row, seen], end.tokens[0, seen])  # what is not seen is free
        assert end.bias is None or torch.equal(found.bias[row], end.bias[0])
    if a.bias is not None:
        only_b = torch.isinf(a.bias[0]) & ~torch.isinf(b.bias[0])  # what only the longer has, is there for a quarter
        assert only_b.any()
        torch.testing.assert_close(found.bias[1, only_b].exp(), torch.full((int(only_b.sum()),), 0.25))
        assert torch.equal(found.tokens[1, only_b], b.tokens[0, only_b])
    shared = slice(0, 4)
    middle = 0.75 * ends[0].tokens[0, shared] + 0.25 * ends[1].tokens[0, shared]
    torch.testing.assert_close(found.tokens[1, shared], middle)


def test_what_cannot_be_mixed():
    a = Cond(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="2 rows, 2 rows and 3 shares"):
        mix(a, a, [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match=r"share is \[0.0, 1.5\]"):
        mix(a, a, [0.0, 1.5])
    with pytest.raises(ValueError, match="differ in size_ids"):
        mix(a, replace(a, size_ids=torch.zeros(2, 6)), 0.5)
    for key, value in (("pooled", torch.zeros(2, 5)), ("bias", torch.zeros(2, 3))):
        with pytest.raises(ValueError, match=f"only one of the two has {key}"):
            mix(a, replace(a, **{key: value}), 0.5)
    with pytest.raises(ValueError, match="in one call"):
        mix(a, Cond(torch.randn(2, 5, 4)), 0.5)


def test_noise_keeps_its_norm_and_goes_evenly():
    """On the sphere: equal steps are equal angles."""
    a, b = (torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    shares = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    found = slerp(a, b, shares)
    assert torch.equal(found[:1], a) and torch.equal(found[-1:], b)
    norms = found.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.lerp(a.norm(), b.norm(), torch.tensor(shares)))
    assert torch.lerp(a, b, 0.5).norm() < 0.75 * norms.min()  # the straight way
    angles = [torch.cosine_similarity(*found[i : i + 2].flatten(1), dim=0).acos() for i in range(5)]
    torch.testing.assert_close(torch.stack(angles), angles[0].expand(5), atol=1e-3, rtol=1e-3)
    whole = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).acos()
    assert sum(angles).item() == pytest.approx(whole.item(), rel=1e-3) and abs(whole - math.pi / 2) < 0.2
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 0.5)
    with pytest.raises(ValueError, match="do not fit together"):
        slerp(a, b[:, :2], 0.5)


@torch.no_grad()
def test_pictures_on_the_way():
    """The ends are the pictures of the two prompts and seeds, up to the rounding of another batch."""
    parts = from_stock_pipeline(families.sd())
    prompts, seeds = ("a red apple", "zebra"), (3, 4)
    conds = [parts.text.encode([x]) for x in prompts]
    shape = latent_shape(parts, 1)
    noises = [start_latents(shape, torch.Generator().manual_seed(seed)) for seed in seeds]
    how = dict(steps=4, guidance_scale=3.0)

    def draw(cond: Cond, noise: torch.Tensor) -> torch.Tensor:
        return decode(parts.vae, sample_latents(parts, cond, parts.text.null(), noise, **how))

    shares = [0.0, 0.5, 1.0]
    found = draw(mix(*conds, shares), slerp(*noises, shares))
    for i, row in ((0, 0), (1, 2)):
        torch.testing.assert_close(found[row], draw(conds[i], noises[i])[0], atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().max() > 0.05 and (found[2] - found[1]).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m_sde", "ddpm"])
def test_a_picture_is_that_of_its_seed_whatever_the_batch(sampler: str):
    """Its noise is its own, at the start and at each step. What is left is the rounding of a product whose kernel is
    chosen by the batch's size: 1e-4 of latents of unit size, below one of 255 shades."""
    parts = from_stock_pipeline(families.sd())

    def draw(seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        cond = parts.text.encode(["a red apple"] * len(seeds))
        noise = start_latents(latent_shape(parts, len(seeds)), generators)
        how = dict(steps=5, guidance_scale=3.0, sampler=sampler, generator=generators)
        return sample_latents(parts, cond, parts.text.null(), noise, **how)

    together = draw([7, 8, 9])
    assert torch.equal(together, draw([7, 8, 9]))
    for i in range(3):
        torch.testing.assert_close(together[i], draw([7 + i])[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(draw([9, 7])[0], together[2], atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1
