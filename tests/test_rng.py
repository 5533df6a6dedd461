import math

import pytest
import torch

from ldm import rng
from ldm.rng import normal, philox, uniform

PI_DIGITS = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors for philox4x32-10
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (PI_DIGITS, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox([torch.tensor(c) for c in counter], key)
    assert " ".join(f"{w.item():08x}" for w in words) == expected


def test_the_words_reach_their_positions():
    """Counter 0, key 0 is seed 0, index 0, stream 0, positions 0 to 3."""
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], dtype=torch.float64)
    drawn = uniform(0, torch.tensor([0]), (2, 2)).flatten()
    assert torch.equal(drawn.double(), (torch.floor(words / 2**9) + 0.5) / 2**23)
    r, s = (torch.sqrt(-2 * torch.log((w + 0.5) / 2**32)) for w in (words[0], words[2]))
    a, b = (2 * math.pi * w / 2**32 for w in (words[1], words[3]))
    expected = torch.stack([r * a.cos(), r * a.sin(), s * b.cos(), s * b.sin()]).float()
    torch.testing.assert_close(normal(0, torch.tensor([0]), (4,))[0], expected, rtol=2e-7, atol=0)  # one bit of float32


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_row_does_not_know_its_batch(draw):
    index = torch.tensor([0, 5, 2**31 - 1, 2**32, 2**32 + 5, 2**53, 5])
    batch = draw(2**63 - 1, index, (3, 7, 5), stream=2)
    assert batch.shape == (7, 3, 7, 5) and batch.dtype == torch.float32
    for i, row in zip(index, batch, strict=True):
        assert torch.equal(draw(2**63 - 1, i[None], (3, 7, 5), stream=2)[0], row)
    assert torch.equal(draw(2**63 - 1, index.flip(0), (3, 7, 5), stream=2), batch.flip(0))
    assert torch.equal(batch[1], batch[6])
    assert len(torch.unique(batch.flatten(1), dim=0)) == 6
    # A longer row begins with the shorter one.
    assert torch.equal(draw(2**63 - 1, index, (200,), stream=2)[:, :105], batch.flatten(1))


def test_threads_change_nothing():
    threads = torch.get_num_threads()
    try:
        draws = []
        for n in (1, 3):
            torch.set_num_threads(n)
            draws.append(normal(11, torch.arange(40), (4, 33, 33)))  # past the size at which torch splits its loops
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*draws)


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("other", [{"seed": 8}, {"seed": 7 + 2**32}, {"stream": 1}, {"index": 1}, {"index": 2**32}])
def test_seed_stream_and_index_are_independent(draw, other):
    def values(seed=7, stream=0, index=0):
        return draw(seed, torch.tensor([index]), (20_000,), stream)[0].double()

    x, y = values(), values(**other)
    assert (x == y).sum() < 10  # by chance: 20,000 pairs of 2^23 values
    correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(20_000)  # five standard errors


def test_uniform_law():
    u = uniform(0, torch.arange(400), (1000,)).flatten().double()
    assert u.min() > 0 and u.max() < 1
    n = len(u)
    # Kolmogorov-Smirnov: P(D > 1.95 / sqrt n) = 0.001; the draw is fixed, so this passes always or never.
    assert _ks(u) < 1.95 / math.sqrt(n)
    assert abs(u.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)


def test_extreme_words(monkeypatch):
    """Float32 tells the ends of the uniform law from 0 and 1, and the normal law stays finite there."""
    words = torch.tensor([[0, 0xFFFFFFFF]])
    monkeypatch.setattr(rng, "_words", lambda *_: (words,) * 4)
    index = torch.tensor([0])
    assert uniform(0, index, (8,)).unique().tolist() == [2**-24, 1 - 2**-24]
    assert normal(0, index, (8,)).abs().max().item() == pytest.approx(math.sqrt(2 * 33 * math.log(2)), rel=1e-6)
    assert normal(0, index, (8,)).isfinite().all()


def test_normal_law():
    z = normal(1, torch.arange(400), (4, 250)).double()
    n = z.numel()
    assert _ks(torch.special.ndtr(z.flatten())) < 1.95 / math.sqrt(n)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # Var z^p = E z^2p - (E z^p)^2
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(spread / n)
    # Neighbours come from one pair of words: their squares must be uncorrelated as well.
    for f in (torch.square, lambda x: x):
        neighbours = f(z.flatten(1))
        pairs = torch.corrcoef(torch.stack([neighbours[:, :-1].flatten(), neighbours[:, 1:].flatten()]))[0, 1]
        assert abs(pairs) < 4 / math.sqrt(n)
    assert 4.2 < z.abs().max() < 6.8  # of 400,000 values; 2^-33 is the smallest u


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3)])
def test_shapes(shape):
    assert uniform(0, torch.arange(3), shape).shape == (3, *shape)
    assert normal(0, torch.arange(0), shape).shape == (0, *shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
        ({"stream": 2**32}, "stream="),
        ({"index": torch.tensor([1.0])}, "torch.int64, got"),
        ({"index": torch.tensor(1)}, r"\(B,\)"),
        ({"shape": (2, -1)}, "negative"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        uniform(**{"seed": 0, "index": torch.arange(2), "shape": (2,)} | arguments)


def _ks(u: torch.Tensor) -> float:
    """Kolmogorov's distance of a sample from the uniform law on (0, 1)."""
    steps = torch.arange(len(u) + 1, dtype=torch.float64) / len(u)
    u = u.sort().values
    return max((u - steps[:-1]).max().item(), (steps[1:] - u).max().item())
