import json
import math
from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import nn

from ldm.cond import Cond
from ldm.denoiser import Denoiser, TimeInput
from ldm.models.dit import DiT, visible
from ldm.paths import DiscreteVP
from ldm.prediction import Eps
from tests import tiny
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
    "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3, "cross_attention_dim": 24, "sample_size": 16,
    "caption_channels": 20,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "alpha-512": {},
    "alpha-1024-ms": {"use_additional_conditions": True, "interpolation_scale": 2},
    "sigma-256": {"interpolation_scale": 0.5},
    "other-sizes": {
        "sample_size": 18, "interpolation_scale": 3, "patch_size": 3, "in_channels": 3, "out_channels": None
    },
}  # fmt: skip
FULL = {  # transformer/config.json of the published models, and how many weights the files hold
    "alpha-256": ({"sample_size": 32, "interpolation_scale": 1}, 610_856_096),
    "alpha-512": ({"sample_size": 64}, 610_856_096),
    "alpha-1024-ms": ({"sample_size": 128}, 611_349_152),
    "sigma-256": ({"sample_size": 32, "interpolation_scale": 0.5, "use_additional_conditions": False}, 610_856_096),
    "sigma-512-ms": ({"sample_size": 64, "interpolation_scale": 1, "use_additional_conditions": False}, 610_856_096),
    "sigma-1024-ms": ({"sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": False}, 610_856_096),
    "sigma-2k-ms": ({"sample_size": 256, "interpolation_scale": 4, "use_additional_conditions": False}, 610_856_096),
}


def stock(dtype=torch.float32, **config) -> PixArtTransformer2DModel:
    return random_twin(PixArtTransformer2DModel, dtype, **SMALL | config)


def inputs(batch=2, height=16, width=16, length=7, channels=4, dtype=torch.float32):
    """Latents, time, text, which tokens are words (the last one of row 0 alone is not), and the picture's size."""
    x, tokens = draw((batch, channels, height, width), (batch, length, 20), dtype=dtype)
    seen = torch.ones(batch, length)
    if batch > 1:
        seen[0, -1] = 0
    sizes = torch.tensor([8.0 * height, 8.0 * width, height / width], dtype=dtype).expand(batch, -1)
    return x, times(batch, dtype), tokens, seen, sizes * torch.linspace(1, 1.5, batch, dtype=dtype)[:, None]


def hidden(seen, dtype=torch.float32):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(seen == 0, -math.inf)


def run_stock(model, x, time, tokens, seen=None, sizes=None):
    added = {
        "resolution": None if sizes is None else sizes[:, :2],
        "aspect_ratio": None if sizes is None else sizes[:, 2:],
    }
    return model(
        x, encoder_hidden_states=tokens, timestep=time, encoder_attention_mask=seen, added_cond_kwargs=added,
        return_dict=False,
    )[0]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "height", "width", "length"), [(1, 18, 18, 2), (3, 12, 24, 7), (2, 30, 6, 77)])
def test_equals_stock(family, dtype, batch, height, width, length):
    theirs = stock(dtype, **FAMILIES[family])
    ours = DiT.from_diffusers(theirs)
    x, time, tokens, seen, sizes = inputs(batch, height, width, length, theirs.config["in_channels"], dtype)
    sizes = sizes if ours.config["use_additional_conditions"] else None
    leaves = {"x": x.requires_grad_(), "tokens": tokens.requires_grad_()}
    out = ours(x, time, Cond(tokens, hidden(seen, dtype), size_ids=sizes))
    expected = run_stock(theirs, x, time, tokens, seen, sizes)
    assert out.shape == expected.shape and out.dtype == dtype
    assert_close(out, expected, TOLERANCE[dtype])
    assert_same_gradients(gradients(out, ours, **leaves), gradients(expected, theirs, **leaves), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [9, 9], [3, 9], [1, 4], "gaps"])
