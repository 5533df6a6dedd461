"""Latents and text embeddings, computed once by all processes and kept by the content that they were made of."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from rich.progress import track

from ldm.cond import Cond

from .batches import CachedRows, CachedTexts, Captioned, latent_masks, to_unit
from .cache_keys import Words, mask_keys, picture_keys, words_of
from .captions import check_lengths
from .encoders import About, Encoders, pieces
from .fit import ConfigError
from .schema import AdaptConfig, DiffusionConfig, LatentRun
from .store import Store, as_stored
from .tables import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")
Fields = dict[str, np.ndarray]

ROWS = 1024  # in a shard as it is made: what a killed run loses at most, per process
BYTES = 2**26  # or so many
BATCH = 32  # pictures or captions through an encoder at once
PIXELS = 2**21  # or so many
LAYOUT = 1  # of what is stored; another one is another folder


@dataclass(frozen=True)
class Together:
    """The processes that share the work."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, accelerator: Accelerator) -> Together:
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)

    def told(self, find: Callable[[], T]) -> T:
        """What the first process finds."""
        if self.world == 1:
            return find()
        box = [find() if self.rank == 0 else None]
        broadcast_object_list(box, from_process=0)
        return box[0]  # type: ignore[return-value]

    def shared(self, jobs: Sequence[T], what: str) -> Iterator[T]:
        """This process's jobs: every ``world``-th. All wait in each round: who waited at the end alone might wait
        longer than the process group allows."""
        rounds, quiet = range(0, len(jobs), self.world), self.rank > 0 or not jobs
        for first in track(rounds, what, transient=True, console=Console(stderr=True), disable=quiet):
            yield from jobs[first + self.rank : first + self.rank + 1]
            self.wait()

    def sum(self, number: int) -> int:
        return number if self.world == 1 else sum(gather_object([number]))


@dataclass(frozen=True)
class Caches:
    """What a task reads; None is encoded live."""

    latents: CachedRows | None
    texts: CachedTexts | None
    masks: CachedRows | None


def root_of(config: LatentRun) -> Path:
    return Path(config.cache.dir or Path(config.output_dir) / "cache")


def make_cache(
    config: DiffusionConfig | AdaptConfig, train: Any, held_out: Any, accelerator: Accelerator
) -> dict[str, int]:
    """``ldm cache``: encode what is missing, by all processes together, and train nothing.

    Returns:
        ``pictures_made``, ``pictures_taken_up``, ``texts_made``, ``texts_taken_up``; ``bytes`` on disk of the folders
        that this config uses.
    Raises:
        ConfigError: captions are to be cached that are another each time.
        DataError: a picture no longer decodes, a caption is longer than allowed, or a number does not fit into the
            precision asked for.
    """
    encoders, together = Encoders(config, accelerator.device, accelerator.mixed_precision), Together.of(accelerator)
    about = together.told(encoders.about)
    splits = [(train, config.data.random_flip), (held_out, False)]
    _, counts = open_caches(config, splits, encoders, about, together)
    encoders.free()
    return counts


def open_caches(
    config: LatentRun,
    splits: Sequence[tuple[Captioned, bool]],
    encoders: Encoders,
    about: About,
    together: Together,
) -> tuple[list[Caches], dict[str, int]]:
    """Make what is missing, and open it.

    Args:
        splits: rows, and whether their mirrored pictures are wanted too.
        encoders: asked only where something is missing.
    Returns:
        The caches of each split, and counts as of ``make_cache``.
    """
    how, root, policy = config.cache, root_of(config), config.data.long_captions
    pictures = Store(root / f"pictures-{_name(about.vae, how.precision)}")
    texts = Store(root / f"texts-{_name(about.text, how.precision)}")
    masks = Store(root / f"masks-{_name(about.factor)}")
    if how.text and any(rows.data.shuffle_tags for rows, _ in splits):
        raise ConfigError("data.shuffle_tags makes another caption of it each time: set cache.text: false")
    if policy == "refuse":
        together.told(lambda: [_refuse_long(rows, encoders) for rows, _ in splits])
    counts: dict[str, int] = {"pictures_made": 0, "pictures_taken_up": 0, "texts_made": 0, "texts_taken_up": 0}
    plans = [_Plan(1 + flip, about.length) for _, flip in splits]
    for (rows, flip), plan in zip(splits, plans, strict=True):
        if how.latents:
            plan.pictures = picture_keys(rows, flip)
            made = _fill_pictures(pictures, rows, plan.pictures, encoders, about, how.precision, together)
            counts["pictures_made"] += made
            counts["pictures_taken_up"] += len(np.unique(plan.pictures)) - made
            if rows.masks([0]) is not None:
                plan.masks = together.told(partial(mask_keys, rows))  # each is decoded
                _fill_masks(masks, rows, plan.masks, about.factor, together)
        if how.text:
            find = partial(words_of, rows, encoders, policy)
            plan.words = together.told(find) if policy == "chunk" else find()  # pieces need the tokenizer
            made = _fill_texts(texts, rows, plan.words, encoders, about, how.precision, together)
            counts["texts_made"] += made
            counts["texts_taken_up"] += len(np.unique(plan.words.keys)) - made
    for store, used in (
        (pictures, [plan.pictures for plan in plans if plan.pictures is not None]),
        (texts, [plan.words.keys for plan in plans if plan.words]),
        (masks, [plan.masks for plan in plans if plan.masks is not None]),
    ):
        if used:
            _tidy(store, np.concatenate(used) if how.prune else None, together)
    opened = [plan.open(pictures, texts, masks) for plan in plans]
    counts["bytes"] = sum(store.bytes for store in (pictures, texts, masks))
    return opened, counts


