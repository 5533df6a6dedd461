"""What only a CUDA device can show; `pytest -m gpu` runs it."""

import importlib.util

import pytest
import torch
from torch import Tensor

from ldm.models.attention import attention

pytestmark = pytest.mark.gpu
CASES = {  # backend: dtypes, whether it takes a bias, the widest head
    "sdpa": ((torch.float16, torch.bfloat16, torch.float32), True, 512),
    "plain": ((torch.float16, torch.bfloat16, torch.float32), True, 512),
    "flash": ((torch.float16, torch.bfloat16), False, 256),
    "xformers": ((torch.float16, torch.bfloat16, torch.float32), True, 512),
}
if importlib.util.find_spec("xformers") is None:
    del CASES["xformers"]
# Products of float32 may run on TF32 units, with the mantissa of float16.
TOLERANCE = {torch.float16: 6e-3, torch.bfloat16: 4e-2, torch.float32: 6e-3}


def run(tensors: list[Tensor], bias: Tensor | None, backend: str) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    out = attention(q, k, v, bias, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), (q, k, v))]


@pytest.mark.parametrize("keys", [64, 77, 320])  # 320 % 128 == 64: cuDNN's gradients with a mask (pytorch#196678)
@pytest.mark.parametrize("width", [8, 40, 64, 160, 512])
@pytest.mark.parametrize(("backend", "dtype"), [(b, d) for b, (dtypes, *_) in CASES.items() for d in dtypes])
def test_backends_agree_with_float64(backend, dtype, width, keys):
    """Outputs and gradients, without a bias and with one that hides keys, folds keys and hides a whole row."""
    _, biased, widest = CASES[backend]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(n: int) -> Tensor:
        return torch.randn(3, n, 2, width, generator=generator, device="cuda").to(dtype).transpose(1, 2)

    tensors = [draw(100), draw(keys), draw(keys)]
    bias = torch.zeros(3, keys, device="cuda")
    bias[0, 5:], bias[1, 3], bias[2] = -torch.inf, torch.tensor(256.0).log(), -torch.inf
    bias = bias.to(dtype).float()  # as the kernels see it
    exact = [x.double() for x in tensors]
    for given in (None, bias):
        if width > widest or (given is not None and not biased):
            with pytest.raises(ValueError, match=backend):
                run(tensors, given, backend)
            continue
        found = run(tensors, given, backend)
        for a, b in zip(found, run(exact, given, "plain"), strict=True):
            assert a.dtype is dtype
            assert (a.double() - b).abs().max() < TOLERANCE[dtype] * b.abs().max()
        assert given is None or not any(x[2].any() for x in found)  # zero, and not NaN, where all is hidden


def kernels(*args, **kw) -> str:
    """Names of what ran on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attention(*args, **kw)
        torch.cuda.synchronize()
    return " ".join(event.key for event in profile.key_averages()).lower()


def test_the_kernel_is_the_one_that_is_named():
    q, k, v = (torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.zeros(2, 128, device="cuda")
    assert "flash" in kernels(q, k, v, backend="flash")
    assert "fmha_cutlass" in kernels(q, k, v, bias, backend="auto") and "cudnn" not in kernels(q, k, v, bias)


def test_a_bias_costs_no_memory_per_query():
    """The mask stays a row per picture: SDPA does not copy it to (B, 1, N, M)."""
    q = torch.randn(2, 1, 4096, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(2, 1, 77, 64, device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(2, 77, device="cuda")
    peak = []
    for given in (None, bias):
        attention(q, k, k, given)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(q, k, k, given)
        peak.append(torch.cuda.max_memory_allocated() - before)
    assert peak[1] - peak[0] < 2 * 4096 * 77 * 2 / 4  # a quarter of such a copy
