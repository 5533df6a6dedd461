"""Where rows come from: imagefolders, parquet files, tars and hub data sets, opened split by split."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from PIL import Image

from .pictures import one_line
from .remembered import state_of
from .remote import ShardCache, copy_of, is_remote
from .schema import Data
from .schema.data import Source
from .tables import Beside, Column, Computed, DataError, Table, columns
from .tars import TarTable

__all__ = ["HUB", "DataError", "Source", "Split", "files_of", "open_split", "pick", "pictures_in"]

log = logging.getLogger(__name__)

HUB = "hub:"
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")

Split = Literal["train", "test"]
Parts = dict[str, list[Path]]  # files by split


def open_split(place: Source, data: Data, split: Split, in_memory: int) -> tuple[Table, np.ndarray, bool]:
    """A source's table, the rows of it that belong to the split, and whether those are still to be parted.

    Args:
        place: one of ``data.places``.
        in_memory: parquet files that are larger are copied into Arrow files once, in the cache of ``datasets``.
    Raises:
        DataError: nothing there, nothing in it, a missing column or split.
    """
    if place.path.startswith(HUB):
        parts = _loaded(place.path, place.path.removeprefix(HUB))
        part, alone = pick(parts, split, place.path)
        table = _arrow_table(place, parts[part].data.table, parts[part]._fingerprint)
        return table, _all(table, place, part), alone
    if is_remote(place.path):
        cache = cache_of(data)
        copy = copy_of(place.path, data.storage_options, cache.folder, cache.max_bytes)
        place = place.model_copy(update={"path": str(copy)})
    kind, files = files_of(place.path, data.beside)
    if kind == "imagefolder":
        return _imagefolder(place, data, split)
    part, alone = pick(files, split, place.path)
    if kind == "tar":
        own = {key: getattr(place, key) for key in ("image_column", "caption_column", "mask_column")}
        table = TarTable(place.path, files[part], **own, caption_extension=data.caption_extension)
    else:
        size = sum(file.stat().st_size for some in files.values() for file in some)
        table = _parquet(place, files[part], part, size <= in_memory)
    return table, _all(table, place, part), alone


def files_of(source: str, beside: tuple[str, ...] = ()) -> tuple[Literal["imagefolder", "parquet", "tar"], Parts]:
    """What kind of source a path is, and its files by split; of an imagefolder, its folders.

    Args:
        beside: endings of pictures that belong to others.
    """
    root = Path(source).expanduser()
    if root.exists():
        files = [root] if root.is_file() else [x for x in sorted(root.rglob("*")) if x.suffix in (".parquet", ".tar")]
        if root.is_file() and not re.search(r"\.(parquet|tar(\.\w+)?|tgz)$", root.name):
            raise DataError(f"{source}: expected a folder, a .parquet or a .tar file")
    elif found := sorted(Path(x) for x in glob.glob(str(root)) if x.endswith((".parquet", ".tar"))):
        files, root = found, Path(os.path.commonpath([x.parent for x in found]))
    else:
        raise DataError(f"{source}: no such folder or file (a data set of the hub is written {HUB}owner/name)")
    files = [x for x in files if x.name != "metadata.parquet" and not _hidden(x, root)]
    parquet = [x for x in files if x.suffix == ".parquet"]
    if parquet and len(parquet) < len(files):
        raise DataError(f"{source}: holds parquet files and tars; name one of the two, or both in data.sources")
    if files and not parquet and root.is_dir() and next(pictures_in(root, beside), None):
        raise DataError(f"{source}: holds pictures and tars ({files[0].name}); move one of the two away")
    if parquet:
        files = [x for x in parquet if rows_of(x)]
        if not files:
            raise DataError(f"{source}: the data set is empty: no rows in its parquet files")
    if files:
        parts: Parts = {}
        for file in files:
            parts.setdefault(split_of(file, root) or "", []).append(file)
        if len(parts) > 1 and "" in parts:
            raise DataError(f"{parts[''][0]}: belongs to no split, but other files here do ({', '.join(parts)})")
        return "parquet" if parquet else "tar", {name or "train": part for name, part in parts.items()}
    if next(pictures_in(root, beside), None) is None:
        raise DataError(f"{source}: the data set is empty: no picture, no parquet file and no tar in this folder")
    folders = [x for x in sorted(root.iterdir()) if x.is_dir() and x.name.lower() in SPLITS]
    folders = [x for x in folders if next(pictures_in(x, beside), None)] or [root]
    named: Parts = {}
    for folder in folders:
        named.setdefault("train" if folder == root else SPLITS[folder.name.lower()], []).append(folder)
    return "imagefolder", named


def pick(parts: Mapping[str, Any], split: Split, source: str) -> tuple[str, bool]:
    """The name of a split in the source, and whether it is the only one, which is then to be parted."""
    if len(parts) == 1:
        return next(iter(parts)), True
    for name in ("train",) if split == "train" else ("test", "validation"):
        if name in parts:
            return name, False
    raise DataError(f"{source}: no split for {split!r} among {', '.join(parts)}")


def cache_of(data: Data) -> ShardCache:
    """Where the section's remote files are copied to."""
    from datasets import config

    folder = data.shard_cache or Path(config.HF_DATASETS_CACHE) / "latent_t2i_shards"
    return ShardCache(Path(folder).expanduser(), int(data.shard_cache_gb * 1e9))


