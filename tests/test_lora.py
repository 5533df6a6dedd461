"""LoRA in live networks: every layer against the stock twin that peft wraps in the same way; targets, ranks, alphas."""

import copy
import re
from dataclasses import replace
from typing import get_args

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from ldm.cond import Cond
from ldm.models import linear
from pipelines.lora.live import (
    LoraSettings,
    add_lora,
    lora_of,
    target_names,
    unload,
)
from pipelines.lora.targets import PRESETS
from tests import families, tiny
from tests.twins import NETWORKS, TOLERANCE, assert_close, assert_same_gradients, call
from training.schema.adapt import Presets

NETS = ["unet", "mmdit", "dit"]
ALL = LoraSettings(rank=2, alpha=5.0, targets=("",))
Q = "to_q$"


def drawn(module: nn.Module, name: str = "default", seed: int = 1) -> None:
    """What trains, taken away from where it starts: by name, so that twins get the same."""
    with torch.no_grad():
        for key, p in sorted(module.named_parameters()):
            if f".{name}." in key:
                generator = torch.Generator().manual_seed(seed + sum(map(ord, key)))
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
                p.copy_(p * (1 + 0.2 * noise) if "magnitude" in key else 0.1 * noise)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_restored(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# --- the same function as the stock twin -------------------------------------------------------------------------


def inputs(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, tiny.JOINT if kind == "mmdit" else tiny.WIDTH, generator=g, dtype=dtype)
    pooled = torch.randn(2, tiny.POOLED + 2, generator=g, dtype=dtype) if kind == "mmdit" else None
    x = torch.randn(2, 4, 8, 8, generator=g, dtype=dtype).requires_grad_()
    return x, torch.tensor([3.0, 700.0], dtype=dtype), Cond(tokens, pooled=pooled)


def stock_call(model, x, time, cond):
    if cond.pooled is not None:
        return model(x, cond.tokens, cond.pooled, time).sample
    if "PixArt" in type(model).__name__:
        none = {"resolution": None, "aspect_ratio": None}
        return model(x, encoder_hidden_states=cond.tokens, timestep=time, added_cond_kwargs=none).sample
    return model(x, time, cond.tokens).sample


def gradients(out, model, x):
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"x": x}
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return dict(zip(trains, torch.autograd.grad(out, list(trains.values()), g), strict=True))


@pytest.mark.parametrize(
    ("form", "dora"), [("float64", False), ("float64", True), ("float32", True), ("onednn", False)]
)
@pytest.mark.parametrize("kind", NETS)
def test_every_layer_acts_as_in_the_stock_twin(kind, form, dora, monkeypatch):
    if form == "onednn":  # its products at every size and on every processor
        monkeypatch.setattr(linear, "SMALL", 0)
        monkeypatch.setattr(linear, "_onednn_is_faster", lambda: True)
    dtype = torch.float64 if form == "float64" else torch.float32
    net = NETWORKS[kind]().to(dtype)
    twin = copy.deepcopy(net).to_diffusers()
    add_lora(net, replace(ALL, dora=dora))
    names = [name for name, part in twin.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=5, use_dora=dora, target_modules=names), twin)
    drawn(net)
    drawn(twin)
    x, time, cond = inputs(kind, dtype)
    ours, theirs = net(x, time, cond), stock_call(twin, x, time, cond)
    assert_close(ours, theirs, TOLERANCE[dtype])
    ours_g, theirs_g = gradients(ours, net, x), gradients(theirs, twin, x)
    assert len(theirs_g) == (3 if dora else 2) * len(names) + 1
    assert_same_gradients(ours_g, theirs_g, TOLERANCE[dtype])
    with torch.no_grad():  # other paths: in place, GELU inside the product
        assert_close(net(x, time, cond), theirs, TOLERANCE[dtype])
    unload(net)
    with torch.no_grad():
        assert (net(x, time, cond) - theirs).abs().max() > 0.05 * theirs.abs().max()  # it was the LoRA


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_the_start_is_peft_s_own(init):
    net = tiny.unet()
    twin = copy.deepcopy(net).to_diffusers()
    names = [name for name, part in net.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    torch.manual_seed(7)
    add_lora(net, replace(ALL, init=init))
    torch.manual_seed(7)
    start = True if init == "default" else init
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=5, init_lora_weights=start, target_modules=names), twin)
    theirs = dict(twin.named_parameters())
    trains = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert trains and all(torch.equal(p, theirs[name]) for name, p in trains.items())


