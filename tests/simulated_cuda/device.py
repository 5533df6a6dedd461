"""Tensors that say ``cuda:0`` and hold their numbers on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import rules
from .syncs import note

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
aten = torch.ops.aten


class CudaTensor(torch.Tensor):
    """``cpu``: the numbers. Views share them, as on a device; autograd and autocast act above, as CUDA's do."""

    cpu_data: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> CudaTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            layout=data.layout, device=CUDA,
        )  # fmt: skip
        made.cpu_data = data
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.cpu_data!r})"

    # With these nn.Module.to swaps a parameter's content and keeps the object, as it does with a real device's.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["cpu_data"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _meta: Any, _size: Any, _stride: Any) -> CudaTensor:
        return CudaTensor(inner["cpu_data"])

    # What asks for memory by its address gets an address that is its own: to tell shared weights apart.
    def untyped_storage(self) -> torch.UntypedStorage:
        return self.cpu_data.untyped_storage()

    def data_ptr(self) -> int:
        return self.cpu_data.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaTensor:
        if id(self) not in memo:
            made = CudaTensor(self.cpu_data.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if is_parameter else made
        return memo[id(self)]

    def tolist(self) -> Any:  # torch has none for subclasses
        if self.numel():
            note("tolist")
        return self.cpu_data.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Operator:
    """What is known of an operator from its schema."""

    def __init__(self, func: Any):
        schema = func._schema
        self.full, self.name = str(func), schema.name
        self.arguments = [a.name for a in schema.arguments]
        self.dtypes = rules.DTYPES.get(self.name)
        self.wait = rules.WAITS.get(self.name)
        if self.name == "aten::repeat_interleave" and func._overloadname == "self_int":
            self.wait = None
        self.special = SPECIAL.get(self.name)
        self.writes = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        self.draws = "generator" in self.arguments
        self.has_device = "device" in self.arguments

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}