@dataclass
class _Plan:
    """The keys of a split, how many sides its pictures have, and the tokens that are read of a caption at once."""

    sides: int
    length: int
    pictures: np.ndarray | None = None
    words: Words | None = None
    masks: np.ndarray | None = None

    def open(self, pictures: Store, texts: Store, masks: Store) -> Caches:
        latents = captions = regions = None
        if self.pictures is not None:
            reader = pictures.open(self.pictures)
            latents = CachedRows(reader, reader.slots.reshape(-1, self.sides), "moments")
        if self.masks is not None:
            reader = masks.open(self.masks)
            regions = CachedRows(reader, reader.slots[:, None], "mask")
        if self.words is not None:
            reader, words = texts.open(self.words.keys), self.words
            slots, null = reader.slots[1:], int(reader.slots[0])
            captions = CachedTexts(reader, slots, words.starts, null, words.parts, self.length)
        return Caches(latents, captions, regions)


def _refuse_long(rows: Captioned, encoders: Encoders) -> None:
    every = (x for texts in rows.texts for x in texts)
    check_lengths(every, encoders.text.count_tokens, encoders.text.max_length, "refuse")


def _name(*what: Any) -> str:
    return hashlib.blake2b(repr((LAYOUT, *what)).encode(), digest_size=8).hexdigest()


# --- what is missing -------------------------------------------------------------------------------------------------


def fill(
    store: Store,
    keys: np.ndarray,
    encode: Callable[[np.ndarray], Fields],
    together: Together,
    *,
    group: np.ndarray | None = None,
    size: Callable[[int], int] = lambda _: ROWS,
    what: str,
) -> int:
    """Encode the keys that ``store`` lacks, by all processes.

    Blocks are cut from the missing keys in their order, so that a run that goes on after a kill makes those that are
    left of the same rows, and so of the same bits.

    Args:
        encode: positions in ``keys`` -> the rows of a shard.
        group: (N,) of the keys: a block is of one group. All are of one if None.
        size: of a group: rows in a block.
        what: for the progress bar.
    Returns:
        How many rows were missing.
    """

    def look() -> np.ndarray:
        store.sweep()
        return store.missing(keys)

    missing = together.told(look)
    blocks = list(_blocks(missing, group, size))
    for block in together.shared(blocks, f"encoding {what}"):
        store.write(keys[block], encode(block))
    return len(missing)


def _tidy(store: Store, used: np.ndarray | None, together: Together) -> None:
    for part in together.shared(together.told(lambda: store.to_join(used)), "putting shards together"):
        store.join(part)


def _blocks(missing: np.ndarray, group: np.ndarray | None, size: Callable[[int], int]) -> Iterator[np.ndarray]:
    groups = np.zeros(len(missing), np.int64) if group is None else group[missing]
    for one in np.unique(groups):
        rows, step = missing[groups == one], size(int(one))
        yield from (rows[i : i + step] for i in range(0, len(rows), step))


