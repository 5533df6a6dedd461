"""All that decides what an encoder gives is in the key of what is kept; nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.stand_in import Bucketed, Given, made, text_of
from training.encoders import text_hash, vae_hash, weights_hash
from training.store import Store


def nudged(module: nn.Module, name: str) -> nn.Module:
    """One weight, by one unit in its last place."""
    weight = dict(module.named_parameters())[name].view(-1)[:1]
    with torch.no_grad():
        weight.copy_(torch.nextafter(weight, torch.tensor([9.0])))
    return module


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart alpha"])
def test_all_that_decides_an_embedding_is_in_its_key(name: str):
    """Each encoder's weights, words and lengths; not what its tokenizer was last asked."""
    base, seen = text_of(name), set()
    base.encode(["a red apple"])
    seen.add(text_hash(base))
    base.encode(["zebra", ""], max_sequence_length=13)
    assert text_hash(base) in seen and text_hash(text_of(name)) in seen
    for tower in base.towers():
        changed = text_of(name)
        model = changed.towers()[tower][1]
        nudged(model, [n for n, _ in model.named_parameters()][-1])
        assert text_hash(changed) not in seen
        seen.add(text_hash(changed))
        changed = text_of(name)
        changed.tokenizer = copy.deepcopy(changed.tokenizer)
        words = changed.tokenizer
        words.add_special_tokens({"pad_token": "<pad2>" if name.startswith("pixart") else "a"})
        assert text_hash(changed) not in seen
    for key, value in (("max_sequence_length", 21), ("zeros_for_empty", False), ("family", "sd"), ("width", 7)):
        changed = text_of(name)
        setattr(changed, key, value)
        assert text_hash(changed) not in seen
        seen.add(text_hash(changed))
    longer = text_of(name)
    longer.tokenizer = copy.deepcopy(longer.tokenizer)
    longer.tokenizer.model_max_length = 9
    assert text_hash(longer) not in seen


def test_all_that_decides_the_moments_is_in_their_key():
    """Groups of the norms are in no weight; the scale is applied later."""
    base = vae_hash(tiny.vae())
    assert base == vae_hash(tiny.vae(scaling_factor=0.3, shift_factor=0.1))
    assert base != vae_hash(tiny.vae(norm_num_groups=2))
    assert base != vae_hash(tiny.vae().half())


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


class Masked(Bucketed):
    """Whose masks are told apart from its pictures."""

    def __init__(self, total: int = 12):
        super().__init__(total, masked=True)
        self.weights = {i: (self.bytes[i][:1] > 100).float() for i in range(total)}
        self.asked: list[int] = []

    def masks(self, indices: Sequence[int]) -> Tensor:
        self.asked += indices
        return torch.stack([self.weights[i] for i in indices])


def test_a_changed_mask_is_made_anew_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever it stands and whatever else the data set holds; equal masks are kept once."""
    wrote: list[tuple[str, int]] = []
    plain = Store.write

    def write(self: Store, keys: np.ndarray, named: Mapping[str, np.ndarray]) -> None:
        wrote.append((self.folder.name.partition("-")[0], len(keys)))
        plain(self, keys, named)

    monkeypatch.setattr(Store, "write", write)

    def check(rows: Masked, expected: list[tuple[str, int]]) -> None:
        wrote.clear()
        caches, _ = made(tmp_path, rows, Given())
        assert wrote == expected and caches.masks is not None
        for i in range(len(rows)):
            mask = rows.weights[i]
            h, w = (x // 2 for x in mask.shape[1:])
            assert caches.masks(np.array([i])).equal(mask.reshape(1, 1, h, 2, w, 2).mean((3, 5)))

    rows = Masked()
    check(rows, [*[("pictures", 4)] * 3, *[("masks", 4)] * 3, ("texts", 6)])
    check(Masked(), [])
    rows.weights[4] = 1 - rows.weights[4]
    check(rows, [("masks", 1)])
    rows.weights[7] = rows.weights[4].clone()  # of the same bucket
    check(rows, [])
    rows.texts[3] = ("another caption",)  # it was a part of the data set's fingerprint, and so of every mask's key
    check(rows, [("texts", 1)])
