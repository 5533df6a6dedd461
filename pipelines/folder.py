"""To and from a folder that stock diffusers opens: ``model_index.json`` and one subfolder for each part."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file

import ldm.paths
from ldm.models.base import Network
from ldm.models.dit import DiT
from ldm.models.new_tokens import merged
from ldm.models.text import FAMILIES, TextEncoder
from ldm.models.text_files import quiet_transformers, which_variant
from ldm.models.vae import VAE
from ldm.prediction import Prediction

from .compare import compare
from .core import Parts
from .schedulers import default_schedule
from .stock import (
    FORMS,
    Form,
    as_written,
    check_fit,
    check_kind,
    check_low_res,
    read_schedule,
    text_settings,
    to_stock_pipeline,
)

log = logging.getLogger(__name__)
INDEX = "model_index.json"
LEFT_OUT = {("sdxl", "text_encoder"), ("sd3", "text_encoder_3")}  # what may be absent from a stock folder
NOTES = {"README.md", "samples.png", "LICENSE", ".gitattributes"}  # what else a pipeline folder may hold at its top


# --- out ---------------------------------------------------------------------------------------------------------


def export(
    folder: str | Path,
    *,
    net: Network,
    vae: VAE,
    text: TextEncoder,
    path: ldm.paths.Path,
    prediction: Prediction,
    shift: float = 1.0,
) -> Path:
    """``save_parts`` for networks that were trained on this path, with the schedule that is the default for them.

    Args:
        shift: of a flow's times, at which stock pipelines will sample.
    """
    schedule = default_schedule(path, prediction, text.family, shift)
    return save_parts(folder, Parts(net, vae, text, schedule))


def save_parts(folder: str | Path, parts: Parts) -> Path:
    """Write the stock form: a UNet as ``StableDiffusionPipeline`` or, with SDXL's added conditions,
    ``StableDiffusionXLPipeline``; an MMDiT as ``StableDiffusion3Pipeline``; a DiT as one of PixArt's. A network that is
    shown something beside the latents is written as the pipeline that shows it (``kinds``).

    It is written beside, opened again with the stock classes, compared with the parts given (every weight, and what
    each network answers), and only then renamed into place. A pipeline folder of the same name is replaced. New tokens
    become rows of the text encoders' tables.

    Returns:
        The folder.
    Raises:
        ValueError: the parts do not fit each other or have no stock form; or ``folder`` holds anything but a pipeline.
        RuntimeError: what was written does not read back as the same model; nothing is left behind.
    """
    target = Path(folder).expanduser().resolve()
    check_replaceable(target)
    with _untouched_randomness(), _quiet():
        parts = as_written(replace(parts, text=merged(parts.text)))
        stock = to_stock_pipeline(parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            beside.chmod(0o777 & ~_umask())
            parts.text.forget_last_call()
            stock.save_pretrained(beside, safe_serialization=True)
            _write_for_older_readers(beside)
            compare(beside, parts)
            _move(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return target


def check_replaceable(target: Path) -> None:
    """A folder may be written here: nothing is, or an empty folder, or a pipeline and nothing else.

    Raises:
        ValueError: naming what else is there.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: a file of this name is in the way of the pipeline folder")
    entries = {entry.name for entry in target.iterdir()}
    if entries and INDEX not in entries:
        raise ValueError(f"{target}: holds {min(entries)} but no {INDEX}, so it is no pipeline; choose another folder")
    foreign = entries - {INDEX} - NOTES - set(read_index(target) if entries else ())
    if foreign:
        raise ValueError(f"{target}: holds {min(foreign)}, which is no part of its pipeline and would be lost")


