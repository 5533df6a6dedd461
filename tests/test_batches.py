"""From rows to batches, and the cache of what the encoders made of them."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.models.text import TextEncoder
from ldm.models.vae import VAE
from tests import tiny
from training import cache
from training.batches import Encoded, LatentBatches, PictureBatches, random_crop, to_bytes, to_unit
from training.cache import encode, weights_hash
from training.data import Rows, open_rows

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


# --- latents ---------------------------------------------------------------------------------------------------------


def encoded(total: int = 6, captions: int = 3) -> Encoded:
    """Every number tells where it is from; the last caption is the empty one."""
    moments = np.arange(2 * total, dtype=np.float32)[:, None, None, None] * np.ones((1, 8, 2, 2), np.float32)
    tokens = np.arange(captions + 1, dtype=np.float32)[:, None, None] * np.ones((1, 4, 5), np.float32)
    return Encoded(moments, tokens, np.arange(total) % captions, pooled=tokens[:, 0, :3], bias=tokens[:, :, 0])


def test_latent_batches_are_the_rows():
    rows = LatentBatches(encoded(), 0)
    batch = rows.__getitems__([(9, 5), (10, 0), (11, 4)])
    assert len(rows) == 6
    assert batch["moments"][:, 0, 0, 0].tolist() == [5, 0, 4]
    assert batch["tokens"][:, 0, 0].tolist() == batch["pooled"][:, 0].tolist() == [2, 0, 1]
    assert batch["bias"].shape == (3, 4)
    assert batch["row"].tolist() == [5, 0, 4] and batch["index"].tolist() == [9, 10, 11]
    bare = LatentBatches(encoded()._replace(pooled=None, bias=None), 0).__getitems__([(0, 0)])
    assert bare.keys() == {"index", "row", "moments", "tokens"}


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_dropped_captions(dropout: float):
    """Within four standard deviations of a binomial; each of them, pooled too, becomes the empty caption's."""
    rows = LatentBatches(encoded(), 1, dropout=dropout)
    n = 5000
    batch = rows.__getitems__([(i, i % 6) for i in range(n)])
    caption = batch["tokens"][:, 0, 0]
    dropped = caption == 3
    assert abs(dropped.sum().item() - n * dropout) <= 4 * (n * dropout * (1 - dropout)) ** 0.5
    kept = torch.arange(n) % 6 % 3
    assert caption[~dropped].equal(kept[~dropped].float())
    assert batch["pooled"][:, 0].equal(caption)
    assert batch["moments"][:, 0, 0, 0].equal((torch.arange(n) % 6).float())  # the pictures stay


def test_drops_and_flips_belong_to_the_image_index():
    rows = LatentBatches(encoded(), 1, dropout=0.5, flip=True)
    pairs = [(n, n % 6) for n in range(600)]
    whole = rows.__getitems__(pairs)
    single = [rows.__getitems__([pair]) for pair in pairs]
    for key, value in whole.items():
        assert torch.cat([s[key] for s in single]).equal(value)
    mirrored = whole["moments"][:, 0, 0, 0] >= 6
    assert (whole["moments"][:, 0, 0, 0] % 6).long().equal(whole["row"])
    dropped = whole["tokens"][:, 0, 0] == 3
    assert 600 * 0.5 - 49 < mirrored.sum() < 600 * 0.5 + 49  # four standard deviations of 12.2
    both = (mirrored & dropped).sum()
    assert 150 - 43 < both < 150 + 43  # and the two are drawn apart: 10.6
    other = LatentBatches(encoded(), 2, dropout=0.5, flip=True).__getitems__(pairs)
    assert not other["tokens"].equal(whole["tokens"])


# --- the cache -------------------------------------------------------------------------------------------------------

CAPTIONS = ["a red apple", "", "zebra", "a red apple", "hot dog", "a cat's face"]


