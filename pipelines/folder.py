"""To and from a folder that stock diffusers opens: ``model_index.json`` and one subfolder for each part."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ldm.paths
from ldm.models.base import Network
from ldm.models.text import (
    EMPTY_TOKENS,
    FAMILIES,
    SECOND_WIDTH,
    TextEncoder,
    load_clip,
    load_tokenizer,
    quiet_transformers,
)
from ldm.models.vae import VAE
from ldm.prediction import Prediction

from .core import Parts
from .schedulers import default_schedule
from .stock import FORMS, NOT_EMPTY, check_fit, form_of, is_empty, read_schedule, to_stock_pipeline

log = logging.getLogger(__name__)
INDEX = "model_index.json"
NOTES = {"README.md", "LICENSE", ".gitattributes"}  # what else a pipeline folder may hold at its top


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
    schedule = default_schedule(path, prediction, form_of(net).family, shift)
    return save_parts(folder, Parts(net, vae, text, schedule))


def save_parts(folder: str | Path, parts: Parts) -> Path:
    """Write the stock form: a UNet as ``StableDiffusionPipeline``, an MMDiT as ``StableDiffusion3Pipeline``.

    It is written beside, opened again with the stock classes, compared with the parts given (every weight, and what
    each network answers), and only then renamed into place. A pipeline folder of the same name is replaced.

    Returns:
        The folder.
    Raises:
        ValueError: the parts do not fit each other or have no stock form; or ``folder`` holds anything but a pipeline.
        RuntimeError: what was written does not read back as the same model; nothing is left behind.
    """
    target = Path(folder).expanduser().resolve()
    check_replaceable(target)
    with _untouched_randomness(), _quiet():
        stock = to_stock_pipeline(parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            beside.chmod(0o777 & ~_umask())
            parts.text.forget_last_call()
            stock.save_pretrained(beside, safe_serialization=True)
            _write_for_older_readers(beside)
            _compare(beside, parts)
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
    foreign = entries - {INDEX} - NOTES - set(_read_index(target) if entries else ())
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
    """transformers 4 wants the keys of a text tower prefixed, and a tokenizer's words and merges in two files.
    transformers 5 reads both forms."""
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    if not any(name.startswith("text_model.") for name in state):
        save_file({f"text_model.{name}": value for name, value in state.items()}, weights, metadata={"format": "pt"})
    for place in folder.glob("tokenizer*"):
        model = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (place / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


@torch.no_grad()
def _compare(folder: Path, parts: Parts) -> None:
    """Open with stock classes alone and compare: weights bit by bit, answers to rounding."""
    net, vae, text = parts.net, parts.vae, parts.text
    form = form_of(net)
    # each in its own precision: the stock loader would open everything in single
    dtypes = {form.net_name: net.dtype, "vae": vae.dtype, "text_encoder": text.dtype, "default": text.dtype}
    again: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=dtypes)
    pairs = {form.net_name: net, "vae": vae, "text_encoder": text.model}
    for name, ours in pairs.items():
        stock = getattr(again, name).to(device=ours.device).eval()
        there = dict(stock.named_parameters()) | dict(stock.named_buffers())
        for key, value in ours.state_dict().items():
            if key not in there or there[key].is_meta or not torch.equal(there[key], value):
                raise RuntimeError(f"{folder}: {name}.{key} does not come back as it was; the export is given up")
    again.to(net.device)

    prompts = ["", "two things, and a third"]
    with _evaluating(net, vae, text):
        cond = text.encode(prompts)
        pooled: dict[str, Tensor] = {}
        if form.family == "sd":
            tokens, _ = again.encode_prompt(prompts, net.device, 1, False)
            _close(folder, "text_encoder", cond.tokens, tokens)
        else:
            answer = again.encode_prompt(prompts, None, None, device=net.device, do_classifier_free_guidance=False)
            tokens, pooled = answer[0], {"pooled_projections": answer[2].to(net.dtype)}
            unfolded = cond.tokens[:, -1:].expand(-1, EMPTY_TOKENS, -1)
            _close(folder, "text_encoder", torch.cat([cond.tokens[:, :-1], unfolded], dim=1), tokens)
        levels = len(net.config.get("block_out_channels", (0,)))
        side = 2 * net.config.get("patch_size", 1) * 2 ** (levels - 1)  # small, and divisible as the network asks
        x = _waves(2, net.config["in_channels"], side).to(net.device, net.dtype)
        time = torch.tensor([3.0, 700.0], device=net.device)
        stock_net = getattr(again, form.net_name)
        output = stock_net(x, timestep=time, encoder_hidden_states=tokens.to(net.dtype), **pooled).sample
        _close(folder, form.net_name, net(x, time, cond.to(net.device, net.dtype)), output)
        picture = _waves(1, vae.config["in_channels"], 4 * vae.factor).to(vae.device, vae.dtype)
        z = vae.encode(picture).mean
        again.vae.to(vae.device)
        _close(folder, "vae encoder", z, again.vae.encode(picture).latent_dist.mean)
        _close(folder, "vae decoder", vae.decode(z), again.vae.decode(z).sample)


def _waves(rows: int, channels: int, side: int) -> Tensor:
    """Something of every frequency, without a random number: (rows, channels, side, side) in [-1, 1]."""
    n = rows * channels * side * side
    return torch.arange(n, dtype=torch.float32).square().mul(0.1).sin().view(rows, channels, side, side)


def _close(folder: Path, name: str, ours: Tensor, stock: Tensor) -> None:
    # kernels sum in another order: some float32 digits, or what half precision (and TF32 on a GPU) leaves of them
    tolerance = 1e-4 if ours.dtype == torch.float32 and ours.device.type == "cpu" else 5e-2
    ours, stock = ours.float(), stock.float().to(ours.device)
    if ours.shape != stock.shape:
        raise RuntimeError(f"{folder}: {name} answers {tuple(stock.shape)} in stock form, ours {tuple(ours.shape)}")
    apart, size = (ours - stock).abs().max().item(), stock.abs().max().item()
    if not apart <= tolerance * max(1.0, size):
        raise RuntimeError(f"{folder}: {name} answers otherwise in stock form, by {apart:.1e}; the export is given up")


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


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


def load_parts(folder: str | Path, dtype: torch.dtype = torch.float32) -> Parts:
    """The parts of a pipeline folder, ours or anybody's in the same form. No code that it names is imported.

    Args:
        dtype: of all weights, whatever the files have; the stock loader's default too.
    Raises:
        ValueError: naming the file: no folder, no pipeline, a class that is not read here, weights missing.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    index = _read_index(folder)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FORMS:
        raise ValueError(f"{folder / INDEX}: _class_name is {name!r}; {' and '.join(FORMS)} can be opened")
    form = FORMS[name]
    kinds = {form.net_name: form.net.stock, "vae": VAE.stock, "text_encoder": FAMILIES[form.family].__name__}
    for part, kind in kinds.items():
        library = "transformers" if part == "text_encoder" else "diffusers"
        if index.get(part) != [library, kind]:
            raise ValueError(f"{folder / INDEX}: {part} is {index.get(part)}, expected {[library, kind]}")
    if form.family == "sd3":
        _check_empty(folder, index)
    unread = [k for k in ("safety_checker", "image_encoder") if (index.get(k) or [None])[0]]
    if unread:
        log.info("%s: %s not used", folder, " and ".join(unread))

    files: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    with _quiet():
        net = form.net.from_diffusers(_component(folder, form.net_name), **files)
        vae = VAE.from_diffusers(_component(folder, "vae"), **files)
        model = load_clip(_component(folder, "text_encoder"), FAMILIES[form.family], dtype=dtype)
    width = net.config["joint_attention_dim"] if form.family == "sd3" else None
    text = TextEncoder(load_tokenizer(folder / "tokenizer"), model, form.family, width)
    check_fit(net, vae, text)
    schedule = read_schedule(_read_json(folder / "scheduler" / "scheduler_config.json"), form.family)
    return Parts(net.eval(), vae.eval(), text.eval(), schedule)


def _check_empty(folder: Path, index: dict[str, Any]) -> None:
    if not (index.get("text_encoder_2") or [None])[0]:
        raise ValueError(f"{folder / INDEX}: text_encoder_2 is missing")
    for part in ("text_encoder_2", "text_encoder_3"):
        if (index.get(part) or [None])[0]:
            place = _component(folder, part)
            config, weights = _read_json(place / "config.json"), place / "model.safetensors"
            small = config.get("hidden_size", config.get("d_ff")) in (1, SECOND_WIDTH)
            if not small or not weights.is_file() or not is_empty(part, config, load_file(weights)):
                raise ValueError(f"{place}: {NOT_EMPTY}")


def _component(folder: Path, name: str) -> Path:
    place = folder / name
    if not (place / "config.json").is_file():
        raise ValueError(f"{place / 'config.json'}: missing, though {INDEX} names this part")
    if not any(place.glob("*.safetensors")):
        raise ValueError(f"{place}: no safetensors file; weights in other formats are not read")
    return place


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(f"{file}: missing, so {folder} is no pipeline folder")
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content