def test_padded_text_is_hidden_as_in_stock(lengths, dtype):
    """Stock adds -10000 where ours adds -inf: exp(-10000) is zero in float64 too, so both hide altogether."""
    theirs = stock(dtype)
    ours = DiT.from_diffusers(theirs)
    x, time, tokens, seen, _ = inputs(length=9, dtype=dtype)
    seen[:] = 1
    if lengths == "gaps":
        seen[0, [0, 4, 8]] = seen[1, [1, 2, 3]] = 0
    elif lengths:
        for row, n in zip(seen, lengths, strict=True):
            row[n:] = 0
    bias = None if lengths is None else hidden(seen, dtype)
    tokens.requires_grad_()
    out, expected = ours(x, time, Cond(tokens, bias)), run_stock(theirs, x, time, tokens, seen)
    assert_close(out, expected, TOLERANCE[dtype])
    got = gradients(out, ours, tokens=tokens)
    assert_same_gradients(got, gradients(expected, theirs, tokens=tokens), TOLERANCE[dtype])
    assert (got["tokens"].abs().amax(-1) > 0).equal(seen.bool())

    garbage = torch.where(seen[..., None] == 1, tokens, 100.0)
    assert torch.equal(ours(x, time, Cond(garbage, bias)), out)
    shorter = run_stock(theirs, x, time, tokens[:, 1:], seen[:, 1:])
    assert (shorter - expected).abs().max() > 1e-3 * expected.abs().max()  # each token counts


def test_a_row_that_hides_all_its_text_gets_nothing_from_it():
    """Stock would attend evenly to the padding there. The attention answers zero, which leaves the bias of its last
    layer: the same in a batch of its own, of which one token stays."""
    ours = DiT.from_diffusers(stock(torch.float64))
    x, time, tokens, _, _ = inputs(dtype=torch.float64)
    bias = torch.zeros(2, 7, dtype=torch.float64)
    bias[0] = -math.inf
    tokens.requires_grad_()
    out = ours(x, time, Cond(tokens, bias))
    assert not gradients(out, ours, tokens=tokens)["tokens"][0].any()
    assert_close(out[1:], ours(x[1:], time[1:], Cond(tokens[1:])), 1e-12)
    assert_close(out[:1], ours(x[:1], time[:1], Cond(tokens[:1] + 5, bias[:1])), 1e-12)
    blocks: Any = ours.transformer_blocks
    for block in blocks:
        block.attn2.forward = lambda x, text, bias, last=block.attn2.to_out[0]: last.bias.expand_as(x)
    assert_close(out[:1], ours(x, time, Cond(tokens))[:1], 1e-12)


def test_padding_at_the_end_is_cut_for_all_conds_together():
    def cond(*lengths, total=8):
        seen = (torch.arange(total) < torch.tensor(lengths)[:, None]).float()
        return Cond(torch.arange(1.0, total + 1).expand(len(lengths), -1)[..., None], hidden(seen))

    for given, length, biased in (
        ([cond(3, 5), cond(1, 1)], 5, True),
        ([cond(5, 5), cond(5)], 5, False),
        ([cond(8, 8)], 8, False),
        ([cond(0, 0), cond(0)], 1, True),
        ([cond(2, 6), cond(6, 6, total=7)], 6, True),
    ):
        for before, after in zip(given, visible(*given), strict=True):
            assert before.bias is not None
            assert torch.equal(after.tokens, before.tokens[:, :length])
            if biased:
                assert after.bias is not None and torch.equal(after.bias, before.bias[:, :length])
            else:
                assert after.bias is None
    gap, folded, plain = cond(3), cond(3), Cond(torch.zeros(1, 8, 1))
    assert gap.bias is not None and folded.bias is not None
    gap.bias[0, 0], folded.bias[0, 1] = -math.inf, math.log(256)
    for one in (gap, folded):
        (cut,) = visible(one)
        assert cut.bias is not None and torch.equal(cut.bias, one.bias[:, :3])
    for same in ([plain], [plain, gap]):
        assert all(a is b for a, b in zip(visible(*same), same, strict=True))


