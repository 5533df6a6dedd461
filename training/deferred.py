"""Networks whose weights are made where they are sharded, one unit after the other.

A network that is built under ``deferred`` has its weights on the meta device. What its constructor
does to them (``nn.init``) is recorded, and done when ``materialize`` asks for the values, with the
random numbers that it would have drawn at once: the same weights, and the same stream afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

Net = TypeVar("Net", bound=nn.Module)
aten: Any = torch.ops.aten
OVERWRITES = {aten.uniform_.default, aten.normal_.default, aten.zero_.default, aten.fill_.Scalar}

_VALUES: Any = WeakTensorKeyDictionary()  # a parameter on the meta device -> what makes its value


class _Write(NamedTuple):
    """An operation in place on a tensor or a view of it, whose layout is given."""

    function: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    args: tuple[Any, ...]  # behind the tensor
    named: dict[str, Any]
    random_state: Tensor | None  # before it, where it draws


class _Recorder(TorchDispatchMode):
    """``torch.empty`` gives tensors on the meta device; what is written to them is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: dict[int, tuple[Any, list[_Write]]] = {}  # by storage, which it keeps alive

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is aten.empty.memory_format and _is_host(named.get("device")):
            made = func(*args, **{**named, "device": torch.device("meta"), "pin_memory": False})
            storage = made.untyped_storage()
            self.writes[storage._cdata] = storage, []
            return made
        target = args[0] if args else None
        if not (func._schema.is_mutable and isinstance(target, Tensor) and target.is_meta):
            return func(*args, **named)
        others = [x for x in (*args[1:], *named.values()) if isinstance(x, Tensor) and x.is_meta]
        key = target.untyped_storage()._cdata
        if others or key not in self.writes or named.get("generator") is not None:
            raise NotImplementedError(f"{func}: cannot be recorded, to be done when weights are sharded")
        _, writes = self.writes[key]
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            state = torch.get_rng_state()
            drawn = torch.empty_strided(target.size(), target.stride(), dtype=target.dtype)
            func(drawn, *args[1:], **named)  # for the stream of random numbers alone
        if func in OVERWRITES and target.numel() * target.element_size() == _bytes(target):
            writes.clear()
        layout = target.size(), target.stride(), int(target.storage_offset())
        writes.append(_Write(func, *layout, args[1:], named, state))
        return func(*args, **named)

    def value(self, x: Tensor) -> Callable[[], Tensor]:
        """What gives ``x`` its value on the host."""
        _, writes = self.writes[x.untyped_storage()._cdata]
        size, stride, offset = x.size(), x.stride(), x.storage_offset()
        count, dtype = _bytes(x) // x.element_size(), x.dtype

        def make() -> Tensor:
            flat, before = torch.empty(count, dtype=dtype), torch.get_rng_state()
            for w in writes:
                if w.random_state is not None:
                    torch.set_rng_state(w.random_state)
                w.function(flat.as_strided(w.size, w.stride, w.offset), *w.args, **w.named)
            torch.set_rng_state(before)
            return flat.as_strided(size, stride, offset)

        return make


class _LooksReal(TorchFunctionMode):
    """``nn.init.trunc_normal_`` and others do nothing, silently, to what is on the meta device: without its name they
    go on, and are recorded or fail."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hidden: Any = torch.Tensor.is_meta
        return False if func == hidden.__get__ else func(*args, **(kwargs or {}))


def _is_host(device: Any) -> bool:
    return torch.device(device or torch.get_default_device()).type == "cpu"


def _bytes(x: Tensor) -> int:
    return x.untyped_storage().nbytes()


def deferred(build: Callable[[], Net]) -> Net:
    """The network that ``build`` makes, with its weights on the meta device; see ``materialize``.

    The random stream stands afterwards where it would stand if they had been made.

    Raises:
        NotImplementedError, RuntimeError: an initialization that cannot be recorded, since it
            depends on the values.
    """
    recorder = _Recorder()
    with recorder, _LooksReal():
        net = build()
    for p in net.parameters():
        if p.is_meta:
            _VALUES[p] = recorder.value(p)
    return net


@torch.no_grad()
def materialize(module: nn.Module) -> None:
    """Give a module's weights that ``deferred`` left on the meta device their values, on the host."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # some may be used in several places
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is None or not p.is_meta:
                continue
            if p not in made:
                made[p] = nn.Parameter(_VALUES.pop(p)(), requires_grad=p.requires_grad)
            part._parameters[name] = made[p]
