"""The averages of the weights against their closed forms, and their snapshots."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from training import ema as module
from training.ema import EMA
from training.posthoc import sigma_rel_to_gamma
from training.schema.optim import EMA as EMAConfig


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 3))


def one_weight(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def move(parameter: nn.Parameter, where: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(where)


def tracked(**options) -> EMAConfig:
    return EMAConfig(snapshot_every=options.pop("snapshot_every", 100), **options)


# --- the usual average -----------------------------------------------------------------------------------------------


def test_average_has_its_closed_form():
    """avg_n = prod d_k avg_0 + sum_k (1 - d_k) prod_{j>k} d_j w_k, in float64; float32 rounds 40 times by 6e-8."""
    weight, decay = one_weight(1.0, -2.0), 0.7
    ema = EMA([weight], decay)
    track = torch.randn(40, 2, dtype=torch.float64)
    d = [min(decay, (1 + k) / (10 + k)) for k in range(40)]
    assert d[0] == 0.1 and d[19] < decay and d[20] == pytest.approx(decay)  # the warm-up ends at step 20
    for k in range(40):
        move(weight, track[k])
        ema.update(k, k + 1)
    rest = [torch.tensor(d[k:], dtype=torch.float64).prod() for k in range(41)]  # rest[k] = d_k d_k+1 … d_39
    expected = rest[0] * torch.tensor([1.0, -2.0], dtype=torch.float64)
    for k in range(40):
        expected = expected + (1 - d[k]) * rest[k + 1] * track[k]
    torch.testing.assert_close(ema.average[0].double(), expected, rtol=0, atol=1e-6)


def test_updating_seldom_decays_as_much():
    """Every third step, the weights of that step, with the decay of all three."""
    weight = one_weight(1.0)
    ema = EMA([weight], 0.7, EMAConfig(update_every=3))
    average = 1.0
    for k in range(30):
        move(weight, torch.tensor([float(k)]))
        ema.update(k, k + 1)
        if k % 3 == 2:
            d = torch.tensor([min(0.7, (1 + j) / (10 + j)) for j in range(k - 2, k + 1)]).prod().item()
            average = d * average + (1 - d) * k
        assert ema.average[0].item() == pytest.approx(average, rel=1e-6)


def test_average_is_kept_in_float32():
    """Ten updates with steps that bfloat16 would round away."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = EMA([weight], 0.9)
    with torch.no_grad():
        weight.add_(2**-7)  # one unit in its last place
    for k in range(10):
        ema.update(10_000 + k, k + 1)
    assert ema.average[0].dtype == torch.float32
    torch.testing.assert_close(ema.average[0], torch.full((3,), 1 + 2**-7 * (1 - 0.9**10)), rtol=0, atol=1e-6)
    with ema.swapped():
        assert weight.dtype == torch.bfloat16


def test_swapped_restores_bit_for_bit():
    net = network()
    ema = EMA(net.parameters(), 0.9)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape))
    ema.update(3, 4)
    before = [p.detach().clone() for p in net.parameters()]
    average = [x.clone() for x in ema.average]
    pointers = [p.data_ptr() for p in net.parameters()]
    for failing in (False, True):
        try:
            with ema.swapped():
                assert all(p.equal(x) for p, x in zip(net.parameters(), average, strict=True))
                assert not any(p.equal(x) for p, x in zip(net.parameters(), before, strict=True))
                if failing:
                    raise RuntimeError("the sampler failed")
        except RuntimeError:
            assert failing
        assert all(p.equal(x) for p, x in zip(net.parameters(), before, strict=True))
        assert all(x.equal(y) for x, y in zip(ema.average, average, strict=True))
        assert [p.data_ptr() for p in net.parameters()] == pointers  # the optimizer still holds the same tensors


def test_no_average_means_the_weights_themselves():
    weight = one_weight(1.0)
    ema = EMA([weight], 0)
    ema.update(0, 1)
    assert ema.tensors() == {}
    ema.load({})
    with ema.swapped():
        assert weight.item() == 1.0
    assert not ema.snapshot_due(0, 10**9)


def test_average_leaves_out_what_does_not_train():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert len(EMA([frozen, one_weight(1.0)], 0.9).average) == 1


# --- skipped steps, and going on -------------------------------------------------------------------------------------


def walk(ema: EMA, weight: nn.Parameter, steps: range, skip: tuple[int, ...] = (), flags: bool = True) -> None:
    for k in steps:
        move(weight, torch.randn(3, generator=torch.Generator().manual_seed(k)))
        ema.update(k, 8 * (k + 1), torch.tensor(float(k in skip)) if flags else None)


def test_a_skipped_step_leaves_every_average_as_it_was():
    weight = one_weight(1.0, 2.0, 3.0)
    ema = EMA([weight], 0.9, tracked())
    walk(ema, weight, range(5))
    before = {k: v.clone() for k, v in ema.tensors().items()}
    walk(ema, weight, range(5, 6), skip=(5,))
    after = ema.tensors()
    assert all(after[k].equal(before[k]) for k in before if k != "images")
    assert after["images"] == 48  # time goes on


def test_the_flag_of_a_good_step_changes_nothing():
    one, two = one_weight(1.0, 2.0, 3.0), one_weight(1.0, 2.0, 3.0)
    told, untold = EMA([one], 0.9, tracked()), EMA([two], 0.9, tracked())
    walk(told, one, range(20))
    walk(untold, two, range(20), flags=False)
    assert all(told.tensors()[k].equal(v) for k, v in untold.tensors().items())


