"""MMDiT at the published sizes: names, shapes and counts on the meta device; values at widths of fast kernels."""

import math
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from ldm.cond import Cond
from ldm.models.mmdit import MMDiT

SD3: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048, "attention_head_dim": 64, "pos_embed_max_size": 192,
}  # fmt: skip
MEDIUM: dict[str, Any] = SD3 | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
# The transformers' config.json as published with Stable Diffusion 3 and 3.5, and what they count to.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "sd3-medium": (MEDIUM, 2_028_328_000),
    "sd3.5-medium": (
        MEDIUM | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        2_243_171_520,
    ),
    "sd3.5-large": (
        SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
        8_056_627_520,
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_published_sizes(family):
    config, count = PUBLISHED[family]
    with torch.device("meta"):
        theirs, ours = SD3Transformer2DModel(**config), MMDiT(**config)
        first, second = theirs.state_dict(), ours.state_dict()
        assert {k: (v.shape, v.dtype) for k, v in second.items()} == {k: (v.shape, v.dtype) for k, v in first.items()}
        assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
        assert {n for n, _ in ours.named_buffers()} == {n for n, _ in theirs.named_buffers()} == {"pos_embed.pos_embed"}
        assert sum(p.numel() for p in ours.parameters()) == count
        stock = dict(theirs.config)
        assert all(stock[field] == value for field, value in ours.config.items())
        x, tokens, pooled = torch.empty(2, 16, 128, 96), torch.empty(2, 78, 4096), torch.empty(2, 2048)
        with torch.no_grad():
            out = ours(x, torch.empty(2), Cond(tokens, torch.empty(2, 78), pooled))
        assert out.shape == x.shape


WIDE: dict[str, Any] = SD3 | {
    "num_layers": 2, "num_attention_heads": 3, "caption_projection_dim": 192, "joint_attention_dim": 96,
    "pooled_projection_dim": 64, "pos_embed_max_size": 24,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "sd3-medium": {},
    "sd3.5-medium": {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    "sd3.5-large": {"qk_norm": "rms_norm"},
}


def gradients(out: torch.Tensor, net: torch.nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(out.square().sum(), parameters), strict=True))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_the_published_width_equal_stock(family, folded):
    """Products large enough for the kernels that small networks never reach; with a gradient and without."""
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(**WIDE | FAMILIES[family])
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    ours = MMDiT.from_diffusers(theirs)
    x, time, pooled = torch.randn(2, 16, 24, 32), torch.tensor([3.0, 871.5]), torch.randn(2, 64)
    tokens, bias = torch.randn(2, 78, 96), None
    full = tokens
    if folded:
        full = torch.cat([tokens[:, :77], tokens[:, 77:].expand(2, 256, 96)], dim=1)
        bias = torch.zeros(2, 78)
        bias[:, 77] = math.log(256)

    def stock(model: Any, dtype: torch.dtype) -> torch.Tensor:
        x_, full_, pooled_, time_ = (t.to(dtype) for t in (x, full, pooled, time))
        return model(x_, encoder_hidden_states=full_, pooled_projections=pooled_, timestep=time_, return_dict=False)[0]

    out = ours(x, time, Cond(tokens, bias, pooled))
    got = gradients(out, ours)
    with torch.no_grad():
        sampled = ours(x, time, Cond(tokens, bias, pooled))
    theirs.double()  # the truth: its float32 is as far from it as ours, and farther over 256 equal rows
    expected = stock(theirs, torch.float64)
    want = gradients(expected, theirs)
    for result in (out, sampled):
        assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
    floor = max(
        g.abs().max().item() for g in want.values()
    )  # some are zero but for rounding: a bias that all keys share
    for name, g in want.items():
        assert (got[name] - g).abs().max() < 1e-5 * max(g.abs().max().item(), 1e-3 * floor), name
