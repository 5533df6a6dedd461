"""From rows to batches: crops, flips, drops and captions, each by the image's own index."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm import rng
from tests import tiny
from tests.stand_in import Bucketed
from training.batches import (
    CachedRows,
    CachedTexts,
    LatentBatches,
    PictureBatches,
    Stream,
    _one_of,
    dropped,
    random_crop,
    to_bytes,
    to_unit,
    uniforms,
)

SIDE = 16


class Noise:
    """Pictures of random bytes, held as they are."""

    def __init__(self, total: int, side: int = SIDE):
        generator = torch.Generator().manual_seed(2)
        self.bytes = torch.randint(0, 256, (total, 3, side, side + 2), generator=generator, dtype=torch.uint8)
        self.captions = [tiny.CAPTIONS[i % len(tiny.CAPTIONS)] for i in range(total)]

    def __len__(self) -> int:
        return len(self.bytes)

    def pictures(self, indices: Sequence[int]) -> Tensor:
        return self.bytes[list(indices)]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_bytes_to_unit_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(every)
    assert unit.dtype == torch.float32
    assert (unit[0], unit[255]) == (-1, 1)
    assert unit[127].item() == pytest.approx(-unit[128].item(), abs=1e-7)
    assert to_bytes(unit).equal(every)
    assert to_bytes(unit.bfloat16()).equal(every)  # off by 2^-9 at most, where half a byte is 2^-8
    assert to_bytes(torch.tensor([-7.0, 7.0, 0.0039, -0.0039])).tolist() == [0, 255, 128, 127]


def test_random_crop_is_a_slice():
    pictures = Noise(50).pictures(range(50))  # 16 x 18
    u = torch.rand(50, 2)
    for size in (1, 5, 15, 16):
        cropped = random_crop(pictures, size, u)
        assert cropped.shape == (50, 3, size, size)
        for i in range(50):
            y, x = int(u[i, 0] * (16 - size + 1)), int(u[i, 1] * (18 - size + 1))
            assert cropped[i].equal(pictures[i, :, y : y + size, x : x + size])


def test_every_corner_is_drawn_and_none_outside():
    """At the ends of what the generator can give, for every room a picture may have."""
    low, high = 0.5 * 2**-23, 1 - 0.5 * 2**-23
    u = torch.tensor([[low, high], [high, low]])
    for side in range(4, 160):
        ramp = torch.arange(side).expand(2, 1, side, side)
        corners = random_crop(ramp, 3, u)[:, 0, 0, 0]  # the column of the corner
        assert corners.tolist() == [side - 3, 0]


def in_batches(rows: PictureBatches, pairs: list[tuple[int, int]], size: int) -> Tensor:
    parts = [rows.__getitems__(pairs[i : i + size])["pictures"] for i in range(0, len(pairs), size)]
    return torch.cat(parts)


def test_flips_and_crops_belong_to_the_image_index():
    """The same in every batch, another for another image of the same row, another for another seed."""
    noise = Noise(5)
    rows = PictureBatches(noise, 3, crop=8, flip=True)
    pairs = [(n, n % 5) for n in range(60)]
    whole = in_batches(rows, pairs, 60)
    assert whole.shape == (60, 3, 8, 8) and whole.dtype == torch.float32
    for size in (1, 7):
        assert in_batches(rows, pairs, size).equal(whole)
    assert in_batches(rows, pairs[::-1], 60).flip(0).equal(whole)
    assert not whole[0].equal(whole[5]) and len(torch.unique(whole[::5].flatten(1), dim=0)) > 6  # of one row
    other = in_batches(PictureBatches(noise, 4, crop=8, flip=True), pairs, 60)
    assert sum(a.equal(b) for a, b in zip(whole, other, strict=True)) < 10
    torch.rand(5)  # nothing is drawn from the global generator
    assert in_batches(rows, pairs, 60).equal(whole)


def test_flips_are_half_and_crops_are_even():
    """4000 images: 2000 ± 4 · 31.6 are mirrored; each of 9 · 11 corners comes 40.4 ± 4 · 6.3 times, or nearly."""
    ramp = torch.arange(16 * 18).reshape(1, 1, 16, 18).expand(1, 3, 16, 18).contiguous()

    class Ramp(Noise):
        def __init__(self):
            self.bytes, self.captions = ramp, [""]

    pairs = [(n, 0) for n in range(4000)]
    plain = PictureBatches(Ramp(), 0, crop=8).__getitems__(pairs)["pictures"]
    both = PictureBatches(Ramp(), 0, crop=8, flip=True).__getitems__(pairs)["pictures"]
    mirrored = (both != plain).flatten(1).any(1)
    assert both[mirrored].equal(plain[mirrored].flip(-1))
    assert abs(mirrored.sum().item() - 2000) < 4 * 31.7
    corner = ((plain[:, 0, 0, 0] + 1) * 127.5).round().long()
    counts = torch.bincount(corner)
    counts = counts[counts > 0]
    assert len(counts) == 9 * 11
    assert counts.min() > 40.4 - 5 * 6.4 and counts.max() < 40.4 + 5 * 6.4
    # the flip tells nothing about the crop: a quarter of each
    left = (corner % 18 < 5).float()
    chance = (mirrored.float() * left).mean() - mirrored.float().mean() * left.mean()
    assert chance.abs() < 4 * 0.25 / 4000**0.5


def test_a_batch_names_its_rows_and_ids():
    noise, ids = Noise(5), torch.arange(20).view(5, 4)
    batch = PictureBatches(noise, 0, ids=ids).__getitems__([(2**40, 3), (7, 0)])
    assert batch["index"].tolist() == [2**40, 7] and batch["row"].tolist() == [3, 0]
    assert batch["ids"].equal(ids[[3, 0]])
    assert batch["pictures"].equal(to_unit(noise.bytes[[3, 0]]))
    assert "ids" not in PictureBatches(noise, 0).__getitems__([(0, 0)])


# --- latents and text ------------------------------------------------------------------------------------------------


class Told:
    """In a store's place: every number tells where it is from."""

    def gather(self, slots: np.ndarray) -> dict[str, Tensor]:
        x = torch.from_numpy(slots).float()
        tokens = x[:, None, None] * torch.ones(1, 4, 5)
        moments = x[:, None, None, None] * torch.ones(1, 8, 2, 2)
        return {"moments": moments, "tokens": tokens, "pooled": tokens[:, 0, :3], "bias": tokens[:, :, 0]}


