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

from .folders import (
    METADATA,
    Survey,
    log_once,
    metadata_in,
    pictures_in,
    plural,
    printable,
    report_others,
    survey,
    walk,
)
from .pictures import HEIF_ADVICE, one_line
from .remembered import state_of
from .remote import ShardCache, copy_of, is_remote
from .schema import Data
from .schema.data import Source
from .tables import Beside, Column, Computed, DataError, Table, columns, path_from_bytes
from .tars import TarTable

__all__ = ["HUB", "DataError", "Source", "Split", "files_of", "open_split", "pick", "pictures_in"]

log = logging.getLogger(__name__)

HUB = "hub:"
SHARDS = (".parquet", ".tar")
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
        return table, _some(np.arange(len(table)), place, part), alone
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
    return table, _some(np.arange(len(table)), place, part), alone


def files_of(source: str, beside: tuple[str, ...] = ()) -> tuple[Literal["imagefolder", "parquet", "tar"], Parts]:
    """What kind of source a path is, and its files by split; of an imagefolder, its folders.

    Args:
        beside: endings of pictures that belong to others.
    """
    root = Path(source).expanduser()
    if root.exists():
        files = [root] if root.is_file() else [Path(folder, file) for folder, some in walk(root) for file in some]
        if root.is_dir():
            files = sorted(x for x in files if x.suffix.lower() in SHARDS)
        if root.is_file() and not re.search(r"\.(parquet|tar(\.\w+)?|tgz)$", root.name, re.IGNORECASE):
            raise DataError(f"{source}: expected a folder, a .parquet or a .tar file")
    elif found := sorted(Path(x) for x in glob.glob(str(root)) if x.lower().endswith(SHARDS)):
        files, root = found, Path(os.path.commonpath([x.parent for x in found]))
    else:
        raise DataError(f"{source}: no such folder or file (a data set of the hub is written {HUB}owner/name)")
    files = [x for x in files if x.name != "metadata.parquet" and not _hidden(x, root)]
    parquet = [x for x in files if x.suffix.lower() == ".parquet"]
    if parquet and len(parquet) < len(files):
        raise DataError(f"{source}: holds parquet files and tars; name one of the two, or both in data.sources")
    if files and root.is_dir() and (picture := next(pictures_in(root, beside), None)):
        if not parquet:
            raise DataError(f"{source}: holds pictures and tars ({files[0].name}); move one of the two away")
        log_once(
            logging.WARNING,
            f"{source}: its parquet files are read ({files[0].name}); the pictures beside them "
            f"({printable(os.path.basename(picture))}) are left out",
        )
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
        raise DataError(_no_pictures(source, survey([root], beside)))
    return "imagefolder", _split_folders(source, root, beside)


def _no_pictures(source: str, found: Survey) -> str:
    text = f"{source}: the data set is empty: no picture, no parquet file and no tar in this folder"
    if found.heif:
        return f"{text}, but {plural(found.heif, 'HEIF picture')}: {HEIF_ADVICE}"
    others = found.describe_others(None)
    return f"{text}, but {others}" if others else text


def _split_folders(source: str, root: Path, beside: tuple[str, ...]) -> Parts:
    """The subfolders that are splits, if all pictures lie in them; else the folder as a whole.

    Raises:
        DataError: pictures in folders for training and for validation, and others beside them.
    """
    whole: Parts = {"train": [root]}
    folders = [x for x in sorted(root.iterdir()) if x.is_dir() and x.name.lower() in SPLITS]
    folders = [x for x in folders if next(pictures_in(x, beside), None)]
    if not folders:
        return whole
    parts: Parts = {}
    for folder in folders:
        parts.setdefault(SPLITS[folder.name.lower()], []).append(folder)
    below = tuple(f"{folder}{os.sep}" for folder in folders)
    count, first = 0, ""
    for path in pictures_in(root, beside):
        if not path.startswith(below):
            count, first = count + 1, first or path
    if not count:
        return parts
    names = " and ".join(f"{folder.name}/" for folder in folders)
    others = f"{plural(count, 'other picture')} ({printable(os.path.relpath(first, root))}"
    others += " …)" if count > 1 else ")"
    if "train" in parts and len(parts) > 1:
        raise DataError(
            f"{source}: {names} are splits for training and validation, but {others} {_verb(count)} in neither; "
            "move them into one of the folders, or out of the data set"
        )
    log_once(
        logging.WARNING,
        f"{source}: {names} {'is an ordinary folder' if len(folders) == 1 else 'are ordinary folders'} here, no split, "
        f"as {others} {_verb(count)} outside; all are used. For splits, put every picture into train/ or test/",
    )
    return whole


