"""What the tests of our networks share: the stock twin with random weights, and how equal two results have to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.models.base import Network
from ldm.models.mmdit import MMDiT
from ldm.models.vae import VAE
from tests import tiny

Module = TypeVar("Module", bound=nn.Module)
# Of the largest value of a tensor. The two add up in another order and ours fuses multiply and add.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = list(TOLERANCE)
NETWORKS: dict[str, Callable[[], Network]] = {
    "unet": tiny.unet,
    "vae": tiny.vae,
    "mmdit": lambda: tiny.mmdit(dual_attention_layers=(1,), qk_norm="rms_norm"),
    "dit": lambda: tiny.dit(num_layers=4),
}


def call(net: Network) -> Tensor:
    """What one of ``NETWORKS`` gives for two pictures, the second with text that is folded and hidden in part."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(net.dtype)

    if isinstance(net, VAE):
        return net(draw(2, 3, 16, 16), draw(2, 4, 8, 8))[0]
    width = tiny.JOINT if isinstance(net, MMDiT) else tiny.WIDTH
    cond = Cond(draw(2, 5, width), torch.tensor([[0.0] * 5, [0.0, 1.5, 0.0, -torch.inf, -torch.inf]]))
    if isinstance(net, MMDiT):
        cond = Cond(cond.tokens, cond.bias, pooled=draw(2, tiny.POOLED + 2))
    return net(draw(2, 4, 8, 8), torch.tensor([3.0, 700.0]), cond)


def random_twin(kind: Callable[..., Any], dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A stock model, none of whose weights is zero or one, the same at every call."""
    torch.manual_seed(0)
    model: Any = kind(**config)
    return moved(model.to(dtype))


def moved(model: Module, scale: float = 0.1) -> Module:
    """Every weight taken away from where it starts, where a mix-up would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Standard normal, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def times(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(batch, generator=generator, dtype=torch.float64) * 1000).to(dtype)


def gradients(out: Tensor, model: nn.Module, **others: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of ``out``, by the model's parameters and what else is named."""
    wanted = dict(model.named_parameters()) | others
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), weights), strict=True))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float, what: str = "output", floor: float = 0.0) -> None:
    difference, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert difference <= tolerance * max(size, floor), f"{what}: {difference:.2e} of {size:.2e}"


def assert_same_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    largest = max(g.abs().max().item() for g in theirs.values())
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        # One kind is zero but for rounding: softmax does not see a bias that all keys share.
        floor = largest if name.endswith("to_k.bias") else 1e-3 * largest
        assert_close(ours[name], g, tolerance, f"gradient of {name}", floor)


def assert_shared(theirs: Any, ours: Any) -> Any:
    """Both hold the same tensors under the same names, and so does the stock model that ours gives back."""
    back: Any = ours.to_diffusers()
    first, *others = ({**m.state_dict(keep_vars=True), **dict(m.named_buffers())} for m in (theirs, ours, back))
    for other in others:
        assert first.keys() == other.keys()
        for name, value in first.items():
            assert value.data_ptr() == other[name].data_ptr(), name
            assert value.requires_grad == other[name].requires_grad, name
    for field in ours.config:
        assert back.config[field] == theirs.config[field]
    return back


def assert_start(net: nn.Module, zero: set[nn.Module], small: set[nn.Module]) -> None:
    """DiT's start: no biases; layers of ``zero`` at zero, of ``small`` from N(0, 0.02²), the others by Xavier."""
    for name, m in net.named_modules():
        if not isinstance(m, nn.Linear | nn.Conv2d):
            continue
        assert m.bias is not None and not m.bias.any(), name
        w = m.weight.flatten(1)
        if m in zero:
            assert not w.any(), name
            continue
        std = 0.02 if m in small else math.sqrt(2 / sum(w.shape))
        # The standard error of a standard deviation is at most 1 / sqrt(2 n) of it; five of them.
        assert abs(w.std().item() / std - 1) < 5 / math.sqrt(2 * w.numel()), name
        if m not in small:
            assert w.abs().max() <= math.sqrt(3) * std * (1 + 1e-6), name  # Xavier draws from a box


def train(net: nn.Module, loss: Callable[[], Tensor], steps: int = 12) -> list[float]:
    """The losses; the gradients of the last step are left where they are."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
