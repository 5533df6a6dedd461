"""More input channels: the function stays, the new weights learn, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.guidance import apg, classifier_free
from ldm.models.base import Network
from ldm.models.grow import grow_input, grow_labels, latent_channels
from ldm.models.unet import UNet
from ldm.paths import DiscreteVP, RectifiedFlow
from ldm.prediction import Eps, Flow
from tests import tiny

NETS: dict[str, Callable[[], Network]] = {
    "unet": tiny.unet,
    "mmdit": tiny.mmdit,
    "mmdit none": lambda: tiny.mmdit(out_channels=None),
    "dit": tiny.dit,
    "dit with variance": lambda: tiny.dit(out_channels=8),
}
every = pytest.mark.parametrize("name", NETS)


def told(net: Network, rows: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Cond]:
    g = torch.Generator().manual_seed(seed)
    width = {"UNet": tiny.WIDTH, "DiT": tiny.WIDTH}.get(type(net).__name__, tiny.JOINT)
    pooled = torch.randn(rows, tiny.POOLED + 2, generator=g) if type(net).__name__ == "MMDiT" else None
    cond = Cond(torch.randn(rows, 5, width, generator=g), pooled=pooled)
    return torch.randn(rows, 4, 8, 8, generator=g), torch.tensor([3.0, 700.0])[:rows], cond


def first(net: Network) -> nn.Conv2d:
    return net.conv_in if isinstance(net, UNet) else net.pos_embed.proj  # type: ignore[return-value, union-attr]


@every
@pytest.mark.parametrize("channels", [7, 8, 9])
def test_the_function_stays_whatever_the_new_channels_hold(name: str, channels: int):
    net = NETS[name]().eval()
    x, time, cond = told(net)
    before, weight, bias = net(x, time, cond), first(net).weight.clone(), first(net).bias
    out, names = net.config["out_channels"] or 4, list(net.state_dict())
    grow_input(net, channels)
    assert first(net).weight.shape[1] == channels == first(net).in_channels == net.config["in_channels"]
    assert first(net).weight[:, :4].equal(weight) and not first(net).weight[:, 4:].any() and first(net).bias is bias
    assert net.config["out_channels"] == out and list(net.state_dict()) == names
    assert latent_channels(net) == (8 if channels == out == 8 else 4)
    for extra in (torch.zeros(2, channels - 4, 8, 8), 100 * torch.randn(2, channels - 4, 8, 8)):
        # a sum over more channels may be taken in another order
        torch.testing.assert_close(net(x, time, replace(cond, extra=extra)), before, rtol=1e-5, atol=1e-6)
        whole = net(torch.cat([x, extra], dim=1), time, cond)
        assert whole.equal(net(x, time, replace(cond, extra=extra)))


@every
def test_the_new_weights_learn_by_an_optimizer_made_afterwards(name: str):
    net = NETS[name]()
    grow_input(net, 9)
    x, time, cond = told(net)
    cond = replace(cond, extra=torch.randn(2, 5, 8, 8))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    net(x, time, cond).square().mean().backward()
    optimizer.step()
    new = first(net).weight[:, 4:]
    assert (new != 0).all() and new.abs().max() < 2e-3
    assert not torch.allclose(net(x, time, cond), net(x, time, replace(cond, extra=-cond.extra)))  # type: ignore[operator]


@every
def test_growing_twice_is_growing_once_and_other_numbers_are_refused(name: str):
    net = NETS[name]()
    grow_input(net, 4)
    assert first(net).in_channels == 4
    with pytest.raises(ValueError, match="takes 4 latent channels; expected as many or more, not 3"):
        grow_input(net, 3)
    grow_input(net, 9)
    nn.init.normal_(first(net).weight)
    layer = first(net)
    grow_input(net, 9)
    assert first(net) is layer and layer.weight[:, 4:].any()
    for other in (4, 8, 10):
        with pytest.raises(ValueError, match=rf"takes 9 channels, 4 latent ones and 5 more; {other} are asked for"):
            grow_input(net, other)


def test_dtype_freezing_and_mode_stay():
    net = tiny.unet().to(torch.bfloat16).requires_grad_(False).eval()
    grow_input(net, 9)
    assert net.conv_in.weight.dtype == torch.bfloat16 and not net.conv_in.weight.requires_grad
    assert not any(m.training for m in net.modules())
    x, time, cond = told(net)
    cond = replace(cond.to(torch.bfloat16), extra=torch.ones(2, 5, 8, 8))  # float32, as a task makes it
    assert net(x.bfloat16(), time, cond).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="VAE has no input to grow"):
        grow_input(tiny.vae(), 9)


@every
def test_grown_networks_are_the_stock_classes_of_so_many_channels(name: str):
    net = NETS[name]().eval()
    grow_input(net, 9)
    nn.init.normal_(first(net).weight, std=0.1)
    x, time, cond = told(net)
    cond = replace(cond, extra=torch.randn(2, 5, 8, 8))
    stock = net.to_diffusers()
    assert stock.config.in_channels == 9
    kw = dict(encoder_hidden_states=cond.tokens, timestep=time)
    kw |= {"pooled_projections": cond.pooled} if cond.pooled is not None else {}
    if "dit" in name.split():
        kw["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    theirs = stock(torch.cat([x, cond.extra], dim=1), **kw).sample  # type: ignore[list-item]
    torch.testing.assert_close(net(x, time, cond), theirs, rtol=1e-4, atol=1e-4)
    again = type(net).from_diffusers(stock)
    assert again(x, time, cond).equal(net(x, time, cond))


@every
def test_the_loss_and_guidance_carry_the_extra_channels(name: str):
    net = NETS[name]().eval()
    grow_input(net, 9)
    nn.init.normal_(first(net).weight, std=0.1)
    x, _, cond = told(net)
    extra = torch.randn(2, 5, 8, 8)
    cond, null = replace(cond, extra=extra), replace(told(net, seed=1)[2], extra=extra)
    flow, t = RectifiedFlow(), torch.tensor(0.4)
    variance = net.config["out_channels"] == 8
    path, kind = (DiscreteVP(), Eps()) if variance else (flow, Flow())
    d = Denoiser(net, path, kind, learned_variance=variance)
    a, b = (d(x, t, one).output for one in (cond, null))
    guided = classifier_free(d, cond, null, 3.0)(x, t)
    torch.testing.assert_close(guided.output, b + 3 * (a - b), rtol=1e-4, atol=1e-4)
    in_turns = classifier_free(d, cond, null, 3.0, one_batch=False)(x, t)
    torch.testing.assert_close(guided.output, in_turns.output, rtol=1e-4, atol=1e-4)
    assert apg(d, cond, null, 3.0)(x, t).x0.shape == x.shape
    other = replace(cond, extra=-extra)
    assert not d(x, t, other).output.allclose(a)
    eps, times = torch.randn_like(x), torch.tensor([0.3, 0.7])
    assert not d.loss(x, times, other, eps=eps).allclose(d.loss(x, times, cond, eps=eps))
    one = replace(told(net, rows=1)[2], extra=extra[:1])  # a row for all
    assert d(x, t, one).output.shape == x.shape


def test_extra_channels_of_another_shape_are_named():
    for name in ("unet", "mmdit", "dit"):
        net = NETS[name]().eval()
        x, time, cond = told(net)
        with pytest.raises(ValueError, match=r"(4 channels|\(2, 9, 8, 8\)|9 channels)"):
            net(x, time, replace(cond, extra=torch.zeros(2, 5, 8, 8)))
        grow_input(net, 9)
        with pytest.raises(ValueError, match=r"4 channels|\(2, 4, 8, 8\)"):
            net(x, time, cond)
        with pytest.raises(ValueError, match=r"Cond.extra: shape \(2, 5, 4, 4\), expected \(2, C', 8, 8\)"):
            net(x, time, replace(cond, extra=torch.zeros(2, 5, 4, 4)))


def test_labels_begin_at_nothing_and_learn():
    net = tiny.unet().eval()
    x, time, cond = told(net)
    before = net(x, time, cond)
    grow_labels(net, 1000)
    labels = replace(cond, class_labels=torch.tensor([0, 999]))
    assert net(x, time, labels).equal(before) and net.config["num_class_embeds"] == 1000
    net(x, time, labels).square().mean().backward()
    gradient = net.class_embedding.weight.grad  # type: ignore[union-attr]
    assert gradient is not None and gradient[[0, 999]].any(1).all() and not gradient[1:999].any()  # type: ignore[index]
    with torch.no_grad():
        net.class_embedding.weight.normal_()  # type: ignore[union-attr]
    stock = net.to_diffusers()
    theirs = stock(x, time, encoder_hidden_states=cond.tokens, class_labels=labels.class_labels).sample
    torch.testing.assert_close(net(x, time, labels), theirs, rtol=1e-4, atol=1e-4)
    table = net.class_embedding
    grow_labels(net, 1000)
    assert net.class_embedding is table
    with pytest.raises(ValueError, match="class_embed_type None and 1000 labels; expected None and 10"):
        grow_labels(net, 10)
