"""What ``ldm lora`` does: merge, extract, resize and convert LoRA files."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..convert_files import shape
from ..core import Parts
from ..folder import check_replaceable, load_parts, save_parts
from ..precision import DTYPES
from ..stock import form_of
from .algebra import extracted, fits, joined, merged, norm, one_alpha, resized
from .files import FORMATS, Component, Format, Layer, LoraFile, family_of, look_into, read_lora, write_lora
from .kohya import Names
from .notes import triggers
from .weights import Weights, open_model, pipeline_folder

log = logging.getLogger(__name__)
Source = str | Path | LoraFile
Progress = Callable[[int, int], Any]  # done, of how many


# --- merge -----------------------------------------------------------------------------------------------------------


def merge_into(
    base: str | Path,
    sources: Sequence[Source],
    target: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    names: Names | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge LoRA into a pipeline folder's weights, in double precision, and write the folder that comes of it.

    Args:
        base: pipeline folder, stock or ours, or a run's.
        sources: files, folders or what ``read_lora`` gave; a DoRA is merged in the order in which they stand.
        weights: what each counts; 1 by default.
        dtype: of the folder: ``fp16``, ``bf16`` or ``fp32``, the default.
        overwrite: replace a pipeline folder that is there.
    Raises:
        ValueError: naming what: a file that is no LoRA, one for another model (a component or a module that the base
            lacks, another shape), or a target that is taken.
    """
    target, folder = Path(target).expanduser(), pipeline_folder(Path(base).expanduser())
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if target.exists() and not overwrite:
        raise ValueError(f"{target}: is there already; --overwrite replaces a pipeline folder")
    check_replaceable(target)
    if target.resolve() == folder.resolve():
        raise ValueError(f"{target}: is the base; a merged one goes elsewhere, so that the base is not lost")
    loras = _weighted(sources, weights, names or _module_names(open_model(folder)))
    parts = load_parts(folder)
    plan: dict[tuple[str, str], tuple[nn.Parameter, list[tuple[Layer, float]]]] = {}
    for what, lora, w in loras:
        for component, layers in lora.components.items():
            for module, weight in _weights_of(folder, what, parts, component, layers).items():
                plan.setdefault((component, module), (weight, []))[1].append((layers[module], w))
    with torch.no_grad():
        for (component, module), (weight, layers) in plan.items():
            with _telling(f"{component}.{module}"):
                weight.copy_(merged(weight, layers))
    for part in (parts.net, parts.vae, parts.text) if dtype else ():
        part.to(DTYPES[dtype or "fp32"])
    return save_parts(target, parts)


def _weights_of(folder: Path, what: str, parts: Parts, component: str, layers: Component) -> dict[str, nn.Parameter]:
    """The base's parameter for each layer. Raises ValueError for a LoRA of another model."""
    known: dict[str, nn.Module] = {name: tower for name, (_, tower) in parts.text.towers().items()}
    known[form_of(parts.net, parts.text).net_name] = parts.net
    if component not in known:
        raise ValueError(f"{what}: changes {component}, and {folder} has {', '.join(known)}")
    names = {name.removeprefix("text_model."): p for name, p in known[component].named_parameters()}
    found = {}
    for module, layer in layers.items():
        weight = names.get(f"{module}.weight")
        if weight is None:
            near = difflib.get_close_matches(f"{module}.weight", names, n=1, cutoff=0.0)[0].removesuffix(".weight")
            raise ValueError(f"{what}: changes {component}.{module}, and {folder} has none; the nearest name is {near}")
        if not fits(layer, weight):
            raise ValueError(
                f"{what}: {component}.{module} changes a weight of {layer.shape}, in {folder} it is {shape(weight)}; "
                "a LoRA of another model?"
            )
        found[module] = weight
    return found