class ToldTexts(CachedTexts):
    def __call__(self, *args: Any) -> dict[str, Tensor]:
        return {k: v for k, v in super().__call__(*args).items() if k != "moments"}


NULL = 99


def latent_batches(total: int = 6, seed: int = 0, **how: Any) -> LatentBatches:
    """Row i's picture is i, or i + 1000 mirrored; its captions are 10 i, 10 i + 1."""
    slots = np.stack([np.arange(total), np.arange(total) + 1000], axis=1)
    rows, told = Bucketed(total), cast(Any, Told())
    starts = np.cumsum([0, *(len(x) for x in rows.texts)])
    captions = np.concatenate([10 * i + np.arange(len(x)) for i, x in enumerate(rows.texts)])
    texts = ToldTexts(told, captions, starts, NULL)
    return LatentBatches(rows, seed, latents=CachedRows(told, slots, "moments"), texts=texts, **how)


def test_latent_batches_are_the_rows():
    rows = latent_batches()
    batch = rows.__getitems__([(9, 2), (10, 0), (11, 1)])
    assert len(rows) == 6 and rows.bucket.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.keys() == {"index", "row", "moments", "tokens", "pooled", "bias"}
    assert batch["moments"][:, 0, 0, 0].tolist() == [2, 0, 1]
    assert batch["tokens"][:, 0, 0].tolist() == batch["pooled"][:, 0].tolist() == [20, 0, 10]
    assert batch["bias"].shape == (3, 4)
    assert batch["row"].tolist() == [2, 0, 1] and batch["index"].tolist() == [9, 10, 11]


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_dropped_captions(dropout: float):
    """Within four standard deviations of a binomial; each of them, pooled too, becomes the null prompt's."""
    rows = latent_batches(seed=1, dropout=dropout)
    n = 5000
    batch = rows.__getitems__([(i, i % 6) for i in range(n)])
    caption = batch["tokens"][:, 0, 0]
    drop = caption == NULL
    assert abs(drop.sum().item() - n * dropout) <= 4 * (n * dropout * (1 - dropout)) ** 0.5
    assert (caption[~drop] // 10).equal((torch.arange(n) % 6)[~drop].float())
    assert batch["pooled"][:, 0].equal(caption)
    assert batch["moments"][:, 0, 0, 0].equal((torch.arange(n) % 6).float())  # the pictures stay
    assert drop.equal(dropped(1, batch["index"], dropout))  # what the task drops that encodes them itself


def test_drops_flips_and_variants_belong_to_the_image_index():
    rows = latent_batches(seed=1, dropout=0.5, flip=True)
    pairs = [(2**33 + n, n % 6) for n in range(600)]
    whole = rows.__getitems__(pairs)
    single = [rows.__getitems__([pair]) for pair in pairs]
    for key, value in whole.items():
        assert torch.cat([s[key] for s in single]).equal(value)
    mirrored = whole["moments"][:, 0, 0, 0] >= 1000
    assert (whole["moments"][:, 0, 0, 0] % 1000).long().equal(whole["row"])
    drop = whole["tokens"][:, 0, 0] == NULL
    assert 600 * 0.5 - 49 < mirrored.sum() < 600 * 0.5 + 49  # four standard deviations of 12.2
    both = (mirrored & drop).sum()
    assert 150 - 43 < both < 150 + 43  # and the two are drawn apart: 10.6
    other = latent_batches(seed=2, dropout=0.5, flip=True).__getitems__(pairs)
    assert not other["tokens"].equal(whole["tokens"])


def test_each_of_a_rows_captions_comes_as_often():
    """6000 images of a row with two: 3000 ± 4 · 38.7. The draw is the caption's own, not the flip's."""
    rows = latent_batches(flip=True)
    batch = rows.__getitems__([(n, 3) for n in range(6000)])
    second = batch["tokens"][:, 0, 0] - 30
    assert set(second.tolist()) == {0, 1} and abs(second.sum().item() - 3000) < 155
    mirrored = (batch["moments"][:, 0, 0, 0] >= 1000).float()
    assert abs((second * mirrored).mean() - second.mean() * mirrored.mean()) < 4 * 0.25 / 6000**0.5
    other = latent_batches(seed=5).__getitems__([(n, 3) for n in range(6000)])
    assert not other["tokens"].equal(batch["tokens"])
    # at the end of what the generator gives, float32 would round up to the next row's caption
    high = np.array([1 - 0.5 * 2**-23], np.float32)
    assert all(_one_of(high, np.array([count])) == count - 1 for count in range(1, 2000))


def test_uniforms_are_those_of_rng():
    index = torch.tensor([0, 1, 77, 2**31, 2**40 + 5, 2**62])
    for seed in (0, 3, 2**62 + 12345):
        streams = (Stream.FLIP, Stream.CAPTION, Stream.VARIANT)
        for stream, u in zip(streams, uniforms(seed, index.numpy(), *streams), strict=True):
            assert torch.from_numpy(u).equal(rng.uniform(seed, index, (), stream))
    streams = [v for k, v in vars(Stream).items() if k.isupper()]
    assert sorted(streams) == list(range(len(streams)))


def test_live_batches_are_the_cached_ones_rows():
    """The same flips and the same captions, for the task to encode."""
    rows = Bucketed(9)
    live = LatentBatches(rows, 1, flip=True)
    pairs = [(n, 3 * (n % 3)) for n in range(40)]  # of the first bucket
    batch = live.__getitems__(pairs)
    assert batch.keys() == {"index", "row", "pictures", "captions"}
    cached = latent_batches(9, seed=1, flip=True).__getitems__(pairs)
    mirrored = cached["moments"][:, 0, 0, 0] >= 1000
    for i, (_, row) in enumerate(pairs):
        picture = to_unit(rows.bytes[row])
        assert batch["pictures"][i].equal(picture.flip(-1) if mirrored[i] else picture)
        assert batch["captions"][i] == rows.texts[row][int(cached["tokens"][i, 0, 0]) - 10 * row]
    assert len({(row, text) for (_, row), text in zip(pairs, batch["captions"], strict=True)}) == 1 + 2 + 3


def test_masks_and_sizes_go_with_the_picture():
    rows = Bucketed(9, masked=True)
    pairs = [(n, 1 + 3 * (n % 3)) for n in range(20)]
    batch = LatentBatches(rows, 1, factor=4, flip=True, sizes=True).__getitems__(pairs)
    assert batch["size_ids"].equal(rows.size_ids([row for _, row in pairs]))
    assert batch["mask"].shape == (20, 1, 2, 6)
    plain = LatentBatches(rows, 1, factor=4).__getitems__(pairs)
    mirrored = (batch["pictures"] != plain["pictures"]).flatten(1).any(1)
    assert 3 < mirrored.sum() < 17
    for i, (_, row) in enumerate(pairs):
        mask = rows.masks([row])
        mask = mask.flip(-1) if mirrored[i] else mask
        mean = torch.stack([mask[0, 0, y : y + 4, x : x + 4].mean() for y in (0, 4) for x in range(0, 24, 4)])
        torch.testing.assert_close(batch["mask"][i].flatten(), mean)
