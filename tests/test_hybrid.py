"""The hybrid loss of Nichol & Dhariwal, and the standards that ``Denoiser.loss`` keeps with and without it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.denoiser import Denoiser, TimeInput
from ldm.likelihood import variance_range
from ldm.paths import PATHS, DiscreteVP, Path, RectifiedFlow
from ldm.prediction import X0, Eps, Flow, Prediction, V
from ldm.process import posterior

NONE = Cond(torch.zeros(1, 1, 1))
CHAIN, ZERO = DiscreteVP(), DiscreteVP(zero_terminal_snr=True)
SHAPE = (4, 2, 3, 3)
T = torch.tensor([0.001, 0.002, 0.5, 0.999], dtype=torch.float64)


def numbers(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(2, channels, 3, padding=1)
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if not torch.compiler.is_compiling():
            self.times.append(time)
        return torch.tanh(self.mix(x)) + torch.cos(time).view(-1, 1, 1, 1).to(x.dtype)


@pytest.mark.parametrize("prediction", [Eps(), X0(), V(), Flow()], ids=repr)
@pytest.mark.parametrize("path", [CHAIN, DiscreteVP([0.1, 0.2, 0.4, 0.9]), RectifiedFlow()], ids=repr)
def test_gradients_of_the_hybrid_loss(path: Path, prediction: Prediction) -> None:
    """A network that says what it is told: the mean half feels L_simple alone, the other the bound's derivative."""
    x0, eps, m, v = numbers(0), numbers(1), numbers(2).requires_grad_(), numbers(3).tanh().requires_grad_()
    steps = path.num_train_timesteps if isinstance(path, DiscreteVP) else 1000
    t = T if steps == 1000 else torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    hybrid = Denoiser(lambda *_: torch.cat([m, v], 1), path, prediction, learned_variance=True, vb_weight=0.01)
    plain = Denoiser(lambda *_: m, path, prediction)
    loss, simple = hybrid.loss(x0, t, NONE, eps=eps), plain.loss(x0, t, NONE, eps=eps)
    of_mean, of_var = torch.autograd.grad(loss.sum(), [m, v])
    torch.testing.assert_close(of_mean, torch.autograd.grad(simple.sum(), m)[0], rtol=1e-12, atol=0)

    # with e = f log(beta / beta tilde) and q = (error of the mean)^2 / Sigma: KL = (e + exp(-e) - 1 + q) / 2, and
    # L_0 = (log(2 pi Sigma) + q) / 2, in bits and over the 18 values of a row
    s = (t * steps - 1).round() / steps
    first = (s == 0).view(4, 1, 1, 1)
    log_small, ratio = (u.view(4, 1, 1, 1) for u in variance_range(path, s, t))
    e = (v + 1) / 2 * ratio
    told = plain.interpret(path.mix(x0, eps, t), t, m).x0
    q = (posterior(path, s, t).of_x0.view(4, 1, 1, 1) * (x0 - told)) ** 2 * torch.exp(-log_small - e)
    unit = 0.01 * steps / (math.log(2) * 18)
    slope = unit * ratio / 2 * (1 - torch.where(first, 0.0, torch.exp(-e)) - q) / 2
    torch.testing.assert_close(of_var, slope.detach(), rtol=1e-8, atol=1e-10)
    value = torch.where(first, math.log(2 * math.pi) + log_small + e, e + torch.expm1(-e)) + q
    torch.testing.assert_close(loss, simple + (unit * value / 2).flatten(1).sum(1), rtol=1e-8, atol=1e-10)


def test_no_weight_is_the_simple_loss() -> None:
    net = Net(4).double()
    hybrid = Denoiser(net, CHAIN, Eps(), learned_variance=True, vb_weight=0.0)
    plain = Denoiser(lambda *told: net(*told).chunk(2, 1)[0], CHAIN, Eps())
    args = numbers(0), T, NONE
    torch.testing.assert_close(hybrid.loss(*args, eps=numbers(1)), plain.loss(*args, eps=numbers(1)), rtol=0, atol=0)
    assert Denoiser(net, CHAIN, Eps(), learned_variance=True).vb_weight == 0.001


def test_the_bound_is_of_whole_steps() -> None:
    hybrid = Denoiser(Net(4).double(), CHAIN, Eps(), TimeInput(1000, offset=-1), learned_variance=True)
    between = hybrid.loss(numbers(0), T - 0.0004, NONE, eps=numbers(1))
    at_node = hybrid.loss(numbers(0), T, NONE, eps=numbers(1))
    assert torch.equal(between, at_node)
    # every node told in float32 is itself, and t = 0, where there is no step, is the first
    hybrid.net.times.clear()
    nodes = torch.arange(1001, dtype=torch.float32) / 1000
    one = torch.zeros(1, 2, 1, 1, dtype=torch.float64).expand(1001, 2, 1, 1)
    assert hybrid.loss(one, nodes, NONE, eps=one).isfinite().all()
    assert torch.equal(hybrid.net.times[0], torch.arange(1000.0)[[0, *range(1000)]])
    scalar = hybrid.loss(numbers(0), T[2], NONE, eps=numbers(1))
    torch.testing.assert_close(scalar[2], at_node[2], rtol=1e-12, atol=0)


