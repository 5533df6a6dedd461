"""The denoiser: what the network is shown, what is made of its answer, and the loss."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.cond import Cond
from ldm.denoiser import Denoiser, TimeInput
from ldm.paths import CosineVP, DiscreteVP, Path, RectifiedFlow
from ldm.prediction import PREDICTIONS, X0, Eps, Flow, Karras, V


class Net(nn.Module):
    """Depends on everything that it is told; remembers the call."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.calls.append((x, time))
        told = cond.tokens.mean((1, 2)) + torch.cos(time / 100).to(x.dtype)
        return torch.tanh(self.mix(x)) + told.to(x.dtype).view(-1, 1, 1, 1)


def tokens(rows: int, seed: int) -> Cond:
    return Cond(tokens=torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(seed)))


def denoiser(prediction=None, path: Path | None = None, time_input: TimeInput | None = None) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(Net(), path or RectifiedFlow(), prediction or Flow(), time_input)


def latents(rows: int = 3, **kw) -> Tensor:
    return torch.randn(rows, 4, 6, 5, generator=torch.Generator().manual_seed(7)).to(**kw)


@pytest.mark.parametrize(
    "t", [torch.tensor(0.4, dtype=torch.float64), torch.tensor([0.1, 0.4, 0.8])], ids=["()", "(B,)"]
)
@pytest.mark.parametrize("prediction", [Flow(), Karras(0.5), V()], ids=repr)
def test_several_conds_in_one_batch_are_the_single_answers(prediction, t: Tensor) -> None:
    d, x, conds = denoiser(prediction), latents(), [tokens(3, 0), tokens(1, 1), tokens(3, 2)]
    together = d(x, t, conds)
    assert len(d.net.calls) == 1 and d.net.calls[0][0].shape == (9, 4, 6, 5)
    turns = d(x, t, conds, one_batch=False)
    assert len(d.net.calls) == 4
    for cond, one, other in zip(conds, together, turns, strict=True):
        alone = d(x, t, cond)
        for a, b, c in zip(alone[:3], one[:3], other[:3], strict=True):
            # a batch of 9 and one of 3 may be summed in another order
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            torch.testing.assert_close(a, c, rtol=0, atol=0)
    assert (together[0].x0 - together[1].x0).abs().max() > 0.01


def test_answer_is_the_prediction_of_the_output() -> None:
    d, x, cond = denoiser(Karras(0.5)), latents(), tokens(3, 0)
    t = torch.tensor([0.2, 0.5, 0.9])
    c = d.path.coeffs(t, 4)
    output = d.net(d.prediction.scale_input(c) * x, 1000 * t, cond)
    answer = d(x, t, cond)
    torch.testing.assert_close(answer.output, output)
    torch.testing.assert_close(answer.x0, d.prediction.to_x0(x, output, c))
    torch.testing.assert_close(answer.eps, d.prediction.to_eps(x, output, c))
    assert answer.var_frac is None
    again = d.interpret(x, t, output)
    assert torch.equal(again.x0, answer.x0) and torch.equal(again.eps, answer.eps)


@pytest.mark.parametrize(
    ("time_input", "t", "seen"),
    [
        (TimeInput(1000), 0.1239, 123.9),
        (TimeInput(1000, floor=True), 0.1239, 123.0),
        (TimeInput(1000, floor=True), 0.999, 999.0),
        (TimeInput(1000, offset=-1), 0.001, 0.0),
        (TimeInput(1000, offset=-1), 1.0, 999.0),
        (TimeInput(1.0), 0.5, 0.5),
        (None, 0.5, 500.0),
    ],
)
def test_what_the_time_embedding_sees(time_input: TimeInput | None, t: float, seen: float) -> None:
    d = denoiser(time_input=time_input)
    d(latents(), torch.tensor(t, dtype=torch.float64), tokens(3, 0))
    d(latents(), torch.full((3,), t, dtype=torch.float64), tokens(3, 0))
    for _, time in d.net.calls:
        assert time.dtype == torch.float32 and torch.equal(time, torch.full((3,), seen))


def test_every_node_of_a_chain_is_its_integer() -> None:
    d = denoiser(Eps(), DiscreteVP(), TimeInput(1000, offset=-1))
    nodes = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    d(torch.zeros(1000, 4, 1, 1), nodes, tokens(1, 0))
    assert torch.equal(d.net.calls[0][1], torch.arange(1000.0))


