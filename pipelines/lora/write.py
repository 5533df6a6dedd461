"""A LoRA into a file, in the form of diffusers, kohya or peft."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert_files import Entry, cast, write_safetensors
from ..convert_notes import HASH
from ..precision import DTYPES
from .kohya import COMPONENTS, FAMILIES, TEXT, Names, kohya_name, with_text_model
from .layer import Component, LoraFile
from .notes import CUSTOM, notes, told_family
from .read import PEFT_CONFIG, PEFT_FILE, STOCK_FILE, Format
from .stock import ADAPTER, PEFT, adapter_config, packed

log = logging.getLogger(__name__)
FORMATS = ("diffusers", "kohya", "peft")


def family_of(lora: LoraFile) -> str | None:
    """``sd15``, ``sd21``, ``sdxl``, ``sd3`` or ``pixart``: by the layers, else by what the file says. None: neither."""
    parts = lora.components
    if any(".attn1." in name or name.startswith("adaln_single.") for name in parts.get("transformer", ())):
        return "pixart"
    if "transformer" in parts:
        return "sd3"
    unet = parts.get("unet", {})
    if "text_encoder_3" not in parts and (
        "text_encoder_2" in parts or any(n.startswith("add_embedding.") for n in unet)
    ):
        return "sdxl"
    widths = {layer.down.shape[1] for name, layer in unet.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    by_width = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
    return by_width.get(widths.pop()) if len(widths) == 1 and widths <= by_width.keys() else told_family(lora.metadata)


def write_lora(
    target: str | Path,
    lora: LoraFile,
    format: Format = "diffusers",
    *,
    base: str | None = None,
    dtype: str | None = None,
    names: Names | None = None,
    title: str | None = None,
    trigger: Sequence[str] = (),
    resolution: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a LoRA; beside, and then renamed.

    Diffusers' form is read by stock diffusers with every layer's true scale; ComfyUI reads its tensors, with alpha =
    rank. Kohya's form is for A1111 and ComfyUI. PixArt's stock pipelines have no loader: peft reads peft's form.

    Args:
        target: for diffusers a folder or a ``.safetensors`` file; for kohya such a file; for peft a folder.
        base: family, where neither layers nor metadata tell it: ``sd15``, ``sd21``, ``sdxl``, ``sd3``, ``pixart``;
            or ``sd``: the first or the second of these.
        dtype: ``fp16``, ``bf16`` or ``fp32``; by default each tensor keeps its own. Alphas are never rounded.
        names: as in ``read_lora``: kohya's form of an SDXL UNet that is not of the published depth.
        trigger: words that call it up, for the metadata.
        resolution: width and height of the pictures that it is for.
        overwrite: replace what is there.
    Returns:
        The file; for peft the folder.
    Raises:
        ValueError: naming the target, the option or the layer: nothing to write, no such format or family, no form of
            it there, or something is in the way.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    custom = lora.metadata.get("modelspec.architecture", "").startswith(CUSTOM)
    if base == "sd":
        published = family_of(lora)
        custom = custom or published not in ("sd15", "sd21")
        base = "sd15" if custom else published
    if base is not None and base not in FAMILIES:
        raise ValueError(f"base {base!r} is not one of {', '.join(FAMILIES)}")
    if not lora.layers():
        raise ValueError(f"{target}: there is no layer to write")
    if unknown := [name for name in lora.components if name not in COMPONENTS]:
        raise ValueError(f"component {unknown[0]!r} is not one of {', '.join(COMPONENTS)}")
    target, base = Path(target).expanduser(), base or family_of(lora)
    files = _plan(target, lora, format, base, names)
    for file in files:
        check_free(file, overwrite)
    told = notes(
        base,
        [(layer.rank, layer.alpha) for layer in lora.layers().values()],
        title=title or lora.metadata.get("modelspec.title") or target.stem,
        trigger=trigger,
        resolution=resolution,
        told=lora.metadata,
        custom=custom,
    )
    for note in _misread(lora, base, format):
        log.warning("%s: %s", target.name, note)
    kept = None if dtype is None else DTYPES[dtype]
    for file, (tensors, extra) in files.items():
        entries = {}
        for key, tensor in tensors.items():
            tensor = tensor if key.endswith(".alpha") else cast(tensor, kept, key)
            entries[key] = Entry(tensor.to("meta"), lambda tensor=tensor: tensor.detach().cpu())
        beside = {file.parent / PEFT_CONFIG: extra} if format == "peft" else {}
        _put(file, entries, told | ({ADAPTER: extra} if format == "diffusers" else {}), beside)
    return target if format == "peft" else next(iter(files))


def check_free(file: Path, overwrite: bool) -> None:
    """Raises ValueError if a file of this name is there (or anything that is no file)."""
    if file.is_dir():
        raise ValueError(f"{file}: a folder of this name is in the way")
    if file.exists() and not overwrite:
        raise ValueError(f"{file}: is there already; --overwrite replaces it")


def _plan(
    target: Path, lora: LoraFile, format: Format, base: str | None, names: Names | None
) -> dict[Path, tuple[dict[str, Tensor], str]]:
    """Each file's tensors, and the config that goes with them."""
    named = target.suffix == ".safetensors"
    if not named and target.is_file():
        raise ValueError(f"{target}: a file of this name is in the way of the folder")
    if format == "kohya":
        if not named:
            raise ValueError(f"{target}: kohya's form is one file; expected a name that ends in .safetensors")
        if base is None:
            known = ", ".join(FAMILIES[:4])
            raise ValueError(f"{target}: the names depend on the model, which nothing tells; give its family: {known}")
        return {target: (_kohya(lora, base, names), "")}
    configs = {name: _config(name, layers) for name, layers in lora.components.items()}
    if format == "diffusers":
        tensors = {}
        for name, layers in lora.components.items():
            tensors |= _dotted(layers, f"{name}.", name in TEXT, old=_no_attention(name, layers), ended=name in TEXT)
        return {target if named else target / STOCK_FILE: (tensors, packed(configs))}
    if named:
        raise ValueError(f"{target}: peft's form is a folder; a name of a file was given")
    files = {}
    for name, layers in lora.components.items():
        alone = len(lora.components) == 1 and name in ("unet", "transformer", "text_encoder")
        prefixed = name in TEXT and (name != "text_encoder" or base == "sd3")  # as transformers 5 has its classes
        config = configs[name] | {"peft_type": "LORA", "task_type": None, "inference_mode": True}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        files[(target if alone else target / name) / PEFT_FILE] = _dotted(layers, PEFT, prefixed), text
    return files


