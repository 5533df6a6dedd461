"""Weights tensor by tensor: read from safetensors files (or a pickle that is vouched for), written as they come."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .convert_configs import Config, Part

log = logging.getLogger(__name__)
NAMES = {  # as a safetensors header spells them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in NAMES.items()}


class Source(NamedTuple):
    """Tensors by name; only ``read`` touches their data."""

    where: Path
    like: Mapping[str, Tensor]  # on the meta device: shape and dtype
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str]


def open_safetensors(*files: Path) -> Source:
    """All tensors of these files (the shards of one part, or one file).

    Raises:
        ValueError: a file is missing, is no safetensors file, or two hold the same name.
    """
    handles: dict[str, Any] = {}
    like: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a safetensors file, or cut short ({error})") from error
        metadata |= handle.metadata() or {}
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            if name in handles:
                raise ValueError(f"{file}: {name} is in another shard too")
            piece = handle.get_slice(name)
            kind = piece.get_dtype()
            if kind not in _TYPES:
                raise ValueError(f"{file}: {name} is {kind}; {', '.join(_TYPES)} can be read")
            handles[name] = handle
            like[name] = torch.empty(piece.get_shape(), dtype=_TYPES[kind], device="meta")
    return Source(files[0], like, lambda name: handles[name].get_tensor(name), metadata)


def open_checkpoint(file: Path, allow_pickle: bool = False) -> Source:
    """One file of weights, known by its first bytes, not by its name.

    Args:
        allow_pickle: read a ``.ckpt`` too, as tensors and plain containers only (``weights_only=True``): nothing that
            it names is imported or run.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    with file.open("rb") as f:
        start = f.read(9)
    headed = start[8:] == b"{" and 8 + int.from_bytes(start[:8], "little") <= file.stat().st_size
    zipped = start.startswith(b"PK") and zipfile.is_zipfile(file)
    if headed or not (zipped or start.startswith(b"\x80")):  # a header's length may begin with a pickle's 0x80
        return open_safetensors(file)
    if not allow_pickle:
        raise ValueError(
            f"{file}: a pickled checkpoint, not safetensors; --allow-pickle reads its tensors (and nothing that runs)"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{file}: holds more than tensors, or is broken, and is not read: {reason}") from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a dict of tensors, or one under 'state_dict'; got {type(content).__name__}")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{file}: holds no tensor; its keys are {list(content)[:5]}")
    like = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
    return Source(file, like, tensors.__getitem__, {})


def open_part(folder: Path) -> Source:
    """The weights of one part of a pipeline folder: one file, shards with an index, or the only variant there is."""
    stems = ("diffusion_pytorch_model", "model")
    for stem in stems:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return open_safetensors(*(folder / shard for shard in sorted(set(shards.values()))))
        if (folder / f"{stem}.safetensors").is_file():
            return open_safetensors(folder / f"{stem}.safetensors")
    variants = [f for stem in stems for f in sorted(folder.glob(f"{stem}.*.safetensors")) if "-of-" not in f.name]
    if len(variants) == 1:
        log.info("%s: the only weights of this part", variants[0])
        return open_safetensors(variants[0])
    if variants:
        raise ValueError(f"{folder}: holds {', '.join(f.name for f in variants)}; leave one of them")
    raise ValueError(f"{folder}: no safetensors file; weights in other formats are not read")


# --- what a part must hold --------------------------------------------------------------------------------------------

TIED = "encoder.embed_tokens.weight"  # T5's second name for shared.weight


def stock_like(part: Part, config: Config) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the stock class with this config: meta tensors."""
    kind: Any = getattr(diffusers if part.library == "diffusers" else transformers, part.kind)
    with torch.device("meta"):
        if part.library == "diffusers":
            module = kind.from_config(config)
        else:
            module = kind(kind.config_class.from_dict(dict(config)))
    return {prefixed(part, name): value for name, value in module.state_dict().items() if name != TIED}


def prefixed(part: Part, name: str) -> str:
    """A CLIP's names as transformers 4 has them; transformers 5 dropped ``text_model.`` for one class, reads both."""
    bare = part.kind.startswith("CLIP") and not name.startswith(("text_model.", "text_projection."))
    return f"text_model.{name}" if bare else name


def check_names(where: object, have: Collection[str], want: Collection[str], what: str) -> None:
    missing, left = [n for n in want if n not in have], [n for n in have if n not in want]
    for names, word in ((missing, "missing"), (left, "left over")):
        if names:
            raise ValueError(f"{where}: {names[0]} is {word} ({len(names)} such names), as {what} has it")


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file}: missing") from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content


def shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def without_paths(config: Config) -> Config:
    return {key: value for key, value in config.items() if key != "_name_or_path"}


# --- out -------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor to be written: what it will be like, and how to get it when its turn comes."""

    like: Tensor  # meta
    read: Callable[[], Tensor]


def cast(x: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """Floats in another precision; integers as they are.

    Raises:
        ValueError: a finite number is beyond the range of ``dtype``.
    """
    if dtype is None or not x.is_floating_point() or x.dtype == dtype:
        return x
    y = x.to(dtype)
    if not x.is_meta and y.numel() and bool((y.isinf() & ~x.isinf()).any()):
        raise ValueError(f"{name}: holds {x.float().abs().max().item():.3g}, beyond {dtype}; take bf16 or fp32")
    return y


def write_safetensors(file: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], hashed: str = "") -> None:
    """Write one safetensors file, a tensor at a time: never more than one of them in memory.

    The format: 8 bytes with the header's length, the header (JSON, padded to a multiple of 8), then all data without a
    gap; wider types first, so that each tensor is aligned.

    Args:
        hashed: name of a metadata entry to hold the SHA-256 of all data, ``0x`` and 64 digits.
    """
    order = sorted(entries, key=lambda name: (-entries[name].like.element_size(), name))
    place, header = 0, {}
    for name in order:
        like = entries[name].like
        size = like.numel() * like.element_size()
        header[name] = {
            "dtype": NAMES[like.dtype],
            "shape": list(like.shape),
            "data_offsets": [place, place + size],
        }
        place += size

    def head(digest: str) -> bytes:
        notes = dict(metadata) | ({hashed: f"0x{digest}"} if hashed else {})
        text = json.dumps({"__metadata__": notes, **header}, separators=(",", ":"), ensure_ascii=False).encode()
        return text + b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    first = head("0" * 64)
    with file.open("wb") as f:
        f.write(len(first).to_bytes(8, "little") + first)
        for name in order:
            like, read = entries[name]
            tensor = read().detach().contiguous()
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise RuntimeError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, announced {tuple(like.shape)}")
            data: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
            f.write(data)
            digest.update(data)
        f.seek(8)
        f.write(head(digest.hexdigest()))  # of the same length
