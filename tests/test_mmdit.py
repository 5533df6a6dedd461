import math
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import nn

from ldm.cond import Cond
from ldm.models.mmdit import LORA_TARGETS, JointBlock, MMDiT, Modulation

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
# Of the largest value of a tensor. The two add up in another order and ours fuses multiply and add.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = list(TOLERANCE)


def stock(dtype=torch.float32, **config) -> SD3Transformer2DModel:
    """The stock class with random weights, none of which is zero or one."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model: Any = SD3Transformer2DModel(**SMALL | config)
    model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def inputs(batch=2, height=16, width=16, length=7, channels=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    shapes = (batch, channels, height, width), (batch, length, 24), (batch, 12)
    x, tokens, pooled = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    time = (torch.rand(batch, generator=g, dtype=torch.float64) * 1000).to(dtype)
    return x, time, tokens, pooled


def run_stock(model, x, time, tokens, pooled):
    return model(x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=time, return_dict=False)[0]


def gradients(out, model, **others):
    wanted = dict(model.named_parameters()) | others
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    return dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), cotangent), strict=True))


def assert_close(ours, theirs, tolerance, what="output", floor=0.0):
    difference, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert difference <= tolerance * max(size, floor), f"{what}: {difference:.2e} of {size:.2e}"


def assert_same_gradients(ours, theirs, tolerance):
    # One kind is zero but for rounding: softmax does not see a bias that all keys share (attn2.to_k.bias).
    floor = 1e-3 * max(g.abs().max().item() for g in theirs.values())
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        assert_close(ours[name], g, tolerance, f"gradient of {name}", floor)


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
    back = ours.to_diffusers()
    first, second, third = (m.state_dict(keep_vars=True) for m in (theirs, ours, back))
    assert first.keys() == second.keys() == third.keys()
    for name in first:
        assert first[name].data_ptr() == second[name].data_ptr() == third[name].data_ptr(), name
        assert first[name].requires_grad == second[name].requires_grad == third[name].requires_grad, name
    for field in ours.config:
        assert back.config[field] == theirs.config[field]

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
    # Sines of positions below 8, whose float32 rounding is the only difference there could be.
    torch.testing.assert_close(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed, rtol=0, atol=1e-6)


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
    modulations = {m.linear for m in net.modules() if isinstance(m, Modulation)}
    embedders = set(net.time_text_embed.modules())
    for name, m in net.named_modules():
        if not isinstance(m, nn.Linear | nn.Conv2d):
            continue
        assert m.bias is not None and m.bias.abs().max() == 0, name
        w = m.weight.flatten(1)
        if m in modulations or m is net.proj_out:
            assert w.abs().max() == 0, name
            continue
        std = 0.02 if m in embedders else math.sqrt(2 / sum(w.shape))
        # The standard error of a standard deviation is at most 1 / sqrt(2 n) of it; five of them.
        assert w.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * w.numel())), name
        if m not in embedders:
            assert w.abs().max() <= math.sqrt(3) * std * (1 + 1e-6), name  # xavier draws from a box
    assert all((p == 1).all() for n, p in net.named_parameters() if "norm_" in n and n.endswith("norm_q.weight"))


def test_first_steps_train():
    torch.manual_seed(0)
    net = MMDiT(**SMALL)
    x, time, tokens, pooled = inputs()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = (net(x, time, Cond(tokens, pooled=pooled)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    # What feeds nothing is the last block's text queries: their gradient is zero, not missing, as DDP wants it.
    assert all(p.grad is not None for p in net.parameters())
    dead = {n for n, p in net.named_parameters() if p.grad.abs().max() == 0}  # type: ignore[union-attr]
    assert dead == {"transformer_blocks.2.attn.add_q_proj.weight", "transformer_blocks.2.attn.add_q_proj.bias"}


def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(monkeypatch):
    net = MMDiT.from_diffusers(stock(**FAMILIES["sd3.5-medium"]))
    calls = []
    forward = JointBlock.forward
    monkeypatch.setattr(JointBlock, "forward", lambda self, *a: (calls.append(self), forward(self, *a))[1])
    x, time, tokens, pooled = inputs()
    bias = torch.zeros(2, 7)
    bias[:, 6] = 2
    results = []
    for expected in (3, 6):
        calls.clear()
        out = net(x, time, Cond(tokens, bias, pooled))
        grads = gradients(out, net)
        assert len(calls) == expected
        results.append({"out": out, **grads})
        net.enable_gradient_checkpointing()
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_attention_backends_agree():
    net = MMDiT.from_diffusers(stock(torch.float64, **FAMILIES["sd3.5-medium"]))
    x, time, tokens, pooled = inputs(dtype=torch.float64)
    bias = torch.randn(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    auto = net(x, time, Cond(tokens, bias, pooled))
    net.set_attention_backend("plain")
    assert [m.backend for m in net.modules() if hasattr(m, "backend")] == ["plain"] * 5  # three joint, two dual
    assert_close(net(x, time, Cond(tokens, bias, pooled)), auto, 1e-12)


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
        ({"pos_embed_max_size": 0}, "pos_embed_max_size=0.*at least 1"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size=None"),
        ({"num_layers": 0, "in_channels": -4}, "in_channels=-4, num_layers=0.*at least 1"),
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
        ({"pooled": None}, "pooled is missing"),
        ({"pooled": torch.zeros(2, 11)}, "pooled is 11 wide.*pooled_projection_dim=12"),
        ({"tokens": torch.zeros(2, 7, 23)}, "tokens is 23 wide.*joint_attention_dim=24"),
        ({"bias": torch.zeros(2, 6)}, r"bias is \(2, 6\).*\(2, 7\)"),
        ({"tokens": torch.zeros(3, 7, 24)}, "tokens is for 3 pictures; x holds 2"),
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
    with pytest.raises(ValueError, match=r"expected \(B, 4, H, W\)"):
        MMDiT(**SMALL)(torch.zeros(shape), time, Cond(tokens, pooled=pooled))


def test_lora_targets_are_the_projections_of_every_attention_here_and_in_stock():
    for model in (stock(**FAMILIES["sd3.5-medium"]), MMDiT(**SMALL | FAMILIES["sd3.5-medium"])):
        linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        hit = {n for n in linears if n.endswith(tuple(f".{t}" for t in LORA_TARGETS))}
        assert hit == {n for n in linears if ".attn." in n or ".attn2." in n}
        assert all(any(n.endswith(f".{t}") for n in hit) for t in LORA_TARGETS)