def folder_of(place: Path, captions: list[str] = CAPTIONS, seed: int = 0) -> Path:
    """An imagefolder with pictures of random bytes."""
    place.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    lines = []
    for i, caption in enumerate(captions):
        name = f"{i:02}.png"
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(place / name)
        lines.append(json.dumps({"file_name": name, "text": caption or "x"}) + "\n")
    (place / "metadata.jsonl").write_text("".join(lines))
    return place


def opened(place: Path) -> Rows:
    return open_rows(place, resolution=SIDE, split="train", held_out=0.01)


@pytest.fixture(scope="module")
def vae() -> VAE:
    return tiny.vae()


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return tiny.text()


class Plain(Noise):
    """Square pictures; one caption is empty, one comes twice."""

    def __init__(self):
        super().__init__(len(CAPTIONS), SIDE)
        self.bytes, self.captions = self.bytes[..., :SIDE], CAPTIONS


@pytest.mark.parametrize("family", ["sd", "sd3", "pixart"])
@pytest.mark.parametrize("flip", [False, True])
def test_the_cache_holds_what_the_encoders_give(family: str, flip: bool, vae: VAE, tmp_path: Path):
    """In batches of 4 as against one by one: sums in another order, 1e-5 of numbers near 1."""
    rows, text, n = Plain(), tiny.text(family), len(CAPTIONS)
    found = encode(rows, "x", vae, text, tmp_path, flip=flip, batch=4)
    assert found.moments.shape == (n * (1 + flip), 8, 8, 8)
    assert len(found.tokens) == 5  # distinct ones, the empty one last
    assert (found.bias is None) == (family == "sd")
    with torch.no_grad():
        for i in range(n * (1 + flip)):
            picture = to_unit(rows.pictures([i % n]))
            moments = vae.encode(picture.flip(-1) if i >= n else picture)
            expected = torch.cat([moments.mean, moments.log_var], 1)[0]
            torch.testing.assert_close(torch.from_numpy(found.moments[i].copy()), expected, rtol=1e-5, atol=1e-5)
        null = text.null()
        torch.testing.assert_close(torch.from_numpy(found.tokens[-1:].copy()), null.tokens, rtol=1e-5, atol=1e-5)
    # through the batches, as the task gets them
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of arrays that torch may not write to
        batch = LatentBatches(found, 0).__getitems__([(i, i) for i in range(n)])
    with torch.no_grad():
        for i, caption in enumerate(CAPTIONS):
            cond = text.encode([caption])
            torch.testing.assert_close(batch["tokens"][i : i + 1], cond.tokens, rtol=1e-5, atol=1e-5)
            if cond.pooled is not None:
                torch.testing.assert_close(batch["pooled"][i : i + 1], cond.pooled, rtol=1e-5, atol=1e-5)
            if cond.bias is not None:
                assert batch["bias"][i : i + 1].equal(cond.bias)
    assert ("pooled" in batch, "bias" in batch) == (null.pooled is not None, null.bias is not None)
    dropped = LatentBatches(found, 0, dropout=1.0).__getitems__([(0, 0)])
    torch.testing.assert_close(dropped["tokens"], null.tokens, rtol=1e-5, atol=1e-5)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which encoder was asked, in order."""
    asked: list[str] = []
    for kind, method in ((VAE, "encode"), (TextEncoder, "encode")):
        plain: Any = getattr(kind, method)

        def counted(self, *args, plain=plain, name=kind.__name__, **kw):
            asked.append(name)
            return plain(self, *args, **kw)

        monkeypatch.setattr(kind, method, counted)
    return asked


def test_what_is_there_is_not_encoded_again(calls: list[str], vae: VAE, text: TextEncoder, tmp_path: Path):
    first = encode(Plain(), "x", vae, text, tmp_path, batch=4)
    assert calls.count("VAE") == 2 and calls.count("TextEncoder") >= 1
    calls.clear()
    again = encode(Plain(), "x", tiny.vae(), tiny.text(), tmp_path, batch=3)  # equal parts, built anew
    assert calls == []
    assert again.moments.tobytes() == first.moments.tobytes() and again.tokens.tobytes() == first.tokens.tobytes()
    assert len(list(tmp_path.iterdir())) == 1


def nudged(module: nn.Module) -> nn.Module:
    """One weight, by one unit in its last place."""
    weight = next(module.parameters()).view(-1)[:1]
    with torch.no_grad():
        weight.copy_(torch.nextafter(weight, torch.tensor([9.0])))
    return module


def test_any_change_is_another_key(calls: list[str], tmp_path: Path, vae: VAE, text: TextEncoder):
    """Caption, picture, autoencoder, text encoder, family, mirrored or not."""
    root = tmp_path / "cache"
    plain = opened(folder_of(tmp_path / "a"))
    caption = opened(folder_of(tmp_path / "b", [*CAPTIONS[:-1], "a dog's face"]))
    picture = opened(folder_of(tmp_path / "c", seed=1))
    other_vae, other_text = nudged(tiny.vae()), tiny.text()
    nudged(other_text.model)
    for n, (rows, v, t, flip) in enumerate(
        [
            (plain, vae, text, False),
            (caption, vae, text, False),
            (picture, vae, text, False),
            (plain, other_vae, text, False),
            (plain, vae, other_text, False),
            (plain, vae, tiny.text("sd3"), False),
            (plain, vae, text, True),
        ]
    ):
        calls.clear()
        encode(rows, rows.fingerprint, v, t, root, flip=flip)
        assert "VAE" in calls, n
        assert len(list(root.iterdir())) == n + 1
    calls.clear()
    again = opened(folder_of(tmp_path / "elsewhere" / "a"))  # the same content in another place
    encode(again, again.fingerprint, vae, text, root)
    assert calls == []


def test_weights_hash_sees_names_shapes_and_kinds():
    one = nn.Linear(2, 3, bias=False)
    base = weights_hash(one)
    assert base == weights_hash(one)
    turned = nn.Linear(3, 2, bias=False)
    named = nn.ParameterDict({"other": one.weight})
    half = nn.Linear(2, 3, bias=False).bfloat16()
    with torch.no_grad():
        turned.weight.copy_(one.weight.reshape(2, 3))
        half.weight.copy_(one.weight)
    assert len({base, weights_hash(turned), weights_hash(named), weights_hash(half), weights_hash(one, one)}) == 5


@pytest.mark.parametrize("where", ["_encode_pictures", "_encode_captions", "replace_folder"])
def test_a_cache_that_was_cut_short_is_made_anew(
    where: str, calls: list[str], vae: VAE, text: TextEncoder, tmp_path: Path, monkeypatch
):
    """Stopped in the midst, as a kill would: what is there by then must not be taken for a cache."""
    plain = getattr(cache, where)

    def cut(*args, **kw):
        if where == "_encode_captions":
            np.save(args[0] / "tokens.npy", np.zeros(3))
        elif where == "_encode_pictures":
            Path(args[0]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, where, cut)
    with pytest.raises(KeyboardInterrupt):
        encode(Plain(), "x", vae, text, tmp_path)
    monkeypatch.setattr(cache, where, plain)
    assert all(p.name.endswith(".partial") for p in tmp_path.iterdir())
    calls.clear()
    found = encode(Plain(), "x", vae, text, tmp_path)
    assert "VAE" in calls
    assert found.moments.shape[0] == len(CAPTIONS) and found.tokens.shape == (5, tiny.LENGTH, tiny.WIDTH)
    assert [p.name.endswith(".partial") for p in tmp_path.iterdir()] == [False]


def test_long_captions_are_counted(vae: VAE, text: TextEncoder, tmp_path: Path, caplog):
    rows = Plain()
    rows.captions = ["a " * 40, *CAPTIONS[1:]]
    encode(rows, "x", vae, text, tmp_path)
    assert f"1 captions have more than {tiny.LENGTH} tokens; their ends are cut" in caplog.text
