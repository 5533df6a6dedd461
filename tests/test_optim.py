"""The guarded optimizer against torch's own, and the average of the weights against its closed form."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from training.ema import EMA
from training.optim import GuardedAdamW
from training.schema import Optimizer

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 3))


def gradients(seed: int = 1) -> Iterator[float]:
    """Scales of the loss: some gradients are above the limit, some below."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield 10 ** torch.empty(()).uniform_(-3, 2, generator=generator).item()


def backward(net: nn.Module, scale: float, seed: int) -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    (scale * net(x).square().mean()).backward()


def guarded(net: nn.Module, total: int = 20, warmup: int = 4, **options) -> GuardedAdamW:
    return GuardedAdamW(net.parameters(), Optimizer(learning_rate=1e-2, **options), total, warmup)


def flat(optimizer: GuardedAdamW) -> Tensor:
    return torch.cat([p.detach().flatten() for p in optimizer.parameters])


# --- the step --------------------------------------------------------------------------------------------------------


def test_equals_plain_adamw_with_clipping():
    """torch clips to max_norm / (norm + 1e-6): beside norms of 0.5 that is 2e-6 of a gradient, hence of the largest
    moment. Adam's division takes most of it out of the weights, of which 20 steps of 1e-2 are left to round."""
    ours, theirs = network(), network()
    options = dict(adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.3, max_grad_norm=0.5, adam_epsilon=1e-6)
    optimizer = guarded(ours, lr_scheduler="constant", **options)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.3, eps=1e-6, fused=False)
    clipped = 0
    for i, scale in zip(range(20), gradients(), strict=False):
        backward(ours, scale, i)
        backward(theirs, scale, i)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        norm, skipped = optimizer.step()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        assert skipped == 0
        clipped += bool(expected > 0.5)
        assert all(p.grad is None for p in optimizer.parameters)
    assert 3 < clipped < 17  # both sides of the limit were there
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p, q in zip(optimizer.parameters, theirs.parameters(), strict=True):
        for name, value in plain.state[q].items():
            bound = 4e-6 * value.abs().max().item()
            torch.testing.assert_close(optimizer.adamw.state[p][name], value, rtol=0, atol=bound)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [0, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, first: int):
    """One such number in one tensor; as the very first step, and later. What follows is as if it had not been."""
    net, other = network(), network()
    optimizer, spared = guarded(net, lr_scheduler="constant"), guarded(other, lr_scheduler="constant")
    for i in range(first):
        backward(net, 1, i)
        backward(other, 1, i)
        optimizer.step()
        spared.step()
    before = flat(optimizer)
    moments = {k: v.clone() for k, v in optimizer.tensors().items()}
    backward(net, 1, 9)
    optimizer.parameters[1].grad[2] = bad
    norm, skipped = optimizer.step()
    assert skipped == 1 and not norm.isfinite()
    assert flat(optimizer).equal(before)
    assert all(optimizer.tensors()[k].equal(v) for k, v in moments.items())
    assert all(v.isfinite().all() for v in optimizer.tensors().values())
    assert optimizer.steps == first + 1
    backward(net, 1, 10)
    backward(other, 1, 10)
    assert optimizer.step()[1] == 0
    spared.step()
    assert flat(optimizer).equal(flat(spared))
    assert not flat(optimizer).equal(before)


def test_only_what_trains_is_stepped():
    net = network()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    optimizer = guarded(net)
    assert len(optimizer.parameters) == 2
    backward(net, 1, 0)
    optimizer.step()
    assert net[0].weight.equal(before)


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_going_on_is_bit_identical(name: str):
    """Weights, moments and learning rates, through a warm-up and with a skipped step before the break."""
    whole, half = network(), network()
    one, two = guarded(whole, lr_scheduler=name), guarded(half, lr_scheduler=name)
    rates = []
    for i in range(12):
        backward(whole, float("nan") if i == 1 else 1, i)
        one.step()
        rates.append(one.lr)
    for i in range(3):
        backward(half, float("nan") if i == 1 else 1, i)
        two.step()
        assert two.lr == rates[i]
    stored = {k: v.clone() for k, v in two.tensors().items()}
    again = network(5)
    again.load_state_dict(half.state_dict())
    three = guarded(again, lr_scheduler=name)
    three.load(stored, two.steps)
    assert (three.lr, three.steps) == (rates[2], 3)
    for i in range(3, 12):
        backward(again, 1, i)
        three.step()
        assert three.lr == rates[i]
        assert three.adamw.param_groups[0]["lr"] == rates[i]
    assert flat(three).equal(flat(one))
    assert all(three.tensors()[k].equal(v) for k, v in one.tensors().items())