_known: dict[Any, _Operator] = {}


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator, on the CPU, as CUDA would: with its rules, and its result on the same device."""
    operator = _known.get(func)
    if operator is None:
        operator = _known[func] = _Operator(func)
    ours: list[CudaTensor] = []
    cpu: list[Tensor] = []

    def unwrap(x: Any) -> Any:
        if isinstance(x, CudaTensor):
            ours.append(x)
            return x.cpu_data
        if isinstance(x, torch.Tensor):
            cpu.append(x)
        elif isinstance(x, list):
            return [unwrap(y) for y in x]
        elif isinstance(x, tuple):
            return tuple([unwrap(y) for y in x])
        elif isinstance(x, torch.device) and x.type == "cuda":
            return CPU
        return x

    inner = [unwrap(x) for x in args]
    named = {k: unwrap(v) for k, v in kwargs.items()} if kwargs else {}
    if ours and cpu:
        into_cpu = bool(operator.writes) and args and args[0] is cpu[0]
        rules.check_devices(operator.name, operator.full, cpu, into_cpu)
    if operator.dtypes is not None:
        operator.dtypes(operator.full, operator.named(args, kwargs))
    if operator.draws:
        given = operator.named(args, kwargs)
        rules.check_generator(operator.full, given.get("generator"))
    if operator.wait is not None and ours[0].numel() and kwargs.get("output_size") is None:
        note(operator.wait)
    to_host = False
    if operator.special is not None:
        to_host = operator.special(operator, args, kwargs) is HOST
    elif operator.has_device:
        device = operator.named(args, kwargs).get("device")
        to_host = device is not None and torch.device(device).type == "cpu"
    if named.get("pin_memory"):
        named["pin_memory"] = False
    out = func(*inner, **named)
    if operator.writes:
        for x in ours:
            if x.cpu_data.shape != x.shape:
                raise NotImplementedError(f"{operator.full}: changes the shape of a simulated CUDA tensor in place")
    return _wrapped(out, ours, cpu, to_host)


def _wrapped(out: Any, ours: list[CudaTensor], cpu: list[Tensor], to_host: bool) -> Any:
    if isinstance(out, torch.Tensor):
        for x in ours:
            if x.cpu_data is out:
                return x
        if to_host or any(x is out for x in cpu):
            return out
        return CudaTensor(out)
    if isinstance(out, list):
        return [_wrapped(x, ours, cpu, to_host) for x in out]
    if isinstance(out, tuple):
        return tuple([_wrapped(x, ours, cpu, to_host) for x in out])
    return out


# --- copies and indices ----------------------------------------------------------------------------------------------

HOST = object()  # the answer of what leaves its result there


def _to_copy(operator: _Operator, args: Any, kwargs: Any) -> Any:
    device = kwargs.get("device")
    if device is None or torch.device(device).type == "cuda":
        return None
    if not kwargs.get("non_blocking") and args[0].numel():
        note("D2H copy")
    return HOST


def _copy_(operator: _Operator, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) and source.numel()
    here, there = isinstance(target, CudaTensor), isinstance(source, CudaTensor)
    if waits and here != there:
        note("H2D copy" if here else "D2H copy")
    return None


def _foreach_copy_(operator: _Operator, args: Any, kwargs: Any) -> Any:
    for target, source in zip(args[0], args[1], strict=True):
        _copy_(operator, (target, source, *args[2:]), kwargs)


def _index(operator: _Operator, args: Any, kwargs: Any) -> Any:
    values = args[2] if len(args) > 2 else None
    if not isinstance(args[0], CudaTensor):
        raise RuntimeError(
            f"{operator.full}: indices should be either on cpu or on the same device as the tensor (cpu)"
        )
    if isinstance(values, Tensor) and not isinstance(values, CudaTensor) and values.ndim:
        raise RuntimeError(f"{operator.full}: expected self and value to be on the same device, got cuda:0 and cpu")
    if (kind := rules.indexing_waits(args[1], values)) is not None:
        note(kind)


SPECIAL: dict[str, Callable[[_Operator, Any, Any], Any]] = {
    "aten::_to_copy": _to_copy,
    "aten::copy_": _copy_,
    "aten::_foreach_copy_": _foreach_copy_,
    **dict.fromkeys(("aten::index", "aten::_unsafe_index"), _index),
    **dict.fromkeys(("aten::index_put", "aten::index_put_", "aten::_index_put_impl_"), _index),
}

# --- what makes tensors ----------------------------------------------------------------------------------------------

FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m", "full",
    "linspace", "logspace", "ones", "zeros", "rand", "rand.generator", "randn", "randn.generator", "randint",
    "randint.low", "randint.generator", "randint.low_generator", "randperm", "randperm.generator", "scalar_tensor",
    "tril_indices", "triu_indices",
)  # fmt: skip
_libraries: list[torch.library.Library] = []  # what they register goes with them


def register() -> None:
    """CUDA's kernels of what makes tensors, of the copy that ``torch.tensor(…, device="cuda")`` makes below Python's
    dispatch, and of attention, whose choice of a kernel is no operator."""
    library = torch.library.Library("aten", "IMPL", "CUDA")
    _libraries.append(library)

    def factory(full: str) -> Callable[..., Tensor]:
        packet, _, overload = full.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")

        def make(*args: Any, **kwargs: Any) -> Tensor:
            rules.check_generator(full, kwargs.get("generator"))
            kwargs |= {"device": CPU, "pin_memory": None}
            return CudaTensor(func(*args, **kwargs))

        return make

    for full in FACTORIES:
        library.impl(full, factory(full))
    library.impl("copy_", _made_on_device)
    above = torch.library.Library("aten", "IMPL", "AutogradCUDA")
    _libraries.append(above)
    above.impl("scaled_dot_product_attention", _attention)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **how: Any,
) -> Tensor:
    """Whatever kernel it would be, the numbers come from products and a softmax."""
    rules.check_sdpa(query, key, value, attn_mask)
    math = aten._scaled_dot_product_attention_math
    return math(query, key, value, attn_mask, dropout_p, is_causal, **how)[0]


def _made_on_device(target: CudaTensor, source: Tensor, non_blocking: bool = False) -> CudaTensor:
    if source.numel():
        note("torch.tensor(device=cuda)")
    target.cpu_data.copy_(source)
    return target