# ---- imagefolder


def _imagefolder(place: Source, data: Data, split: Split) -> tuple[Table, np.ndarray, bool]:
    root = Path(place.path).expanduser()
    folders = files_of(place.path, data.beside)[1]
    part, alone = pick(folders, split, place.path)
    above = [] if folders[part] == [root] else sorted(root.glob("metadata.*"))
    metadata = above or [x for folder in folders[part] for x in sorted(folder.rglob("metadata.*"))]
    captions = masks = None
    if any(x.suffix in (".jsonl", ".csv", ".parquet") for x in metadata):
        paths, captions, masks = _with_metadata(place, folders[part], above)
    else:
        paths = _listed(folders[part], data.beside)
        if place.mask_column:
            raise _no_column(place, "mask_column", "image", "; masks stand in metadata.jsonl as mask_file_name")
        if place.caption_column is not None:
            captions = Computed(Beside(data.caption_extension, text=True), paths)
            if not any(captions.function.file(paths[i]).is_file() for i in range(len(paths))):
                hint = f"; captions of an imagefolder stand in its metadata.jsonl, or in {data.caption_extension} files"
                hint += " beside the pictures; or give one to all of them, as instance_prompt"
                raise _no_column(place, "caption_column", "image", hint)
    if data.mask_suffix:
        masks = Computed(Beside(data.mask_suffix, text=False), paths)
    about = f"column {place.caption_column!r}" if metadata else f"a {data.caption_extension} file beside it"
    table = Table(place.path, paths, captions, masks, str(root.resolve()), about)
    if metadata:
        table.also = state_of(metadata)  # what it says of the pictures
    return table, _all(table, place, part), alone


def _listed(folders: Sequence[Path], beside: tuple[str, ...]) -> Column:
    import pyarrow as pa

    found = ({"image": path} for folder in folders for path in pictures_in(folder.resolve(), beside))
    return columns(found, pa.schema({"image": pa.string()}))["image"]


def _with_metadata(place: Source, folders: Sequence[Path], above: Sequence[Path]) -> tuple[Any, Any, Any]:
    """Paths, captions and masks as ``datasets`` reads metadata.jsonl, .csv and .parquet: it refuses paths outside."""
    import pyarrow as pa
    from datasets import Image as ImageFeature

    patterns = [_pattern(x) for x in above] + [_pattern(folder) + "/**" for folder in folders]
    table = _loaded(place.path, "imagefolder", data_files={"train": patterns}, streaming=True)["train"]
    wanted = columns_of(place)
    check_columns(table.features.arrow_schema, place)
    pictures = [name for name in wanted if isinstance(table.features[name], ImageFeature)]
    for name in pictures:
        table = table.cast_column(name, ImageFeature(decode=False))
    types = {name: pa.string() if name in pictures else table.features.arrow_schema.field(name).type for name in wanted}

    def rows() -> Iterator[dict[str, Any]]:
        for row in table.select_columns(wanted):
            yield {name: row[name] and row[name]["path"] if name in pictures else row[name] for name in wanted}

    try:
        read = columns(rows(), pa.schema(types))
    except Exception as error:
        raise _unreadable(place.path, error) from error
    paths = read[place.image_column or ""]
    if place.caption_column is not None:
        _warn_of_unnamed(paths)
    return paths, read.get(place.caption_column or ""), read.get(place.mask_column or "")


def pictures_in(root: Path, beside: tuple[str, ...] = ()) -> Iterator[str]:
    """Files of known endings, in a fixed order, without hidden ones and those that end as ``beside`` says."""
    known = set(Image.registered_extensions())
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(x for x in inner if not x.startswith((".", "__")))
        for file in sorted(files):
            if file.startswith(".") or file.endswith(beside):
                continue
            if os.path.splitext(file)[1].lower() in known:
                yield os.path.join(folder, file)


