"""Every kind of optimizer: its step is its library's, a skipped one leaves no trace, and it goes on bit for bit."""

import importlib.util
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from training.optim import Guarded
from training.optimizers import Fused
from training.schema.optim import OptimizerSection

SECTIONS = {
    "adamw": {"learning_rate": 1e-2, "adam_beta2": 0.99},
    "adamw_8bit": {"learning_rate": 1e-2},
    "adafactor": {"learning_rate": 1e-2, "adafactor_beta1": 0.9, "adam_weight_decay": 0.02},
    "prodigy": {"learning_rate": 1.0, "adam_beta1": 0.8},
    "schedule_free": {"learning_rate": 1e-2},
    "muon": {"learning_rate": 1e-2},
}
PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}
KINDS = [kind for kind in SECTIONS if importlib.util.find_spec(PACKAGES.get(kind, "torch"))]  # test_optim: the others


def network(seed: int = 0) -> nn.Sequential:
    """Convolutions, a matrix that is large enough for 8 bits, vectors."""
    torch.manual_seed(seed)
    layers = {
        "conv_in": nn.Conv2d(3, 8, 3, padding=1),
        "conv": nn.Conv2d(8, 8, 3, padding=1),
        "act": nn.SiLU(),
        "flat": nn.Flatten(),
        "large": nn.Linear(128, 40),
        "out": nn.Linear(40, 3),
    }
    return nn.Sequential(OrderedDict(layers))


def section(kind: str, **options) -> Any:
    return TypeAdapter(OptimizerSection).validate_python({"name": kind, **SECTIONS[kind], **options})


def guarded(net: nn.Module, kind: str, warmup: int = 0, **options) -> Guarded:
    return Guarded(net.named_parameters(), section(kind, **options), 40, warmup)


def backward(net: nn.Module, seed: int, scale: float = 1.0) -> None:
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    (scale * (net(x) - 1).square().mean()).backward()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in net.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


# --- truth -----------------------------------------------------------------------------------------------------------


def library(kind: str, net: nn.Module) -> Callable[[], Any]:
    """One step of the library's own optimizer on this network's gradients, built from its documented arguments."""
    if kind == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.99), fused=True).step
    if kind == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(net.parameters(), lr=1e-2).step
    if kind == "adafactor":
        from transformers.optimization import Adafactor

        own = dict(relative_step=False, scale_parameter=False, beta1=0.9, weight_decay=0.02)
        return Adafactor(net.parameters(), lr=1e-2, **own).step
    if kind == "prodigy":
        import prodigyopt

        own = dict(use_bias_correction=True, safeguard_warmup=True, weight_decay=0.01)
        return prodigyopt.Prodigy(net.parameters(), betas=(0.8, 0.999), **own).step
    if kind == "schedule_free":
        import schedulefree

        optimizer = schedulefree.AdamWScheduleFree(net.parameters(), lr=1e-2, weight_decay=0.01)
        optimizer.train()
        return optimizer.step
    hidden = [net.get_parameter(name) for name in ("conv.weight", "large.weight", "out.weight")]
    rest = [p for p in net.parameters() if all(p is not q for q in hidden)]
    matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in hidden]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-2, fused=True)

    def step() -> None:
        for p, matrix in zip(hidden, matrices, strict=True):
            matrix.grad = p.grad.flatten(1)
        muon.step()
        adamw.step()
        with torch.no_grad():
            for p, matrix in zip(hidden, matrices, strict=True):
                p.copy_(matrix.view_as(p))

    return step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_norm", [1e9, 0.1])
def test_the_step_is_the_librarys(kind: str, max_norm: float):
    """Six of them, bit for bit: the library gets the gradients over their clipping, rounded as ours rounds it."""
    ours, theirs = network(), network()
    optimizer, step = guarded(ours, kind, max_grad_norm=max_norm, lr_scheduler="constant"), library(kind, theirs)
    fused = {p for stepper in optimizer.steppers if isinstance(stepper, Fused) for p in stepper.kept}
    for i in range(6):
        backward(ours, i)
        backward(theirs, i)
        divisor = (torch.nn.utils.get_total_norm(p.grad for p in theirs.parameters()) / max_norm).clamp(min=1)
        assert (divisor > 1) == (max_norm < 1)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert q.grad is not None
            q.grad = q.grad / divisor if p in fused else q.grad * (1 / divisor)
        step()
        for q in theirs.parameters():
            q.grad = None
        assert optimizer.step()[1] == 0
        assert same(weights(ours), weights(theirs)), i
    assert not same(weights(ours), weights(network()))


def test_muon_takes_hidden_matrices_alone():
    net = network()
    optimizer = guarded(net, "muon")
    flat = {name: optimizer.steppers[0].kept.get(p) for name, p in net.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in flat.items() if p is not None}
    assert shapes == {"conv.weight": (8, 72), "large.weight": (40, 128), "out.weight": (3, 40)}
    assert {id(p) for p in optimizer.steppers[1].kept} == {
        id(p) for name, p in net.named_parameters() if name not in shapes
    }


