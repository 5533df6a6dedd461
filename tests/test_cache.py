"""What the encoders gave is what the cache holds; what is there is not made again, and what changed is."""

from __future__ import annotations

import copy
import os
import signal
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.models.text import TextEncoder
from ldm.models.vae import VAE
from tests import families, tiny
from tests.stand_in import CAPTIONS, SHAPES, Bucketed, Given, all_of, forked, made, text_of
from tests.test_cache_keys import nudged
from training import cache
from training.batches import to_unit
from training.encoders import encode_captions, pieces
from training.fit import ConfigError
from training.schema import Data
from training.store import Store
from training.tables import DataError

CLOSE: dict[str, float] = {"rtol": 1e-6, "atol": 1e-6}  # numbers near 1, summed in a batch of another size


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many rows each encoder was asked for, call by call."""
    asked: dict[str, list[int]] = {"pictures": [], "texts": []}
    vae, text, null = VAE.encode, TextEncoder.encode, TextEncoder.null

    def encode_pictures(self: VAE, x: Tensor) -> Any:
        asked["pictures"].append(len(x))
        return vae(self, x)

    def encode_texts(self: TextEncoder, prompts: Any, *args: Any, **kw: Any) -> Any:
        asked["texts"].append(len(prompts))
        return text(self, prompts, *args, **kw)

    monkeypatch.setattr(VAE, "encode", encode_pictures)
    monkeypatch.setattr(TextEncoder, "encode", encode_texts)
    monkeypatch.setattr(TextEncoder, "null", null)
    return asked


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.PIPELINES)
def test_texts_are_what_the_encoders_give(name: str, tmp_path: Path):
    """Each row's captions and the null prompt, T5's tokens, pooled and bias as each family has them."""
    rows, text = Bucketed(9), text_of(name)
    caches, counts = made(tmp_path, rows, Given(text=text), latents=False)
    assert caches.latents is None and counts["texts_made"] == len(CAPTIONS) + 1 and counts["pictures_made"] == 0
    texts = caches.texts
    assert texts is not None
    with torch.no_grad():
        for i, captions in enumerate(rows.texts):
            for k, caption in enumerate(captions):
                assert_cond(texts(np.array([i]), np.array([k])), text.encode([caption]))
        assert_cond(texts(np.array([3]), np.array([1]), np.array([True])), text.null())
        both = texts(np.array([3, 4]), np.array([1, 0]), np.array([False, True]))
        assert_cond({k: x[:1] for k, x in both.items()}, text.encode([rows.texts[3][1]]))
        assert_cond({k: x[1:] for k, x in both.items()}, text.null())
    zeros = not text.null().tokens.any()
    assert zeros == (name in ("sdxl", "sdxl second alone"))


def assert_cond(found: dict[str, Tensor], cond: Any) -> None:
    assert found.keys() == {k for k in ("tokens", "pooled", "bias") if getattr(cond, k) is not None}
    for key, x in found.items():
        torch.testing.assert_close(x, getattr(cond, key), **CLOSE)


@pytest.mark.parametrize("flip", [False, True])
def test_moments_are_what_the_autoencoder_gives(flip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In buckets of three shapes, in several shards, and mirrored."""
    monkeypatch.setattr(cache, "ROWS", 4)
    monkeypatch.setattr(cache, "BATCH", 3)
    monkeypatch.setattr(Store, "join", lambda *_: None)
    rows, vae = Bucketed(14), tiny.vae()
    caches, counts = made(tmp_path, rows, Given(vae), flip=flip)
    assert counts["pictures_made"] == 14 * (1 + flip) and counts["pictures_taken_up"] == 0
    assert len(list(tmp_path.glob("pictures-*/*"))) == (8 if flip else 5)  # of 5, 5 and 4 rows, or twice as many
    latents = caches.latents
    assert latents is not None
    with torch.no_grad():
        for i in range(14):
            for side in range(1 + flip):
                picture = to_unit(rows.pictures([i]))
                moments = vae.encode(picture.flip(-1) if side else picture)
                expected = torch.cat([moments.mean, moments.log_var], dim=1)
                assert expected.shape[2:] == tuple(x // 2 for x in SHAPES[i % 3])
                torch.testing.assert_close(latents(np.array([i]), side), expected, rtol=1e-6, atol=3e-6)
        if flip:
            sides = np.array([0, 1, 1, 0])
            together = latents(np.array([1, 4, 1, 7]), sides)
            for i, row in enumerate((1, 4, 1, 7)):
                assert together[i].equal(latents(np.array([row]), int(sides[i]))[0])


@pytest.mark.parametrize(("precision", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_the_rounded_number_in_half_the_room(precision: str, kind: torch.dtype, tmp_path: Path):
    rows, encoders = Bucketed(6), Given(text=tiny.text("sd3"))
    full, sizes = made(tmp_path / "a", rows, encoders)
    half, halves = made(tmp_path / "b", rows, encoders, precision=precision)
    at = np.array([0, 3])
    for one, other in ((full.latents, half.latents),):
        assert one and other
        assert other(at).dtype == kind and other(at).equal(one(at).to(kind))
    assert full.texts and half.texts
    a, b = (x.texts(at, np.array([0, 1]), np.array([False, True])) for x in (full, half))  # type: ignore[misc]
    assert b["tokens"].equal(a["tokens"].to(kind)) and b["pooled"].equal(a["pooled"].to(kind))
    assert b["bias"].dtype == torch.float32 and b["bias"].equal(a["bias"])  # log 256 must go on counting 256 tokens

    def values(folder: Path) -> int:
        files = [x for x in folder.rglob("*.npy") if x.stem not in ("keys", "sums", "bias")]
        return sum(np.load(x).nbytes for x in files)

    assert values(tmp_path / "b") * 2 == values(tmp_path / "a") and halves["bytes"] < sizes["bytes"]


def test_a_number_too_large_for_float16_is_refused(tmp_path: Path):
    vae = tiny.vae()
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1e6)
    with pytest.raises(DataError, match=r"cache\.precision fp16: a picture's latents .*65504; take bf16 or fp32"):
        made(tmp_path, Bucketed(3), Given(vae), precision="fp16")
    made(tmp_path, Bucketed(3), Given(vae), precision="bf16")


def test_masks_are_kept_at_the_latents_size(tmp_path: Path, calls: dict[str, list[int]]):
    rows = Bucketed(6, masked=True)
    caches, _ = made(tmp_path, rows)
    assert caches.masks
    for i in range(6):
        mask = rows.masks([i])
        h, w = (x // 2 for x in mask.shape[2:])
        assert caches.masks(np.array([i])).equal(mask.reshape(1, 1, h, 2, w, 2).mean((3, 5)))
    assert made(tmp_path, Bucketed(6))[0].masks is None
    calls["pictures"].clear()
    caches, _ = made(tmp_path, Bucketed(6, masked=True))
    assert calls["pictures"] == [] and caches.masks


def test_long_captions_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = Bucketed(6)
    rows.texts[2:4] = [("a " * 40,), ("b " * 40, "zebra", "a " * 40)]
    made(tmp_path, rows)
    assert f"2 captions have more than {tiny.LENGTH} tokens; the excess is cut" in caplog.text


LONG = "a red apple and a green apple and a zebra and a hot dog and a car"


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3 without t5", "sd3"])
def test_long_captions_in_pieces(name: str, tmp_path: Path, calls: dict[str, list[int]]):
    """Each piece is read by itself; a shorter caption is told apart by a bias that hides what it lacks."""
    rows, text = Bucketed(6), text_of(name)
    rows.texts[1], rows.texts[4] = (LONG,), ("zebra", LONG + " zebra apple tree")
    caches, _ = made(tmp_path, rows, Given(text=text), latents=False, long_captions="chunk")
    read = pieces(text, [LONG, "zebra", LONG + " zebra apple tree"], "chunk")
    assert len(read[0]) >= 2 and read[1] == ["zebra"] and len(read[2]) > len(read[0])
    assert " ".join(read[2]) == LONG + " zebra apple tree"
    at, caption, drop = np.array([1, 4, 4, 1]), np.array([0, 0, 1, 0]), np.array([False, False, False, True])
    assert caches.texts
    found = caches.texts(at, caption, drop)
    with torch.no_grad():
        null, alone = text.null(), text.encode(["zebra"])
        live = encode_captions(
            text, [LONG, "zebra", LONG + " zebra apple tree", LONG], "chunk", null, torch.tensor(drop)
        )
        n, most = text.max_length, len(read[2])
        for i, parts in enumerate(read):
            one = text.encode(parts, None, [" ".join(parts)] * len(parts))  # T5 reads the whole
            torch.testing.assert_close(found["tokens"][i, : n * len(parts)], one.tokens[:, :n].flatten(0, 1), **CLOSE)
            torch.testing.assert_close(found["tokens"][i, n * most :], one.tokens[0, n:], **CLOSE)
            if one.pooled is not None:
                torch.testing.assert_close(found["pooled"][i], one.pooled[0], **CLOSE)
            own = torch.zeros(one.tokens.shape[1]) if one.bias is None else one.bias[0]
            hidden = torch.full((n * (most - len(parts)),), -torch.inf)
            assert found["bias"][i].equal(torch.cat([*[own[:n]] * len(parts), hidden, own[n:]]))
    torch.testing.assert_close(found["tokens"][3, :n], null.tokens[0, :n], **CLOSE)
    torch.testing.assert_close(found["tokens"][3, n * most :], null.tokens[0, n:], **CLOSE)
    assert (found["bias"][3, n : n * most] == -torch.inf).all()
    for key, x in found.items():
        torch.testing.assert_close(getattr(live, key), x, **CLOSE)
    short = caches.texts(at[1:2], caption[1:2])  # in a batch of short ones nothing is added
    torch.testing.assert_close(short["tokens"], alone.tokens, **CLOSE)
    assert ("bias" in short) == (alone.bias is not None)
    calls["texts"].clear()
    made(tmp_path, rows, Given(text=text), latents=False, long_captions="chunk")
    assert calls["texts"] == []


def test_long_captions_are_refused(tmp_path: Path):
    rows = Bucketed(6)
    made(tmp_path / "a", rows, long_captions="refuse")
    rows.texts[5] = ("zebra", LONG)
    for how in ({}, {"text": False}):
        with pytest.raises(DataError, match="1 of 9 captions has more than 12 tokens"):
            made(tmp_path / "b", rows, long_captions="refuse", **how)
    assert not (tmp_path / "b").exists()
    text = tiny.text()
    with pytest.raises(DataError, match="1 of 2 captions"):
        encode_captions(text, ["zebra", LONG], "refuse", text.null(), torch.zeros(2, dtype=torch.bool))


def test_captions_that_change_each_time_are_not_cached(tmp_path: Path):
    rows = Bucketed(6)
    rows.data = Data(path="unused", shuffle_tags=True)
    with pytest.raises(ConfigError, match=r"data\.shuffle_tags .* set cache\.text: false"):
        made(tmp_path, rows)
    assert not list(tmp_path.iterdir())
    assert made(tmp_path, rows, text=False)[0].texts is None


# --- what is made again ----------------------------------------------------------------------------------------------


def test_what_is_there_is_not_encoded_again(calls: dict[str, list[int]], tmp_path: Path):
    rows = Bucketed(14)
    rows.bytes[3] = rows.bytes[0]  # the same picture twice is one
    first, counts = made(tmp_path, rows)
    assert sum(calls["pictures"]) == 13 == counts["pictures_made"]
    assert sum(calls["texts"]) == len(CAPTIONS) + 1 == counts["texts_made"]  # each once, and the null prompt
    before = all_of(first, rows)
    for x in calls.values():
        x.clear()
    again, counts = made(tmp_path, rows)  # equal parts, built anew
    assert calls == {"pictures": [], "texts": []}
    assert counts == {
        "pictures_made": 0, "pictures_taken_up": 13, "texts_made": 0, "texts_taken_up": 6, "bytes": counts["bytes"],
    }  # fmt: skip
    assert all_of(again, rows) == before
    fewer = copy.deepcopy(rows)
    order = [6, 2, 9, 1]
    fewer.bytes, fewer.texts = [rows.bytes[i] for i in order], [rows.texts[i] for i in order]
    fewer.bucket = rows.bucket[order]
    found, _ = made(tmp_path, fewer)
    assert calls == {"pictures": [], "texts": []} and found.latents and first.latents
    assert found.latents(np.array([1])).equal(first.latents(np.array([2])))


def test_one_change_makes_anew_what_depends_on_it_and_nothing_else(calls: dict[str, list[int]], tmp_path: Path):
    def asked(rows: Bucketed, vae: VAE | None = None, text: TextEncoder | None = None, **how: Any) -> tuple[int, int]:
        for x in calls.values():
            x.clear()
        made(tmp_path, rows, Given(vae, text), **how)
        return sum(calls["pictures"]), sum(calls["texts"])

    rows = Bucketed(14)
    everything = (14, len(CAPTIONS) + 1)
    assert asked(rows) == everything
    rows.bytes[5][0, 0, 0] ^= 1
    assert asked(rows) == (1, 0)
    rows.texts[7] = ("a dog's face", *rows.texts[7][1:])
    assert asked(rows) == (0, 1)
    rows.texts[8] = (*rows.texts[8], "a red car", "green salad")
    assert asked(rows) == (0, 2)
    assert asked(rows, flip=True) == (14, 0)
    assert asked(rows, precision="bf16") == (14, everything[1] + 3)
    other: Any = nudged(tiny.vae(), "quant_conv.bias")
    assert asked(rows, other) == (14, 0)
    decoder: Any = nudged(tiny.vae(), "decoder.conv_in.bias")  # makes no latents
    assert asked(rows, decoder) == (0, 0)
    text = tiny.text()
    nudged(text.model, next(n for n, _ in text.model.named_parameters()))
    assert asked(rows, None, text) == (0, everything[1] + 3)
    assert asked(rows) == (0, 0)  # and what was there before is there still


def test_prune_drops_what_is_no_longer_used(calls: dict[str, list[int]], tmp_path: Path):
    rows = Bucketed(14)
    made(tmp_path, rows, flip=True)
    full, counts = made(tmp_path, Bucketed(5))
    assert counts["pictures_taken_up"] == 5
    pruned, after = made(tmp_path, Bucketed(5), prune=True)
    assert after["bytes"] < counts["bytes"] and len(Store(next(tmp_path.glob("pictures-*"))).keys()) == 5
    assert all_of(pruned, Bucketed(5)) == all_of(full, Bucketed(5))
    calls["pictures"].clear()
    made(tmp_path, rows)
    assert sum(calls["pictures"]) == 9


# --- killed ----------------------------------------------------------------------------------------------------------


def until_killed(place: str, root: Path, pipe: Connection) -> None:
    """Make a cache, but in the third shard say so and wait, while it is encoded or half written."""
    seen: list[int] = []
    owner, name, when = (VAE, "encode", 5) if place == "encode" else (os, "fsync", 8)
    plain = getattr(owner, name)

    def stall(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == when:
            pipe.send("now")
            time.sleep(60)
        return plain(*args)

    setattr(owner, name, stall)
    made(root, Bucketed(40), flip=True)


@pytest.mark.parametrize("place", ["encode", "write"])
def test_killed_and_gone_on_it_is_the_same_to_the_bit(
    place: str, calls: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """SIGKILL while the third shard is encoded, or half written; only the rest is made then."""
    monkeypatch.setattr(cache, "ROWS", 4)
    monkeypatch.setattr(cache, "BATCH", 3)
    rows = Bucketed(40)
    whole = all_of(made(tmp_path / "whole", rows, flip=True)[0], rows, 2)
    assert sum(calls["pictures"]) == 80
    child, pipe = forked(partial(until_killed, place, tmp_path / "killed"))
    assert pipe.poll(60) and pipe.recv() == "now"
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (folder,) = (tmp_path / "killed").glob("pictures-*")
    done = len(Store(folder).keys())
    halves = len(list(folder.glob(".*")))
    assert (done, halves) == (8, int(place == "write"))
    calls["pictures"].clear()
    caches, counts = made(tmp_path / "killed", rows, flip=True)
    assert sum(calls["pictures"]) == counts["pictures_made"] == 80 - done
    assert all_of(caches, rows, 2) == whole
    assert list(folder.glob(".*")) == []
