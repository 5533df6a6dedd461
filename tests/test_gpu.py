"""What only a CUDA device can show; `pytest -m gpu` runs it.

``LDM_GPU_TEST_DEVICE=cpu pytest -m gpu`` runs the same bodies on a CPU, in bfloat16 where a GPU would take it by
itself; what looks at CUDA's own kernels is skipped there.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.models.attention import attention

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("LDM_GPU_TEST_DEVICE", "cuda")
kernels_of_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="looks at CUDA's own kernels or memory")
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


@kernels_of_cuda
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


@kernels_of_cuda
def test_the_kernel_is_the_one_that_is_named():
    q, k, v = (torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.zeros(2, 128, device="cuda")
    assert "flash" in kernels(q, k, v, backend="flash")
    assert "fmha_cutlass" in kernels(q, k, v, bias, backend="auto") and "cudnn" not in kernels(q, k, v, bias)


@kernels_of_cuda
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


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Products of float32 in float32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def networks() -> dict[str, Callable[[], nn.Module]]:
    from tests import tiny

    return {"unet": tiny.unet, "mmdit": tiny.mmdit, "dit": tiny.dit}


def inputs(name: str, *, bias: bool) -> tuple[Tensor, Tensor, Cond]:
    """Latents (B, C, h, w), times as the network sees them, and text; ``bias``: on the logits of the last token."""
    from tests import tiny

    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator).to(DEVICE)

    tokens = draw(tiny.LENGTH, tiny.JOINT if name == "mmdit" else tiny.WIDTH)
    last = torch.zeros(3, tiny.LENGTH, device=DEVICE)
    last[:, -1] = -math.inf if name == "dit" else math.log(4)
    pooled = draw(tiny.POOLED + 2) if name == "mmdit" else None
    return (
        draw(4, 8, 8),
        torch.tensor([20.0, 400.0, 900.0], device=DEVICE),
        Cond(tokens, last if bias else None, pooled),
    )


def passes(net: nn.Module, x: Tensor, t: Tensor, cond: Cond, autocast: torch.dtype | None = None) -> list[Tensor]:
    """The output and the gradient of every weight, in float32."""
    net.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        out = net(x, t, cond)
    out.float().square().mean().backward()
    return [out.detach().float(), *(p.grad.float() for p in net.parameters() if p.grad is not None)]


def apart(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Relative L2 distance of the outputs, and of all gradients together."""
    assert len(found) == len(exact)

    def distance(a: list[Tensor], b: list[Tensor]) -> float:
        return math.sqrt(sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))) / math.sqrt(
            sum(float(y.square().sum()) for y in b)
        )

    return distance(found[:1], exact[:1]), distance(found[1:], exact[1:])


@pytest.mark.parametrize("name", ["unet", "mmdit", "dit"])
def test_bfloat16_is_near_float32(name: str, exact_float32: None):
    """bf16 has 8 bits: a relative error of 0.4% in each product, of which a few dozen follow each other."""
    net = networks()[name]().to(DEVICE).train()
    given = inputs(name, bias=name != "unet")
    exact = passes(net, *given)
    output, gradients = apart(passes(net, *given, torch.bfloat16), exact)
    assert 1e-5 < output < 0.03 and 1e-5 < gradients < 0.08  # above zero: it was bf16


@pytest.mark.parametrize("backend", ["sdpa", "flash", "xformers"])
@pytest.mark.parametrize("name", ["unet", "mmdit", "dit"])
def test_backends_agree_in_a_network(name: str, backend: str, exact_float32: None):
    """Outputs and gradients under autocast to bf16, beside those of ``plain`` in float32."""
    if backend == "xformers" and (DEVICE != "cuda" or "xformers" not in CASES):
        pytest.skip("xformers' kernels need a CUDA device and the package")
    net: Any = networks()[name]().to(DEVICE).train()
    given = inputs(name, bias=name != "unet" and backend != "flash")
    net.set_attention_backend("plain")
    exact = passes(net, *given)
    net.set_attention_backend(backend)
    output, gradients = apart(passes(net, *given, torch.bfloat16), exact)
    assert output < 0.03 and gradients < 0.08


def test_compiled_blocks_agree(exact_float32: None):
    """Regional compilation by inductor: the same numbers, in another order of summation."""
    from training.tasks.common import compile_blocks

    net: Any = networks()["mmdit"]().to(DEVICE).train()
    given = inputs("mmdit", bias=True)
    exact = passes(net, *given)
    assert compile_blocks(net) == 3
    output, gradients = apart(passes(net, *given), exact)
    assert output < 1e-4 and gradients < 1e-3


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_skipped_step_changes_no_bit(bad: float, fp16: bool):
    """One value of one gradient is not finite: weights, both moments and the step's count stay as they were, the
    average too, and in fp16 the loss's scale is halved. The next step is made."""
    from training.ema import EMA
    from training.optim import Guarded
    from training.schema.optim import AdamW

    net = networks()["unet"]().to(DEVICE).train()
    given = inputs("unet", bias=False)
    optimizer = Guarded(net.named_parameters(), AdamW(learning_rate=1e-3), 100, fp16=fp16)
    ema = EMA(net.named_parameters(), 0.9)

    def state() -> dict[str, Tensor]:
        flat = {**optimizer.tensors(), **{f"average {k}": x for k, x in ema.tensors().items()}}
        flat |= {f"weight {k}": p for k, p in net.named_parameters()}
        return {k: x.detach().clone() for k, x in flat.items() if k not in ("loss_scale", "good_steps")}

    def step(spoil: bool) -> float:
        optimizer.scaled(net(*given).float().square().mean()).backward()
        if spoil:
            next(p for p in net.parameters() if p.grad is not None).grad.view(-1)[0] = bad
        _, skipped = optimizer.step()
        ema.update(optimizer.steps - 1, optimizer.steps, skipped)
        return skipped.item()

    assert step(False) == 0.0
    before, scale = state(), optimizer.tensors().get("loss_scale", torch.ones(())).item()
    assert step(True) == 1.0
    after = state()
    assert before.keys() == after.keys() and [k for k in before if not before[k].equal(after[k])] == []
    if fp16:
        assert optimizer.tensors()["loss_scale"].item() == scale / 2
    assert step(False) == 0.0 and any(not before[k].equal(x) for k, x in state().items())