def _verb(count: int) -> str:
    return "lies" if count == 1 else "lie"


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
    above = [] if folders[part] == [root] else [x for name in METADATA if (x := root / name).is_file()]
    metadata = above or [x for folder in folders[part] for x in metadata_in(folder)]
    captions = masks = None
    found = survey([x for some in folders.values() for x in some], data.beside, data.caption_extension)
    ending = None
    if metadata:
        paths, captions, masks = _with_metadata(place, folders[part], above)
        about = f"column {place.caption_column!r}"
    else:
        paths = _listed(folders[part], data.beside)
        ending = found.ending(data.caption_extension)
        about = f"a {ending} file beside it"
        if place.mask_column:
            raise _no_column(place, "mask_column", "image", "; masks stand in metadata.jsonl as mask_file_name")
        if place.caption_column is not None:
            if not found.captions[ending]:
                raise DataError(
                    f"{place.path}: no captions found for {plural(found.pictures, 'picture')}: expected "
                    f"{found.expected(ending)}, or metadata.jsonl{found.unused_text(ending)}; or give all of them "
                    "one caption, as data.instance_prompt"
                )
            log_once(
                logging.INFO,
                f"{place.path}: captions: {found.captions[ending]:,} of {plural(found.pictures, 'picture')} "
                f"{'has' if found.captions[ending] == 1 else 'have'} a {ending} file",
            )
            captions = Computed(Beside(*found.variants(ending), text=True), paths)
    report_others(place.path, found, ending)
    if data.mask_suffix:
        masks = Computed(Beside(data.mask_suffix, text=False), paths)
    table = Table(place.path, paths, captions, masks, str(root.resolve()), about)
    if metadata:
        table.also = state_of(metadata)  # what it says of the pictures
    rows = np.arange(len(table))
    if above:  # one metadata file for all splits
        tops = [os.path.relpath(table.path(i) or "", table.root).split(os.sep)[0].lower() for i in rows.tolist()]
        rows = np.array([i for i, top in enumerate(tops) if SPLITS.get(top) == part], np.int64)
    return table, _some(rows, place, part), alone


def _listed(folders: Sequence[Path], beside: tuple[str, ...]) -> Computed:
    import pyarrow as pa

    paths = ({"image": os.fsencode(path)} for folder in folders for path in pictures_in(folder.resolve(), beside))
    return Computed(path_from_bytes, columns(paths, pa.schema({"image": pa.binary()}))["image"])


def _with_metadata(place: Source, folders: Sequence[Path], above: Sequence[Path]) -> tuple[Any, Any, Any]:
    """Paths, captions and masks as ``datasets`` reads metadata.jsonl, .csv and .parquet: it refuses paths outside."""
    import pyarrow as pa
    from datasets import Image as ImageFeature

    patterns = [_pattern(x) for x in above] + [x for folder in folders for x in _patterns_below(folder)]
    table = _loaded(place.path, "imagefolder", data_files={"train": patterns}, streaming=True)["train"]
    check_columns(table.features.arrow_schema, place)
    pictures = [name for name, feature in table.features.items() if isinstance(feature, ImageFeature)]
    wanted = list(dict.fromkeys((*columns_of(place), *pictures)))
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
        _warn_of_unnamed([read[name] for name in pictures], folders)
    return paths, read.get(place.caption_column or ""), read.get(place.mask_column or "")


def _patterns_below(folder: Path) -> list[str]:
    """Patterns for all files below a folder. ``**`` would follow a link upwards, so each folder has its own where
    there are links."""
    folder = folder.resolve()
    linked = any(os.path.islink(os.path.join(x, y)) for x, inner, _ in os.walk(folder) for y in inner)
    return [glob.escape(x) + "/*" for x, _ in walk(folder)] if linked else [_pattern(folder) + "/**"]


def _warn_of_unnamed(columns: Sequence[Sequence[str | None]], folders: Sequence[Path]) -> None:
    """``datasets`` passes over pictures that no row of the metadata names. Masks and hints are named too."""
    total = sum(len(column) for column in columns)
    hashes = np.fromiter((hash(path) for column in columns for path in column), np.int64, total)
    named = np.sort(hashes)  # 8 bytes for each, whatever the path's length
    unnamed, first = 0, ""
    for path in (path for folder in folders for path in pictures_in(folder.resolve())):
        place = np.searchsorted(named, hash(path))
        if place == len(named) or named[place] != hash(path):
            unnamed, first = unnamed + 1, first or path
    if unnamed:
        log.warning(
            "in no row of its metadata, left out: %s, the first %s", plural(unnamed, "picture"), printable(first)
        )


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
            raise _no_column(place, key, there, "")
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


def _some(rows: np.ndarray, place: Source, part: str) -> np.ndarray:
    """The rows. Raises DataError where there are none."""
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