def test_averages_go_on_from_their_state():
    """Bit for bit, with profiles, a skipped step, and updates every second step."""
    nets = one_weight(1.0, 2.0, 3.0), one_weight(1.0, 2.0, 3.0), one_weight(7.0, 7.0, 7.0)
    whole, half, again = (EMA([w], 0.9, tracked(update_every=2), start=0) for w in nets)
    walk(whole, nets[0], range(20), skip=(5,))
    walk(half, nets[1], range(11), skip=(5,))
    again.load({k: v.clone() for k, v in half.tensors().items()})
    walk(again, nets[2], range(11, 20))
    assert again.tensors().keys() == {"0", "0.05/0", "0.1/0", "images"}
    assert all(again.tensors()[k].equal(v) for k, v in whole.tensors().items())
    with again.swapped():
        assert nets[2].equal(whole.average[0])


@pytest.mark.parametrize("wrong", [{"0": torch.ones(2), "1": torch.ones(2)}, {}])
def test_other_averages_are_refused(wrong: dict[str, Tensor]):
    weight = one_weight(5.0, 6.0)
    ema = EMA([weight], 0.9)
    with pytest.raises(ValueError, match=f"the average has {len(wrong)} tensors, the network 1"):
        ema.load(wrong)
    assert ema.average[0].tolist() == [5.0, 6.0]


# --- profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 24])
def test_profiles_have_their_closed_form(start: int):
    """avg at image T = Σ_k (t_k^(γ+1) - t_(k-1)^(γ+1)) / T^(γ+1) w_k: the integral of (γ+1) t^γ / T^(γ+1) over weights
    that stand still between steps, whatever their length. The first weights of all count for nothing."""
    weight = one_weight(100.0, 100.0)
    ema = EMA([weight], 0, tracked(sigma_rels=(0.05, 0.2)), start=start)
    times = torch.tensor([8, 16, 24, 28, 32, 48, 50, 51, 52, 80], dtype=torch.float64)  # the batch may change
    track = torch.randn(10, 2, dtype=torch.float64)
    for k in range(10):
        move(weight, track[k])
        ema.update(k, start + int(times[k]))
    for profile in ema.profiles:
        gamma = sigma_rel_to_gamma(profile.sigma_rel)
        power = (times / 80) ** (gamma + 1)
        share = power - torch.cat([torch.zeros(1), power[:-1]])
        assert share.sum() == pytest.approx(1)
        torch.testing.assert_close(profile.average[0].double(), share @ track, rtol=0, atol=1e-6)
    with ema.swapped():
        assert weight.double().equal(track[-1].float().double())  # samples use ema_decay's alone


def test_time_must_go_on():
    ema = EMA([one_weight(1.0)], 0, tracked())
    ema.update(0, 8)
    with pytest.raises(ValueError, match="have seen 8 images, the update says 8"):
        ema.update(1, 8)


# --- snapshots -------------------------------------------------------------------------------------------------------


def test_snapshots_are_due_at_their_multiples_and_at_the_end():
    ema = EMA([one_weight(1.0)], 0.9, tracked(), start=96, end=250)
    due = [n for n in range(0, 264, 24) if ema.snapshot_due(n - 24, n)]
    assert due == [120, 216]
    assert ema.snapshot_due(240, 264)  # the end, 250, was passed
    assert not ema.snapshot_due(264, 288)
    assert not ema.snapshot_due(0, 96)  # the player has not joined


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_snapshots_hold_the_profiles_under_the_weights_names(dtype: str, tmp_path: Path):
    net = network()
    ema = EMA(net.named_parameters(), 0.9, tracked(snapshot_dtype=dtype))
    ema.update(0, 8)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(-3)
    ema.update(1, 16)
    ema.write_snapshot(tmp_path / "ema" / "net", 16)
    files = sorted((tmp_path / "ema" / "net").iterdir())
    assert [f.name for f in files] == [f"images_000000016_sigma_rel_{x}.safetensors" for x in ("0.05", "0.1")]
    for file, profile in zip(files, ema.profiles, strict=True):
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata()["sigma_rel"] == str(profile.sigma_rel)
            for (name, _), x in zip(net.named_parameters(), profile.average, strict=True):
                assert handle.get_tensor(name).equal(x.to(getattr(torch, dtype)))


def test_a_snapshot_that_fails_leaves_nothing_and_the_old_one(tmp_path: Path, monkeypatch):
    ema = EMA([("w", one_weight(1.0))], 0.9, tracked())
    ema.update(0, 8)
    ema.write_snapshot(tmp_path, 8)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(flat, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "save_file", full)
    for images in (8, 16):
        with pytest.raises(OSError, match="No space"):
            ema.write_snapshot(tmp_path, images)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_what_a_killed_run_wrote_of_later_images_goes(tmp_path: Path):
    ema = EMA([("w", one_weight(1.0))], 0.9, tracked(sigma_rels=(0.05,)))
    for k, images in enumerate((100, 200, 300)):
        ema.update(k, images)
        ema.write_snapshot(tmp_path, images)
    (tmp_path / "images_000000200_sigma_rel_0.05.partial").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("the user's")
    ema.forget_after(tmp_path, 200)
    kept = [f"images_000000{n}_sigma_rel_0.05.safetensors" for n in (100, 200)]
    assert sorted(f.name for f in tmp_path.iterdir()) == [*kept, "notes.txt"]
    ema.forget_after(tmp_path / "none", 0)


def test_other_processes_write_nothing(tmp_path: Path):
    ema = EMA([("w", one_weight(1.0))], 0.9, tracked())
    ema.write_snapshot(tmp_path / "ema", 8, write=False)
    assert not (tmp_path / "ema").exists()
