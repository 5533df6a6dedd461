"""The UNet is its stock twin: same names, same function, same gradients; and it trains from its own start."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from ldm.cond import Cond
from ldm.models.unet import UNet
from tests.twins import assert_close, assert_same_gradients, assert_shared, gradients

TEXT_DOWN, TEXT_UP, DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UpBlock2D"
SMALL = {"norm_num_groups": 4, "cross_attention_dim": 24, "layers_per_block": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {
        **SMALL,
        "sample_size": 8,
        "block_out_channels": (8, 16, 16, 24),
        "down_block_types": (TEXT_DOWN, TEXT_DOWN, TEXT_DOWN, DOWN),
        "up_block_types": (UP, TEXT_UP, TEXT_UP, TEXT_UP),
        "layers_per_block": 2,
        "attention_head_dim": 4,
    },
    "sd21": {
        **SMALL,
        "block_out_channels": (8, 16, 24),
        "down_block_types": (TEXT_DOWN, TEXT_DOWN, DOWN),
        "up_block_types": (UP, TEXT_UP, TEXT_UP),
        "attention_head_dim": (1, 2, 3),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        **SMALL,
        "block_out_channels": (8, 16, 24),
        "down_block_types": (DOWN, TEXT_DOWN, TEXT_DOWN),
        "up_block_types": (TEXT_UP, TEXT_UP, UP),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 12 + 6 * 8,
    },
    "one_level": {
        **SMALL,
        "block_out_channels": (16,),
        "down_block_types": (TEXT_DOWN,),
        "up_block_types": (TEXT_UP,),
        "attention_head_dim": 2,
    },
    "uneven": {  # layers per level, other channels in and out, text on the way up only, DDPM's sinusoids
        **SMALL,
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": (8, 16),
        "down_block_types": (DOWN, DOWN),
        "up_block_types": (TEXT_UP, TEXT_UP),
        "layers_per_block": (1, 2),
        "attention_head_dim": 2,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}


def make_stock(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any = UNet2DConditionModel(**CONFIGS[name])
    model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # norms too: their stock start, 1 and 0, would hide a swap
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def make_inputs(name: str, batch: int, height: int, width: int, length: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(1)
    config = CONFIGS[name]
    x = torch.randn(batch, config.get("in_channels", 4), height, width, dtype=dtype)
    time = torch.linspace(3, 980, batch).to(dtype)
    cond = Cond(torch.randn(batch, length, config["cross_attention_dim"], dtype=dtype))
    if "addition_embed_type" in config:
        sizes = torch.tensor([[512, 768, 0, 16, 1024, 1024]]).repeat(batch, 1)
        cond = replace(cond, pooled=torch.randn(batch, 12, dtype=dtype), size_ids=sizes)
    return x, time, cond


def call_stock(model: Any, x, time, cond: Cond, mask=None):
    added = {"text_embeds": cond.pooled, "time_ids": cond.size_ids} if cond.pooled is not None else None
    return model(
        x, time, encoder_hidden_states=cond.tokens, added_cond_kwargs=added, encoder_attention_mask=mask
    ).sample


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


# float32: some hundred roundings of 6e-8 in another order; float64: the same, 2e-16 each.
@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),  # batch, height, width, text tokens
    [
        ((1, 8, 8, 3), torch.float32, 1e-5),
        ((3, 16, 8, 77), torch.float64, 1e-10),
        ((2, 8, 24, 1), torch.float64, 1e-10),
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradients_are_the_stock_classes(name, size, dtype, tolerance):
    model = make_stock(name, dtype)
    net = UNet.from_diffusers(model)
    batch, height, width, length = size
    x, time, cond = make_inputs(name, batch, height, width, length, dtype)
    leaves = {"x": x.requires_grad_(), "tokens": cond.tokens.requires_grad_()}
    out, expected = net(x, time, cond), call_stock(model, x, time, cond)
    assert_close(out, expected, tolerance)
    assert_same_gradients(gradients(out, net, **leaves), gradients(expected, model, **leaves), tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_shapes_and_storage_go_both_ways(name):
    model = make_stock(name)
    net = UNet.from_diffusers(model)
    back = assert_shared(model, net)
    assert list(net.state_dict()) == list(model.state_dict()) == list(back.state_dict())
    skip = {"_use_default_values", "_name_or_path"}
    plain = [json.loads(json.dumps({k: v for k, v in m.config.items() if k not in skip})) for m in (model, back)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_made_from_scratch_loads_into_the_stock_class(name):
    net = UNet(**CONFIGS[name])
    model = UNet2DConditionModel(**CONFIGS[name])
    model.load_state_dict(net.state_dict(), strict=True)
    x, time, cond = make_inputs(name, 2, 8, 8, 5)
    assert relative(net(x, time, cond) + 1, call_stock(model, x, time, cond) + 1) < 1e-6


def test_defaults_are_the_stock_ones():
    with torch.device("meta"):
        net, model = UNet(), UNet2DConditionModel()
    shapes = [[(k, tuple(v.shape)) for k, v in m.state_dict().items()] for m in (net, model)]
    assert shapes[0] == shapes[1]


def test_bias_hides_and_multiplies_tokens():
    model = make_stock("sd15", torch.float64)
    net = UNet.from_diffusers(model)
    x, time, cond = make_inputs("sd15", 2, 8, 8, 5, torch.float64)
    short = net(x, time, Cond(cond.tokens[:, :3]))
    bias = torch.zeros(2, 5, dtype=torch.float64)
    bias[:, 3:] = -math.inf
    hidden = net(x, time, replace(cond, bias=bias))
    assert relative(hidden, short) < 1e-12
    mask = torch.tensor([1, 1, 1, 0, 0]).expand(2, 5)
    assert relative(hidden, call_stock(model, x, time, cond, mask)) < 1e-10
    assert relative(net(x, time, cond), short) > 1e-3
    twice = Cond(cond.tokens[:, [0, 0, 1, 2]])
    counted = Cond(cond.tokens[:, :3], bias=torch.tensor([[math.log(2), 0, 0]], dtype=torch.float64).expand(2, 3))
    assert relative(net(x, time, counted), net(x, time, twice)) < 1e-12


def test_extra_channels_stand_beside_the_latents():
    torch.manual_seed(0)
    model = UNet2DConditionModel(**CONFIGS["sd15"], in_channels=9)
    net = UNet.from_diffusers(model)
    x, time, cond = make_inputs("sd15", 2, 8, 8, 5)
    extra = torch.randn(2, 5, 8, 8)
    expected = call_stock(model, torch.cat([x, extra], dim=1), time, cond)
    assert relative(net(x, time, replace(cond, extra=extra)), expected) < 1e-5
    with pytest.raises(ValueError, match=r"4 channels with those of Cond\.extra; the UNet takes 9"):
        net(x, time, cond)


def test_memory_format_does_not_change_the_output():
    net = UNet.from_diffusers(make_stock("sd21", torch.float64))
    x, time, cond = make_inputs("sd21", 2, 8, 8, 5, torch.float64)
    expected = net(x, time, cond)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = net(x.contiguous(memory_format=torch.channels_last), time, cond)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert relative(last, expected) < 1e-12


def test_it_starts_at_zero_and_gradients_reach_every_weight_by_the_third_step():
    torch.manual_seed(0)
    net = UNet(**CONFIGS["sd15"])
    x, time, cond = make_inputs("sd15", 4, 16, 16, 5)  # 2 x 2 at the deepest: one pixel has no choice
    assert not net(x, time, cond).any()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(3):  # conv_out first, then the ends of the branches, then what is inside them
        optimizer.zero_grad()
        loss = (net(x, time, cond) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("AttnDownBlock2D",) * 2}, "down_block_types.*CrossAttnDownBlock2D"),
        ({"up_block_types": (UP,)}, "up_block_types.*expected 2"),
        ({"attention_head_dim": 3}, "no multiple of its 3 heads"),
        ({"attention_head_dim": (2, 2, 2)}, "attention_head_dim.*2 levels"),
        ({"transformer_layers_per_block": ((1, 2), 1)}, "transformer_layers_per_block"),
        ({"norm_num_groups": 5}, "no multiple of norm_num_groups = 5"),
        ({"cross_attention_dim": (24, 24)}, "cross_attention_dim.*one number"),
        ({"addition_embed_type": "image"}, "'text_time'"),
        ({"addition_embed_type": "text_time"}, "needs addition_time_embed_dim"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(change, message):
    blocks = {"down_block_types": (TEXT_DOWN, DOWN), "up_block_types": (UP, TEXT_UP)}
    good: dict[str, Any] = {**SMALL, **blocks, "block_out_channels": (8, 16)}
    with torch.device("meta"):
        UNet(**good)
        with pytest.raises(ValueError, match=message):
            UNet(**good | change)


def test_a_stock_option_that_ours_lacks_is_refused():
    model = UNet2DConditionModel(**CONFIGS["one_level"], time_embedding_dim=64)
    with pytest.raises(ValueError, match="time_embedding_dim=64 is not supported"):
        UNet.from_diffusers(model)


def test_inputs_that_do_not_fit_are_refused():
    net = UNet.from_diffusers(make_stock("sd15"))
    x, time, cond = make_inputs("sd15", 2, 13, 16, 5)
    with pytest.raises(ValueError, match=r"13 x 16.*multiples of 8.*nearest that fits is 16 x 16"):
        net(x, time, cond)
    x, time, cond = make_inputs("sd15", 2, 11, 3, 5)
    with pytest.raises(ValueError, match="nearest that fits is 8 x 8"):
        net(x, time, cond)
    x, time, cond = make_inputs("sd15", 2, 8, 8, 5)
    for tokens in (cond.tokens[:1], cond.tokens[..., :20], cond.tokens[0]):
        with pytest.raises(ValueError, match=r"expected \(2, L, 24\)"):
            net(x, time, Cond(tokens))
    xl = UNet.from_diffusers(make_stock("sdxl"))
    x, time, cond = make_inputs("sdxl", 2, 8, 8, 5)
    with pytest.raises(ValueError, match=r"Cond\.pooled: missing"):
        xl(x, time, Cond(cond.tokens))
    assert cond.size_ids is not None and cond.pooled is not None
    with pytest.raises(ValueError, match=r"size_ids.*\(2, 6\)"):
        xl(x, time, replace(cond, size_ids=cond.size_ids[:, :5]))
    with pytest.raises(ValueError, match=r"pooled.*\(2, 12\)"):
        xl(x, time, replace(cond, pooled=cond.pooled[:, :5]))


def test_a_saved_folder_opens_in_both(tmp_path):
    net = UNet(**CONFIGS["sdxl"])
    torch.nn.init.normal_(net.conv_out.weight)
    net.to_diffusers().save_pretrained(tmp_path)
    x, time, cond = make_inputs("sdxl", 1, 8, 8, 5)
    expected = net(x, time, cond)
    assert torch.equal(UNet.from_diffusers(tmp_path)(x, time, cond), expected)
    model = UNet2DConditionModel.from_pretrained(tmp_path)
    assert relative(call_stock(model, x, time, cond), expected) < 1e-5