def test_going_on_before_the_first_step():
    fresh, again = guarded(network()), guarded(network())
    assert fresh.tensors() == {}
    again.load({}, 0)
    for optimizer, i in ((fresh, 0), (again, 0), (fresh, 1), (again, 1)):
        backward_all(optimizer, i)
        optimizer.step()
    assert flat(fresh).equal(flat(again))


def backward_all(optimizer: GuardedAdamW, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in optimizer.parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def test_schedules_have_their_shape():
    """lr of the first, the warmed-up and the last step, from each schedule's formula."""
    expected = {
        "constant": (1e-2, 1e-2, 1e-2),
        "constant_with_warmup": (0.0, 1e-2, 1e-2),
        "linear": (0.0, 1e-2, 1e-2 / 16),
        "cosine": (0.0, 1e-2, 1e-2 * (1 + torch.cos(torch.tensor(torch.pi * 15 / 16)).item()) / 2),
    }
    for name, (first, warm, last) in expected.items():
        optimizer = guarded(network(), lr_scheduler=name)
        rates = []
        for i in range(20):
            rates.append(optimizer.adamw.param_groups[0]["lr"])
            backward_all(optimizer, i)
            optimizer.step()
        assert (rates[0], rates[4], rates[19]) == pytest.approx((first, warm, last), rel=1e-5), name


# --- the average -----------------------------------------------------------------------------------------------------


def one_weight(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def test_average_has_its_closed_form():
    """avg_n = prod d_k avg_0 + sum_k (1 - d_k) prod_{j>k} d_j w_k, in float64; float32 rounds 40 times by 6e-8."""
    weight, decay = one_weight(1.0, -2.0), 0.7
    ema = EMA([weight], decay)
    track = torch.randn(40, 2, dtype=torch.float64)
    d = [min(decay, (1 + k) / (10 + k)) for k in range(40)]
    assert d[0] == 0.1 and d[19] < decay and d[20] == pytest.approx(decay)  # the warm-up ends at step 20
    for k in range(40):
        with torch.no_grad():
            weight.copy_(track[k])
        ema.update(k)
    rest = [torch.tensor(d[k:], dtype=torch.float64).prod() for k in range(41)]  # rest[k] = d_k d_k+1 … d_39
    expected = rest[0] * torch.tensor([1.0, -2.0], dtype=torch.float64)
    for k in range(40):
        expected = expected + (1 - d[k]) * rest[k + 1] * track[k]
    torch.testing.assert_close(ema.average[0].double(), expected, rtol=0, atol=1e-6)


def test_average_is_kept_in_float32():
    """Ten updates with steps that bfloat16 would round away."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = EMA([weight], 0.9)
    with torch.no_grad():
        weight.add_(2**-7)  # one unit in its last place
    for k in range(10):
        ema.update(10_000 + k)
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
    ema.update(3)
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
    ema.update(0)
    assert ema.state_dict() == {}
    ema.load_state_dict({})
    with ema.swapped():
        assert weight.item() == 1.0


def test_average_leaves_out_what_does_not_train():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert len(EMA([frozen, one_weight(1.0)], 0.9).average) == 1


def test_average_goes_on_from_its_state():
    first, weight = EMA([one_weight(1.0, 2.0)], 0.9), one_weight(5.0, 6.0)
    again = EMA([weight], 0.9)
    again.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    assert again.average[0].tolist() == [1.0, 2.0]
    with again.swapped():
        assert weight.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="the average has 2 tensors, the network 1"):
        again.load_state_dict({"0": torch.ones(2), "1": torch.ones(2)})
    assert weight.tolist() == [5.0, 6.0]
