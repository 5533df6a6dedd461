import json
import math
from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import nn

from ldm.cond import Cond
from ldm.denoiser import Denoiser, TimeInput
from ldm.models.dit import LORA_TARGETS, Block, DiT
from ldm.paths import DiscreteVP
from ldm.prediction import Eps
from tests import tiny

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
# Of the largest value of a tensor. The two add up in another order and ours fuses multiply and add.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = list(TOLERANCE)


def stock(dtype=torch.float32, **config) -> PixArtTransformer2DModel:
    """The stock class with random weights, none of which is zero or one."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model: Any = PixArtTransformer2DModel(**SMALL | config)
    model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def inputs(batch=2, height=16, width=16, length=7, channels=4, dtype=torch.float32):
    """Latents, time, text, which tokens are words (the last one of row 0 alone is not), and the picture's size."""
    g = torch.Generator().manual_seed(1)
    shapes = (batch, channels, height, width), (batch, length, 20)
    x, tokens = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    time = (torch.rand(batch, generator=g, dtype=torch.float64) * 1000).to(dtype)
    seen = torch.ones(batch, length)
    if batch > 1:
        seen[0, -1] = 0
    sizes = torch.tensor([8.0 * height, 8.0 * width, height / width], dtype=dtype).expand(batch, -1)
    return x, time, tokens, seen, sizes * torch.linspace(1, 1.5, batch, dtype=dtype)[:, None]


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


def gradients(out, model, **others):
    wanted = dict(model.named_parameters()) | others
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    return dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), cotangent), strict=True))


def assert_close(ours, theirs, tolerance, what="output", floor=0.0):
    difference, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert difference <= tolerance * max(size, floor), f"{what}: {difference:.2e} of {size:.2e}"


def assert_same_gradients(ours, theirs, tolerance):
    largest = max(g.abs().max().item() for g in theirs.values())
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        # One kind is zero but for rounding: softmax does not see a bias that all keys share.
        floor = largest if name.endswith("to_k.bias") else 1e-3 * largest
        assert_close(ours[name], g, tolerance, f"gradient of {name}", floor)


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
    """Stock would attend evenly to the padding there."""
    ours = DiT.from_diffusers(stock(torch.float64))
    x, time, tokens, _, _ = inputs(dtype=torch.float64)
    bias = torch.zeros(2, 7, dtype=torch.float64)
    bias[0] = -math.inf
    out = ours(x, time, Cond(tokens, bias))
    assert_close(out[1:], ours(x[1:], time[1:], Cond(tokens[1:])), 1e-12)
    assert_close(out[:1], ours(x[:1], time[:1], Cond(tokens[:1] + 5, bias[:1])), 1e-12)
    assert out.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_go_there_and_back_without_a_copy(family, tmp_path):
    theirs = stock(**FAMILIES[family])
    ours = DiT.from_diffusers(theirs)
    back: Any = ours.to_diffusers()
    first, second, third = (m.state_dict(keep_vars=True) for m in (theirs, ours, back))
    assert first.keys() == second.keys() == third.keys()
    for name in first:
        assert first[name].data_ptr() == second[name].data_ptr() == third[name].data_ptr(), name
        assert first[name].requires_grad == second[name].requires_grad == third[name].requires_grad, name
    for field in ours.config:
        assert back.config[field] == theirs.config[field]
    x, time, tokens, seen, sizes = inputs(1, 18, 18, channels=theirs.config["in_channels"])
    assert torch.equal(run_stock(back, x, time, tokens, seen, sizes), run_stock(theirs, x, time, tokens, seen, sizes))

    back.save_pretrained(tmp_path)
    again = DiT.from_diffusers(tmp_path)
    cond = Cond(tokens, hidden(seen), size_ids=sizes)
    assert all(torch.equal(v, first[k]) for k, v in again.state_dict().items())
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
    with torch.device("meta"):
        ours: Any = DiT(**SMALL | {"sample_size": sample_size, "use_additional_conditions": False}).pos_embed
    theirs: Any = stock(sample_size=sample_size, use_additional_conditions=False).pos_embed
    assert torch.equal(ours.pos_embed, theirs.pos_embed)
    nn.init.zeros_(theirs.proj.weight)
    nn.init.zeros_(theirs.proj.bias)
    expected = theirs(torch.zeros(1, 4, 20, 44))[0]
    assert torch.equal(ours.table(10, 22, torch.device("cpu")).flatten(0, 1), expected)


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
    embedders = {*net.adaln_single.emb.modules(), *net.caption_projection.modules()}
    for name, m in net.named_modules():
        if not isinstance(m, nn.Linear | nn.Conv2d):
            continue
        assert m.bias is not None and m.bias.abs().max() == 0, name
        w = m.weight.flatten(1)
        if m in zero:
            assert w.abs().max() == 0, name
            continue
        std = 0.02 if m in embedders else math.sqrt(2 / sum(w.shape))
        # The standard error of a standard deviation is at most 1 / sqrt(2 n) of it; five of them.
        assert w.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * w.numel())), name


def test_first_steps_train():
    torch.manual_seed(0)
    net = DiT(**SMALL | {"out_channels": 4, "use_additional_conditions": True})
    x, time, tokens, seen, sizes = inputs()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = (net(x, time, Cond(tokens, hidden(seen), size_ids=sizes)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
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


def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(monkeypatch):
    net = DiT.from_diffusers(stock(**FAMILIES["alpha-1024-ms"]))
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: (calls.append(self), forward(self, *a))[1])
    x, time, tokens, seen, sizes = inputs()
    results = []
    for expected in (3, 6):
        calls.clear()
        out = net(x, time, Cond(tokens, hidden(seen), size_ids=sizes))
        grads = gradients(out, net)
        assert len(calls) == expected
        results.append({"out": out, **grads})
        net.enable_gradient_checkpointing()
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_attention_backends_agree():
    net = DiT.from_diffusers(stock(torch.float64))
    x, time, tokens, seen, _ = inputs(dtype=torch.float64)
    cond = Cond(tokens, hidden(seen, torch.float64))
    net.set_attention_backend("sdpa")
    sdpa = net(x, time, cond)
    net.set_attention_backend("plain")
    assert [m.backend for m in net.modules() if hasattr(m, "backend")] == ["plain"] * 6
    assert_close(net(x, time, cond), sdpa, 1e-12)


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
        ({"sample_size": 1}, "sample_size=1"),
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
        ({"tokens": torch.zeros(2, 7, 19)}, "tokens is 19 wide.*caption_channels=20"),
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
    with pytest.raises(ValueError, match=r"\(2, 5, 16, 16\).*in_channels=4"):
        net(torch.zeros(2, 5, 16, 16), time, Cond(tokens, size_ids=sizes))


def test_lora_targets_are_the_projections_of_every_attention_here_and_in_stock():
    for model in (stock(), DiT(**SMALL)):
        linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        hit = {n for n in linears if n.endswith(tuple(f".{t}" for t in LORA_TARGETS))}
        assert hit == {n for n in linears if ".attn1." in n or ".attn2." in n}
        assert all(any(n.endswith(f".{t}") for n in hit) for t in LORA_TARGETS)
