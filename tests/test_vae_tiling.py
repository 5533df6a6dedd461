"""Tiles against the whole picture, and against stock's tiles with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.models import tiling
from ldm.models.tiling import Tiling
from ldm.models.vae import VAE

SMALL: dict[str, Any] = dict(block_out_channels=(8, 16, 16), norm_num_groups=4)
SIZES = [(100, 148), (40, 132), (132, 36)]  # tiles of 64 leave remainders; one side smaller than a tile


def made(**config: Any) -> VAE:
    torch.manual_seed(0)
    vae = VAE(**SMALL | config)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return vae


def worst(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def rms(a: Tensor, b: Tensor) -> float:
    return ((a - b).square().mean().sqrt() / b.std()).item()


@pytest.fixture
def true_statistics(monkeypatch):
    """Norms are measured on one patch, which is the whole picture: what is left is what tiles do to convolutions."""
    monkeypatch.setattr(tiling, "PATCH", 10_000)
    monkeypatch.setattr(tiling, "HALO", 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [dict(), dict(layers_per_block=2, block_out_channels=(8, 8), latent_channels=16)])
def test_with_true_statistics_tiles_are_the_whole_everywhere(size, config, true_statistics):
    vae = made(**config)
    f = vae.factor
    x, z = torch.randn(2, 3, *size), torch.randn(2, vae.config["latent_channels"], size[0] // f, size[1] // f)
    with torch.no_grad():
        moments, y = vae.encode(x), vae.decode(z)
        vae.enable_tiling(64)
        of_tiles, y_tiles = vae.encode(x), vae.decode(z)
        assert worst(of_tiles.mean, moments.mean) < 1e-5  # attention and all: only the order of sums differs
        assert worst(of_tiles.log_var, moments.log_var) < 1e-5
        assert worst(y_tiles, y) < 1e-5
        vae.enable_tiling(64, overlap=0.0)
        assert worst(vae.decode(z), y) > 1e-3  # the test sees a seam where there is one
        assert worst(vae.encode(x).mean, moments.mean) > 1e-3


def test_with_true_statistics_gradients_are_those_of_the_whole(true_statistics):
    vae = made().double()
    z, weight = torch.randn(1, 4, 25, 20).double(), torch.randn(1, 3, 100, 80).double()
    grads = []
    for tiled, recompute in ((False, False), (True, False), (True, True)):
        vae.zero_grad()
        vae.enable_tiling(64) if tiled else vae.disable_tiling()
        vae.enable_gradient_checkpointing() if recompute else vae.disable_gradient_checkpointing()
        (vae.decode(z) * weight).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in vae.decoder.parameters() if p.grad is not None]))
    assert worst(grads[1], grads[0]) < 1e-10
    assert worst(grads[2], grads[0]) < 1e-10


def test_half_precision_is_as_near_to_the_truth_as_without_tiles(true_statistics):
    vae, z = made(), torch.randn(1, 4, 40, 40)
    with torch.no_grad():
        truth = vae.decode(z)
        vae = vae.bfloat16()
        error = rms(vae.decode(z.bfloat16()).float(), truth)
        vae.enable_tiling(64)
        y = vae.decode(z.bfloat16())
        assert y.dtype == torch.bfloat16
        assert rms(y.float(), truth) < 1.2 * error
        moments = vae.encode(torch.randn(1, 3, 100, 80).bfloat16())
        assert moments.mean.dtype == torch.bfloat16
    # Weights of bfloat16 that should sum to 1 miss it by up to 2^-8; these do not.
    ones = tiling.in_tiles(
        lambda t, act: torch.ones_like(t), torch.zeros(1, 1, 40, 40).bfloat16(), Tiling(16, 5), 1, 1, 1
    )
    assert (ones == 1).all()


@pytest.mark.parametrize("side", range(2, 15))
@pytest.mark.parametrize("reach", [1, 5])
def test_weights_sum_to_one_and_leave_out_what_a_border_reaches(side, reach):
    for overlap in range(side // 2 + 1):
        plan = Tiling(side, overlap)
        for length in range(1, 40):
            starts = tiling._starts(length, plan)
            high = min(side, length)
            weights = tiling._weights(starts, high, length, plan, 2, reach)
            torch.testing.assert_close(weights.sum(0), torch.ones(2 * length, dtype=torch.float64))
            assert (weights >= 0).all()
            assert starts[0] == 0 and starts[-1] + high == length
            for row, start, after in zip(weights, starts, [*starts[1:], None], strict=True):
                assert after is None or start + high - after >= overlap
                seen = torch.zeros_like(row)
                first, last = 2 * start, 2 * (start + high)
                margin = reach if 2 * reach <= 2 * overlap else 0
                seen[first + margin * (start > 0) : last - margin * (start + high < length)] = 1
                assert (row[seen == 0] == 0).all()


def test_a_picture_no_larger_than_a_tile_is_untouched():
    vae = made()
    x, z = torch.randn(1, 3, 64, 48), torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        mean, y = vae.encode(x).mean, vae.decode(z)
        vae.enable_tiling(64)
        assert torch.equal(vae.encode(x).mean, mean)
        assert torch.equal(vae.decode(z), y)
        large = torch.randn(1, 4, 17, 16)
        tiled = vae.decode(large)
        vae.disable_tiling()
        assert not torch.equal(vae.decode(large), tiled)


def test_rows_go_through_a_tile_together_and_do_not_mix():
    vae = made()
    vae.enable_tiling(64, overlap=0.25)
    z = torch.randn(3, 4, 20, 28)
    batches = []
    vae.decoder.conv_out.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    with torch.no_grad():
        together = vae.decode(z)
        assert batches == [3 * 16] + [3] * 4  # 16 patches a row, then 2 by 2 tiles
        for i in range(3):
            assert worst(vae.decode(z[i : i + 1]), together[i : i + 1]) < 1e-5
        vae.enable_slicing()
        assert worst(vae.decode(z), together) < 1e-5


class Largest(TorchDispatchMode):
    """The most numbers that any one tensor had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_the_largest_tensor_is_that_of_a_tile(what):
    vae = VAE(block_out_channels=(32, 32, 32), norm_num_groups=8)
    run = getattr(vae, what)

    def largest(side: int) -> int:
        x = torch.zeros(1, 4, side // 4, side // 4) if what == "decode" else torch.zeros(1, 3, side, side)
        with torch.no_grad(), Largest() as seen:
            run(x)
        return seen.numel

    of_tile, whole = largest(64), largest(256)
    assert whole > 15 * of_tile  # 16 times the pixels, less the border that padding adds to a tile
    vae.enable_tiling(64)
    # What stays whole, 32 channels at 64 by 64, is as large as a tile's 32 at 64 by 64; the picture itself is larger.
    assert largest(256) <= max(of_tile, 3 * 256 * 256)


# --- weights that have learned something -----------------------------------------------------------------------------


def pictures(n: int, side: int, generator: torch.Generator) -> Tensor:
    """Coloured rectangles on coloured slopes: (n, 3, side, side) in [-1, 1]; what is in them is 6 to 40 large."""
    slope = torch.rand(n, 3, 3, 3, generator=generator) * 2 - 1
    x = F.interpolate(slope, size=(side, side), mode="bicubic", align_corners=True).clamp(-1, 1)
    for row in x:
        for _ in range(6 * (side // 32) ** 2):
            top, left = torch.randint(0, side - 6, (2,), generator=generator).tolist()
            high, wide = torch.randint(6, 40, (2,), generator=generator).tolist()
            row[:, top : top + high, left : left + wide] = torch.rand(3, 1, 1, generator=generator) * 2 - 1
    return x


@pytest.fixture(scope="module")
def trained() -> VAE:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = VAE(block_out_channels=(8, 16, 16), norm_num_groups=4, sample_size=64)
    data = pictures(128, 32, generator)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    for _ in range(150):
        x = data[torch.randint(128, (8,), generator=generator)]
        y, moments = vae(x, torch.randn(8, 4, 8, 8, generator=generator))
        loss = (y - x).abs().mean() + 1e-5 * moments.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vae.eval()


def steps(y: Tensor, dim: int) -> Tensor:
    """Root mean square of the step to the next column (dim 3) or row (dim 2), one for each of them."""
    return y.diff(dim=dim).square().mean(tuple(d for d in range(4) if d != dim)).sqrt()


def test_seams_are_below_the_noise_and_nearer_to_the_whole_than_stock(trained):
    stock: Any = trained.to_diffusers()
    x = pictures(1, 224, torch.Generator().manual_seed(1)) * torch.linspace(0.2, 1.0, 224)  # tiles differ in contrast
    with torch.no_grad():
        z = trained.encode(x).mean
        y = trained.decode(z)
        trained.enable_tiling(128)
        z_ours, y_ours = trained.encode(x).mean, trained.decode(z)
        trained.disable_tiling()
        stock.use_tiling, stock.tile_sample_min_size, stock.tile_latent_min_size = True, 128, 32
        z_stock, y_stock = stock.encode(x).latent_dist.mean, stock.decode(z).sample
    assert rms(z_ours, z) < 0.5 * rms(z_stock, z)  # measured: 0.010 and 0.220
    assert rms(y_ours, y) < 0.5 * rms(y_stock, y)  # 0.03 and 0.15
    # Two tiles of 128 share 32 pixels, of which 16 on either side do not count: the seam is between 111 and 112.
    for dim in (2, 3):
        error = steps(y_ours - y, dim)
        assert error[111] < 0.1 * steps(y - x, dim).mean()  # what is lost in the latents anyway; measured: 0.02
        assert error[111] < 3 * error.median()  # 1.2 to 1.8, where the largest of all columns is 4 to 6
        assert error[111] < 0.1 * steps(y, dim)[111]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tile_sample_min_size=66), "tile_sample_min_size=66.*factor 4.*nearest that fits is 68"),
        (dict(tile_sample_min_size=3), "nearest that fits is 8"),
        (dict(tile_sample_min_size=64, overlap=0.6), r"overlap=0.6: expected .* in \[0, 0.5\]"),
        (dict(tile_sample_min_size=64, overlap=-0.1), r"overlap=-0.1"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(arguments, message):
    vae = made()
    with pytest.raises(ValueError, match=message):
        vae.enable_tiling(**arguments)
    assert vae.tiling is None


def test_one_level_has_nothing_to_tile():
    with pytest.raises(ValueError, match=r"one level.*use slicing"):
        VAE(block_out_channels=(8,), norm_num_groups=4).enable_tiling(64)


def test_sides_without_arguments():
    # SD: the decoder's tile border reaches 50 pixels, so that 12.5 latents on either side of a quarter would do.
    with torch.device("meta"):
        sd = VAE(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
    assert (sd.encoder.reach, sd.decoder.reach) == (5, 50)
    sd.enable_tiling()
    assert sd.tiling == Tiling(64, 16)
    sd.enable_tiling(256)
    assert sd.tiling == Tiling(32, 13)
    sd.enable_tiling(128)
    assert sd.tiling == Tiling(16, 8)
