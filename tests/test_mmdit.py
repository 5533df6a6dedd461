import math
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from ldm.cond import Cond
from ldm.models.mmdit import MMDiT, Modulation
from tests.twins import (
    DTYPES,
    TOLERANCE,
    assert_close,
    assert_same_gradients,
    assert_shared,
    assert_start,
    draw,
    gradients,
    random_twin,
    times,
    train,
)  # fmt: skip

SMALL: dict[str, Any] = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 24, "pooled_projection_dim": 12,
    "pos_embed_max_size": 12,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "sd3-medium": {},
    "sd3.5-medium": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "sd3.5-large": {"qk_norm": "rms_norm"},
    "other-sizes": {"patch_size": 4, "in_channels": 3, "out_channels": None, "dual_attention_layers": (2,)},
}


def stock(dtype=torch.float32, **config) -> SD3Transformer2DModel:
    return random_twin(SD3Transformer2DModel, dtype, **SMALL | config)


def inputs(batch=2, height=16, width=16, length=7, channels=4, dtype=torch.float32):
    x, tokens, pooled = draw((batch, channels, height, width), (batch, length, 24), (batch, 12), dtype=dtype)
    return x, times(batch, dtype), tokens, pooled


def run_stock(model, x, time, tokens, pooled):
    return model(x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=time, return_dict=False)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "height", "width", "length"), [(1, 16, 16, 1), (3, 8, 24, 7), (2, 20, 12, 77)])
