"""The UNets that people have, at full size without weights: names, shapes and counts; and what else they are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from torch.utils.flop_counter import FlopCounterMode

from ldm.cond import Cond
from ldm.models import linear
from ldm.models.unet import UNet

TEXT_DOWN, TEXT_UP, DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UpBlock2D"
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SD21 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (DOWN, TEXT_DOWN, TEXT_DOWN),
    "up_block_types": (TEXT_UP, TEXT_UP, UP),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    **SDXL,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": (DOWN, TEXT_DOWN, TEXT_DOWN, DOWN),
    "up_block_types": (UP, TEXT_UP, TEXT_UP, UP),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
UPSCALER = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": (DOWN, TEXT_DOWN, TEXT_DOWN, TEXT_DOWN),
    "up_block_types": (TEXT_UP, TEXT_UP, TEXT_UP, UP),
    "cross_attention_dim": 1024,
    "only_cross_attention": (True, True, True, False),
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
# Millions of parameters as the original code prints them ("DiffusionWrapper has 859.52 M params"); the refiner's by the
# size of its weights, LCM's as SD 1.5's and a layer of 256 x 320.
FULL: dict[str, tuple[dict[str, Any], float]] = {
    "sd15": (SD15, 859.52),
    "sd15_inpaint": ({**SD15, "in_channels": 9}, 859.54),
    "sd21": (SD21, 865.91),
    "sd2_depth": ({**SD21, "in_channels": 5}, 865.91),
    "unclip": ({**SD21, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}, 870.17),
    "upscaler": (UPSCALER, 473.40),
    "sdxl": (SDXL, 2567.46),
    "refiner": (REFINER, 2259.53),
    "lcm": ({**SD15, "time_cond_proj_dim": 256}, 859.60),
}
EXACT = {"sd15": 859_520_964, "sdxl": 2_567_463_684}
TINY = {"norm_num_groups": 4, "cross_attention_dim": 24, "layers_per_block": 1, "attention_head_dim": 2}
TWO = {"block_out_channels": (8, 16), "down_block_types": (TEXT_DOWN,) * 2, "up_block_types": (TEXT_UP,) * 2}
TOLD: dict[str, dict[str, Any]] = {
    "inpaint": {**TINY, **TWO, "in_channels": 9},
    "depth": {**TINY, **TWO, "in_channels": 5, "use_linear_projection": True},
    "learned_variance": {**TINY, **TWO, "out_channels": 8},
    "upscaler": {**TINY, **TWO, "in_channels": 7, "only_cross_attention": (True, False), "num_class_embeds": 30},
    "cross_only": {**TINY, **TWO, "only_cross_attention": True, "use_linear_projection": True},
    "unclip": {**TINY, **TWO, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    "lcm": {**TINY, **TWO, "time_cond_proj_dim": 12},
    "refiner": {
        **TINY,
        "block_out_channels": (8, 16, 16),
        "down_block_types": (DOWN, TEXT_DOWN, DOWN),
        "up_block_types": (UP, TEXT_UP, UP),
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 10 + 6 * 8,
    },
}


def make_stock(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any = UNet2DConditionModel(**config)
    model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # norms too: their stock start, 1 and 0, would hide a swap
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def make_inputs(config: dict[str, Any], batch: int, height: int, width: int, length: int, dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(batch, 4, height, width, dtype=dtype)
    cond = Cond(torch.randn(batch, length, config["cross_attention_dim"], dtype=dtype))
    if config.get("in_channels", 4) > 4:
        cond = replace(cond, extra=torch.randn(batch, config["in_channels"] - 4, height, width, dtype=dtype))
    if "num_class_embeds" in config:
        cond = replace(cond, class_labels=torch.arange(batch) * 7 + 8)
    if "class_embed_type" in config:
        vectors = torch.randn(batch, config["projection_class_embeddings_input_dim"], dtype=dtype)
        cond = replace(cond, class_labels=vectors)
    if "time_cond_proj_dim" in config:
        cond = replace(cond, guidance=torch.linspace(1.5, 9, batch))
    if "addition_embed_type" in config:
        sizes = torch.tensor([[512, 768, 0, 16, 1024, 1024]]).repeat(batch, 1)
        cond = replace(cond, pooled=torch.randn(batch, 10, dtype=dtype), size_ids=sizes)
    return x, torch.linspace(3, 980, batch).to(dtype), cond


def call_stock(model: Any, x: torch.Tensor, time: torch.Tensor, cond: Cond) -> torch.Tensor:
    width = model.config.time_cond_proj_dim
    guidance = None
    if cond.guidance is not None:
        embed: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        guidance = embed(None, cond.guidance - 1, embedding_dim=width).to(x.dtype)
    return model(
        x if cond.extra is None else torch.cat([x, cond.extra], dim=1),
        time,
        encoder_hidden_states=cond.tokens,
        class_labels=cond.class_labels,
        timestep_cond=guidance,
        added_cond_kwargs=None if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.size_ids},
    ).sample


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def outputs_and_gradients(model: Any, call: Any, x: torch.Tensor, cond: Cond) -> dict[str, Any]:
    model.zero_grad()
    leaf, tokens = x.clone().requires_grad_(), cond.tokens.clone().requires_grad_()
    out = call(leaf, replace(cond, tokens=tokens))
    (out * torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out)).sum().backward()
    found: dict[str, Any] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"out": out.detach(), "x": leaf.grad, "tokens": tokens.grad}


def assert_equal_gradients(ours: dict[str, Any], stock: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == stock.keys()
    assert relative(ours.pop("out"), stock["out"]) < tolerance
    # a gradient that nearly cancels (a bias in front of a norm) has few digits: the biggest one sets a floor
    floor = 1e-4 * max(g.abs().max() for n, g in stock.items() if n != "out")
    for key, gradient in ours.items():
        scale = torch.maximum(stock[key].abs().max(), floor)
        assert ((gradient - stock[key]).abs().max() / scale).item() < tolerance, key


@pytest.mark.parametrize("name", FULL)
def test_full_size_networks_have_the_stock_names_and_shapes_and_the_published_count(name):
    config, millions = FULL[name]
    with torch.device("meta"):
        model: Any = UNet2DConditionModel(**config)
        net = UNet(**config)
    assert [(k, v.shape) for k, v in net.state_dict().items()] == [(k, v.shape) for k, v in model.state_dict().items()]
    count = sum(p.numel() for p in net.parameters())
    assert f"{count / 1e6:.2f}" == f"{millions:.2f}"
    assert count == EXACT.get(name, count)


# float32: some hundred roundings of 6e-8 in another order; float64: the same, 2e-16 each.
@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),  # batch, height, width, text tokens
    [
        ((1, 8, 8, 3), torch.float32, 1e-5),
        ((3, 16, 8, 77), torch.float64, 1e-10),
        ((2, 4, 12, 1), torch.float64, 1e-10),
    ],
)
@pytest.mark.parametrize("name", TOLD)
def test_everything_a_network_can_be_told_is_heard_as_by_the_stock_class(name, size, dtype, tolerance):
    model = make_stock(TOLD[name], dtype)
    net = UNet.from_diffusers(model)
    x, time, cond = make_inputs(TOLD[name], *size, dtype=dtype)
    ours = outputs_and_gradients(model, lambda x, c: net(x, time, c), x, cond)
    stock = outputs_and_gradients(model, lambda x, c: call_stock(model, x, time, c), x, cond)
    assert_equal_gradients(ours, stock, tolerance)
    assert list(net.to_diffusers().state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    ("name", "told"), [("upscaler", "class_labels"), ("unclip", "class_labels"), ("lcm", "guidance")]
)
def test_what_it_is_told_makes_a_difference_and_goes_through_cond(name, told):
    net = UNet.from_diffusers(make_stock(TOLD[name]))
    x, time, cond = make_inputs(TOLD[name], 2, 8, 8, 3)
    both = Cond.cat([cond, cond.map(lambda v: v.flip(0))]).to(torch.float32)
    out = net(x.repeat(2, 1, 1, 1), time.repeat(2), both)
    assert relative(out[:2], net(x, time, cond)) < 1e-5
    other = replace(cond, **{told: getattr(cond, told).flip(0)})
    assert relative(net(x, time, other), net(x, time, cond)) > 1e-3


def test_without_guidance_a_distilled_network_is_the_plain_one():
    model = make_stock(TOLD["lcm"])
    x, time, cond = make_inputs(TOLD["lcm"], 2, 8, 8, 3)
    cond = replace(cond, guidance=None)
    assert relative(UNet.from_diffusers(model)(x, time, cond), call_stock(model, x, time, cond)) < 1e-5


def test_labels_stay_whole_when_the_rest_is_rounded():
    cond = Cond(torch.randn(1, 2, 3), class_labels=torch.tensor([999]), guidance=torch.tensor([7.5]))
    half = cond.to(torch.bfloat16)
    assert half.class_labels is not None and half.class_labels.tolist() == [999]
    assert half.class_labels.dtype == torch.int64 and half.tokens.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("upscaler", {"class_labels": None}, r"class_labels: missing, expected \(2,\)"),
        ("upscaler", {"class_labels": torch.zeros(2)}, r"expected whole numbers from 0 to 29"),
        ("upscaler", {"class_labels": torch.tensor([3, 30])}, r"\[3, 30\]; expected whole numbers from 0 to 29"),
        ("unclip", {"class_labels": torch.zeros(2, 9)}, r"class_labels: shape \(2, 9\), expected \(2, 10\)"),
        ("lcm", {"guidance": torch.tensor(7.5)}, r"guidance: shape \(\), expected \(2,\)"),
        ("depth", {"guidance": torch.ones(2)}, r"guidance: this UNet's config has no layer that takes it"),
        ("lcm", {"class_labels": torch.zeros(2).long()}, "class_labels: this UNet's config has no layer"),
    ],
)
def test_what_it_cannot_be_told_is_refused(name, change, message):
    net = UNet(**TOLD[name])
    x, time, cond = make_inputs(TOLD[name], 2, 8, 8, 3)
    with pytest.raises(ValueError, match=message):
        net(x, time, replace(cond, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'.*expected None"),
        ({"class_embed_type": "projection"}, "or 'projection' with projection_class_embeddings_input_dim"),
        ({"num_class_embeds": 0}, "num_class_embeds = 0"),
        ({"only_cross_attention": (True,)}, "only_cross_attention.*one truth value, or one for each of the 2 levels"),
        ({"only_cross_attention": (1, 0)}, "only_cross_attention"),
    ],
)
def test_options_that_contradict_themselves_are_refused(change, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        UNet(**TINY, **TWO, **change)


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN's products at every size and on every processor."""
    monkeypatch.setattr(linear, "SMALL", 0)
    monkeypatch.setattr(linear, "_onednn_is_faster", lambda: True)


