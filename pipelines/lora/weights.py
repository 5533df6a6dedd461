"""The weights of two models' denoisers and text encoders, under stock names, whether folders or single files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..convert_configs import Part, infer, recognise
from ..convert_files import Source, open_checkpoint, open_part, stock_like
from ..convert_notes import told_configs
from ..folder import INDEX
from ..key_maps import JUNK, OLD_SINGLE, pairs, renamed
from .kohya import COMPONENTS


@dataclass(frozen=True)
class Weights:
    """Of one component; only ``read`` touches data."""

    like: Mapping[str, Tensor]  # meta, by stock name without ``text_model.``
    read: Callable[[str], Tensor]


def open_model(where: str | Path) -> dict[str, Weights]:
    """Each component of a pipeline folder (a run's folder too) or a single file of weights.

    Raises:
        ValueError: nothing is there, or it is no model of a known kind.
    """
    place = Path(where).expanduser()
    if place.is_file():
        return _of_file(place)
    folder = pipeline_folder(place)
    parts = [name for name in COMPONENTS if (folder / name / "config.json").is_file()]
    return {name: _plain(open_part(folder / name)) for name in parts}


def pipeline_folder(where: Path) -> Path:
    """The folder itself, or the ``pipeline/`` in a run's. Raises ValueError if neither is one."""
    if not where.is_dir():
        raise ValueError(f"{where}: no such file or folder")
    found = next((folder for folder in (where, where / "pipeline") if (folder / INDEX).is_file()), None)
    if found is None:
        raise ValueError(f"{where}: no {INDEX} in it, so it is no pipeline folder")
    return found


def _plain(source: Source) -> Weights:
    names = {name.removeprefix("text_model."): name for name in source.like}
    return Weights({name: source.like[old] for name, old in names.items()}, lambda name: source.read(names[name]))


def _of_file(file: Path) -> dict[str, Weights]:
    source = open_checkpoint(file)
    names = {renamed(name, OLD_SINGLE): name for name in source.like if not JUNK.match(name)}
    layout = recognise(file, list(names))
    told = told_configs(file, source.metadata)
    found = {}
    for part in layout.parts:
        own = {name.removeprefix(part.prefix): old for name, old in names.items() if name.startswith(part.prefix)}
        if own and part.name in COMPONENTS:
            like = {name: source.like[old] for name, old in own.items()}
            found[part.name] = _single(
                source, part, own, stock_like(part, told.get(part.name) or infer(layout, part, like))
            )
    return found


def _single(source: Source, part: Part, own: Mapping[str, str], like: Mapping[str, Tensor]) -> Weights:
    places = {
        name.removeprefix("text_model."): (pair, i)
        for pair in pairs(part.table, like)
        for i, name in enumerate(pair.stock)
        if pair.single in own
    }

    def read(name: str) -> Tensor:
        pair, i = places[name]
        return pair.op.to_stock(source.read(own[pair.single]))[i]

    stock = {name.removeprefix("text_model."): value for name, value in like.items()}
    return Weights({name: stock[name] for name in places}, read)
