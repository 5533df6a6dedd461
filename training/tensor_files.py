"""Safetensors files that are written and hashed in one pass, and read tensor by tensor, each as much as is needed.

The format is a JSON header and then the bytes of one tensor after the other
(https://huggingface.co/docs/safetensors/index#format); the library writes it only from tensors that are all on the
host.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {  # in the order in which the library writes them, the widest first
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
OFFSETS = "DCP_SHARDING_INFO"  # metadata key of torch's distributed checkpoint: where each shard begins


def write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file. One tensor at a time is copied to the host; those on it are not copied.

    Args:
        tensors: plain ones, on any device; the file gets the bytes that ``safetensors.torch.save_file`` would write.
    Returns:
        the file's SHA-256, in hex.
    Raises:
        OSError: the disk is full.
        ValueError: a dtype that the format does not have.
    """
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is of {x.dtype}, which is not written to safetensors here")
    widths = list(DTYPES)
    order = sorted(tensors, key=lambda name: (widths.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        x = tensors[name]
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as handle:

        def put(data: Any) -> None:
            digest.update(data)
            handle.write(data)

        put(len(text).to_bytes(8, "little") + text)
        for name in order:
            if tensors[name].numel():
                put(_bytes(tensors[name]))
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()


def _bytes(x: Tensor) -> memoryview:
    numbers: Any = x.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(numbers)


class StoredTensor:
    """A tensor in one file, or in shards of several, of which only what is asked for is read.

    Args:
        chunks: file, and where in the tensor what it holds begins.
    """

    def __init__(self, name: str, chunks: Sequence[tuple[Any, Sequence[int]]]):
        self.name, self.chunks = name, []
        for file, begin in chunks:
            self.chunks.append((file, tuple(begin), tuple(file.get_slice(name).get_shape())))
        ends = [[b + n for b, n in zip(begin, size, strict=True)] for _, begin, size in self.chunks]
        self.shape = torch.Size(max(x) for x in zip(*ends, strict=True))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def read(self, begin: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """The tensor, or the box of that size that begins there, in memory of its own on the host."""
        begin = [0] * self.ndim if begin is None else begin
        size = self.shape if size is None else size
        out: Tensor | None = None
        for file, first, length in self.chunks:
            low = [max(a, b) for a, b in zip(begin, first, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(begin, size, first, length, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            # mapped into memory: of what lies outside of the slice nothing is read
            piece = file.get_tensor(self.name)[_box(low, high, first)]
            if piece.shape == torch.Size(size):
                return piece.clone(memory_format=torch.contiguous_format)
            if out is None:
                out = torch.empty(tuple(size), dtype=piece.dtype)
            out[_box(low, high, begin)] = piece
        if out is None:  # nothing of it lies in the box
            return self.chunks[0][0].get_tensor(self.name).new_empty(tuple(size))
        return out

    def read_flat(self, begin: int, length: int) -> Tensor:
        """``length`` of its numbers from ``begin`` on, in the order of ``flatten``; fewer where it ends."""
        if len(self.chunks) > 1:
            return self.read().flatten()[begin : begin + length]
        return self.chunks[0][0].get_tensor(self.name).flatten()[begin : begin + length].clone()


def _box(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


Stored = Mapping[str, Any]  # of Tensor and StoredTensor; single numbers are tensors


def stored(files: Sequence[Path]) -> dict[str, Tensor | StoredTensor]:
    """What is in a file, or in the files of shards that belong together; single numbers are read at once.

    Raises:
        ValueError: no safetensors file.
    """
    places: dict[str, list[tuple[Any, list[int]]]] = {}
    found: dict[str, Tensor | StoredTensor] = {}
    for path in files:
        try:
            file: Any = safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: no safetensors file ({error})") from error
        begins = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if not (shape := file.get_slice(name).get_shape()):
                found[name] = file.get_tensor(name).clone()
                continue
            begin = begins[name]["saved_offsets"] if name in begins else [0] * len(shape)
            places.setdefault(name, []).append((file, begin))
    return found | {name: StoredTensor(name, chunks) for name, chunks in places.items()}


def read(x: Tensor | StoredTensor) -> Tensor:
    """All of it, in memory."""
    return x.read() if isinstance(x, StoredTensor) else x