def test_no_text_at_all_is_text_that_is_hidden():
    ours = DiT.from_diffusers(stock(torch.float64))
    x, time, tokens, _, _ = inputs(dtype=torch.float64)
    bias = torch.full((2, 7), -math.inf, dtype=torch.float64)
    expected = ours(x, time, Cond(tokens, bias))
    for empty in (None, bias[:, :0]):
        assert_close(ours(x, time, Cond(tokens[:, :0], empty)), expected, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_go_there_and_back_without_a_copy(family, tmp_path):
    theirs = stock(**FAMILIES[family])
    ours = DiT.from_diffusers(theirs)
    back = assert_shared(theirs, ours)
    x, time, tokens, seen, sizes = inputs(1, 18, 18, channels=theirs.config["in_channels"])
    assert torch.equal(run_stock(back, x, time, tokens, seen, sizes), run_stock(theirs, x, time, tokens, seen, sizes))

    back.save_pretrained(tmp_path)
    again = DiT.from_diffusers(tmp_path)
    cond = Cond(tokens, hidden(seen), size_ids=sizes)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in again.state_dict().items())
    assert_close(again(x, time, cond), ours(x, time, cond), 1e-6)  # products differ with where in memory weights lie


def test_opens_the_first_checkpoints_form(tmp_path):
    """PixArt-α's folders name a class that has since been divided, with fields that have since gone."""
    theirs = stock()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    old = {"double_self_attention": False, "num_vector_embeds": None, "only_cross_attention": False}
    file.write_text(json.dumps(config | old | {"_class_name": "Transformer2DModel", "use_linear_projection": False}))
    x, time, tokens, seen, _ = inputs()
    assert_close(
        DiT.from_diffusers(tmp_path)(x, time, Cond(tokens, hidden(seen))),
        run_stock(theirs, x, time, tokens, seen),
        1e-5,
    )


@pytest.mark.parametrize("family", FULL)
def test_full_size(family):
    config, count = FULL[family]
    with torch.device("meta"):
        ours = DiT(**config)
        theirs: Any = PixArtTransformer2DModel(**ours.stock_config())
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs))
    assert shapes == expected
    assert sum(p.numel() for p in ours.parameters()) == count
    assert ours.sized == ("adaln_single.emb.resolution_embedder.linear_1.weight" in expected)


@pytest.mark.parametrize("sample_size", [32, 64, 128, 192, 256])
def test_positions_are_the_stock_ones(sample_size):
    """At the size laid out for, where stock keeps them, and at others, where it works them out again."""
    config = {"sample_size": sample_size, "use_additional_conditions": False}
    ours, theirs = DiT(**SMALL | config).pos_embed, stock(**config).pos_embed
    assert torch.equal(ours.pos_embed, theirs.pos_embed)
    nn.init.zeros_(theirs.proj.weight)
    nn.init.zeros_(theirs.proj.bias)
    for h, w in ((10, 22), (ours.base, ours.base), (ours.base, 7)):
        expected = theirs(torch.zeros(1, 4, 2 * h, 2 * w))[0]
        assert torch.equal(ours.table(h, w).flatten(0, 1), expected)


def test_initialisation():
    torch.manual_seed(0)
    width = 48
    config = {"attention_head_dim": 16, "cross_attention_dim": width, **FAMILIES["alpha-1024-ms"]}
    net = DiT(**SMALL | config)
    x, time, tokens, seen, sizes = inputs()
    with torch.no_grad():
        assert net(x, time, Cond(tokens, hidden(seen), size_ids=sizes)).abs().max() == 0
        image, text = torch.randn(2, 64, width), torch.randn(2, 7, width)
        modulations = net.adaln_single(time, sizes, torch.float32)[1]
        for block in net.transformer_blocks:
            assert torch.equal(block(image, text, modulations, None), image)
    zero = {net.adaln_single.linear, net.proj_out, *(b.attn2.to_out[0] for b in net.transformer_blocks)}  # type: ignore[union-attr, index]
    assert_start(net, zero, {*net.adaln_single.emb.modules(), *net.caption_projection.modules()})


