"""The guarded optimizer: AdamW's step against torch's own, schedules against their formulas, groups, loss scaling."""

import json
import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from training.fit import ConfigError
from training.optim import Guarded, check_optimizer
from training.schema import AutoencoderConfig
from training.schema.optim import AdamW, Group, OptimizerSection
from training.tasks.common import player

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 3))


def gradients(seed: int = 1) -> Iterator[float]:
    """Scales of the loss: some gradients are above the limit, some below."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield 10 ** torch.empty(()).uniform_(-3, 2, generator=generator).item()


def backward(net: nn.Module, scale: float, seed: int, optimizer: Guarded | None = None) -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    loss = scale * net(x).square().mean()
    (optimizer.scaled(loss) if optimizer else loss).backward()


def config_of(**options) -> AdamW:
    rules = {"lr_step_rules": "1:6,0.1:10,0.01"} if options.get("lr_scheduler") == "piecewise_constant" else {}
    return AdamW(**{"learning_rate": 1e-2, **rules, **options})


def guarded(net: nn.Module, total: int = 20, warmup: int = 4, fp16: bool = False, **options) -> Guarded:
    return Guarded(net.named_parameters(), config_of(**options), total, warmup, fp16=fp16)


def flat(optimizer: Guarded) -> Tensor:
    return torch.cat([p.detach().flatten() for p in optimizer.parameters])


def stored(optimizer: Guarded) -> tuple[dict[str, Tensor], dict]:
    """As a checkpoint keeps it."""
    return {k: v.clone() for k, v in optimizer.tensors().items()}, json.loads(json.dumps(optimizer.state()))


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
    for i, q in enumerate(theirs.parameters()):
        for name, value in plain.state[q].items():
            bound = 4e-6 * value.abs().max().item()
            torch.testing.assert_close(optimizer.tensors()[f"{i}.{name}"], value, rtol=0, atol=bound)


def test_only_what_trains_is_stepped():
    net = network()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    optimizer = guarded(net)
    assert len(optimizer.parameters) == 2
    backward(net, 1, 0)
    optimizer.step()
    assert net[0].weight.equal(before)


# --- schedules -------------------------------------------------------------------------------------------------------


def factor(name: str, n: int, total: int, warmup: int) -> float:
    """The schedule's formula at image ``n``, of a learning rate of 1e-2."""
    if name == "constant":
        return 1.0
    if name == "piecewise_constant":
        return 1.0 if n < 240 else 0.1 if n < 480 else 0.01
    if n < warmup:
        return n / warmup
    part = (n - warmup) / (total - warmup)
    return {
        "constant_with_warmup": 1.0,
        "linear": 1 - part,
        "cosine": (1 + math.cos(math.pi * part)) / 2,
        "cosine_with_restarts": (1 + math.cos(math.pi * (3 * part % 1))) / 2,
        "polynomial": ((1 - part) ** 2 * (1e-2 - 1e-7) + 1e-7) / 1e-2,
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("batch, accumulated, processes", [(8, 1, 1), (4, 3, 1), (8, 2, 2), (7, 1, 3)])
def test_schedules_count_images(name: str, batch: int, accumulated: int, processes: int):
    """Whatever makes up a step: at an image, the learning rate is that of the formula. The peers' oldest bug is to
    count calls here, of which there are more with accumulation and with several processes."""
    rules = {"lr_step_rules": "1:240,0.1:480,0.01"} if name == "piecewise_constant" else {}
    options = {"learning_rate": 1e-2, "lr_scheduler": name, "lr_warmup_images": 100, "lr_num_cycles": 3, "lr_power": 2}
    config = AutoencoderConfig(
        task="autoencoder",
        output_dir="run",
        data={"path": "nowhere"},
        train={"images": 700, "batch_size": batch, "gradient_accumulation_steps": accumulated},
        optimizer={**options, **rules},
    )
    alone = SimpleNamespace(
        num_processes=processes, mixed_precision="no", is_fsdp2=False, prepare=lambda module: module
    )
    for start in (0, 100):  # a player that joins late has the rest of the run
        optimizer = player("net", network(), lambda *_: None, config, alone, start=start).optimizer
        per_step = batch * accumulated * processes
        for n in range(0, 700 - start, per_step):
            expected = 1e-2 * factor(name, n, 700 - start, 100)
            assert optimizer.steppers[0].optimizer.param_groups[0]["lr"] == optimizer.lr
            assert optimizer.lr == pytest.approx(expected, rel=1e-9, abs=1e-15), n
            for p in optimizer.parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert optimizer.images >= 700 - start > optimizer.images - per_step


@pytest.mark.parametrize("total", [4, 8])
def test_a_warm_up_longer_than_the_run_is_cut_off_with_it(total: int):
    for name in SCHEDULES[1:-1]:
        optimizer = guarded(network(), total=total, warmup=8, lr_scheduler=name)
        for i in range(total):
            assert optimizer.lr == pytest.approx(1e-2 * i / 8)
            optimizer.step()  # of no gradients: the schedule goes on


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("fp16", [False, True])
def test_going_on_is_bit_identical(name: str, fp16: bool):
    """Weights, moments, learning rates and the loss's scale, through a warm-up and with a skipped step before."""
    whole, half = network(), network()
    one, two = guarded(whole, fp16=fp16, lr_scheduler=name), guarded(half, fp16=fp16, lr_scheduler=name)
    rates = []
    for i in range(12):
        backward(whole, float("nan") if i == 1 else 1, i, one)
        one.step()
        rates.append(one.lr)
    for i in range(3):
        backward(half, float("nan") if i == 1 else 1, i, two)
        two.step()
        assert two.lr == rates[i]
    again = network(5)
    again.load_state_dict(half.state_dict())
    three = guarded(again, fp16=fp16, lr_scheduler=name)
    three.load(*stored(two))
    assert (three.lr, three.steps, three.images) == (rates[2], 3, 3)
    for i in range(3, 12):
        backward(again, 1, i, three)
        three.step()
        assert three.lr == rates[i]
    assert flat(three).equal(flat(one))
    assert three.state() == one.state()
    assert three.tensors().keys() == one.tensors().keys()
    assert all(three.tensors()[k].equal(v) for k, v in one.tensors().items())


def test_going_on_before_the_first_step():
    nets = network(), network()
    fresh, again = guarded(nets[0]), guarded(nets[1])
    assert fresh.tensors() == {}
    again.load(*stored(fresh))
    for i in range(2):
        for net, optimizer in zip(nets, (fresh, again), strict=True):
            backward(net, 1, i)
            optimizer.step()
    assert flat(fresh).equal(flat(again))


def test_a_schedule_goes_on_by_images_when_the_step_grows():
    """Resumed on twice the processes: the same learning rate at the same image, in half the steps."""
    small, large = network(), network()
    one = Guarded(small.named_parameters(), config_of(lr_scheduler="cosine"), 64, 8, per_step=4)
    for i in range(6):
        backward(small, 1, i)
        one.step()
    two = Guarded(large.named_parameters(), config_of(lr_scheduler="cosine"), 64, 8, per_step=8)
    two.load(*stored(one))
    assert two.lr == one.lr
    for net, optimizer, steps in ((small, one, 4), (large, two, 2)):
        for i in range(steps):
            backward(net, 1, i)
            optimizer.step()
    assert (one.steps, two.steps, one.images, two.images) == (10, 8, 40, 40)
    assert one.lr == two.lr == pytest.approx(1e-2 * (1 + math.cos(math.pi * 32 / 56)) / 2)


# --- groups ----------------------------------------------------------------------------------------------------------


def test_groups_have_their_own_rate_and_decay():
    """Each parameter as torch's AdamW of its own options would have it; the schedule scales all."""
    groups = (
        Group(pattern="bias$", weight_decay=0),
        Group(pattern=r"^2\.", learning_rate=3e-3),
    )
    ours, theirs = network(), network()
    optimizer = guarded(ours, warmup=0, lr_scheduler="linear", adam_weight_decay=0.2, groups=groups)
    named = dict(theirs.named_parameters())
    plain = torch.optim.AdamW(
        [
            {"params": [named["0.weight"]], "weight_decay": 0.2},
            {"params": [named["0.bias"], named["2.bias"]], "weight_decay": 0},  # the first pattern that matches counts
            {"params": [named["2.weight"]], "weight_decay": 0.2, "lr": 3e-3},
        ],
        lr=1e-2,
        fused=True,
    )
    rates = [group["lr"] for group in plain.param_groups]
    for i in range(5):
        for group, rate in zip(plain.param_groups, rates, strict=True):
            group["lr"] = rate * (20 - i) / 20
        backward(ours, 0.1, i)
        backward(theirs, 0.1, i)
        optimizer.step()
        plain.step()
        plain.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.equal(b)
    factored = guarded(network(), groups=(Group(pattern="weight", learning_rate_factor=0.5),), lr_scheduler="constant")
    assert [g["lr"] for g in factored.steppers[0].optimizer.param_groups] == [1e-2, 5e-3]


def test_by_default_everything_decays():
    """As in diffusers' scripts; a group spares biases and norms where a config asks."""
    (group,) = guarded(network()).steppers[0].optimizer.param_groups
    assert group["weight_decay"] == 0.01 and len(group["params"]) == 4


@pytest.mark.parametrize(
    "groups, message",
    [
        (["0.wieght"], r"groups.0.pattern: '0.wieght' matches no parameter; near are 0.weight, "),
        (["weight", r"0\.weight"], r"groups.1.pattern: .* matches only what the groups before it took"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(groups: list[str], message: str):
    config = config_of(groups=[{"pattern": x, "weight_decay": 0} for x in groups])
    with pytest.raises(ConfigError, match=message):
        Guarded(network().named_parameters(), config, 10)
    with torch.device("meta"):
        bare = network()
    with pytest.raises(ConfigError, match=message):
        check_optimizer(config, bare)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"groups": [{"pattern": "(", "weight_decay": 0}]}, "no regular expression"),
        ({"groups": [{"pattern": "a"}]}, "changes nothing"),
        ({"groups": [{"pattern": "a", "learning_rate": 1, "learning_rate_factor": 1}]}, "not both"),
        ({"name": "prodigy", "groups": [{"pattern": "a", "learning_rate": 1}]}, "one step size"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_step_rules"),
        ({"lr_step_rules": "1:10,0.1"}, "lr_step_rules"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:10"}, "FACTOR:IMAGES"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:10,0.1:5,0.01"}, "more images"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "1e-7"),
        ({"name": "schedule_free", "lr_scheduler": "cosine"}, "constant_with_warmup"),
        ({"name": "adamw", "prodigy_beta3": 0.9}, "prodigy_beta3"),
        ({"name": "sgd"}, "adamw_8bit"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(section: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(OptimizerSection).validate_python(section)


def test_without_a_name_it_is_adamw():
    assert TypeAdapter(OptimizerSection).validate_python({"learning_rate": 1}) == AdamW(learning_rate=1)


@pytest.mark.parametrize(
    "kind, package", [("adamw_8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("schedule_free", "schedulefree")]
)
def test_a_missing_package_is_told_before_anything_is_spent(kind: str, package: str, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what Python takes as: not to be imported
    config = TypeAdapter(OptimizerSection).validate_python({"name": kind})
    for ask in (check_optimizer, lambda c: Guarded(network().named_parameters(), c, 10)):
        with pytest.raises(ConfigError, match=rf"optimizer.name: {kind} needs .* {package}.*pip install '{package}>="):
            ask(config)


# --- half precision --------------------------------------------------------------------------------------------------


def test_the_loss_scale_follows_torchs_grad_scaler():
    """Through infinities in a row and twice the growth interval: the same scale as torch.amp's at every step."""
    bad = {0, 1, 5, 4020, 4021}
    weight, w = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    ours = Guarded([weight], config_of(), 10_000, fp16=True)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    sgd = torch.optim.SGD([w], lr=0.1)
    seen = []
    for i in range(4030):
        scale = theirs.scale(torch.ones(())).item()
        assert ours.scaled(torch.ones(())) == scale
        weight.grad = torch.full((1,), float("inf") if i in bad else scale)
        w.grad = weight.grad.clone()
        norm, skipped = ours.step()
        assert (skipped == 1) == (i in bad)
        assert i in bad or norm == 1  # told without the scale
        theirs.step(sgd)
        theirs.update()
        seen.append(math.log2(scale))
    assert [seen[i] for i in (0, 6, 2005, 2006, 4005, 4006, 4029)] == [16, 13, 13, 14, 14, 15, 13]


def test_scaled_steps_are_the_plain_ones():
    """The scale is a power of two: what it multiplies and divides again loses nothing."""
    nets = network(), network()
    plain, scaled = guarded(nets[0], max_grad_norm=0.5), guarded(nets[1], fp16=True, max_grad_norm=0.5)
    for i, size in zip(range(10), gradients(), strict=False):
        backward(nets[0], size, i)
        backward(nets[1], size, i, scaled)
        assert plain.step()[0] == scaled.step()[0]
    assert flat(plain).equal(flat(scaled))
    assert plain.scaled(torch.ones(())) == 1