# --- runs ------------------------------------------------------------------------------------------------------------

MIXED: dict[str, Any] = {"mixed_precision": "auto"} if DEVICE == "cuda" else {"mixed_precision": "bf16"}
HALF_BASE: dict[str, Any] = {} if DEVICE == "cuda" else {"base_dtype": "bf16"}  # a GPU's default


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny bases of the four families, and pictures."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture
def device_of_runs(monkeypatch: pytest.MonkeyPatch, own_accelerate: None) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def weights(run: Path) -> dict[str, Tensor]:
    files = sorted(x for part in ("pipeline", "adapter") for x in (run / part).rglob("*.safetensors"))
    return {f"{x.parent.name}/{key}": value for x in files for key, value in load_file(x).items()}


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart alpha"])
def test_lora_with_defaults(
    family: str, bases: Path, device_of_runs: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A run with nothing set but a LoRA: the frozen base is bf16, what trains is float32 and learns."""
    from tests import adapting
    from training import loop

    tasks: list[Any] = []
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda task, *a, **kw: (tasks.append(task), train(task, *a, **kw))[1])
    run = adapting.trained(family, bases, str(tmp_path / "run"), lora={}, train=MIXED, **HALF_BASE)
    (task,) = tasks
    dtypes = {trains: {p.dtype for p in task.net.parameters() if p.requires_grad is trains} for trains in (True, False)}
    assert dtypes[True] == {torch.float32} and torch.bfloat16 in dtypes[False]
    assert all(p.device.type == DEVICE for p in task.net.parameters())
    adapter = weights(run)
    learned = [bool(x.any()) for key, x in adapter.items() if "lora_B" in key]
    assert sum(learned) > 0.9 * len(learned) > 0  # SD 3's last block uses no query of the text
    assert all(x.isfinite().all() for x in adapter.values())
    assert list((run / "samples").glob("*.png"))


def test_a_checkpoint_is_gone_on_from(
    bases: Path, device_of_runs: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A run that breaks off after a checkpoint and is started again ends where an unbroken one ends: on a CPU bit for
    bit, on a GPU but for sums whose order differs from run to run."""
    from tests import adapting
    from training.tasks.diffusion import DiffusionTask

    how: dict[str, Any] = {"train": {**MIXED, "images": 12, "checkpoint_every": 4}, "ema_decay": 0.9}
    whole = adapting.trained("sd", bases, str(tmp_path / "whole"), **how)
    loss = DiffusionTask.loss

    def breaks(self: Any, batch: Any, images: int) -> Any:
        if images >= 10:
            raise KeyboardInterrupt
        return loss(self, batch, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DiffusionTask, "loss", breaks)
        adapting.trained("sd", bases, str(tmp_path / "broken"), **how)
    kept = sorted(x.name for x in (tmp_path / "broken" / "checkpoints").glob("images_*"))
    assert kept == ["images_000000004", "images_000000008"]
    again = adapting.trained("sd", bases, str(tmp_path / "broken"), **how)
    for part in ("pipeline", "checkpoints/images_000000012"):
        a, b = (
            {
                f"{x.relative_to(run / part)}/{k}": v
                for x in (run / part).rglob("*.safetensors")
                for k, v in load_file(x).items()
            }
            for run in (whole, again)
        )
        assert a.keys() == b.keys() and len(a) > 100
        if DEVICE == "cpu":
            assert [k for k in a if not a[k].equal(b[k])] == []
        else:
            far = [float((a[k].double() - b[k].double()).norm()) for k in a]
            length = [float(x.double().norm()) for x in b.values()]
            assert math.hypot(*far) < 1e-3 * math.hypot(*length)


def test_offloaded_parts_draw_the_same():
    """Each part is on the device only while it is at work; the pictures are those without offload."""
    from pipelines.text_to_image import TextToImagePipeline
    from tests import adapting

    stock: Any = adapting.stock("sd3")
    pipe: Any = TextToImagePipeline.from_diffusers(stock).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    plain = adapting.drawn(pipe, ["a red apple", "zebra"])
    pipe = TextToImagePipeline.from_diffusers(stock)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload(device=DEVICE)
    offloaded = adapting.drawn(pipe, ["a red apple", "zebra"])
    assert (offloaded.float().cpu() - plain.float().cpu()).abs().max() < 2e-3
    at_rest = {name: part.device.type for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    assert at_rest == {"net": "cpu", "vae": "cpu", "text": "cpu"}
