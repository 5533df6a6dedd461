"""The attention kernels against the formula, and what is said when one cannot be had."""

import contextlib
import logging
import sys
import types

import pytest
import torch
from torch import Tensor

from ldm.models import attention as module
from ldm.models.attention import BACKENDS, attention, check_backend

SHAPES = {"self": (2, 3, 12, 12, 8), "cross": (2, 2, 10, 13, 16), "one_head": (1, 1, 9, 5, 32)}  # B, H, N, M, d
HERE = [name for name in BACKENDS if name != "flash"]  # those that take a bias


def fake_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None) -> Tensor:
    """What xFormers' documentation gives as the equivalent code, with the refusals that it documents, but for CUDA."""
    batch, n, heads, width = q.shape
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):  # the last is ours, to compare
        raise NotImplementedError(f"dtype={q.dtype} (supported: float32, float16, bfloat16)")
    align = 128 // torch.finfo(q.dtype).bits
    if width % align:
        raise NotImplementedError(f"query.shape[-1] % {align} != 0")
    if any(x.stride(-1) != 1 or x.stride(-2) % align for x in (q, k, v)):
        raise NotImplementedError("query.stride(-1) > 1")
    logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * width**-0.5
    if attn_bias is not None:
        if attn_bias.shape != (batch, heads, n, k.shape[1]):
            raise ValueError(f"Invalid shape for attention bias: {attn_bias.shape}")
        if attn_bias.dtype != q.dtype:
            raise ValueError(f"invalid dtype for bias: {attn_bias.dtype}")
        if any(attn_bias.stride(i) % align for i in range(3)) or attn_bias.stride(3) != 1:
            raise NotImplementedError(f"attn_bias.stride(-2) % {align} != 0 ({attn_bias.stride()})")
        logits = logits + attn_bias
    return (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).contiguous()


@pytest.fixture
def xformers(monkeypatch) -> types.ModuleType:
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, fake_attention
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return ops


