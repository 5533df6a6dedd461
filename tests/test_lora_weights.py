"""LoRA that starts, acts beside others, is fused, taken out, trained on and saved."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from ldm.models.new_tokens import add_tokens
from pipelines.lora.files import Layer
from pipelines.lora.live import (
    LoraSettings,
    active_adapters,
    adapters,
    add_lora,
    fuse,
    load_lora,
    lora_of,
    set_weights,
    unfuse,
    unload,
)
from tests import tiny
from tests.test_lora import ALL, NETS, assert_restored, drawn, gradients, inputs, stock_call, weights
from tests.twins import NETWORKS, assert_close, assert_same_gradients, call

# --- starts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "dora"),
    [
        ("default", True),
        ("gaussian", False),
        ("orthogonal", False),
        ("pissa", False),
        ("pissa", True),
        ("olora", False),
    ],
)
def test_an_init_is_the_same_with_the_same_seed_and_changes_nothing_at_first(init, dora):
    nets, states = [tiny.dit(), tiny.dit()], []
    before, y = weights(nets[0]), call(nets[0])
    for net in nets:
        torch.manual_seed(3)
        add_lora(net, LoraSettings(rank=4, alpha=6.0, init=init, dora=dora, targets="all-linear"))
        states.append(weights(net))
        assert all(("lora_" in name) == p.requires_grad for name, p in net.named_parameters())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    if init != "orthogonal":  # which is not meant to
        assert_close(call(nets[0]), y, 1e-5)
    with torch.no_grad():  # train a little
        generator = torch.Generator().manual_seed(4)
        for p in nets[0].parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    trained, found = call(nets[0]), lora_of(nets[0])
    doubled = 2 if init in ("pissa", "olora") else 1
    assert {layer.rank for layer in found.values()} == {4 * doubled}
    unload(nets[0])
    assert_restored(nets[0], before)
    fresh = tiny.dit()  # the change is one of the ORIGINAL weights
    load_lora(fresh, found)
    assert_close(call(fresh), trained, 1e-5)
    assert (trained - y).abs().max() > 0.01 * y.abs().max()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_one_that_holds_a_part_of_the_weights_counts_one(init):
    net = tiny.dit()
    y = call(net)
    add_lora(net, LoraSettings(rank=4, init=init))
    for wrong in ({"default": 0.5}, {}):
        with pytest.raises(ValueError, match="holds a part of the network's weights"):
            set_weights(net, wrong)
    with pytest.raises(ValueError, match="holds a part of the network's weights"):
        fuse(net, scale=0.5)
    assert_close(call(net), y, 1e-5)
    fuse(net)
    assert_close(call(net), y, 1e-5)
    unload(net)
    assert torch.equal(call(net), y)


def test_pissa_of_float64_is_refused():
    with pytest.raises(ValueError, match="'pissa' takes no float64"):
        add_lora(tiny.dit().double(), LoraSettings(rank=4, init="pissa"))


# --- several -----------------------------------------------------------------------------------------------------


def component(net: nn.Module, seed: int, dora: bool = False, rank: int = 2, targets="conv") -> dict[str, Layer]:
    net = copy.deepcopy(net)
    add_lora(net, LoraSettings(rank=rank, alpha=3.0, dora=dora, targets=targets))
    drawn(net, seed=seed)
    return lora_of(net)


@pytest.mark.parametrize("kind", NETS)
def test_several_act_by_their_weights_and_leave_no_trace(kind):
    net = NETWORKS[kind]()
    before, y0 = weights(net), call(net)
    first, second = component(net, 1), component(net, 2, rank=4, targets="attention")
    expected = copy.deepcopy(net)
    for part, weight in ((first, 0.7), (second, -0.4)):
        for name, layer in part.items():
            expected.get_submodule(name).weight.data += weight * layer.delta()
    state = torch.get_rng_state()
    load_lora(net, first, "a", weight=0.7)
    load_lora(net, second, "b")
    assert torch.equal(torch.get_rng_state(), state)
    set_weights(net, {"a": 0.7, "b": -0.4})
    assert adapters(net) == ["a", "b"] and active_adapters(net) == {"a": 0.7, "b": -0.4}
    y = call(net)
    assert_close(y, call(expected), 1e-5)
    set_weights(net, {})
    assert torch.equal(call(net), y0)
    set_weights(net, {"a": 0.7, "b": -0.4})
    fuse(net)
    assert_close(call(net), y, 1e-5)
    for refused in (lambda: fuse(net), lambda: set_weights(net, {"a": 1.0}), lambda: load_lora(net, first, "c")):
        with pytest.raises(ValueError, match="fused"):
            refused()
    unfuse(net)
    assert torch.equal(call(net), y)  # bit for bit
    assert all(torch.equal(layer.up, lora_of(net, "b")[name].up) for name, layer in second.items())
    fuse(net)
    fused = copy.deepcopy(net)
    unload(net)
    assert_restored(net, before)
    assert all(p.requires_grad for p in net.parameters())
    unload(fused, keep_fused=True)
    assert fused.state_dict().keys() == before.keys()
    assert_close(call(fused), y, 1e-5)


def test_fusing_counts_by_a_scale_and_refuses_nan():
    net = tiny.unet()
    part = component(net, 1)
    load_lora(net, part, "a", weight=0.5)
    load_lora(net, component(net, 2, dora=True), "b")
    set_weights(net, {"a": 0.5 * 0.8})
    y = call(net)
    set_weights(net, {"a": 0.5})
    fuse(net, scale=0.8)
    assert_close(call(net), y, 1e-5)
    unfuse(net)
    with pytest.raises(ValueError, match="active are a; say which"):
        fuse(net, ["b"])
    with pytest.raises(ValueError, match=r"no adapter 'c' in this UNet; there is a, b"):
        fuse(net, ["c"])
    half = call(net)
    name = next(iter(part))
    broken = part | {name: replace(part[name], up=part[name].up * torch.nan)}
    load_lora(net, broken, "broken")
    set_weights(net, {"broken": 1.0})
    with pytest.raises(ValueError, match="NaN"):
        fuse(net)
    set_weights(net, {"a": 0.5})
    assert torch.equal(call(net), half)


@pytest.mark.parametrize("name", ["a.b", "", "keys", "a"])
def test_names_that_clash(name):
    net = tiny.unet()
    part = component(net, 1)
    load_lora(net, part, "a")
    y = call(net)
    for load in (lambda: load_lora(net, part, name), lambda: add_lora(net, LoraSettings(rank=2), name)):
        with pytest.raises(ValueError, match=r"adapter name '.*'( is taken in this UNet|: expected a word)"):
            load()
    assert torch.equal(call(net), y)
    with pytest.raises(ValueError, match=r"no adapter 'b' in this UNet; there is a"):
        lora_of(net, "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: {}, "it holds no layer"),
        (lambda part: {f"x{name}": layer for name, layer in part.items()}, r"32 of its 32 .*: xdown_blocks.*nearest"),
        (lambda part: part | {"mid_block.attn.to_q": next(iter(part.values()))}, "1 of its 33 layers are not in this"),
        (
            lambda part: {name: replace(layer, down=torch.ones(2, 24)) for name, layer in part.items()},
            r"attn1.to_q: it changes \(16, 24\), this UNet has \(16, 16\)",
        ),
    ],
)
def test_a_lora_for_another_model(change, message):
    net = tiny.unet()
    before = weights(net)
    with pytest.raises(ValueError, match=f"a LoRA for another model.*{message}"):
        load_lora(net, change(component(net, 1, targets="attention")))
    assert_restored(net, before)
    assert adapters(net) == []


def test_a_1x1_convolution_and_a_linear_layer_take_each_other_s_form():
    net = tiny.unet()
    part = {name: layer for name, layer in component(net, 1).items() if name.endswith("proj_in")}
    assert part and all(layer.down.ndim == 4 for layer in part.values())
    flat = {n: replace(v, down=v.down.flatten(1), up=v.up.flatten(1)) for n, v in part.items()}
    load_lora(net, part, "a")
    y = call(net)
    unload(net)
    load_lora(net, flat, "a")
    assert torch.equal(call(net), y)


# --- training ----------------------------------------------------------------------------------------------------


def test_going_on_with_one_beside_another_over_a_half_base():
    net = tiny.mmdit().bfloat16()
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    first, second = component(net, 1), component(net, 2, dora=True)
    load_lora(net, first, "style", weight=0.5)
    assert {p.dtype for name, p in net.named_parameters() if ".style." in name} == {torch.bfloat16}
    assert not any(p.requires_grad for name, p in net.named_parameters() if ".style." in name)
    load_lora(net, second, "mine", trainable=True, dropout=0.1)
    trains = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(trains) == 3 * len(second) and all(".mine." in name for name in trains)
    assert {p.dtype for p in trains.values()} == {torch.float32}
    again = lora_of(net, "mine")
    for name, layer in second.items():
        assert torch.equal(again[name].down, layer.down) and torch.equal(again[name].up, layer.up)
        assert again[name].alpha == layer.alpha
        assert again[name].magnitude is not None and torch.equal(again[name].magnitude, layer.magnitude)
    net.train()
    net.enable_gradient_checkpointing()
    assert not torch.equal(call(net), call(net))  # dropout
    call(net).float().sum().backward()
    assert all(p.grad is not None for p in trains.values())
    net.eval()
    assert torch.equal(call(net), call(net))
    unload(net)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags


@pytest.mark.parametrize("kind", NETS)
def test_checkpointing_kernels_and_saving_with_a_lora(kind):
    net = NETWORKS[kind]().requires_grad_(False)
    before = weights(net)
    blocks = len(net.blocks())
    add_lora(net, replace(ALL, dora=True))
    drawn(net)
    x, time, cond = inputs(kind, torch.float32)
    plain = gradients(net(x, time, cond), net, x)
    net.enable_gradient_checkpointing()
    assert len(net.blocks()) == blocks
    assert_same_gradients(gradients(net(x, time, cond), net, x), plain, 1e-6)
    net.disable_gradient_checkpointing()
    y = call(net)
    net.set_attention_backend("plain")
    assert_close(call(net), y, 1e-5)
    net.set_attention_backend("auto")

    other = NETWORKS[kind]()
    add_lora(other, replace(ALL, dora=True))
    other.load_state_dict(net.state_dict())
    assert torch.equal(call(other), y)
    assert torch.equal(call(copy.deepcopy(net)), y)
    with pytest.raises(ValueError, match="do not fit"):
        other.load_state_dict(before)

    with pytest.raises(ValueError, match=r"a LoRA acts in .* that its weight does not hold; fuse it"):
        net.to_diffusers()
    set_weights(net, {})
    assert_restored(net.to_diffusers(), before)
    set_weights(net, {"default": 1.0})
    fuse(net)
    assert_close(stock_call(net.to_diffusers(), x, time, cond), net(x, time, cond), 1e-5)
    unload(net)
    assert not any(p.requires_grad for p in net.parameters())


def test_new_words_train_beside_a_lora():
    text = tiny.text()
    (rows,) = add_tokens(text, [("<toy>", "apple", 2)])
    _, model = text.towers()["text_encoder"]
    add_lora(model, LoraSettings(rank=2))
    assert rows.requires_grad
    assert all("lora_" in name or p is rows for name, p in model.named_parameters() if p.requires_grad)