def _warn_of_unnamed(paths: Sequence[str]) -> None:
    """Pictures that no row of the metadata names are passed over by ``datasets`` without a word."""
    named = np.sort(np.fromiter(map(hash, paths), np.int64, len(paths)))  # 8 bytes for each, whatever its length
    folders = sorted({os.path.dirname(path) for path in paths})
    tops = [x for x in folders if not any(x.startswith(y + os.sep) for y in folders)]  # the rest lies below them
    unnamed, first = 0, ""
    for path in (path for top in tops for path in pictures_in(Path(top))):
        place = np.searchsorted(named, hash(path))
        if place == len(named) or named[place] != hash(path):
            unnamed, first = unnamed + 1, first or path
    if unnamed:
        log.warning("in no row of its metadata, left out: %d picture(s), the first %s", unnamed, first)


# ---- parquet and hub


def _parquet(place: Source, files: list[Path], part: str, small: bool) -> Table:
    """A small one is read in one go; a large one is converted to Arrow once, in datasets' cache, and mapped."""
    state = state_of(files)
    if not small:
        named = {part: [_pattern(file) for file in files]}
        return _arrow_table(place, _loaded(place.path, "parquet", data_files=named)[part].data.table, state)
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_columns(pq.read_schema(files[0]), place)
    try:
        tables = [pq.read_table(file, columns=columns_of(place)) for file in files]
        return _arrow_table(place, pa.concat_tables(tables, promote_options="permissive"), state)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(place.path, error) from error


def _arrow_table(place: Source, table: Any, state: str) -> Table:
    check_columns(table.schema, place)
    read = {name: Column(table.column(name)) for name in columns_of(place)}
    captions, masks = read.get(place.caption_column or ""), read.get(place.mask_column or "")
    about = f"column {place.caption_column!r}"
    return Table(place.path, read[place.image_column or ""], captions, masks, about_captions=about, state=state)


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


def rows_of(parquet: Path) -> int:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(parquet).num_rows
    except Exception as error:
        raise DataError(f"{parquet}: is no parquet file that can be read ({one_line(error)})") from error


# ---- columns


def columns_of(place: Source) -> list[str]:
    return [x for x in dict.fromkeys((place.image_column, place.caption_column, place.mask_column)) if x]


def check_columns(schema: Any, place: Source) -> None:
    """Of an Arrow schema. Raises DataError naming the key and what there is."""
    from pyarrow import types as t

    there = ", ".join(f"{field.name} ({field.type})"[:80] for field in schema) or "none"
    for key in ("image_column", "caption_column", "mask_column"):
        name = getattr(place, key)
        if name is None:
            continue
        if name not in schema.names:
            hint = "; captions of an imagefolder stand in its metadata.jsonl" if key == "caption_column" else ""
            raise _no_column(place, key, there, hint)
        kind = schema.field(name).type
        if key == "caption_column":
            inner = kind.value_type if t.is_list(kind) or t.is_large_list(kind) else kind
            if not (_is_text(inner) or t.is_null(inner)):
                raise DataError(f"{place.path}: column {name!r} ({key}) is no text; there are: {there}")
        elif not (_holds_pictures(kind) or (key == "mask_column" and _is_text(kind))):
            raise DataError(f"{place.path}: column {name!r} ({key}) holds no pictures; there are: {there}")


def _holds_pictures(kind: Any) -> bool:
    from pyarrow import types as t

    return t.is_binary(kind) or t.is_large_binary(kind) or (t.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _is_text(kind: Any) -> bool:
    from pyarrow import types as t

    return t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)


def _no_column(place: Source, key: str, there: str, hint: str) -> DataError:
    return DataError(f"{place.path}: no column {getattr(place, key)!r} ({key}); there are: {there}{hint}")


# ---- splits


def _all(table: Table, place: Source, part: str) -> np.ndarray:
    """Its rows; where a metadata file above the folders of splits names those of all, the ones that lie in this."""
    rows = np.arange(len(table))
    if table.root is not None and any(x.name.lower() in SPLITS for x in os.scandir(table.root) if x.is_dir()):
        tops = [os.path.relpath(table.path(i) or "", table.root).split(os.sep)[0].lower() for i in rows.tolist()]
        if any(top in SPLITS for top in tops):
            rows = np.array([i for i, top in enumerate(tops) if SPLITS.get(top) == part], np.int64)
    if not len(rows):
        raise DataError(f"{place.path}: the data set has no rows in its split {part!r}")
    return rows


def _hidden(file: Path, root: Path) -> bool:
    return file != root and any(part.startswith((".", "__")) for part in file.relative_to(root).parts)


def split_of(file: PurePath, root: PurePath) -> str | None:
    """By a folder below root, or by the file's name: train/0.parquet, train-00000-of-00001.parquet, test.parquet."""
    parts = file.relative_to(root).parts[:-1] if file != root else ()
    for word in (*parts, re.split(r"[-._ ]", file.stem)[0]):
        if word.lower() in SPLITS:
            return SPLITS[word.lower()]
    return None


def _pattern(file: Path) -> str:
    """A path that ``datasets``, which globs, takes as it is written."""
    return glob.escape(str(file.resolve()))