def _move(beside: Path, target: Path) -> None:
    if not target.exists():
        beside.rename(target)
        return
    check_replaceable(target)  # it may have changed meanwhile
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    try:
        beside.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write_for_older_readers(folder: Path) -> None:
    """transformers 4 wants the keys of a text tower prefixed, a CLIP tokenizer's words and merges in two files, and
    a T5 tokenizer called by its quick class. transformers 5 reads both forms."""
    for weights in folder.glob("text_encoder*/model.safetensors"):
        model_type = read_json(weights.parent / "config.json").get("model_type")
        state = load_file(weights)
        if model_type == "clip_text_model" and not any(name.startswith("text_model.") for name in state):
            save_file(
                {f"text_model.{name}": value for name, value in state.items()}, weights, metadata={"format": "pt"}
            )
    index = read_index(folder)
    for place in folder.glob("tokenizer*"):
        if index[place.name][1] == "T5Tokenizer":
            index[place.name][1] = "T5TokenizerFast"
        model = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        if model["type"] == "BPE":
            (place / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _untouched_randomness() -> Iterator[None]:
    """Stock classes draw a random start even for weights that are then loaded; a training run must not notice."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    bars = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        with quiet_transformers():
            yield
    finally:
        if bars:
            diffusers_logging.enable_progress_bar()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- in ----------------------------------------------------------------------------------------------------------


def load_parts(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    variant: str | None = None,
    t5: bool | None = True,
    load_in_8bit: bool = False,
) -> Parts:
    """The parts of a pipeline folder, ours or anybody's in the same form. No code that it names is imported.

    Args:
        dtype: of all weights, whatever the files have; the stock loader's default too.
        variant: such as ``fp16``: of the files, where there are such.
        t5: False or None leaves the T5 of an SD3 out.
        load_in_8bit: T5 in 8 bits; needs bitsandbytes.
    Raises:
        ValueError: naming the file: no folder, no pipeline, a class that is not read here, weights that do not fit.
        OSError: weights that are missing, or do not open.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    index = read_index(folder)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FORMS:
        raise ValueError(f"{folder / INDEX}: _class_name is {name!r}; {', '.join(FORMS)} can be opened")
    form = FORMS[name]
    check_classes(folder, form, index)
    if variant is not None and not any(folder.glob(f"*/*.{variant}*.safetensors")):
        raise ValueError(f"{folder}: no part has weights of variant {variant!r}")
    unread = [k for k in ("safety_checker", "image_encoder") if (index.get(k) or [None])[0]]
    if unread:
        log.info("%s: %s not used", folder, " and ".join(unread))

    files: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    with _quiet():
        place = _component(folder, form.net_name)
        net = form.net.from_diffusers(place, **files, variant=which_variant(place, variant))
        check_kind(name, net)
        place = _component(folder, "vae")
        vae = VAE.from_diffusers(place, **files, variant=which_variant(place, variant))
        t5_settings = {"t5": t5, "load_in_8bit": load_in_8bit}
        settings = text_settings(form, net, index)
        text = TextEncoder.from_pretrained(folder, form.family, dtype=dtype, variant=variant, **t5_settings, **settings)
    check_fit(net, vae, text)
    schedule = read_schedule(read_json(folder / "scheduler" / "scheduler_config.json"), form.family)
    return Parts(net.eval(), vae.eval(), text.eval(), schedule)


def check_classes(folder: Path, form: Form, index: dict[str, Any]) -> None:
    """Each part that is needed is there and of its class, before any weights are read."""
    kinds = {form.net_name: ("diffusers", [form.net.stock]), "vae": ("diffusers", [VAE.stock])}
    if form.net is DiT:
        kinds[form.net_name][1].append("Transformer2DModel")  # what the first PixArt-alpha folders say
    for part, classes in FAMILIES[form.family].items():
        absent = (index.get(part) or [None])[0] is None
        if absent and (form.family, part) in LEFT_OUT:
            continue
        kinds[part] = ("transformers", [kind.__name__ for kind in classes])
    for part, (library, classes) in kinds.items():
        if index.get(part) not in [[library, kind] for kind in classes]:
            expected = " or ".join(str([library, kind]) for kind in classes)
            raise ValueError(f"{folder / INDEX}: {part} is {index.get(part)}, expected {expected}")
        _component(folder, part)
    if form.kind == "low_resolution":
        file = folder / "low_res_scheduler" / "scheduler_config.json"
        check_low_res(read_json(file), str(file))


def _component(folder: Path, name: str) -> Path:
    place = folder / name
    if not (place / "config.json").is_file():
        raise ValueError(f"{place / 'config.json'}: missing, though {INDEX} names this part")
    return place


def read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(f"{file}: missing, so {folder} is no pipeline folder")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content