def test_equals_stock(family, dtype, batch, height, width, length):
    theirs = stock(dtype, **FAMILIES[family])
    ours = MMDiT.from_diffusers(theirs)
    x, time, tokens, pooled = inputs(batch, height, width, length, theirs.config["in_channels"], dtype)
    leaves = {"x": x.requires_grad_(), "tokens": tokens.requires_grad_(), "pooled": pooled.requires_grad_()}
    out, expected = ours(x, time, Cond(tokens, pooled=pooled)), run_stock(theirs, x, time, tokens, pooled)
    assert out.shape == expected.shape and out.dtype == dtype
    assert_close(out, expected, TOLERANCE[dtype])
    assert_same_gradients(gradients(out, ours, **leaves), gradients(expected, theirs, **leaves), TOLERANCE[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_go_there_and_back_without_a_copy(family, tmp_path):
    theirs = stock(**FAMILIES[family])
    ours = MMDiT.from_diffusers(theirs)
    back = assert_shared(theirs, ours)
    back.save_pretrained(tmp_path)
    again = MMDiT.from_diffusers(tmp_path)
    x, time, tokens, pooled = inputs(channels=theirs.config["in_channels"])
    cond = Cond(tokens, pooled=pooled)
    assert torch.equal(again(x, time, cond), ours(x, time, cond))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_table_of_a_fresh_one_are_the_stock_ones(family):
    theirs, ours = stock(**FAMILIES[family]), MMDiT(**SMALL | FAMILIES[family])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    assert torch.equal(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed)


@pytest.mark.parametrize(("sample_size", "side"), [(32, 16), (64, 96), (128, 192), (100, 31)])
def test_positions_are_the_stock_ones(sample_size, side):
    config = {"sample_size": sample_size, "pos_embed_max_size": side}
    ours, theirs = MMDiT(**SMALL | config).pos_embed, stock(**config).pos_embed
    for h, w in ((side, side), (side - 1, 4), (3, side - 2)):
        expected = theirs.cropped_pos_embed(2 * h, 2 * w)[0]
        assert torch.equal(ours.table(h, w).flatten(0, 1), expected)


@pytest.mark.parametrize("tail", ["zero", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_one_token_with_log_256_is_256_equal_tokens(family, dtype, tail):
    """Stock SD3 without T5 sees 77 CLIP tokens and 256 equal ones.

    The truth is the stock class in float64: its float32 gradients, sums over 256 equal rows, are ten times as far
    from it (2e-5) as ours (2e-6).
    """
    ours = MMDiT.from_diffusers(stock(**FAMILIES[family])).to(dtype)
    theirs = stock(**FAMILIES[family]).double()
    x, time, tokens, pooled = inputs(length=78)
    tokens[:, 77] = 0.0 if tail == "zero" else tokens[0, 77].clone()
    bias = torch.zeros(2, 78, dtype=dtype)
    bias[:, 77] = math.log(256)

    a, folded = x.to(dtype).requires_grad_(), tokens.to(dtype).requires_grad_()
    out = ours(a, time.to(dtype), Cond(folded, bias, pooled.to(dtype)))
    b = x.double().requires_grad_()
    full = torch.cat([tokens[:, :77], tokens[:, 77:].expand(2, 256, 24)], dim=1).double().requires_grad_()
    expected = run_stock(theirs, b, time.double(), full, pooled.double())
    assert full.shape[1] == 333
    assert_close(out, expected, TOLERANCE[dtype])

    got, want = gradients(out, ours, x=a, tokens=folded), gradients(expected, theirs, x=b, tokens=full)
    want["tokens"] = torch.cat([want["tokens"][:, :77], want["tokens"][:, 77:].sum(1, keepdim=True)], dim=1)
    assert_same_gradients(got, want, TOLERANCE[dtype])

    unbiased = ours(a, time.to(dtype), Cond(folded, pooled=pooled.to(dtype)))
    assert (unbiased - expected).abs().max() > 1e-3 * expected.abs().max()  # the bias matters


def test_rows_may_fold_differently():
    """Row 0 hides its last token, row 1 counts it three times."""
    ours = MMDiT.from_diffusers(stock(torch.float64))
    x, time, tokens, pooled = inputs(dtype=torch.float64)
    bias = torch.zeros(2, 7, dtype=torch.float64)
    bias[0, 6], bias[1, 6] = -math.inf, math.log(3)
    out = ours(x, time, Cond(tokens, bias, pooled))
    hidden = ours(x[:1], time[:1], Cond(tokens[:1, :6], pooled=pooled[:1]))
    tripled = ours(x[1:], time[1:], Cond(tokens[1:, [*range(7), 6, 6]], pooled=pooled[1:]))
    assert_close(out, torch.cat([hidden, tripled]), 1e-12)


def test_initialisation():
    torch.manual_seed(0)
    width = 64
    config = {"attention_head_dim": 16, "caption_projection_dim": width, **FAMILIES["sd3.5-medium"]}
    net = MMDiT(**SMALL | config)
    x, time, tokens, pooled = inputs()
    with torch.no_grad():
        assert net(x, time, Cond(tokens, pooled=pooled)).abs().max() == 0
        image, text, c = torch.randn(2, 64, width), torch.randn(2, 7, width), torch.randn(2, width)
        for block in net.transformer_blocks:
            y, y_t = block(image, text, c, None)
            assert torch.equal(y, image) and (y_t is None or torch.equal(y_t, text))
    zero = {net.proj_out, *(m.linear for m in net.modules() if isinstance(m, Modulation))}
    assert_start(net, zero, set(net.time_text_embed.modules()))
    assert all((p == 1).all() for n, p in net.named_parameters() if "norm_" in n and n.endswith("norm_q.weight"))


def test_first_steps_train():
    torch.manual_seed(0)
    net = MMDiT(**SMALL)
    x, time, tokens, pooled = inputs()
    losses = train(net, lambda: (net(x, time, Cond(tokens, pooled=pooled)) - x).square().mean())
    assert losses[-1] < 0.8 * losses[0]
    # What feeds nothing is the last block's text queries: their gradient is zero, not missing, as DDP wants it.
    assert all(p.grad is not None for p in net.parameters())
    dead = {n for n, p in net.named_parameters() if p.grad.abs().max() == 0}  # type: ignore[union-attr]
    assert dead == {"transformer_blocks.2.attn.add_q_proj.weight", "transformer_blocks.2.attn.add_q_proj.bias"}


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    theirs = stock(**FAMILIES["sd3.5-medium"])
    exact = MMDiT.from_diffusers(theirs)
    x, time, tokens, pooled = inputs()
    expected = exact(x, time, Cond(tokens, pooled=pooled))
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            out = exact(x, time, Cond(tokens, pooled=pooled))
    else:
        low = exact.to(torch.bfloat16)
        out = low(x.bfloat16(), time, Cond(tokens.bfloat16(), pooled=pooled.bfloat16()))
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected, 0.05)  # eight bits of mantissa through three blocks


@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [(15, 16, "16 × 16"), (16, 9, "16 × 10"), (26, 8, "24 × 8"), (24, 100, "24 × 24"), (1, 16, "2 × 16")],
)
def test_a_size_that_does_not_fit_names_the_nearest(height, width, nearest):
    net = MMDiT(**SMALL)
    x, time, tokens, pooled = inputs(height=height, width=width)
    with pytest.raises(ValueError, match=f"{height} × {width}.*nearest that fits is {nearest}$"):
        net(x, time, Cond(tokens, pooled=pooled))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"caption_projection_dim": 24}, "caption_projection_dim=24.* = 32"),
        ({"qk_norm": "l2"}, "qk_norm='l2'"),
        ({"pos_embed_max_size": 0}, "pos_embed_max_size=0.*above 0"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size=None"),
        ({"num_layers": 0, "in_channels": -4}, "in_channels=-4, num_layers=0.*above 0"),
        ({"sample_size": 1}, "sample_size=1 holds no patch of patch_size=2"),
        ({"dual_attention_layers": (1, 3)}, r"\[3\].*0 to 2"),
        ({"attention_head_dim": 1, "num_attention_heads": 6, "caption_projection_dim": 6}, "multiple of 4"),
    ],
)
def test_a_config_that_does_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(**SMALL | config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled": None}, r"pooled is missing; expected \(2, pooled_projection_dim=12\)"),
        ({"pooled": torch.zeros(2, 11)}, r"pooled is \(2, 11\); expected \(2, pooled_projection_dim=12\)"),
        ({"tokens": torch.zeros(2, 7, 23)}, r"tokens is \(2, 7, 23\); expected \(2, L, joint_attention_dim=24\)"),
        ({"bias": torch.zeros(2, 6)}, r"bias is \(2, 6\).*\(2, 7\)"),
        ({"tokens": torch.zeros(3, 7, 24)}, r"tokens is \(3, 7, 24\); expected \(2, L, "),
        ({"tokens": torch.zeros(2, 24)}, r"tokens is \(2, 24\); expected \(2, L, "),
        ({"pooled": torch.zeros(2, 1, 12)}, r"pooled is \(2, 1, 12\)"),
        ({"extra": torch.zeros(2, 1, 16, 16)}, "extra is given"),
    ],
)
def test_a_cond_that_does_not_fit(change, message):
    x, time, tokens, pooled = inputs()
    with pytest.raises(ValueError, match=message):
        MMDiT(**SMALL)(x, time, Cond(**{"tokens": tokens, "pooled": pooled} | change))


@pytest.mark.parametrize("shape", [(2, 5, 16, 16), (4, 16, 16)])
def test_latents_of_other_channels(shape):
    _, time, tokens, pooled = inputs()
    with pytest.raises(ValueError, match=r"expected \(B, in_channels=4, H, W\)"):
        MMDiT(**SMALL)(torch.zeros(shape), time, Cond(tokens, pooled=pooled))


@pytest.mark.parametrize("time", [torch.tensor(3.0), torch.zeros(3)])
def test_a_time_that_does_not_fit(time):
    x, _, tokens, pooled = inputs()
    with pytest.raises(ValueError, match=r"time is \(3?,?\); expected \(2,\), one for each picture"):
        MMDiT(**SMALL)(x, time, Cond(tokens, pooled=pooled))
