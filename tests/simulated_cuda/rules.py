"""What CUDA's kernels refuse and the CPU's do, and which operations wait for the device: by operator, for torch 2.13.

Each rule raises what CUDA does, as far as its words help to find the fault. ``name`` is ``aten::…`` without overload.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
aten = torch.ops.aten

# --- mixed devices ---------------------------------------------------------------------------------------------------

# TensorIterator's ``allow_cpu_scalars``: elementwise with a second operand; a 0-dim CPU tensor is read as a number.
_BINARY = (
    "add sub rsub mul div true_divide floor_divide remainder fmod pow float_power maximum minimum fmax fmin atan2 hypot"
    " copysign nextafter xlogy logaddexp logaddexp2 eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and"
    " bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift heaviside where clamp clamp_min clamp_max addcmul"
    " addcdiv threshold addr"
)
CPU_SCALARS = {f"aten::{name}" for name in _BINARY.split()} | {f"aten::{name}_" for name in _BINARY.split()}
CPU_SCALARS |= {f"aten::_foreach_{name}{end}" for name in ("add", "mul", "div") for end in ("", "_")}
CPU_SCALARS |= {"aten::masked_fill", "aten::masked_fill_", "aten::fill", "aten::fill_", "aten::index_fill"}
# Between devices by their meaning, or with indices that are brought over.
ANY_DEVICE = {
    "aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::index", "aten::_unsafe_index", "aten::index_put",
    "aten::index_put_", "aten::_index_put_impl_", "aten::set_data",
}  # fmt: skip


def check_devices(name: str, full: str, cpu: Sequence[Tensor], into_cpu: bool) -> None:
    """Of one call with tensors of both devices.

    Args:
        cpu: those on the CPU.
        into_cpu: the result would be written into the first of them.
    """
    if name in ANY_DEVICE:
        return
    if name in CPU_SCALARS and all(x.ndim == 0 for x in cpu) and not into_cpu:
        return
    shapes = [tuple(x.shape) for x in cpu]
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({full}: "
        f"of shape {', '.join(map(str, shapes))} on the CPU)"
    )


# --- dtypes ----------------------------------------------------------------------------------------------------------


def _same(*names: str) -> Callable[..., None]:
    """The operands of a product or a norm have one dtype, and none of whole numbers."""

    def rule(full: str, given: dict[str, Any]) -> None:
        operands = {name: given[name] for name in names if isinstance(given.get(name), Tensor)}
        kinds = {x.dtype for x in operands.values()}
        if len(kinds) > 1:
            each = ", ".join(f"{name} {x.dtype}" for name, x in operands.items())
            raise RuntimeError(f"{full} on CUDA: expected the same dtype, got {each}")
        if not all(kind.is_floating_point or kind.is_complex for kind in kinds):
            raise RuntimeError(f'{full}: "addmm_cuda" not implemented for {next(iter(kinds))}')

    return rule


def _fused_adamw(full: str, given: dict[str, Any]) -> None:
    for name in ("grad_scale", "found_inf"):
        value = given.get(name)
        if isinstance(value, Tensor) and value.dtype is not torch.float32:
            raise RuntimeError(f"{full}: {name}: expected scalar type Float but found {value.dtype}")
    for parameter, grad, first, second in zip(
        given["self"], given["grads"], given["exp_avgs"], given["exp_avg_sqs"], strict=True
    ):
        kinds = {x.dtype for x in (parameter, grad, first, second)}
        if len(kinds) > 1:
            raise RuntimeError(f"{full}: params, grads, exp_avgs and exp_avg_sqs must have same dtype, got {kinds}")


def _not_half(full: str, given: dict[str, Any]) -> None:
    for value in given.values():
        if isinstance(value, Tensor) and value.dtype in HALF:
            raise RuntimeError(f"{full}: not implemented for {value.dtype} on CUDA")


DTYPES: dict[str, Callable[[str, dict[str, Any]], None]] = {
    **dict.fromkeys(("aten::mm", "aten::mv", "aten::bmm", "aten::dot"), _same("self", "mat2", "vec", "tensor")),
    "aten::addmm": _same("self", "mat1", "mat2"),
    "aten::baddbmm": _same("self", "batch1", "batch2"),
    "aten::linear": _same("input", "weight", "bias"),
    "aten::convolution": _same("input", "weight", "bias"),
    "aten::convolution_backward": _same("grad_output", "input", "weight"),
    "aten::native_layer_norm": _same("input", "weight", "bias"),  # the CPU's takes a half input with float32 weights
    "aten::native_layer_norm_backward": _same("grad_out", "input", "weight"),
    "aten::native_group_norm": _same("input", "weight", "bias"),
    "aten::native_group_norm_backward": _same("grad_out", "input", "weight"),
    "aten::_fused_adamw_": _fused_adamw,
    **{
        f"aten::{name}": _not_half
        for name in (
            "linalg_inv_ex", "linalg_cholesky_ex", "linalg_qr", "_linalg_svd", "_linalg_eigh", "linalg_solve_ex",
            "_linalg_solve_ex", "linalg_lstsq", "histc",
        )
    },
}  # fmt: skip


def check_generator(full: str, generator: torch.Generator | None) -> None:
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"{full}: Expected a 'cuda' device type for generator but found 'cpu'")


def check_sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """Of scaled_dot_product_attention: one of the kernels that are switched on takes these.

    Raises:
        RuntimeError: none does.
    """
    if not query.dtype == key.dtype == value.dtype:
        kinds = f"{query.dtype}, {key.dtype} and {value.dtype}"
        raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got {kinds}")
    kernels, width = torch.backends.cuda, query.shape[-1]
    flash = query.dtype in HALF and attn_mask is None and width <= 256
    efficient = query.dtype in (*HALF, torch.float32)
    if (
        (flash and kernels.flash_sdp_enabled())
        or (efficient and kernels.mem_efficient_sdp_enabled())
        or kernels.math_sdp_enabled()
    ):
        return
    raise RuntimeError(
        f"No available kernel. Aborting execution. (query {query.dtype}, heads {width} wide, "
        f"{'a' if attn_mask is not None else 'no'} mask; flash takes float16 and bfloat16 without a mask)"
    )


# --- where the host waits --------------------------------------------------------------------------------------------

WAITS = {
    "aten::_local_scalar_dense": "item", "aten::nonzero": "nonzero", "aten::masked_select": "masked_select",
    "aten::equal": "equal", "aten::is_nonzero": "is_nonzero", "aten::unique_dim": "unique", "aten::_unique2": "unique",
    "aten::unique_consecutive": "unique", "aten::_unique": "unique", "aten::bincount": "bincount",
    "aten::repeat_interleave": "repeat_interleave", "aten::histc": "histc", "aten::_linalg_check_errors": "linalg",
    "aten::allclose": "allclose", "aten::argwhere": "nonzero",
}  # fmt: skip


def indexing_waits(indices: Sequence[Tensor | None], values: Tensor | None) -> str | None:
    """Of ``x[indices]`` and ``x[indices] = values`` on the device: what for, or None."""
    there = [index for index in indices if index is not None]
    masks = [index for index in there if index.dtype in (torch.bool, torch.uint8)]
    if masks and values is not None and values.numel() == 1 and len(there) == 1:
        return None  # masked_fill, which takes a number from the host along
    if masks:
        return "bool index"
    if any(index.device.type == "cpu" and index.numel() for index in there):
        return "H2D copy of an index"
    return "H2D copy" if values is not None and values.device.type == "cpu" else None