@pytest.mark.parametrize("name", PREDICTIONS)
def test_loss_is_the_mean_square_distance_to_the_target(name: str) -> None:
    d = denoiser(PREDICTIONS[name]())
    x0, eps, t, cond = latents(), torch.randn_like(latents()), torch.tensor([0.2, 0.5, 0.9]), tokens(3, 0)
    loss = d.loss(x0, t, cond, eps=eps)
    c = d.path.coeffs(t, 4)
    x, target = (1 - t).view(3, 1, 1, 1) * x0 + t.view(3, 1, 1, 1) * eps, d.prediction.target(x0, eps, c)
    expected = [torch.mean((d(x, t, cond).output[i] - target[i]) ** 2) for i in range(3)]
    torch.testing.assert_close(loss, torch.stack(expected))
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in d.parameters())


def test_loss_of_a_network_that_knows_the_answer_is_nothing() -> None:
    x0, eps, t = latents(), torch.randn_like(latents()), torch.tensor([0.2, 0.5, 0.9])
    d = Denoiser(lambda x, time, cond: eps - x0, RectifiedFlow(), Flow())
    assert torch.equal(d.loss(x0, t, tokens(3, 0), eps=eps), torch.zeros(3))


def test_bf16_network_is_judged_in_float32() -> None:
    d, t = denoiser(), torch.tensor([0.2, 0.5, 0.9])
    exact = d.loss(latents(), t, tokens(3, 0), eps=torch.ones_like(latents()))
    with torch.autocast("cpu", torch.bfloat16):
        auto = d.loss(latents(), t, tokens(3, 0), eps=torch.ones_like(latents()))
    d.net.to(torch.bfloat16)
    low = d.loss(latents(dtype=torch.bfloat16), t, tokens(3, 0), eps=torch.ones(3, 4, 6, 5, dtype=torch.bfloat16))
    assert d.net.calls[-1][0].dtype == torch.bfloat16
    for loss in (auto, low):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=0.03, atol=0)  # bf16 has 8 bits
    assert d(latents(dtype=torch.bfloat16), t, tokens(3, 0)).x0.dtype == torch.float32


def test_float64_stays() -> None:
    d = denoiser().double()
    answer = d(latents(dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), tokens(3, 0))
    assert answer.x0.dtype == answer.eps.dtype == torch.float64


def test_wrapped_network(tmp_path) -> None:
    plain, t = denoiser(), torch.tensor([0.2, 0.5, 0.9])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = Denoiser(DistributedDataParallel(plain.net), plain.path, plain.prediction)
        eps = torch.ones_like(latents())
        loss = wrapped.loss(latents(), t, tokens(3, 0), eps=eps)
        assert torch.equal(loss, plain.loss(latents(), t, tokens(3, 0), eps=eps))
        loss.mean().backward()
    finally:
        dist.destroy_process_group()


def test_nothing_is_read_back_from_the_device() -> None:
    """A meta tensor has no values: whatever looks at one raises."""
    x, cond = torch.empty(3, 4, 6, 5, device="meta"), Cond(torch.empty(3, 3, 2, device="meta"))
    for path in (RectifiedFlow(), DiscreteVP(zero_terminal_snr=True)):
        for prediction in (Flow(), V(), X0(), Karras(0.5)):
            d = denoiser(prediction, path, TimeInput(1000, floor=True)).to("meta")
            d(x, torch.tensor(0.5, dtype=torch.float64), [cond, cond])
            assert d.loss(x, torch.empty(3, device="meta"), cond, eps=x).shape == (3,)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda d: d(latents(), torch.tensor(1.2), tokens(3, 0)), r"1\.2.*\[0, 1\]"),
        (lambda d: d(latents(), torch.tensor(-0.1), tokens(3, 0)), r"\[0, 1\]"),
        (lambda d: d(latents(), torch.tensor(float("nan")), tokens(3, 0)), r"\[0, 1\]"),
        (lambda d: d(latents(), torch.zeros(2), tokens(3, 0)), "t has shape"),
        (lambda d: d(latents(), torch.tensor(0.5), tokens(2, 0)), "cond has 2 rows for a batch of 3"),
        (lambda d: d(latents(), torch.tensor(0.5), [tokens(3, 0), Cond(torch.zeros(3, 9, 2))]), "one_batch=False"),
        (lambda d: d.loss(latents(), torch.zeros(3), tokens(3, 0), eps=torch.zeros(3, 4, 6, 6)), "eps has shape"),
        (lambda d: d.interpret(latents(), torch.tensor(0.5), latents()[:, :2]), "output has shape"),
    ],
)
def test_bad_input_is_named(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(denoiser())


@pytest.mark.parametrize("path", [RectifiedFlow(), CosineVP(), DiscreteVP(zero_terminal_snr=True)], ids=repr)
@pytest.mark.parametrize("name", ["epsilon", "score"])
def test_no_signal_and_a_prediction_that_divides_by_it(path: Path, name: str) -> None:
    d, one = denoiser(PREDICTIONS[name](), path), torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"t = 1.*alpha = 0"):
        d(latents(), one, tokens(3, 0))
    assert d(latents(), 0.999 * one, tokens(3, 0)).x0.isfinite().all()
    assert denoiser(V(), path)(latents(), one, tokens(3, 0)).x0.isfinite().all()


