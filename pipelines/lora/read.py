"""A LoRA out of a file: diffusers' form (today's and earlier ones), kohya's or peft's, told apart by the keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..convert_files import Source, open_safetensors, read_json, shape
from .kohya import COMPONENTS, Names, is_kohya, place, taken_apart
from .layer import Component, Layer, LoraFile
from .stock import ADAPTER, other_kind, read_alphas, split_key, stock_place, unpacked

STOCK_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
Format = Literal["diffusers", "kohya", "peft"]


@dataclass(frozen=True)
class Found:
    """One file with layers, before its tensors are read."""

    file: Path
    source: Source
    component: str | None = None  # by the name of the folder that peft made
    config: dict[str, Any] | None = None  # adapter_config.json


def read_lora(source: str | Path, *, names: Names | None = None) -> LoraFile:
    """A LoRA in the form of diffusers (today's and earlier ones), kohya or peft, told apart by its keys.

    Args:
        source: a safetensors file; a folder with ``pytorch_lora_weights.safetensors`` or ``adapter_model.safetensors``
            (or one such folder for each component); or the output_dir of a LoRA run, which holds ``adapter/``.
        names: of some components, the module names of their networks, where they are not those of a published model;
            only kohya's form needs them.
    Raises:
        ValueError: naming the file and the key: no such file, a pickle, cut short, no LoRA in it or another kind of
            adapter, a layer that is not whole, shapes that do not go together, names that clash or are not known.
    """
    return _read(find_lora(source), names, lambda found: found.source.read)


def look_into(source: str | Path, *, names: Names | None = None) -> tuple[LoraFile, Format]:
    """``read_lora`` with tensors that have a shape and no values (device meta), from the header and the alphas alone;
    and the form that the file is in."""
    found = find_lora(source)

    def reader(one: Found) -> Callable[[str], Tensor]:
        return lambda key: (one.source.read if one.source.like[key].numel() == 1 else one.source.like.__getitem__)(key)

    keys = list(found[0].source.like)
    kind: Format = "kohya" if any(is_kohya(key.split(".")[0]) for key in keys) else "diffusers"
    return _read(found, names, reader), "peft" if found[0].config is not None else kind


def find_lora(source: str | Path) -> list[Found]:
    """The files of one LoRA, opened. Raises ValueError as ``read_lora`` does."""
    where = Path(source).expanduser()
    if where.is_file():
        return [_open(where, where.parent.name, where.parent / PEFT_CONFIG if where.name == PEFT_FILE else None)]
    if not where.is_dir():
        raise ValueError(f"{where}: no such file or folder")
    for folder in (where, where / "adapter"):
        if (folder / STOCK_FILE).is_file():
            return [_open(folder / STOCK_FILE, None, None)]
        if (folder / PEFT_FILE).is_file():
            return [_open(folder / PEFT_FILE, folder.name, folder / PEFT_CONFIG)]
        parts = [folder / name for name in COMPONENTS if (folder / name / PEFT_FILE).is_file()]
        if parts:
            return [_open(part / PEFT_FILE, part.name, part / PEFT_CONFIG) for part in parts]
    pickled = next((f for f in sorted(where.iterdir()) if f.suffix in PICKLES), None)
    told = f"; {pickled.name} is a pickle, which is not read" if pickled else ""
    raise ValueError(f"{where}: no LoRA in it ({STOCK_FILE} or {PEFT_FILE}, here or in adapter/){told}")


def _open(file: Path, component: str | None, config: Path | None) -> Found:
    with file.open("rb") as f:
        start = f.read(9)
    if start[8:] != b"{" and (file.suffix in PICKLES or start.startswith((b"PK", b"\x80"))):
        raise ValueError(f"{file}: a pickle, which may run code and is not read; a LoRA is a .safetensors file")
    source = open_safetensors(file)
    told = read_json(config) if config is not None else None
    if told is not None and told.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{config}: peft_type is {told['peft_type']!r}, expected 'LORA'")
    return Found(file, source, component if component in COMPONENTS else None, told)


def _read(found: Sequence[Found], names: Names | None, reader: Callable[[Found], Callable[[str], Tensor]]) -> LoraFile:
    components: dict[str, Component] = {}
    for one in found:
        try:
            for component, layers in _layers(one, names, reader(one)).items():
                if component in components:
                    raise ValueError(f"{component} is in another file too")
                components[component] = layers
        except ValueError as error:
            raise ValueError(f"{one.file}: {error}") from error
    metadata = {k: v for k, v in found[0].source.metadata.items() if k not in (ADAPTER, "format")}
    return LoraFile({name: components[name] for name in COMPONENTS if name in components}, metadata)


def _layers(found: Found, names: Names | None, read: Callable[[str], Tensor]) -> dict[str, Component]:
    keys = _grouped(found.source.like)
    places: dict[tuple[str, str], str] = {}
    whole: dict[str, dict[str, tuple[Layer, str, bool]]] = {}  # component: module: layer, its key, has an alpha
    for stem, tensors in keys.items():
        layer = _layer(stem, tensors, partial(_finite, read))
        if not is_kohya(stem):
            component, module = stock_place(stem, found.component)
            modules, parts = (module,), [layer]
        else:
            where = place(stem, names)
            component, modules = where.component, where.modules
            op = taken_apart(stem, where, layer.up.shape[0], layer.down.shape[1])
            ups = op.to_stock(layer.up)
            sizes: Sequence[Tensor | None] = (
                [None] * len(ups) if layer.magnitude is None else op.to_stock(layer.magnitude)
            )
            parts = [replace(layer, up=up.contiguous(), magnitude=m) for up, m in zip(ups, sizes, strict=True)]
        for module, part in zip(modules, parts, strict=True):
            if (component, module) in places:
                raise ValueError(f"{stem} and {places[component, module]} are both {component}.{module}")
            places[component, module] = stem
            whole.setdefault(component, {})[module] = part, stem, "alpha" in tensors
    return {name: _scaled(found, name, layers) for name, layers in whole.items()}


def _grouped(like: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Keys by layer and by what tensor of it they are."""
    found: dict[str, dict[str, str]] = {}
    for key in like:
        if kind := other_kind(key):
            raise ValueError(f"{key} is of {kind}, not of a LoRA; only LoRA and DoRA are read")
        if (split := split_key(key)) is None:
            raise ValueError(f"no LoRA, or not one alone: {key} is none of its tensors (lora_A, lora_down …)")
        stem, tensor = split
        if tensor in found.setdefault(stem, {}):
            raise ValueError(f"{key} and {found[stem][tensor]} are one tensor of one layer")
        found[stem][tensor] = key
    if not found:
        raise ValueError("no LoRA in it: the file holds no tensor")
    return found


def _layer(stem: str, tensors: Mapping[str, str], read: Callable[[str], Tensor]) -> Layer:
    """With the file's alpha, or the rank where it has none."""
    for wanted, other in (("down", "up"), ("up", "down")):
        if wanted not in tensors:
            raise ValueError(
                f"{next(iter(tensors.values()))}: its layer has no {wanted}" + f", only {other}" * (other in tensors)
            )
    down, up = read(tensors["down"]), read(tensors["up"])
    if "mid" in tensors:  # LyCORIS' way to write a convolution: (r, in, 1, 1), then (r, r, k, k)
        mid = read(tensors["mid"])
        if down.ndim != 4 or mid.ndim != 4 or mid.shape[:2] != (down.shape[0], down.shape[0]):
            raise ValueError(f"{tensors['mid']} {shape(mid)} does not go with {tensors['down']} {shape(down)}")
        down = torch.einsum("rskl,si->rikl", mid, down[:, :, 0, 0])
    magnitude = read(tensors["magnitude"]) if "magnitude" in tensors else None
    if magnitude is not None:
        inputs = tensors["magnitude"].endswith(".dora_scale") and magnitude.ndim > 1 and len(magnitude) != len(up)
        if inputs or magnitude.numel() != len(up):  # peft's of a convolution is (1, out, 1, 1)
            raise ValueError(
                f"{tensors['magnitude']} is {shape(magnitude)}: not one length for each of {up.shape[0]} outputs; a "
                "DoRA over the inputs has no stock form"
            )
        magnitude = magnitude.reshape(-1)
    alpha = read(tensors["alpha"]) if "alpha" in tensors else torch.tensor(float(down.shape[0] if down.ndim else 0))
    if alpha.numel() != 1:
        raise ValueError(f"{tensors['alpha']} is {shape(alpha)}, expected one number")
    try:
        return Layer(down, up, float(alpha), magnitude)
    except ValueError as error:
        raise ValueError(f"{stem}: {error}") from error


def _finite(read: Callable[[str], Tensor], key: str) -> Tensor:
    """Raises ValueError where a tensor that has values (device meta has none) holds NaN or Inf."""
    tensor = read(key)
    if tensor.device.type != "meta" and not tensor.float().isfinite().all():
        raise ValueError(f"{key} holds NaN or Inf: the training diverged, or the file is damaged")
    return tensor


def _scaled(found: Found, component: str, layers: Mapping[str, tuple[Layer, str, bool]]) -> Component:
    """With the alphas that a config beside the tensors has."""
    configs = {"": found.config} if found.config is not None else unpacked(found.source.metadata)
    config = None if configs is None else configs.get(component, configs.get(""))
    if config is None:
        return {module: layer for module, (layer, _, _) in layers.items()}
    alphas = read_alphas(config, {module: layer.rank for module, (layer, _, _) in layers.items()})
    return {
        module: layer if said else replace(layer, alpha=alphas[module]) for module, (layer, _, said) in layers.items()
    }