def test_first_steps_train():
    torch.manual_seed(0)
    net = DiT(**SMALL | {"out_channels": 4, "use_additional_conditions": True})
    x, time, tokens, seen, sizes = inputs()
    cond = Cond(tokens, hidden(seen), size_ids=sizes)
    losses = train(net, lambda: (net(x, time, cond) - x).square().mean())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_learned_variance():
    path = DiscreteVP()
    d = Denoiser(tiny.dit(out_channels=8), path, Eps(), TimeInput(1000, -1), learned_variance=True)
    x, t, eps = torch.randn(2, 4, 8, 6), torch.tensor([0.1, 0.9]), torch.randn(2, 4, 8, 6)
    cond = Cond(torch.randn(2, 5, tiny.WIDTH), torch.zeros(2, 5))
    answer = d(x, t, cond)
    assert answer.var_frac is not None and answer.x0.shape == answer.var_frac.shape == x.shape
    loss = d.loss(x, t, cond, eps=eps)
    loss.sum().backward()
    grad = d.net.proj_out.weight.grad.unflatten(0, (4, 8)).abs().amax((0, 2))  # type: ignore[union-attr]
    assert loss.shape == (2,) and (grad > 0).all()  # both the output proper and the variance are taught


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    exact = DiT.from_diffusers(stock())
    x, time, tokens, seen, _ = inputs()
    expected = exact(x, time, Cond(tokens, hidden(seen)))
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            out = exact(x, time, Cond(tokens, hidden(seen)))
    else:
        out = exact.to(torch.bfloat16)(x.bfloat16(), time, Cond(tokens.bfloat16(), hidden(seen)))
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected, 0.05)  # eight bits of mantissa through three blocks


@pytest.mark.parametrize(
    ("height", "width", "nearest"), [(15, 16, "16 × 16"), (16, 9, "16 × 10"), (1, 16, "2 × 16"), (101, 7, "102 × 8")]
)
def test_a_size_that_does_not_fit_names_the_nearest(height, width, nearest):
    """Stock cuts the rest off and gives a smaller picture back."""
    x, time, tokens, _, _ = inputs(height=height, width=width)
    with pytest.raises(ValueError, match=f"{height} × {width}.*nearest that fits is {nearest}$"):
        DiT(**SMALL)(x, time, Cond(tokens))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cross_attention_dim": 32}, "cross_attention_dim=32.* = 24"),
        ({"caption_channels": None}, "caption_channels=None"),
        ({"attention_head_dim": 2, "cross_attention_dim": 6}, "multiple of 4"),
        (
            {"num_attention_heads": 4, "cross_attention_dim": 32, "use_additional_conditions": True},
            "32.*multiple of 3.*36",
        ),
        ({"interpolation_scale": 0.0}, "interpolation_scale=0.0"),
        ({"sample_size": 1}, "sample_size=1 holds no patch of patch_size=2"),
        ({"num_layers": 0, "in_channels": -4}, "in_channels=-4, num_layers=0: expected above 0"),
    ],
)
def test_a_config_that_does_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        DiT(**SMALL | config)


def test_options_of_no_pixart_model_are_refused():
    with pytest.raises(ValueError, match="attention_bias=False is not supported by DiT"):
        DiT.from_diffusers(stock(attention_bias=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 7, 19)}, r"tokens is \(2, 7, 19\); expected \(2, L, caption_channels=20\)"),
        ({"tokens": torch.zeros(3, 7, 20)}, r"tokens is \(3, 7, 20\); expected \(2, L, caption"),
        ({"extra": torch.zeros(2, 1, 16, 16)}, "extra is given"),
        ({"bias": torch.zeros(2, 6)}, r"bias is \(2, 6\).*\(2, 7\)"),
        ({"size_ids": None}, r"size_ids is None.*\(2, 3\): height and width in pixels"),
        ({"size_ids": torch.zeros(2, 6)}, r"size_ids is \(2, 6\).*\(2, 3\)"),
    ],
)
def test_a_cond_that_does_not_fit(change, message):
    x, time, tokens, _, sizes = inputs()
    net = DiT(**SMALL | {"use_additional_conditions": True})
    with pytest.raises(ValueError, match=message):
        net(x, time, Cond(**{"tokens": tokens, "size_ids": sizes} | change))
    with pytest.raises(ValueError, match=r"\(2, 5, 16, 16\); expected \(B, in_channels=4, H, W\)"):
        net(torch.zeros(2, 5, 16, 16), time, Cond(tokens, size_ids=sizes))