def tensors(shape: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v as the networks make them: (B, N, H, d) seen as (B, H, N, d)."""
    b, h, n, m, d = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(b, length, h, d, generator=generator, dtype=dtype) for length in (n, m, m)]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def make_bias(kind: str, b: int, m: int) -> Tensor | None:
    if kind == "none":
        return None
    bias = torch.randn(b, m, generator=torch.Generator().manual_seed(2))
    bias[0, 1], bias[-1, 3:] = torch.log(torch.tensor(256.0)), -torch.inf
    if kind == "hidden":
        bias[-1] = -torch.inf
    return bias


def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, backend: str) -> list[Tensor]:
    """Output, and the gradients of a sum with fixed weights."""
    out = attention(q, k, v, bias, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), (q, k, v))]


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Row by row in float64, hidden keys left out."""
    rows = []
    for i in range(len(q)):
        seen = slice(None) if bias is None else torch.nonzero(bias[i] > -torch.inf)[:, 0]
        logits = torch.einsum("hnd,hmd->hnm", q[i], k[i][:, seen]) / q.shape[-1] ** 0.5
        if bias is not None:
            logits = logits + bias[i, seen]
        weights = logits.exp()
        total = weights.sum(-1, keepdim=True)
        rows.append(weights / torch.where(total > 0, total, 1.0) @ v[i][:, seen])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["none", "some", "hidden"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_is_the_formula_forward_and_backward(xformers, shape, kind):
    """In float64, where only the order of sums differs; where every key of a row is hidden, all is zero."""
    q, k, v = tensors(shape)
    bias = make_bias(kind, q.shape[0], k.shape[2])
    out = formula(q, k, v, bias)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    truth = [out.detach(), *torch.autograd.grad((out * weights).sum(), (q, k, v))]
    for backend in BACKENDS if bias is None else HERE:
        found = run(q, k, v, bias, backend)
        for name, a, b in zip(("output", "dq", "dk", "dv"), found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=lambda m, x=f"{backend} {name}": f"{x}: {m}")
            assert kind != "hidden" or not a[-1].any(), (backend, name)
        with torch.no_grad():
            torch.testing.assert_close(attention(q, k, v, bias, backend=backend), truth[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_backends_agree_in_lower_precision(xformers, dtype, tolerance):
    """The bounds are eight units of the last place (values are about 1); the truth is float64 on the same rounded
    numbers, the bias among them."""
    q, k, v = tensors("cross", dtype)
    bias = make_bias("some", 2, 13).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = run(*exact, bias.double(), "plain")
    for backend in HERE:
        for a, b in zip(run(q, k, v, bias.float(), backend), truth, strict=True):
            assert a.dtype is dtype
            assert (a.double() - b).abs().max() < tolerance * b.abs().max(), backend


@pytest.mark.parametrize("backend", HERE)
def test_minus_infinity_hides_a_key_and_log_n_makes_it_n(xformers, backend):
    q, k, v = tensors("self")
    bias = torch.zeros(2, 12, dtype=torch.float64)
    bias[:, 10:] = -torch.inf
    bias[:, 2] = torch.log(torch.tensor(3.0, dtype=torch.float64))
    keep = torch.tensor([0, 1, 2, 2, 2, *range(3, 10)])
    truth = attention(q, k[:, :, keep], v[:, :, keep], backend="plain")
    torch.testing.assert_close(attention(q, k, v, bias, backend=backend), truth, rtol=1e-12, atol=1e-13)


def test_rounded_bias_counts_as_documented():
    for dtype, n in ((torch.bfloat16, 252.5), (torch.float16, 256.4)):
        assert torch.tensor(256.0).log().to(dtype).double().exp().item() == pytest.approx(n, abs=0.05)


def test_xformers_gets_views_and_an_aligned_bias(xformers):
    """Its documentation: (B, M, H, K), any strides but the last; a bias with strides that are multiples of 8."""
    q, k, v = tensors("cross", torch.float16)
    got = []

    def spy(q_: Tensor, k_: Tensor, v_: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        got.append((q_, k_, v_, attn_bias))
        return fake_attention(q_, k_, v_, attn_bias)

    xformers.memory_efficient_attention = spy
    attention(q, k, v, torch.zeros(1, 13).expand(2, -1), backend="xformers")
    q_, k_, _, bias = got[0]
    assert (q_.shape, q_.data_ptr(), k_.data_ptr()) == ((2, 10, 2, 16), q.data_ptr(), k.data_ptr())
    assert (bias.shape, bias.stride(), bias.dtype) == ((2, 2, 10, 13), (16, 0, 0, 1), torch.float16)


class OnCuda(Tensor):
    device = torch.device("cuda")  # and is_cuda is False, as of a simulated device


def test_on_cuda_a_bias_takes_the_memory_efficient_kernel(monkeypatch):
    """Tensors that say that they are on a GPU: what is asked of torch, not what it answers."""
    asked, given = [], []
    monkeypatch.setattr(module, "sdpa_kernel", lambda kernels: asked.append(kernels) or contextlib.nullcontext())
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda q, k, v, mask=None: given.append(mask) or q)
    q, k, _ = (x.detach().as_subclass(OnCuda) for x in tensors("cross", torch.float16))
    attention(q, k, k, torch.zeros(2, 13), backend="sdpa")
    attention(q, k, k, backend="sdpa")
    attention(q, k, k, backend="flash")
    with pytest.raises(ValueError, match=r"flash.*not torch\.float32; take 'auto'"):
        attention(q.float(), k.float(), k.float(), backend="flash")
    with pytest.raises(ValueError, match="heads 320 wide, it takes 256 at most"):
        attention(q.repeat(1, 1, 1, 20), k.repeat(1, 1, 1, 20), k, backend="flash")
    kernels = module.SDPBackend
    assert asked == [[kernels.EFFICIENT_ATTENTION, kernels.MATH], kernels.FLASH_ATTENTION]
    assert given[0].shape == (2, 1, 1, 13) and given[0].stride() == (16, 16, 16, 1)
    assert given[1:] == [None, None]


# --- auto says what it takes -----------------------------------------------------------------------------------------


def test_auto_says_once_per_case_what_it_took(monkeypatch, caplog):
    monkeypatch.setattr(module, "_said", set())
    caplog.set_level(logging.DEBUG, logger="ldm.models.attention")
    q, k, v = tensors("cross", torch.float32)
    for _ in range(3):
        attention(q, k, v)
        attention(q, k, v, torch.zeros(2, 13))
        attention(q.double(), k.double(), v.double())
        attention(q, k, v, backend="plain")  # asked for: nothing to say
    assert caplog.messages == [
        "attention on cpu, float32, no bias: auto takes torch's SDPA",
        "attention on cpu, float32, with bias: auto takes torch's SDPA",
        "attention on cpu, float64, no bias: auto takes torch's SDPA",
    ]


@pytest.mark.parametrize(
    ("dtype", "biased", "reason"),
    [
        (torch.bfloat16, True, "memory-efficient kernel: flash takes no bias"),
        (torch.bfloat16, False, "SDPA, with a flash kernel"),
        (torch.float32, False, "the flash kernels take no float32"),
    ],
)
def test_auto_gives_its_reason_on_a_gpu(monkeypatch, caplog, dtype, biased, reason):
    monkeypatch.setattr(module, "_said", set())
    caplog.set_level(logging.DEBUG, logger="ldm.models.attention")
    assert [module._auto("cuda", dtype, biased) for _ in range(2)] == ["sdpa", "sdpa"]
    assert len(caplog.messages) == 1 and reason in caplog.messages[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(monkeypatch, caplog, xformers, backend):
    """Sizes that change are in it, and `auto` speaks while it is traced."""
    monkeypatch.setattr(module, "_said", set())
    caplog.set_level(logging.DEBUG, logger="ldm.models.attention")
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    for shape in ("self", "cross", "one_head"):
        q, k, v = tensors(shape)
        bias = None if backend == "flash" else make_bias("some", q.shape[0], k.shape[2])
        assert torch.equal(compiled(q, k, v, bias, backend=backend), attention(q, k, v, bias, backend=backend))
    said = [record for record in caplog.records if record.name == "ldm.models.attention"]  # not torch's own
    assert len(said) == (backend == "auto")


# --- what cannot be had ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(xformers):
    q, k, v = tensors("cross")
    with pytest.raises(ValueError, match="'xformer' is not one of auto, xformers, flash, sdpa, plain"):
        attention(q, k, v, backend="xformer")
    with pytest.raises(ValueError, match="'xformer' is not one of"):
        check_backend("xformer")
    with pytest.raises(ValueError, match=r"bias: shape \(2, 10\), expected \(2, 13\)"):
        attention(q, k, v, torch.zeros(2, 10))
    with pytest.raises(ValueError, match=r"'flash' takes no bias.*take 'auto', which uses SDPA's memory-efficient"):
        attention(q, k, v, torch.zeros(2, 13), backend="flash")
    with pytest.raises(ValueError, match=r"flash.*on meta"):
        attention(q.to("meta"), k.to("meta"), v.to("meta"), backend="flash")
    narrow = [x[..., :3] for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"does not take q \(2, 10, 2, 3\).*float64, cpu.*query\.shape\[-1\] % 2 != 0"):
        attention(*narrow, backend="xformers")


def test_xformers_that_cannot_run_says_why(monkeypatch, xformers):
    q, k, v = tensors("cross")
    with pytest.raises(RuntimeError, match="need a CUDA device, none is visible; take 'auto' or 'sdpa'"):
        check_backend("xformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_backend("xformers", 64)
    check_backend("xformers", 36, torch.float32)
    for width, dtype in ((30, None), (36, torch.bfloat16)):
        with pytest.raises(ValueError, match=f"heads {width} wide, it takes multiples of 8"):
            check_backend("xformers", width, dtype)
    del xformers.memory_efficient_attention  # xFormers is there, the package with its kernels is not
    for call in (lambda: check_backend("xformers"), lambda: attention(q, k, v, backend="xformers")):
        with pytest.raises(RuntimeError, match=r"'xformers' cannot be imported.*memory_efficient_attention"):
            call()
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "xformers.ops")
    for call in (lambda: check_backend("xformers"), lambda: attention(q, k, v, backend="xformers")):
        with pytest.raises(RuntimeError, match=r"cannot be imported.*pip install 'xformers>=.*'; or take 'auto'"):
            call()


def test_flash_that_cannot_run_says_why(monkeypatch):
    check_backend("flash", 512)  # torch's flash kernel for the CPU takes any width
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(RuntimeError, match=r"8\.0 \(Ampere\), Tesla T4 has 7\.5"):
        check_backend("flash")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_backend("flash", 256, torch.float16)
    with pytest.raises(ValueError, match=r"takes float16 and bfloat16 on CUDA, not torch\.float32; take 'auto'"):
        check_backend("flash", 256, torch.float32)
    with pytest.raises(ValueError, match="heads 512 wide, it takes 256 at most"):
        check_backend("flash", 512)