def _config(component: str, layers: Component) -> dict[str, Any]:
    plain = next((name for name, layer in layers.items() if layer.magnitude is None), None)
    dora = next((name for name, layer in layers.items() if layer.magnitude is not None), None)
    if plain and dora:
        raise ValueError(
            f"{component}: {dora} is a DoRA, {plain} is not; peft and diffusers have one for all of a component"
        )
    return adapter_config({n: (layer.rank, layer.alpha) for n, layer in layers.items()}, component, dora is not None)


def _no_attention(component: str, layers: Component) -> bool:
    """Stock tells the form of a text encoder's layers by its attention; where that has no LoRA, it reads the older."""
    return component in TEXT and not any(name.endswith(("q_proj", "k_proj", "v_proj", "out_proj")) for name in layers)


def _dotted(
    layers: Component, prefix: str, text_model: bool, old: bool = False, ended: bool = False
) -> dict[str, Tensor]:
    down, up = ("lora_linear_layer.down", "lora_linear_layer.up") if old else ("lora_A", "lora_B")
    found = {}
    for name, layer in layers.items():
        key = prefix + (with_text_model(name) if text_model else name)
        found |= {f"{key}.{down}.weight": layer.down, f"{key}.{up}.weight": layer.up}
        if layer.magnitude is not None:
            wide = layer.magnitude if layer.down.ndim == 2 else layer.magnitude.view(1, -1, 1, 1)  # as peft has it
            # transformers' loader looks for the first, peft's for the second
            found[f"{key}.lora_magnitude_vector" + ".weight" * ended] = wide
    return found


def _kohya(lora: LoraFile, base: str, names: Names | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for component, layers in lora.components.items():
        for module, layer in layers.items():
            key = kohya_name(component, module, base, names)
            if f"{key}.alpha" in found:
                raise ValueError(f"{component}.{module}: another layer is {key} too")
            alpha = torch.tensor(layer.alpha, dtype=torch.float64)
            single = alpha.float()
            found[f"{key}.alpha"] = single if single.double() == alpha else alpha  # the true one, to the last digit
            found |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
            if layer.magnitude is not None:
                found[f"{key}.dora_scale"] = layer.magnitude.view(-1, *[1] * (layer.down.ndim - 1))
    return found


def _misread(lora: LoraFile, base: str | None, format: Format) -> list[str]:
    """What readers do not read as it is meant, by diffusers 0.42.1 and the sources of the others."""
    found = []
    if format == "diffusers" and "text_encoder_3" in lora.components:
        found.append("stock diffusers has no loader for a LoRA of text_encoder_3, and leaves it out")
    if format != "kohya":
        return found
    if base == "sd3":
        found.append("ComfyUI reads this form of a Stable Diffusion 3, stock diffusers finds nothing in it")
    elif any(len({layer.alpha for layer in layers.values()}) > 1 for layers in lora.components.values()):
        found.append("its layers have several alphas, of which stock diffusers reads one in this form (--same-alpha)")
    if any(layer.magnitude is not None for layer in lora.layers().values()):
        found.append("a DoRA: stock diffusers leaves dora_scale out, ComfyUI and A1111 take it for other lengths")
    return found


def _put(file: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], others: Mapping[Path, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as room:
        beside = Path(room) / file.name
        write_safetensors(beside, entries, metadata, hashed=HASH)
        for other, text in others.items():
            (Path(room) / other.name).write_text(text, encoding="utf-8")
            os.replace(Path(room) / other.name, other)
        os.replace(beside, file)
