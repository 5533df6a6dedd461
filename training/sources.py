"""Where rows come from: imagefolders, parquet files and hub data sets, opened by ``datasets``, split by split."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from .pictures import one_line

HUB = "hub:"
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")

Split = Literal["train", "test"]


class DataError(ValueError):
    """A data set that cannot be used; the message names the file, column or row, and what to do."""


def tables(source: str, in_memory: int) -> dict[str, Any]:
    """Splits by name. Streamed where that costs nothing, so that no copy of the data is written into a cache."""
    if source.startswith(HUB):
        return _loaded(source, source.removeprefix(HUB))
    root = Path(source).expanduser()
    if not root.exists():
        raise DataError(f"{source}: no such folder or file (a data set of the hub is written {HUB}owner/name)")
    parquet = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    parquet = [x for x in parquet if x.name != "metadata.parquet" and not _hidden(x, root)]
    if root.is_file() and root.suffix != ".parquet":
        raise DataError(f"{source}: expected a folder or a .parquet file")
    if parquet:
        parquet = [x for x in parquet if _rows_of(x)]
        if not parquet:
            raise DataError(f"{source}: the data set is empty: no rows in its parquet files")
        parts: dict[str, list[str]] = {}
        for file in parquet:
            parts.setdefault(_split_of(file, root) or "", []).append(_pattern(file))
        if len(parts) > 1 and "" in parts:
            raise DataError(f"{parts[''][0]}: belongs to no split, but other files here do ({', '.join(parts)})")
        files = {name or "train": part for name, part in parts.items()}
        # A small file is read in one go; a large one is converted to Arrow once, in datasets' cache, and mapped.
        small = sum(x.stat().st_size for x in parquet) <= in_memory
        return _loaded(source, "parquet", data_files=files, streaming=small)
    folders = [x for x in sorted(root.iterdir()) if x.is_dir() and x.name.lower() in SPLITS]
    folders = [x for x in folders if next(pictures_in(x), None)] or [root]
    if next(pictures_in(root), None) is None:
        raise DataError(f"{source}: the data set is empty: no picture and no parquet file in this folder")
    shared = [] if folders == [root] else [_pattern(x) for x in sorted(root.glob("metadata.*"))]
    patterns: dict[str, list[str]] = {}
    for folder in folders:
        name = "train" if folder == root else SPLITS[folder.name.lower()]
        patterns.setdefault(name, [*shared]).append(_pattern(folder) + "/**")
    return _loaded(source, "imagefolder", data_files=patterns, streaming=True)


def _loaded(source: str, builder: str, **options: Any) -> dict[str, Any]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(builder, **options))
    except Exception as error:  # every builder raises its own kinds
        raise _unreadable(source, error) from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _unreadable(source: str, error: Exception) -> DataError:
    if source.startswith(HUB):
        return DataError(f"{source}: could not be had from the hub: {one_line(error)}")
    metadata = sorted(str(x) for x in Path(source).expanduser().rglob("metadata.*"))
    where = f" (the fault may be in {', '.join(metadata[:3])}; text must be UTF-8)" if metadata else ""
    return DataError(f"{source}: could not be read{where}: {one_line(error)}")


def pick(tables: dict[str, Any], split: Split, source: str) -> tuple[str, bool]:
    """The name of a split in the source, and whether it is the only one, which is then to be parted."""
    if len(tables) == 1:
        return next(iter(tables)), True
    for name in ("train",) if split == "train" else ("test", "validation"):
        if name in tables:
            return name, False
    raise DataError(f"{source}: no split for {split!r} among {', '.join(tables)}")


def check_columns(features: Any, image_column: str, caption_column: str | None, source: str) -> None:
    from datasets import Image as ImageFeature
    from datasets import Value

    columns = dict(features or {})
    there = ", ".join(f"{name} ({_kind(feature)})" for name, feature in columns.items()) or "none"
    for key, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is not None and column not in columns:
            hint = "; captions of an imagefolder stand in its metadata.jsonl" if key == "caption_column" else ""
            raise DataError(f"{source}: no column {column!r} ({key}); there are: {there}{hint}")
    feature = columns[image_column]
    binary = isinstance(feature, Value) and "binary" in feature.dtype
    if not (isinstance(feature, ImageFeature) or binary or (isinstance(feature, dict) and "bytes" in feature)):
        raise DataError(f"{source}: column {image_column!r} (image_column) holds no pictures; there are: {there}")
    if caption_column is not None:
        feature = columns[caption_column]
        if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view", "null")):
            raise DataError(f"{source}: column {caption_column!r} (caption_column) is no text; there are: {there}")


def read(table: Any, image_column: str, caption_column: str | None, source: str) -> tuple[Any, Any]:
    """Encoded pictures and captions, (N,) each; captions None where none are asked for."""
    from datasets import Image as ImageFeature
    from datasets import IterableDataset

    if isinstance(table.features[image_column], ImageFeature):
        table = table.cast_column(image_column, ImageFeature(decode=False))
    if not isinstance(table, IterableDataset):  # mapped from disk, one by one
        return table[image_column], list(table[caption_column]) if caption_column else None
    columns = [image_column, caption_column] if caption_column else [image_column]
    try:
        rows = list(table.select_columns(columns))
    except Exception as error:
        raise _unreadable(source, error) from error
    return [row[image_column] for row in rows], [row[caption_column] for row in rows] if caption_column else None


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith((".", "__")) for part in file.relative_to(root).parts)


def _split_of(file: Path, root: Path) -> str | None:
    """By a folder below root, or by the file's name: train/0.parquet, train-00000-of-00001.parquet, test.parquet."""
    parts = file.relative_to(root).parts[:-1] if file != root else ()
    for word in (*parts, re.split(r"[-._ ]", file.stem)[0]):
        if word.lower() in SPLITS:
            return SPLITS[word.lower()]
    return None


def _rows_of(parquet: Path) -> int:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(parquet).num_rows
    except Exception as error:
        raise DataError(f"{parquet}: is no parquet file that can be read ({one_line(error)})") from error


def _pattern(file: Path) -> str:
    """A path that ``datasets``, which globs, takes as it is written."""
    return glob.escape(str(file.resolve()))


def pictures_in(root: Path) -> Iterator[str]:
    known = set(Image.registered_extensions())
    for folder, inner, files in os.walk(root):
        inner[:] = [x for x in inner if not x.startswith((".", "__"))]
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in known:
                yield os.path.join(folder, file)


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def in_split(root: str, paths: Sequence[str | None], part: str) -> Sequence[int]:
    """The rows whose files lie in the folder of a split: a metadata file above the folders names those of all."""
    tops = [os.path.relpath(path, root).split(os.sep)[0].lower() if path else "" for path in paths]
    if not any(top in SPLITS for top in tops):
        return range(len(tops))
    return [i for i, top in enumerate(tops) if SPLITS.get(top) == part]