def test_a_mask_weighs_each_place_of_the_loss() -> None:
    """A network that answers 0 loses (eps - x0)² at each place: mean(mask · that) / mean(mask), row by row."""

    class Zero(nn.Module):
        def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
            return x * 0

    d = Denoiser(Zero(), RectifiedFlow(), Flow())
    x0, t = latents(), torch.tensor([0.2, 0.5, 0.9])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 1, 6, 5)
    mask[0, 0, 2, 3], mask[1, 0, 1:3] = 0.25, torch.tensor([0.5, 1.0])[:, None]
    square = (eps - x0).square()
    expected = [square[0, :, 2, 3].mean(), (square[1, :, 1].mean() + 2 * square[1, :, 2].mean()) / 3, torch.tensor(0.0)]
    found = d.loss(x0, t, tokens(3, 0), eps=eps, mask=mask)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)
    plain = d.loss(x0, t, tokens(3, 0), eps=eps)
    torch.testing.assert_close(plain, square.mean((1, 2, 3)))
    for even in (1.0, 0.3):
        same = d.loss(x0, t, tokens(3, 0), eps=eps, mask=torch.full_like(mask, even))
        torch.testing.assert_close(same, plain, rtol=1e-6, atol=0)
    for wrong in ((3, 4, 6, 5), (3, 1, 5, 6), (1, 1, 6, 5)):
        with pytest.raises(ValueError, match=r"mask of shape .* expected \(3, 1, 6, 5\)"):
            d.loss(x0, t, tokens(3, 0), eps=eps, mask=torch.ones(wrong))


def test_nothing_is_learnt_where_the_mask_is_zero() -> None:
    d = denoiser()
    x0, mask = latents(), torch.ones(3, 1, 6, 5)
    mask[:, :, :, 3:] = 0
    inside = d.loss(x0, torch.full((3,), 0.4), tokens(3, 0), eps=torch.zeros_like(x0), mask=mask)
    other = x0.clone()
    other[:, :, :, 4] += 5  # too far for a 3 by 3 kernel to be seen inside the mask
    same = d.loss(other, torch.full((3,), 0.4), tokens(3, 0), eps=torch.zeros_like(x0), mask=mask)
    torch.testing.assert_close(inside, same, rtol=1e-6, atol=0)
    assert (d.loss(other, torch.full((3,), 0.4), tokens(3, 0), eps=torch.zeros_like(x0)) > 2 * inside).all()


def test_learned_variance_goes_with_a_mask() -> None:
    """The bound's term is added as it is."""

    class Double(nn.Module):
        def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
            return torch.cat([x * 0.5, torch.full_like(x, 0.2)], dim=1)

    x0, eps, t = latents(), torch.randn(3, 4, 6, 5), torch.tensor([0.2, 0.5, 0.9])
    path = DiscreteVP()
    both = Denoiser(Double(), path, Eps(), TimeInput(1000, offset=-1), learned_variance=True)
    mask = torch.rand(3, 1, 6, 5)

    def simple(mask: Tensor | None) -> Tensor:
        class Half(nn.Module):
            def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
                return x * 0.5

        return Denoiser(Half(), path, Eps(), TimeInput(1000, offset=-1)).loss(x0, t, tokens(3, 0), eps=eps, mask=mask)

    told = [both.loss(x0, t, tokens(3, 0), eps=eps, mask=m) - simple(m) for m in (mask, None)]
    torch.testing.assert_close(told[0], told[1], rtol=1e-4, atol=1e-5)
    assert (simple(mask) - simple(None)).abs().max() > 1e-3 and told[0].abs().max() > 1e-4
