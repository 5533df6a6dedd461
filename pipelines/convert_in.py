"""One file into a pipeline folder; see ``convert.py``."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from .convert_configs import Config, Layout, Part, infer, recognise
from .convert_files import (
    TIED,
    Entry,
    Source,
    cast,
    check_names,
    open_checkpoint,
    read_json,
    shape,
    stock_like,
    without_paths,
    write_safetensors,
)
from .convert_notes import told_configs, told_prediction
from .folder import INDEX, check_replaceable
from .key_maps import JUNK, MARKERS, OLD_SINGLE, Pair, pairs, renamed

log = logging.getLogger(__name__)
IDENTITY = ("text_encoders.clip_l.", "text_projection.weight")  # SD3's CLIP-L pools without one; the stock class has it


def to_folder(
    file: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    layout: Layout | None = None,
    config: Path | None = None,
    allow_pickle: bool = False,
) -> Path:
    """See ``convert``."""
    if target.suffix in (".safetensors", ".ckpt", ".pt"):
        raise ValueError(f"{target}: a file is converted to a folder; a name of a file was given")
    check_replaceable(target)
    if config is not None and not config.is_dir():
        raise ValueError(f"{config}: no such folder")
    if config is None or not any(config.glob("tokenizer*")):  # before a large file is opened
        raise ValueError(
            f"{config or file}: holds no tokenizer, as no single file does; give --config FOLDER, a pipeline folder "
            "of the same family with its tokenizers"
        )
    source = open_checkpoint(file, allow_pickle)
    names = {renamed(name, OLD_SINGLE): name for name in source.like if not JUNK.match(name) and name not in MARKERS}
    layout = layout or recognise(file, list(names))
    told = told_configs(file, source.metadata)
    index = told.get("model_index", {})
    if config is not None and (config / INDEX).is_file():
        index = read_json(config / INDEX)
    tokenizers = _tokenizers(file, layout, config, names)

    plans: dict[str, tuple[Config, dict[str, Entry]]] = {}
    for part in layout.parts:
        own = {name.removeprefix(part.prefix): old for name, old in names.items() if name.startswith(part.prefix)}
        for name in own:
            del names[part.prefix + name]
        if own:
            plans[part.name] = _plan(source, layout, part, own, _config_of(config, part, told), dtype)
        elif not part.optional and not (config and (config / part.name).is_dir()):
            raise ValueError(f"{file}: holds no {part.name} ({part.prefix}*), and --config has none to take instead")
    if names:
        raise ValueError(f"{file}: {next(iter(names))} is left over ({len(names)} such names), {layout.name} has none")
    scheduler = _scheduler(source, layout, config, told)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as room:
        beside = Path(room) / target.name
        beside.mkdir()
        for part in layout.parts:
            if part.name in plans:
                _write_part(beside / part.name, part, *plans[part.name])
            elif config and (config / part.name).is_dir():
                log.info("%s: not in the file, taken from %s", part.name, config)
                shutil.copytree(config / part.name, beside / part.name)
        for name in tokenizers:
            shutil.copytree((config or file) / name, beside / name)
        (beside / "scheduler").mkdir()
        _write_json(beside / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(beside / INDEX, _index(layout, index, beside, tokenizers, scheduler))
        _put(beside, target, Path(room) / "old")
    if layout.name == "sd3" and not (target / "text_encoder_3").exists():
        log.warning("%s: opens with text_encoder_3=None, tokenizer_3=None: the file holds no T5", target)
    return target


def _config_of(config: Path | None, part: Part, told: Mapping[str, Config]) -> Config | None:
    if config is not None and (config / part.name / "config.json").is_file():
        return without_paths(read_json(config / part.name / "config.json"))
    return told.get(part.name)


def _plan(
    source: Source, layout: Layout, part: Part, own: dict[str, str], config: Config | None, dtype: torch.dtype | None
) -> tuple[Config, dict[str, Entry]]:
    """A part's config, and its tensors under their stock names.

    Args:
        own: names in the file without the prefix: as it has them.
    """
    if part.kind == "T5EncoderModel" and TIED in own:
        own.setdefault("shared.weight", own.pop(TIED))
    guessed = config is None
    config = config or infer(layout, part, {name: source.like[old] for name, old in own.items()})
    like = stock_like(part, config)
    unused = re.compile(part.unused.replace("{layers}", str(config.get("num_hidden_layers"))))
    own = {name: old for name, old in own.items() if name != TIED and not unused.match(name)}
    found = pairs(part.table, like)
    fill = {}
    if part.prefix.startswith(IDENTITY[0]) and IDENTITY[1] not in own:
        kind = source.like[own["text_model.embeddings.token_embedding.weight"]].dtype
        eye = torch.eye(*like[IDENTITY[1]].shape, dtype=kind)
        fill = {IDENTITY[1]: Entry(cast(eye, dtype, IDENTITY[1]).to("meta"), lambda: cast(eye, dtype, IDENTITY[1]))}
    known = "its shapes" if guessed else "its config"
    check_names(
        f"{source.where}: {part.prefix}*",
        own.keys() | fill.keys(),
        {pair.single: None for pair in found},
        f"{part.kind} by {known}",
    )
    entries: dict[str, Entry] = dict(fill)
    for pair in found:
        if pair.single in fill:
            continue
        old = own[pair.single]
        parts = pair.op.to_stock(source.like[old])
        for i, name in enumerate(pair.stock):
            if len(parts) != len(pair.stock) or parts[i].shape != like[name].shape:
                raise ValueError(
                    f"{source.where}: {old} is {shape(source.like[old])}; {layout.name}'s {part.kind} by {known} "
                    f"wants {shape(like[name])} for {name}"
                )

            def read(pair: Pair = pair, old: str = old, i: int = i) -> Tensor:
                return cast(pair.op.to_stock(source.read(old))[i], dtype, old)

            entries[name] = Entry(cast(parts[i], dtype, old), read)
    return config, entries


def _tokenizers(file: Path, layout: Layout, config: Path | None, names: Mapping[str, str]) -> list[str]:
    wanted = [
        part.name.replace("text_encoder", "tokenizer")
        for part in layout.parts
        if part.library == "transformers" and (not part.optional or any(name.startswith(part.prefix) for name in names))
    ]
    absent = [name for name in wanted if config is None or not (config / name).is_dir()]
    if absent:
        raise ValueError(
            f"{config or file}: holds no {' and no '.join(absent)}; give --config FOLDER, a pipeline folder of the "
            f"same family ({layout.name}), with {', '.join(wanted)} in it"
        )
    return wanted


def _scheduler(source: Source, layout: Layout, config: Path | None, told: Mapping[str, Config]) -> Config:
    if config is not None and (config / "scheduler" / "scheduler_config.json").is_file():
        return read_json(config / "scheduler" / "scheduler_config.json")
    if "scheduler" in told:
        return told["scheduler"]
    chosen = dict(layout.scheduler)
    if layout.name != "sd3":
        markers = {mark for mark in MARKERS if mark in source.like}
        said = told_prediction(source.where, source.metadata, markers)
        chosen["prediction_type"] = said or chosen.get("prediction_type", "epsilon")
        if "ztsnr" in markers:
            chosen |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if said is None:
            log.info("%s: does not say what it predicts; taken for %s", source.where, chosen["prediction_type"])
    return chosen


def _index(layout: Layout, known: Config, folder: Path, tokenizers: list[str], scheduler: Config) -> Config:
    kinds: dict[str, list[str | None]] = {
        name: ["transformers", _tokenizer_class(folder / name, known.get(name))] for name in tokenizers
    }
    parts = {
        part.name: [part.library, part.kind] if (folder / part.name).is_dir() else [None, None] for part in layout.parts
    }
    if layout.name == "sd3" and "tokenizer_3" not in kinds:
        kinds["tokenizer_3"] = [None, None]
    name = layout.pipeline
    if (folder / "unet").is_dir() and read_json(folder / "unet" / "config.json").get("in_channels") == 9:
        name = name.replace("Pipeline", "InpaintPipeline")
    extra = {
        key: known.get(key, value) if not isinstance(value, list) else value for key, value in layout.index.items()
    }
    return {
        "_class_name": name,
        "_diffusers_version": diffusers.__version__,
        **parts,
        **kinds,
        "scheduler": ["diffusers", scheduler.get("_class_name")],
        **extra,
    }


def _tokenizer_class(folder: Path, known: list[str] | None) -> str:
    if known and known[1]:
        return known[1]
    file = folder / "tokenizer_config.json"
    return (read_json(file) if file.is_file() else {}).get("tokenizer_class") or "CLIPTokenizer"


def _write_part(folder: Path, part: Part, config: Config, entries: Mapping[str, Entry]) -> None:
    folder.mkdir()
    if part.library == "diffusers":
        head = {"_class_name": part.kind, "_diffusers_version": diffusers.__version__}
        kind: Any = getattr(diffusers, part.kind)
        with torch.device("meta"):
            whole = {k: v for k, v in dict(kind.from_config(config).config).items() if not k.startswith("_")}
        _write_json(folder / "config.json", head | whole)
        write_safetensors(folder / "diffusion_pytorch_model.safetensors", entries, {"format": "pt"})
    else:
        whole = getattr(transformers, part.kind).config_class.from_dict(dict(config))
        whole.architectures = [part.kind]
        whole.save_pretrained(folder)
        write_safetensors(folder / "model.safetensors", entries, {"format": "pt"})


def _write_json(file: Path, content: Config) -> None:
    file.write_text(json.dumps(content, indent=2, default=list) + "\n", encoding="utf-8")


def _put(beside: Path, target: Path, old: Path) -> None:
    """Rename into place; what was there is kept until the new one is."""
    if target.exists():
        check_replaceable(target)  # it may have changed meanwhile
        target.rename(old)
    try:
        beside.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