def _fill_pictures(
    store: Store,
    rows: Captioned,
    keys: np.ndarray,
    encoders: Encoders,
    about: About,
    precision: str,
    together: Together,
) -> int:
    sides = len(keys) // len(rows)

    def size(bucket: int) -> int:
        h, w = rows.shapes[bucket]
        bytes_each = 2 * about.channels * (h // about.factor) * (w // about.factor) * (4 if precision == "fp32" else 2)
        return max(sides, min(ROWS, BYTES // bytes_each) // sides * sides)  # both sides of a picture are made at once

    @torch.no_grad()
    def encode(block: np.ndarray) -> Fields:
        vae = encoders.vae
        row, side = np.divmod(block, sides)
        h, w = rows.shapes[int(rows.bucket[row[0]])]
        step, out = max(1, min(BATCH, PIXELS // (h * w))), []
        parts = [(row[i : i + step], side[i : i + step]) for i in range(0, len(block), step)]
        for (_, mirrored), pictures in _ahead(partial(_distinct_pictures, rows), parts):
            x = to_unit(pictures).to(vae.device, vae.dtype)
            flipped = torch.from_numpy(mirrored == 1).to(x.device)[:, None, None, None]
            moments = vae.encode(torch.where(flipped, x.flip(-1), x))
            out.append(torch.cat([moments.mean, moments.log_var], dim=1).float().cpu())  # (B, 2C, h, w)
        return {"moments": _stored(torch.cat(out), precision, "a picture's latents")}

    group = rows.bucket.repeat(sides)
    return fill(store, keys, encode, together, group=group, size=size, what="pictures")


def _distinct_pictures(rows: Captioned, part: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    """Each decoded once, though both its sides are asked for."""
    distinct, place = np.unique(part[0], return_inverse=True)
    return rows.pictures(distinct.tolist())[torch.from_numpy(place)]


def _fill_texts(
    store: Store,
    rows: Captioned,
    words: Words,
    encoders: Encoders,
    about: About,
    precision: str,
    together: Together,
) -> int:
    cut = np.zeros(1, np.int64)

    def text_at(position: int) -> tuple[str, str]:
        """A caption or a piece of it, and what sd3's T5 reads with it."""
        row, caption, piece = words.caption(position)
        whole = rows.texts[row][caption]
        part = whole if words.parts is None else pieces(encoders.text, [whole], "chunk")[0][piece]
        return part, part if piece else whole

    @torch.no_grad()
    def encode(block: np.ndarray) -> Fields:
        text = encoders.text
        found = [text.null()] if block[0] == 0 else []
        texts = [text_at(position) for position in block[block > 0].tolist()]
        for i in range(0, len(texts), BATCH):
            parts, whole = map(list, zip(*texts[i : i + BATCH], strict=True))
            found.append(text.encode(parts, None, whole))
            cut[0] += sum(n > text.max_length for n in text.count_tokens(parts))
        cond = Cond.cat([x.to("cpu") for x in found])
        out = {"tokens": _stored(cond.tokens, precision, "a caption's embedding")}
        if cond.pooled is not None:
            out["pooled"] = _stored(cond.pooled, precision, "a caption's pooled embedding")
        if cond.bias is not None:
            out["bias"] = as_stored(cond.bias, "fp32")  # rounded, log 256 would no longer count 256 tokens
        return out

    bytes_each = about.tokens * about.width * (4 if precision == "fp32" else 2)
    step = max(1, min(ROWS, BYTES // bytes_each))
    missing = fill(store, words.keys, encode, together, size=lambda _: step, what="captions")
    total = together.sum(int(cut[0]))
    if total and together.rank == 0:
        several = "1 caption has" if total == 1 else f"{total:,} captions have"
        log.warning("%s more than %d tokens; the excess is cut", several, about.length)
    return missing


def _fill_masks(store: Store, rows: Captioned, keys: np.ndarray, factor: int, together: Together) -> None:
    def encode(block: np.ndarray) -> Fields:
        parts = [latent_masks(rows, block[i : i + BATCH].tolist(), factor) for i in range(0, len(block), BATCH)]
        return {"mask": torch.cat(parts).numpy()}

    fill(store, keys, encode, together, group=rows.bucket, what="masks")


def _stored(x: torch.Tensor, precision: str, what: str) -> np.ndarray:
    try:
        return as_stored(x, precision)
    except ValueError as error:
        raise DataError(f"cache.precision {precision}: {what} holds a number of {error}; take bf16 or fp32") from error


def _ahead(work: Callable[[Any], T], jobs: Sequence[Any]) -> Iterator[tuple[Any, T]]:
    """Each job and its result, while the next one is already being worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for i, job in enumerate(jobs):
            result = (coming or pool.submit(work, job)).result()
            coming = pool.submit(work, jobs[i + 1]) if i + 1 < len(jobs) else None
            yield job, result
