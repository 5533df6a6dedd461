"""A pipeline folder into one file; see ``convert.py``."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .convert_configs import LAYOUTS, Config, Layout, Part, prediction, unheard
from .convert_files import (
    TIED,
    Entry,
    cast,
    check_names,
    open_checkpoint,
    open_part,
    prefixed,
    read_json,
    shape,
    stock_like,
    without_paths,
    write_safetensors,
)
from .convert_notes import CONFIGS, HASH, compvis_yaml, modelspec
from .key_maps import JUNK, MARKERS, OLD_STOCK, Pair, pairs, renamed

log = logging.getLogger(__name__)
INDEX = "model_index.json"
SPARE = 23  # layers of SD 2.1's text encoder; CompVis's class also builds OpenCLIP's last block, and never runs it


def to_file(folder: Path, target: Path, *, dtype: torch.dtype | None = None, layout: Layout | None = None) -> Path:
    """See ``convert``."""
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: a folder is converted to a file: expected a name that ends in .safetensors")
    beside_yaml = target.with_suffix(".yaml")
    _check_file(target, beside_yaml)
    index = read_json(folder / INDEX)
    layout = layout or _layout_of(folder, index)
    configs, likes, entries = {}, {}, {}
    for part in layout.parts:
        there = (index.get(part.name) or [None, None])[1]
        if there is None and part.optional:
            continue
        if there != part.kind:
            raise ValueError(f"{folder / INDEX}: {part.name} is {there}, a {layout.name} file needs a {part.kind}")
        configs[part.name] = config = without_paths(read_json(folder / part.name / "config.json"))
        found = _single_entries(folder / part.name, part, config, dtype)
        if layout.name == "sd21" and part.name == "text_encoder" and config["num_hidden_layers"] == SPARE:
            found |= _spare(found)
        if part.kind == "T5EncoderModel":
            found[TIED] = found["shared.weight"]  # the published files have both, and stock's reader needs both
        likes[part.name] = {name: entry.like for name, entry in found.items()}
        entries |= {part.prefix + name: entry for name, entry in found.items()}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if layout.name == "sdxl" and prediction(scheduler) == "v_prediction":
        empty = torch.empty(0)
        marks = MARKERS if scheduler.get("rescale_betas_zero_snr") else MARKERS[:1]
        entries |= {mark: Entry(empty.to("meta"), lambda: empty) for mark in marks}
    notes = modelspec(layout, target.stem, configs, scheduler)
    told = {"scheduler": scheduler, "model_index": {k: index[k] for k in ("_class_name", *layout.index) if k in index}}
    notes[CONFIGS] = json.dumps(configs | told)
    for name in (name for name, value in index.items() if isinstance(value, list) and value[0] and _weighs(name)):
        if name not in configs:
            log.info("%s: %s has no place in a %s file and is left out", folder, name, layout.name)
    for note in [*unheard(layout, configs, scheduler, likes), *_projects(folder, layout)]:
        log.warning("%s: a program that reads the file alone will not know that %s", target.name, note)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as room:
        beside = Path(room) / target.name
        write_safetensors(beside, entries, notes, hashed=HASH)
        if layout.name == "sd21" or (layout.name == "sd15" and prediction(scheduler) == "v_prediction"):
            text = Path(room) / beside_yaml.name
            text.write_text(compvis_yaml(layout, configs, scheduler), encoding="utf-8")
            text.replace(beside_yaml)
        elif beside_yaml.exists():
            beside_yaml.unlink()  # it belonged to the file that is replaced
        beside.replace(target)
    return target


def _layout_of(folder: Path, index: Config) -> Layout:
    name = index.get("_class_name") or ""
    families = {"StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "StableDiffusion": "sd15"}
    family = next((layout for start, layout in families.items() if name.startswith(start)), None)
    if family is None:
        raise ValueError(f"{folder / INDEX}: a {name or 'nameless pipeline'} has no single file form; {families} have")
    if family == "sd15" and read_json(folder / "unet" / "config.json").get("use_linear_projection"):
        family = "sd21"
    return LAYOUTS[family]


def _weighs(name: str) -> bool:
    return not name.startswith(("scheduler", "tokenizer", "feature_extractor"))


def _single_entries(folder: Path, part: Part, config: Config, dtype: torch.dtype | None) -> dict[str, Entry]:
    """The part's tensors under the names that the file will have, less the prefix."""
    source = open_part(folder)
    names = {prefixed(part, renamed(name, OLD_STOCK)): name for name in source.like}
    if part.kind == "T5EncoderModel" and TIED in names:
        names.setdefault("shared.weight", names.pop(TIED))
    names = {name: old for name, old in names.items() if not JUNK.match(name) and name != TIED}
    like = stock_like(part, config)
    check_names(folder, names, like, f"{part.kind} with its config.json")
    for name, old in names.items():
        if source.like[old].shape != like[name].shape:
            raise ValueError(f"{folder}: {old} is {shape(source.like[old])}, by config.json {shape(like[name])}")

    def entry(pair: Pair) -> Entry:
        def fused(read: Callable[[str], Tensor]) -> Tensor:
            return cast(pair.op.to_single(*(read(names[name]) for name in pair.stock)), dtype, pair.single)

        return Entry(fused(source.like.__getitem__), lambda: fused(source.read))

    try:
        return {pair.single: entry(pair) for pair in pairs(part.table, names)}
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _spare(found: Mapping[str, Entry]) -> dict[str, Entry]:
    last, width = f"transformer.resblocks.{SPARE - 1}.", found["ln_final.weight"].like
    spare = {name.replace(last, f"transformer.resblocks.{SPARE}."): e for name, e in found.items() if last in name}
    eye = torch.eye(width.numel(), dtype=width.dtype)
    return spare | {"text_projection": Entry(eye.to("meta"), lambda: eye)}


def _projects(folder: Path, layout: Layout) -> list[str]:
    if layout.name != "sd3":
        return []
    weight = open_part(folder / "text_encoder").read("text_projection.weight")
    identity = weight.shape[0] == weight.shape[1] and torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype))
    return [] if identity else ["text_encoder's text_projection is not the identity"]


def _check_file(target: Path, beside_yaml: Path) -> None:
    if target.is_dir():
        raise ValueError(f"{target}: a folder of this name is in the way")
    if not target.exists():
        if beside_yaml.exists():
            raise ValueError(f"{beside_yaml}: is there already, and readers would take it for the new file's config")
        return
    try:
        ours = "modelspec.sai_model_spec" in open_checkpoint(target).metadata
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(f"{target}: is there already and was not written by this command; choose another name")
