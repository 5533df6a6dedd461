"""The plan in docs/scaling.md is what its script prints; memory without data is memory with data."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import scaling
from benchmarks.measure import peak_bytes
from ldm.cond import Cond
from training import arithmetic
from training.arithmetic import autocast_of, parameters, training_flops, training_memory
from training.config import load
from training.sizes import Sizes
from training.tasks.diffusion import network

ROOT = Path(__file__).resolve().parent.parent


def test_the_document_has_the_scripts_table():
    assert scaling.table(scaling.Assumed()) in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def test_flops_of_a_linear_layer_are_three_products():
    def forward(net: nn.Module, rows: int) -> torch.Tensor:
        return net(torch.randn(rows, 5, 32))

    assert training_flops(lambda: nn.Linear(32, 64), forward) == 3 * 2 * 5 * 32 * 64


def test_stable_diffusion_2_has_the_flops_that_others_count():
    assert scaling.plan("unet_sd2_from_scratch", scaling.Assumed())["training step, one image"] == "2.41 TFLOP"


def network_of(name: str, checkpointing: float) -> tuple[Callable[[], nn.Module], Callable[[nn.Module, int], Tensor]]:
    """Of OpenMoji's configs, and its forward pass on random numbers."""
    config = load(ROOT / f"configs/openmoji/{name}.yaml", [f"train.gradient_checkpointing={checkpointing}"])
    sizes = Sizes(4, 4, 194, 33, 194) if name == "mmdit" else Sizes(4, 4, 192, 32)

    def forward(net: nn.Module, rows: int) -> Tensor:
        pooled = torch.randn(rows, sizes.pooled_width) if sizes.pooled_width else None
        cond = Cond(torch.randn(rows, sizes.text_length, sizes.text_width), pooled=pooled)
        return net(torch.randn(rows, 4, 16, 16), torch.rand(rows), cond)

    return lambda: network(config, sizes), forward  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "checkpointing", "micros", "within"),
    [
        ("unet", 0.0, 1, 0.02),
        ("unet", 0.0, 2, 0.02),
        ("mmdit", 0.0, 1, 0.02),
        ("dit", 1.0, 1, 0.1),
    ],  # what is computed again is held a little longer
)
def test_memory_of_a_step_without_data_is_that_of_one_with(name: str, checkpointing: float, micros: int, within: float):
    """As torch's allocator reports a real step's; kernels' own buffers are in the one and not in the other."""
    build, forward = network_of(name, checkpointing)
    net = build()

    def step() -> None:
        for _ in range(micros):
            forward(net, 8).square().mean().backward()
        net.zero_grad(set_to_none=True)

    step()
    told = training_memory(build, forward, 8, averaged=True, accumulated=micros > 1)
    weights = 4 * parameters(net)[0]
    assert told.weights == pytest.approx(weights, rel=0.01) and told.optimizer == 2 * told.average == 2 * weights
    assert told.total == pytest.approx(4 * weights + peak_bytes(step, torch.device("cpu")), rel=within)


# --- what autocast does on CUDA --------------------------------------------------------------------------------------


def bytes_saved(net: nn.Module, forward: Callable[[nn.Module, int], Tensor]) -> int:
    """What autograd holds for the backward pass of 8 rows, beside the network's own weights."""
    own = {x.untyped_storage().data_ptr() for x in (*net.parameters(), *net.buffers())}
    held: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward(net, 8)
    assert out.requires_grad
    return sum(x.untyped_storage().nbytes() for x in held.values())