def merge(
    sources: Sequence[Source],
    target: str | Path,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    format: Format = "diffusers",
    base: str | None = None,
    dtype: str | None = None,
    names: Names | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge several LoRA into one, in single precision: exactly, of the ranks' sum, or to a rank, by SVD.

    Raises:
        ValueError: one of them is a DoRA, they are for models of other shapes; or as ``read_lora`` and ``write_lora``.
    """
    _check_share(rank, None, needed=False)
    loras = _weighted(sources, weights, names)
    files = [lora for _, lora, _ in loras]
    parts: dict[str, dict[str, list[tuple[Layer, float]]]] = {}
    for _, lora, w in loras:
        for component, layers in lora.components.items():
            for module, layer in layers.items():
                parts.setdefault(component, {}).setdefault(module, []).append((layer, w))
    done: dict[str, Component] = {}
    for component, modules in parts.items():
        found = {}
        for module, layers in modules.items():
            with _telling(f"{component}.{module}"):
                whole = joined(layers)
                found[module] = whole if rank is None else resized(whole, rank=rank)[0]
        done[component] = one_alpha(found)
    words = list(
        dict.fromkeys(w for f in files if "modelspec.trigger_phrase" in f.metadata for w in triggers(f.metadata))
    )
    families = {family for f in files if (family := family_of(f))}
    if base is None and len(families) > 1:
        raise ValueError(f"these are LoRA of different models: {', '.join(sorted(families))}")
    how = dict(base=base or next(iter(families), None), dtype=dtype, names=names, trigger=words, overwrite=overwrite)
    return write_lora(target, LoraFile(done), format, **how)  # type: ignore[arg-type]


def _weighted(
    sources: Sequence[Source], weights: Sequence[float] | None, names: Names | None
) -> list[tuple[str, LoraFile, float]]:
    if not sources:
        raise ValueError("no LoRA to merge")
    if weights is not None and len(weights) != len(sources):
        raise ValueError(f"{len(weights)} weights for {len(sources)} LoRA; expected one for each")
    files = [x if isinstance(x, LoraFile) else read_lora(x, names=names) for x in sources]
    told = [f"LoRA {i}" if isinstance(x, LoraFile) else str(x) for i, x in enumerate(sources)]
    return list(zip(told, files, weights or [1.0] * len(files), strict=True))


# --- extract, resize, convert ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A file, and the share of the squared norm that each of its layers keeps of what it was made from."""

    path: Path
    kept: dict[str, tuple[int, float]]  # by component and module: rank, share
    energy: float  # of all together
    left_out: tuple[str, ...] = ()  # names of weights that differ and that no LoRA can hold


def extract(
    original: str | Path,
    tuned: str | Path,
    target: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    components: Sequence[str] | None = None,
    format: Format = "diffusers",
    base: str | None = None,
    dtype: str | None = None,
    names: Names | None = None,
    trigger: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Made:
    """A LoRA out of the difference of two models: the SVD of each linear and convolution layer's.

    Args:
        original, tuned: pipeline folders or single files of weights.
        rank: of each layer, at most.
        energy: share of each layer's squared norm to keep, in (0, 1]; with a rank, whichever is less.
        components: such as ``unet``; by default all that both have.
    Raises:
        ValueError: neither rank nor energy; models that are equal, or of different shapes; a target that is taken.
    """
    _check_share(rank, energy)
    _check_format(format)
    before, after = open_model(original), open_model(tuned)
    chosen = list(components or [name for name in before if name in after])
    for name in chosen:
        for where, model in ((original, before), (tuned, after)):
            if name not in model:
                raise ValueError(f"{where}: has no {name}; it has {', '.join(model) or 'no component at all'}")
    if not chosen:
        raise ValueError(f"{original} has {', '.join(before)}, {tuned} has {', '.join(after)}: nothing in common")
    for name in chosen:
        _check_alike(original, tuned, name, before[name], after[name])
    total, done = sum(len(before[name].like) for name in chosen), 0
    parts: dict[str, Component] = {}
    kept: dict[str, tuple[int, float]] = {}
    held = whole = 0.0
    left_out = []
    for component in chosen:
        found = {}
        for name in before[component].like:
            done += 1
            if progress is not None:
                progress(done, total)
            if not before[component].like[name].is_floating_point():
                continue
            delta = after[component].read(name).float() - before[component].read(name).float()
            if not delta.any():
                continue
            if not _holds(name, delta.ndim):
                left_out.append(f"{component}.{name}")
                continue
            module = name.removesuffix(".weight")
            with _telling(f"{component}.{name}"):
                layer, share = extracted(delta, rank=rank, energy=energy)
            norm2 = float(delta.double().square().sum())
            found[module], kept[f"{component}.{module}"] = layer, (layer.rank, share)
            held, whole = held + share * norm2, whole + norm2
        if found:
            parts[component] = one_alpha(found)
    if not parts:
        raise ValueError(f"{original} and {tuned}: no linear or convolution layer differs, so there is no LoRA in it")
    if left_out:
        log.warning("%d weights that no LoRA holds differ too and are left out: %s", len(left_out), left_out[0])
    names = names or _module_names(before)
    how = dict(base=base, dtype=dtype, names=names, trigger=trigger, overwrite=overwrite)
    path = write_lora(target, LoraFile(parts), format, **how)  # type: ignore[arg-type]
    return Made(path, kept, held / whole, tuple(left_out))


def _module_names(model: dict[str, Weights]) -> dict[str, list[str]]:
    """By which kohya's names of a network of any depth are told apart."""
    return {part: [name.removesuffix(".weight") for name in weights.like] for part, weights in model.items()}


@contextmanager
def _telling(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _holds(name: str, ndim: int) -> bool:
    """A linear or convolution layer's weight; of those of two dimensions, embeddings are none."""
    tables = ("token_embedding.", "position_embedding.", "shared.", "embed_tokens.", "relative_attention_bias.")
    return name.endswith(".weight") and ndim in (2, 4) and not any(t in name for t in (*tables, "class_embedding."))


def _check_alike(original: Any, tuned: Any, component: str, before: Weights, after: Weights) -> None:
    for name in before.like.keys() | after.like.keys():
        there = [None if name not in x.like else shape(x.like[name]) for x in (before, after)]
        if there[0] != there[1]:
            raise ValueError(
                f"{component}.{name}: {there[0]} in {original}, {there[1]} in {tuned}; both must be of one architecture"
            )


def resize(
    source: Source,
    target: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    format: Format | None = None,
    base: str | None = None,
    dtype: str | None = None,
    names: Names | None = None,
    overwrite: bool = False,
) -> Made:
    """The nearest LoRA of a lower rank; a layer whose rank is lower already keeps it. A DoRA keeps its lengths.

    Args:
        rank, energy: as in ``extract``.
        format: by default the source's.
    """
    _check_share(rank, energy)
    lora, format = _opened(source, format, names)
    parts: dict[str, Component] = {}
    kept: dict[str, tuple[int, float]] = {}
    held = whole = 0.0
    for component, layers in lora.components.items():
        found = {}
        for module, layer in layers.items():
            with _telling(f"{component}.{module}"):
                smaller, share = resized(layer, rank=rank, energy=energy)
            norm2 = norm(layer) ** 2
            found[module], kept[f"{component}.{module}"] = smaller, (smaller.rank, share)
            held, whole = held + share * norm2, whole + norm2
        parts[component] = one_alpha(found)
    how = dict(base=base, dtype=dtype, names=names, overwrite=overwrite)
    path = write_lora(target, replace(lora, components=parts), format, **how)  # type: ignore[arg-type]
    return Made(path, kept, held / whole if whole else 1.0)


def convert(
    source: Source,
    target: str | Path,
    format: Format,
    *,
    base: str | None = None,
    dtype: str | None = None,
    names: Names | None = None,
    trigger: Sequence[str] = (),
    same_alpha: bool = False,
    overwrite: bool = False,
) -> Path:
    """Another form of the same LoRA: ranks, alphas and lengths are kept, and the file's metadata.

    Args:
        same_alpha: one alpha for a whole component, and what the others differ in put into the tensors: stock
            diffusers reads kohya's form right only so.
    """
    _check_format(format)
    lora = source if isinstance(source, LoraFile) else read_lora(source, names=names)
    if same_alpha:
        lora = replace(lora, components={name: one_alpha(layers) for name, layers in lora.components.items()})
    return write_lora(target, lora, format, base=base, dtype=dtype, names=names, trigger=trigger, overwrite=overwrite)


def _opened(source: Source, format: Format | None, names: Names | None) -> tuple[LoraFile, Format]:
    if format is not None:
        _check_format(format)
    if isinstance(source, LoraFile):
        return source, format or "diffusers"
    return read_lora(source, names=names), format or look_into(source, names=names)[1]


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")


def _check_share(rank: int | None, energy: float | None, needed: bool = True) -> None:
    if needed and rank is None and energy is None:
        raise ValueError("give a rank, or the share of the energy to keep, or both")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; a LoRA has rank 1 at least")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; expected a share above 0 and at most 1")