# --- which layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
def test_presets_name_the_layers_of_the_stock_class(kind):
    net = NETWORKS[kind]()
    layers = {n: m for n, m in net.to_diffusers().named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    linears = {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    attention = {name for name in linears if re.search(r"\.attn\d?\.", name)}
    ff = {name for name in linears if ".ff." in name or ".ff_context." in name}
    blocks = {name for name in layers if "blocks." in name or name.startswith("mid_block.")}
    assert set(target_names(net, "attention")) == attention
    assert set(target_names(net, "attention+ff")) == attention | ff
    assert set(target_names(net, "all-linear")) == linears - {"proj_out"}
    assert set(target_names(net, "conv")) == blocks
    assert set(target_names(net, ("",))) == set(layers)


@pytest.mark.parametrize(("family", "tower"), [("sd", 1), ("sdxl", 2), ("sd3", 1), ("sd3", 3), ("pixart alpha", 1)])
def test_presets_name_the_layers_of_a_text_encoder(family, tower):
    model = getattr(families.PIPELINES[family](), "text_encoder" + (f"_{tower}" if tower > 1 else ""))
    linears = [n.removeprefix("text_model.") for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    inside = [name for name in linears if name.startswith("encoder.")]
    attention = [name for name in inside if "ttention" in name or "self_attn" in name]
    assert target_names(model, "attention") == attention
    for preset in ("attention+ff", "all-linear", "conv"):
        assert target_names(model, preset) == inside
    add_lora(model, LoraSettings(rank=2))
    assert list(lora_of(model)) == attention


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("to_qq",), r"'to_qq' matches no layer; near it: to_q"),
        (("to_q", "to_ko$"), r"'to_ko\$' matches no layer; near it: to_k"),
        ("atention", "'atention' matches no layer; near it: attention"),
        (("zzzzzz",), "'zzzzzz' matches no layer; near it: "),
        (("to_(q",), "is no regular expression"),
        ((), "targets are empty"),
    ],
)
def test_targets_that_match_nothing(targets, message):
    net = tiny.unet()
    before = weights(net)
    with pytest.raises(ValueError, match=message):
        add_lora(net, LoraSettings(targets=targets))
    assert_restored(net, before)
    assert all(p.requires_grad for p in net.parameters())


def test_a_preset_of_layers_that_are_not_there():
    with pytest.raises(ValueError, match="'attention': a Sequential has no such layers"):
        target_names(nn.Sequential(nn.Linear(1, 1)), "attention")
    with pytest.raises(ValueError, match="'all-linear': a Sequential has no such layers"):
        target_names(nn.Sequential(nn.Conv2d(1, 1, 1)), "all-linear")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank of a LoRA is 0"),
        ({"rank_pattern": {"to_q": -1}}, "rank_pattern 'to_q' of a LoRA is -1"),
        ({"alpha": -1.0}, "alpha of a LoRA is -1.0"),
        ({"alpha_pattern": {"to_q": 0.0}}, "alpha_pattern 'to_q' of a LoRA is 0.0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"init": "eva"}, "init 'eva' of a LoRA is not one of default, gaussian, orthogonal, pissa, olora"),
        ({"rank": 17}, r"rank 17 is above the size of down_blocks.1.*attn1.to_q, 16 x 16; give a smaller rank"),
        ({"rank": 5, "targets": ("conv_out",)}, "rank 5 is above the size of conv_out, 4 x 72"),
        ({"rank_pattern": {"to_k$": 40}}, "rank 40 is above the size of .*to_k, 16 x 16"),
        ({"rank_pattern": {"to_z$": 4}}, r"rank_pattern 'to_z\$' matches no layer"),
        ({"alpha_pattern": {"conv1": 4.0}}, "alpha_pattern 'conv1' matches no layer"),
        ({"init": "orthogonal", "rank": 3}, "'orthogonal' needs an even rank, .* has 3"),
        ({"init": "pissa", "targets": "conv"}, "'pissa' is for linear layers, .* is a convolution"),
        ({"init": "orthogonal", "targets": ("conv1",)}, "'orthogonal' is for linear layers, .* is a convolution"),
    ],
)
def test_settings_that_cannot_be(change, message):
    net = tiny.unet()
    before = weights(net)
    with pytest.raises(ValueError, match=message):
        add_lora(net, LoraSettings(**({"rank": 4} | change)))
    assert_restored(net, before)


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_alpha_and_their_patterns(rslora):
    net = tiny.unet()
    settings = LoraSettings(
        rank=4, rslora=rslora, rank_pattern={r"attn1\.to_q": 8, Q: 3}, alpha_pattern={"to_k": 2.5, "to_v": 7.0}
    )
    add_lora(net, settings)
    drawn(net)
    found = lora_of(net)
    for name, layer in found.items():
        rank = 8 if "attn1.to_q" in name else 3 if name.endswith("to_q") else 4
        alpha = 2.5 if "to_k" in name else 7.0 if "to_v" in name else rank  # none said: it counts once
        assert layer.rank == rank
        assert layer.scale == pytest.approx(alpha / (rank**0.5 if rslora else rank), rel=1e-12)
    y, bare = call(net), copy.deepcopy(net)
    unload(bare)
    for name, layer in found.items():
        bare.get_submodule(name).weight.data += layer.delta()
    assert_close(call(bare), y, 1e-5)


def test_presets_are_those_of_the_config():
    assert tuple(PRESETS) == get_args(Presets)