def in_float32(function: Callable[..., Tensor], promotes: bool) -> Callable[..., Tensor]:
    """The function on float32 copies of its inputs, as a GPU runs it under autocast; if it
    ``promotes``, only where one of them is in float32."""

    def wide(*args: Any, **kwargs: Any) -> Tensor:
        if promotes and all(x.dtype != torch.float32 for x in args if isinstance(x, Tensor)):
            return function(*args, **kwargs)
        args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
        kwargs = {k: x.float() if isinstance(x, Tensor) else x for k, x in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return wide


@pytest.mark.parametrize(("network_name", "more"), [("unet", 1.2), ("dit", 1.04), ("mmdit", 1.1)])
def test_what_is_held_under_cudas_autocast(network_name: str, more: float):
    """Counted in two ways: by autograd's hooks with norms, upsampling and residuals called in float32, and by the
    dispatcher's rules. On a simulated CUDA device, with CUDA's own autocast, the same bytes were counted."""
    build, forward = network_of(network_name, 0.0)
    net = build()
    with autocast_of("cpu", torch.bfloat16):
        on_cpu = bytes_saved(net, forward)
    with autocast_of("cuda", torch.bfloat16):
        on_cuda = bytes_saved(net, forward)
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        for place, name in ((F, "layer_norm"), (F, "group_norm"), (F, "interpolate"), (torch, "addcmul")):
            wide = in_float32(getattr(place, name), promotes=name == "addcmul")
            stack.enter_context(mock.patch.object(place, name, wide))
        by_hand = bytes_saved(net, forward)
    assert on_cuda == pytest.approx(by_hand, rel=1e-3)
    assert on_cuda > more * on_cpu
    plan = {d: training_memory(build, forward, 8, averaged=False, device_type=d, autocast=torch.bfloat16).total
            for d in ("cpu", "cuda")}  # fmt: skip
    # at the peak of a UNet, whose gradients are there by then, less is held than after the forward pass
    assert plan["cuda"] - plan["cpu"] == pytest.approx(on_cuda - on_cpu, rel=0.1) or network_name == "unet"
    assert plan["cuda"] > plan["cpu"]


def test_the_lists_are_those_of_torch():
    """All that torch registers for CUDA's autocast and not for the CPU's, but for what no precision depends on: names
    for the same products (lower precision in both), and losses and grids that the CPU has under others."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    cuda = {n.removeprefix("aten::") for n in names if has(n, "AutocastCUDA") and not has(n, "AutocastCPU")}
    products = {
        "_convolution", "convolution", "cudnn_convolution", "cudnn_convolution_transpose", "_thnn_fused_gru_cell",
        "_thnn_fused_lstm_cell", "gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell", "addmv", "addr", "mv",
        "chain_matmul", "einsum", "linalg_multi_dot", "_scaled_dot_product_flash_attention",
    }  # fmt: skip
    assert cuda - products == {*arithmetic.CUDA_FLOAT32, *arithmetic.CUDA_PROMOTE}


def test_the_rules_end_with_the_block_and_ask_for_float32():
    x = torch.randn(2, 8, 4, 4).bfloat16()
    with autocast_of("cuda", torch.bfloat16):
        assert F.group_norm(x, 2).dtype == x.softmax(-1).dtype == x.sum(0).dtype == (x**2).dtype == torch.float32
        assert F.silu(x).dtype == (x @ x).dtype == torch.addcmul(x, x, x).dtype == torch.bfloat16
        assert torch.addcmul(x, x, x.float()).dtype == torch.float32
        assert x.softmax(-1, dtype=torch.float64).dtype == torch.float64
    with autocast_of("cuda", None):
        assert F.group_norm(x, 2).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert F.group_norm(x, 2).dtype == x.softmax(-1).dtype == torch.bfloat16


def test_half_precision_weights_that_do_not_train_are_not_copied():
    """A frozen float32 weight is cast for each product, and the copy is held for the gradient of its input."""

    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(1, 256), *(nn.Linear(256, 256, bias=False) for _ in range(7)))
        net[1:].requires_grad_(False)
        return net

    def forward(net: nn.Module, rows: int) -> Tensor:
        return net(torch.randn(rows, 1))

    single, half = (
        training_memory(build, forward, 1, averaged=False, device_type="cuda", autocast=torch.bfloat16, frozen_bytes=n)
        for n in (4, 2)
    )
    copies = 7 * 256 * 256 * 2
    assert single.activations - half.activations == pytest.approx(copies, rel=0.05)
    assert single.weights - half.weights == copies