@pytest.mark.parametrize("name", ["upscaler", "depth"])
def test_the_faster_products_are_the_same_network(onednn, name):
    config = {**TOLD[name], "block_out_channels": (8, 128)}  # 128 channels of 2 x 4: few pixels, one product
    model = make_stock(config)
    net = UNet.from_diffusers(model)
    x, time, cond = make_inputs(config, 2, 4, 4, 3)
    ours = outputs_and_gradients(model, lambda x, c: net(x, time, c), x, cond)
    stock = outputs_and_gradients(model, lambda x, c: call_stock(model, x, time, c), x, cond)
    expected = ours["out"]
    assert_equal_gradients(ours, stock, 1e-5)
    with torch.no_grad():
        assert relative(net(x, time, cond), expected) < 1e-5
    net.requires_grad_(False)  # guidance: a gradient to the latents alone
    leaf = x.clone().requires_grad_()
    out = net(leaf, time, cond)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert leaf.grad is not None
    assert relative(leaf.grad, ours["x"]) < 1e-5


@pytest.mark.parametrize(("width_in", "width"), [(6, 10), (10, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs_and_so_are_its_first_and_second_gradients(onednn, width_in, width, bias):
    torch.manual_seed(0)
    layer = linear.Linear(width_in, width, bias=bias)
    x = torch.randn(2, 3, width_in, requires_grad=True)
    leaves = [x, *layer.parameters()]
    found = []
    for f in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        y = f(x)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.cat([g.flatten() for g in first]).square().sum(), leaves)
        found.append([y, *first, *second])
    assert all(relative(a, b) < 1e-5 for a, b in zip(*found, strict=True))


def test_linear_leaves_transforms_autocast_and_counters_to_torch(onednn):
    torch.manual_seed(0)
    layer, x = linear.Linear(6, 4), torch.randn(5, 6)
    expected = F.linear(x, layer.weight, layer.bias)
    assert relative(torch.func.vmap(layer)(x), expected) < 1e-6
    tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
    assert relative(tangent, layer.weight.sum(1).expand(5, -1)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 5 * 6 * 4


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("batch", "width"), [(2, 200), (1, 100), (1, 6), (2, 6)])  # one product, or a convolution
def test_a_small_map_is_convolved_as_by_torch(onednn, batch, width, stride):
    torch.manual_seed(0)
    layer, x = linear.Conv3x3(4, width, stride=stride), torch.randn(batch, 4, 3, 4)
    expected = F.conv2d(x, layer.weight, layer.bias, stride, 1)
    for out in (torch.no_grad()(layer)(x), layer(x)):
        assert out.shape == expected.shape and out.is_contiguous()
        assert relative(out, expected) < 1e-5
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    (same,) = torch.autograd.grad(expected.square().sum(), layer.weight)
    assert relative(gradient, same) < 1e-5


def test_a_small_picture_is_convolved_as_by_torch_and_so_are_its_first_and_second_gradients(onednn):
    torch.manual_seed(0)
    layer = linear.Conv3x3(6, 10)
    x = torch.randn(1, 6, 5, 4, requires_grad=True)
    leaves = [x, *layer.parameters()]
    assert "OneDNNConv" in type(layer(x).grad_fn).__name__
    found = []
    for f in (layer, lambda x: F.conv2d(x, layer.weight, layer.bias, padding=1)):
        y = f(x)
        plain = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.cat([g.flatten() for g in first]).square().sum(), leaves)
        found.append([y, *plain, *first, *second])
    assert all(relative(a, b) < 1e-5 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_is_torchs_in_either_order_of_memory(onednn, memory_format):
    torch.manual_seed(0)
    layer = linear.Conv1x1(6, 10)
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=memory_format).requires_grad_()
    leaves, found = [x, *layer.parameters()], []
    for f in (layer, lambda x: F.conv2d(x, layer.weight, layer.bias)):
        y = f(x)
        assert y.is_contiguous(memory_format=memory_format)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(a.shape == b.shape and relative(a, b) < 1e-5 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("learned", [[], ["bias"], ["weight", "bias"]])
def test_a_gelu_in_the_product_is_torchs_and_its_gradient_is_kept(onednn, learned):
    torch.manual_seed(0)
    layer, x = linear.Linear(6, 10).requires_grad_(False), torch.randn(2, 3, 6)
    for name in learned:
        layer.get_parameter(name).requires_grad_()
    expected = F.gelu(F.linear(x, layer.weight, layer.bias), approximate="tanh")
    y = linear.linear_gelu(layer, x)
    assert relative(y, expected) < 1e-5 and relative(torch.no_grad()(linear.linear_gelu)(layer, x), expected) < 1e-5
    for name in learned:
        leaf = layer.get_parameter(name)
        ours, theirs = (torch.autograd.grad(f.sum(), leaf, retain_graph=True)[0] for f in (y, expected))
        assert relative(ours, theirs) < 1e-5
    layer.register_forward_hook(lambda *_: torch.zeros(2, 3, 10))  # what is hung on the layer is heard
    assert not torch.no_grad()(linear.linear_gelu)(layer, x).any()


def test_without_torchs_private_state_products_are_torchs(monkeypatch):
    kept = (linear._onednn_is_faster, linear._has_onednn)
    for known in kept:
        known.cache_clear()
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    try:
        assert not linear._onednn_is_faster()
        layer, x = linear.Linear(256, 256), torch.randn(64, 256)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    finally:
        for known in kept:
            known.cache_clear()
