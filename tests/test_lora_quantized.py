"""LoRA over a base in 4 or 8 bits."""

import copy
import sys

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from pipelines.lora.live import LoraSettings, add_lora, fuse, load_lora, lora_of, unload
from pipelines.lora.quantized import KINDS, quantize
from tests import families, tiny
from tests.twins import NETWORKS, assert_close, assert_same_gradients, call

NETS = ["unet", "mmdit", "dit"]


def plain_weight(layer) -> torch.Tensor:
    """bitsandbytes' own reading of its bits."""
    if layer.weight.dtype == torch.uint8:
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return bnb.functional.int8_vectorwise_dequant(layer.weight.data, scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
def test_it_is_the_network_with_rounded_weights_and_trains(name, kind, caplog):
    net = NETWORKS[name]().train()
    rounded, y = copy.deepcopy(net), call(net)
    chosen = quantize(net, kind)
    linears = [place for place, part in rounded.named_modules() if isinstance(part, nn.Linear)]
    apart = [place for place in linears if place not in chosen]
    assert all(
        "time" in place or place in ("proj_out", "norm_out.linear") or "adaln_single" in place for place in apart
    )
    assert 0 < len(apart) < len(chosen)
    for place in chosen:
        layer = rounded.get_submodule(place)
        layer.weight.data = plain_weight(net.get_submodule(place)).to(layer.weight.dtype)
    assert_close(call(net), call(rounded), 1e-5)
    off = (call(net) - y).abs().max() / y.abs().max()
    assert 0 < off < (0.2 if kind == "nf4" else 0.02)

    for model in (net, rounded):
        torch.manual_seed(0)
        add_lora(model, LoraSettings(rank=2, targets="all-linear", init="gaussian"))
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    p.copy_(0.1 * torch.randn(p.shape))
    found = {"quantized": net, "rounded": rounded}
    grads = {}
    for key, model in found.items():
        call(model).square().sum().backward()
        grads[key] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in n for n in grads["quantized"]) and len(grads["quantized"]) == 2 * len(linears) - 2 * (
        "proj_out" in linears
    )
    assert_same_gradients(grads["quantized"], grads["rounded"], 1e-4)

    bits = {place: net.get_submodule(place).base_layer.weight.data.clone() for place in chosen}
    optimizer, losses = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(3):
        loss = (call(net) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.eval()  # a picture between two steps
        with torch.no_grad():
            assert_close(call(net), call(net.train()), 0.05 if kind == "int8" else 1e-5)
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(net.get_submodule(place).base_layer.weight.data, value) for place, value in bits.items())
    assert "inputs will be cast" not in caplog.text

    part = lora_of(net)
    with pytest.raises(ValueError, match="no LoRA can be added to its weight; load the model without"):
        fuse(net)
    unload(net)
    with pytest.raises(ValueError, match="is quantized; export the network that it was made from"):
        net.to_diffusers()
    whole = NETWORKS[name]()
    load_lora(whole, part)  # what was learnt goes onto the whole weights
    fuse(whole)


@pytest.mark.parametrize("tower", ["text_encoder", "text_encoder_3"])
def test_text_encoders(tower):
    model = getattr(families.sd3(), tower)
    rounded, ids = copy.deepcopy(model), torch.arange(8)[None]
    chosen = quantize(model, "nf4")
    assert chosen and not any(place.endswith((".wo", "text_projection")) for place in chosen)
    for place in chosen:
        rounded.get_submodule(place).weight.data = plain_weight(model.get_submodule(place))
    add_lora(model, LoraSettings(rank=2))
    assert_close(model(ids).last_hidden_state, rounded(ids).last_hidden_state, 1e-5)


def test_what_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="quantization 'fp4' is not one of nf4, int8"):
        quantize(tiny.dit(), "fp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is torch.float64; expected float32 or half"):
        quantize(tiny.dit().double(), "nf4")
    with pytest.raises(ValueError, match="no linear layers"):
        quantize(nn.Sequential(nn.Conv2d(1, 1, 1)), "nf4")
    net = tiny.dit()
    add_lora(net, LoraSettings(rank=2))
    with pytest.raises(ValueError, match="holds a LoRA; quantize it before"):
        quantize(net, "nf4")
    unload(net)
    quantize(net, "int8")
    with pytest.raises(ValueError, match="quantized already"):
        quantize(net, "nf4")
    with pytest.raises(ValueError, match=r"dora over int8, as .* is, is not taken; take nf4"):
        add_lora(net, LoraSettings(rank=2, dora=True))
    for init in ("pissa", "olora", "orthogonal"):
        with pytest.raises(ValueError, match=rf"'{init}' needs the weights, but .* is quantized"):
            add_lora(net, LoraSettings(rank=2, init=init))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes .*pip install 'bitsandbytes>="):
        quantize(tiny.dit(), "nf4")
