"""What every network shares: the attention switch and gradient checkpointing."""

import copy
import sys
import types

import pytest
import torch
from torch import Tensor

from ldm.cond import Cond
from ldm.models.base import Network
from ldm.models.mmdit import MMDiT
from ldm.models.vae import VAE
from tests import tiny
from tests.twins import NETWORKS, call

ATTENTIONS = {"unet": 8, "vae": 2, "mmdit": 4, "dit": 8}
WIDTHS = {"unet": "cross_attention_dim", "mmdit": "joint_attention_dim", "dit": "caption_channels"}  # of the text


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.fixture
def xformers(monkeypatch) -> list[torch.Size]:
    """Played by its documented equivalent, which lists its calls."""
    calls = []

    def stand_in(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        calls.append(q.shape)
        logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
        logits = logits if attn_bias is None else logits + attn_bias
        return (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, stand_in
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


@pytest.mark.parametrize("name", NETWORKS)
def test_the_switch_reaches_every_attention(name, monkeypatch, xformers):
    net = NETWORKS[name]().double()
    with torch.no_grad():
        truth = call(net)
        for backend in ("plain", "sdpa"):
            net.set_attention_backend(backend)
            torch.testing.assert_close(call(net), truth, rtol=1e-10, atol=1e-12)
        with pytest.raises(RuntimeError, match="need a CUDA device"):
            net.enable_xformers_memory_efficient_attention()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        net.enable_xformers_memory_efficient_attention()
        torch.testing.assert_close(call(net), truth, rtol=1e-10, atol=1e-12)
        assert len(xformers) == ATTENTIONS[name]
        net.disable_xformers_memory_efficient_attention()
        call(net)
        assert len(xformers) == ATTENTIONS[name]
    with pytest.raises(ValueError, match="attention_op"):
        net.enable_xformers_memory_efficient_attention(attention_op=print)


@pytest.mark.parametrize("backend", ["plain", "sdpa", "xformers"])
@pytest.mark.parametrize("name", ["unet", "mmdit", "dit"])
def test_a_row_that_hides_all_its_text_gets_nothing_from_it(name, backend, monkeypatch, xformers):
    """Whatever the text is, and in any backend: output and gradients are those of another text, and of `plain`."""
    net = NETWORKS[name]().double()
    x, pooled = torch.randn(2, 4, 8, 8).double(), torch.randn(2, tiny.POOLED + 2).double() if name == "mmdit" else None
    results = []
    for kernel, text in ((backend, 0.0), (backend, 3.0), ("plain", 0.0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda kernel=kernel: kernel == "xformers")
        net.set_attention_backend(kernel)
        tokens = torch.linspace(-1, 1, 10 * net.config[WIDTHS[name]]).double().view(2, 5, -1).clone()
        tokens[1] += text
        bias = torch.zeros(2, 5).double()
        bias[0, 3:], bias[1] = -torch.inf, -torch.inf
        out = net(x, torch.tensor([3.0, 700.0]).double(), Cond(tokens.requires_grad_(), bias, pooled))
        grads = torch.autograd.grad(out.sin().sum(), [tokens, *net.parameters()])
        assert out.isfinite().all() and not grads[0][1].any() and grads[0][0, :3].any()
        results.append([out, *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_backend_that_cannot_run_changes_nothing(name, monkeypatch):
    net = NETWORKS[name]()
    monkeypatch.setitem(sys.modules, "xformers", None)
    net.set_attention_backend("plain")
    with pytest.raises(RuntimeError, match="'xformers' cannot be imported"):
        net.set_attention_backend("xformers")
    with pytest.raises(ValueError, match="'flashy' is not one of auto, xformers, flash"):
        net.set_attention_backend("flashy")
    assert {m.backend for m in net.modules() if hasattr(m, "backend")} == {"plain"}


def test_heads_too_wide_are_refused_when_the_backend_is_set(monkeypatch):
    """The autoencoder has one head as wide as its innermost level: 512 in Stable Diffusion's."""
    with torch.device("meta"):
        net = VAE(block_out_channels=(32, 512))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ValueError, match="heads 512 wide, it takes 256 at most"):
        net.set_attention_backend("flash")
    assert {m.backend for m in net.modules() if hasattr(m, "backend")} == {"auto"}


# --- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_what_forward_recomputes(name, monkeypatch):
    net, seen = NETWORKS[name](), []
    monkeypatch.setattr(Network, "run_block", lambda self, block, *args: (seen.append(block), block(*args))[1])
    call(net)
    assert set(seen) == set(net.blocks())
    assert len(seen) == len(net.blocks()) > 2


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputing_changes_no_gradient_and_saves_memory_by_its_share(name):
    """Bit-equal: the same kernels run on the same numbers. Memory is what autograd keeps beside the weights."""
    net = NETWORKS[name]()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    results, kept = [], []
    for fraction in (0.0, 0.34, 0.67, 1.0):
        net.enable_gradient_checkpointing(fraction) if fraction else net.disable_gradient_checkpointing()
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            s = t.untyped_storage()
            if s.data_ptr() not in weights:
                storages[s.data_ptr()] = s.nbytes()
            return t

        net.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = call(net)
        kept.append(sum(storages.values()))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + len(list(net.parameters()))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert kept[3] < 0.5 * kept[0]


def test_the_share_is_spread_over_the_depth():
    with torch.device("meta"):
        net = MMDiT(num_layers=12, num_attention_heads=1, attention_head_dim=8, caption_projection_dim=8)
    for fraction, recomputed in (
        (1.0, list(range(12))), (0.5, [1, 3, 5, 7, 9, 11]), (0.25, [3, 7, 11]), (0.01, [11]), (1, list(range(12))),
    ):  # fmt: skip
        net.enable_gradient_checkpointing(fraction)
        for model in (net, copy.deepcopy(net)):  # an average of the weights is a copy
            assert [i for i, block in enumerate(model.transformer_blocks) if block.recompute] == recomputed
    for wrong in (0, -0.5, 1.5, None, float("nan"), "all"):
        with pytest.raises(ValueError, match="expected above 0 and at most 1"):
            net.enable_gradient_checkpointing(wrong)


def test_nothing_is_recomputed_without_gradients(monkeypatch):
    net = NETWORKS["mmdit"]()
    net.enable_gradient_checkpointing()
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", None)
    with torch.no_grad():
        call(net)
    with pytest.raises(TypeError):
        call(net)


def test_recomputing_compiles_as_one_graph():
    net = tiny.mmdit(num_layers=2)
    net.enable_gradient_checkpointing(0.5)
    expected = call(net)
    net.compile(backend="eager", fullgraph=True)
    assert torch.equal(call(net), expected)