def test_eight_bit_moments_are_kept_in_eight_bits():
    if "adamw_8bit" in KINDS:
        net = network()
        optimizer = guarded(net, "adamw_8bit")
        backward(net, 0)
        optimizer.step()
        place = list(dict(net.named_parameters())).index("large.weight")
        assert optimizer.tensors()[f"{place}.state1"].dtype == torch.uint8
    assert section("adamw_8bit").state_bytes < 3


# --- what is skipped leaves no trace ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [0, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(kind: str, bad: float, first: int):
    """One such number in one tensor; as the very first step, and later. What follows is as if it had not been."""
    net, other = network(), network()
    optimizer, spared = guarded(net, kind, lr_scheduler="constant"), guarded(other, kind, lr_scheduler="constant")
    for i in range(first):
        for n, o in ((net, optimizer), (other, spared)):
            backward(n, i)
            o.step()
    before, moments = weights(net), {k: v.clone() for k, v in optimizer.tensors().items()}
    state = optimizer.state()
    backward(net, 9)
    net.get_parameter("large.weight").grad[3, 5] = bad
    norm, skipped = optimizer.step()
    assert skipped == 1 and not norm.isfinite()
    assert all(p.grad is None for p in net.parameters())
    assert same(weights(net), before)
    after = optimizer.tensors()
    assert all(after[k].equal(v) for k, v in moments.items())
    assert all(not v.any() for k, v in after.items() if k not in moments)  # fused: moments of zero, no step counted
    assert {**optimizer.state(), "steps": first, "images": first} == state
    assert (optimizer.steps, optimizer.images) == (first + 1, first + 1)  # the schedule goes on
    for i in range(10, 13):
        for n, o in ((net, optimizer), (other, spared)):
            backward(n, i)
            assert o.step()[1] == 0
    assert same(weights(net), weights(other))
    assert not same(weights(net), before)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_these_step_without_asking_the_device(kind: str, monkeypatch):
    """No scalar is read back: on a GPU, the host would wait for the whole step there."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the host waits")

    net = network()
    optimizer = guarded(net, kind)
    backward(net, 0)
    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(Tensor, name, refuse)
    optimizer.step()


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_is_bit_identical(kind: str):
    """Through a checkpoint's forms, with a warm-up, two groups, and a skipped step before the break."""
    groups = [{"pattern": "bias", "weight_decay": 0}]

    def at_work(net: nn.Module) -> Guarded:
        return guarded(net, kind, warmup=4, groups=groups, max_grad_norm=0.3)

    def work(net: nn.Module, optimizer: Guarded, steps: range) -> None:
        for i in steps:
            backward(net, i, float("nan") if i == 2 else 1.0)
            optimizer.step()

    whole, half, again = network(), network(), network(7)
    one, two, three = at_work(whole), at_work(half), at_work(again)
    work(whole, one, range(12))
    work(half, two, range(6))
    work(again, three, range(3))  # of another state, which goes
    again.load_state_dict(half.state_dict())
    three.load({k: v.clone() for k, v in two.tensors().items()}, json.loads(json.dumps(two.state())))
    work(again, three, range(6, 12))
    assert same(weights(again), weights(whole))
    assert same(three.tensors(), one.tensors())
    assert three.state() == one.state() and three.lr == one.lr
    assert not same(weights(again), weights(half))


def test_another_kinds_state_is_refused():
    net, other = network(), nn.Linear(2, 2)
    ours, small = guarded(net, "muon"), guarded(other, "adamw")
    backward(net, 0)
    ours.step()
    with pytest.raises(ValueError, match="other parameters or of another kind"):
        small.load(ours.tensors(), ours.state())


# --- which weights are meant -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_evaluating_leaves_training_as_it_was(kind: str):
    net, other = network(), network()
    optimizer, plain = guarded(net, kind), guarded(other, kind)
    for i in range(8):
        for n, o in ((net, optimizer), (other, plain)):
            backward(n, i)
            o.step()
        before = weights(net)
        with pytest.raises(RuntimeError), optimizer.evaluating():
            assert same(weights(net), before) == (kind != "schedule_free" or i == 0)  # after one step x is y
            raise RuntimeError("the sampler failed")
        assert same(weights(net), before)
    assert same(weights(net), weights(other))


def test_schedule_free_is_judged_at_its_average():
    """At a constant rate x is the plain mean of the points z (Defazio et al. 2024, eq. 7), of which the state holds
    the newest. Interpolating between y and z instead of averaging rounds a few times by 6e-8."""
    if "schedule_free" not in KINDS:
        assert section("schedule_free").package == "schedulefree"
        return
    net = network()
    optimizer = guarded(net, "schedule_free", lr_scheduler="constant")
    place = list(dict(net.named_parameters())).index("large.weight")
    points = []
    for i in range(10):
        backward(net, i)
        optimizer.step()
        points.append(optimizer.tensors()[f"{place}.z"].double().clone())
    with optimizer.evaluating():
        mean = torch.stack(points).mean(0)
        torch.testing.assert_close(net.get_parameter("large.weight").double(), mean, rtol=0, atol=1e-6)