def test_answers_have_the_data_s_channels() -> None:
    net = Net(4).double()
    told = Denoiser(net, CHAIN, V(), learned_variance=True)(numbers(0), T, NONE)
    assert all(x.shape == SHAPE for x in (told.x0, told.eps, told.output, told.var_frac))
    output, v = net(numbers(0), (1000 * T).float(), NONE).chunk(2, 1)
    torch.testing.assert_close(told.output, output)
    torch.testing.assert_close(told.var_frac, (v + 1) / 2)


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_wrong_channels_are_refused(channels: int) -> None:
    denoiser = Denoiser(Net(channels).double(), CHAIN, V(), learned_variance=True)
    with pytest.raises(ValueError, match="twice the"):
        denoiser.loss(numbers(0), T, NONE, eps=numbers(1))
    if channels != 2:
        with pytest.raises(ValueError, match="twice the"):
            denoiser(numbers(0), T, NONE)
    with pytest.raises(ValueError, match="the network gave"):
        Denoiser(Net(4).double(), CHAIN, V()).loss(numbers(0), T, NONE, eps=numbers(1))


@pytest.mark.parametrize("bad", [-0.1, 1.001, math.nan, math.inf])
@pytest.mark.parametrize("learned", [False, True])
def test_times_of_rows_are_checked(bad: float, learned: bool) -> None:
    denoiser = Denoiser(Net(4 if learned else 2).double(), CHAIN, V(), learned_variance=learned)
    for t in (torch.tensor([0.5, 0.1, bad, 0.2]), torch.tensor(bad)):
        with pytest.raises(ValueError, match=rf"t is {str(bad)[:5]}.*\[0, 1\]"):
            denoiser(numbers(0), t, NONE)
        with pytest.raises(ValueError, match=rf"t is {str(bad)[:5]}.*\[0, 1\]"):
            denoiser.loss(numbers(0), t, NONE, eps=numbers(1))


def test_rows_without_signal_are_refused_where_x0_is_asked_for() -> None:
    t = torch.tensor([0.5, 0.1, 1.0, 0.2], dtype=torch.float64)
    plain = Denoiser(Net(2).double(), ZERO, Eps())
    with pytest.raises(ValueError, match=r"Eps says nothing of x0 at t = 1.*alpha = 0"):
        plain(numbers(0), t, NONE)
    assert plain.loss(numbers(0), t, NONE, eps=numbers(1)).isfinite().all()  # the noise itself is no secret
    with pytest.raises(ValueError, match=r"Eps says nothing of x0"):
        Denoiser(Net(4).double(), ZERO, Eps(), learned_variance=True).loss(numbers(0), t, NONE, eps=numbers(1))


def test_rows_keep_the_dtype_of_the_data() -> None:
    x0, eps, t = numbers(0).float(), numbers(1).float(), torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    for learned in (False, True):
        denoiser = Denoiser(Net(4 if learned else 2), CHAIN, V(), learned_variance=learned)
        assert denoiser.loss(x0, t, NONE, eps=eps).dtype == denoiser(x0, t, NONE).x0.dtype == torch.float32


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", PATHS)
def test_loss_compiles_in_one_graph(name: str, learned: bool) -> None:
    torch.compiler.reset()
    denoiser = Denoiser(Net(4 if learned else 2), PATHS[name](), V(), learned_variance=learned)
    x0, eps, t = numbers(0).float(), numbers(1).float(), torch.tensor([0.001, 0.4, 0.7, 1.0])
    plain = denoiser.loss(x0, t, NONE, eps=eps)
    compiled = torch.compile(denoiser.loss, backend="eager", fullgraph=True)(x0, t, NONE, eps=eps)
    torch.testing.assert_close(compiled, plain)


def test_nothing_is_read_back_from_the_device() -> None:
    """A meta tensor has no values: whatever looks at one raises."""
    x = torch.empty(SHAPE, device="meta")
    for path in (RectifiedFlow(), ZERO):
        denoiser = Denoiser(Net(4), path, V(), learned_variance=True).to("meta")
        for t in (torch.empty(4, device="meta"), torch.tensor(0.5)):
            assert denoiser.loss(x, t, NONE.to("meta"), eps=x).shape == (4,)
