"""How fast the cache is read, and what that is of a training step: ``python benchmarks/cache.py``.

A store of random moments (means and log variances) and text embeddings is written into a temporary folder, as many
shards as a run leaves and as many as it has before they are put together, and read by batches of random rows: latents
alone, then all that a batch of the training has (flips, dropped captions, embeddings). The second is set beside one
training step (forward, backward, AdamW) of the benchmarks' smallest network on such a batch, in turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, only this folder is on the path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, Case, stock_of
from benchmarks.measure import interleave, machine
from ldm.cond import Cond
from training import cache
from training.batches import CachedRows, CachedTexts, LatentBatches
from training.store import KEY, Store, as_stored

SIDES = (8, 16)  # of the latents, 4 channels
CAPTIONS = 1000
CPU = torch.device("cpu")


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python benchmarks/cache.py", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--rows", type=int, default=50_000, metavar="N", help="pictures (default: 50000)")
    p.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256], metavar="N", help="default: 16 64 256")
    p.add_argument("--precision", nargs="+", choices=["fp32", "fp16", "bf16"], default=["fp32", "fp16"])
    p.add_argument("--size", default="demo", choices=[x.size for x in CASES if x.network == "unet" and not x.large])
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    p.add_argument("--rounds", type=int, default=31, metavar="N", help="default: 31")
    return p.parse_args(argv)


def numbered(total: int) -> np.ndarray:
    """(N,) keys."""
    keys = np.random.default_rng(0).integers(1, 2**63, (total, 2), dtype=np.uint64)
    return keys.reshape(-1).view(KEY)


def filled(folder: Path, total: int, shapes: dict[str, tuple[int, ...]], precision: str, whole: bool) -> Store:
    """A store of random rows in the shards of a finished cache, or of one that is being made."""
    store, keys, generator = Store(folder), numbered(total), torch.Generator().manual_seed(1)
    for i in range(0, total, cache.ROWS):
        block = keys[i : i + cache.ROWS]
        fields = {
            name: as_stored(torch.randn(len(block), *shape, generator=generator), precision)
            for name, shape in shapes.items()
        }
        store.write(block, fields)
    if whole:
        store.tidy()
    return store


class Plain:
    """Rows with one caption each; the cache answers for their content."""

    def __init__(self, total: int):
        self.bucket = np.zeros(total, np.uint16)

    def __len__(self) -> int:
        return len(self.bucket)


def batches(store: Store, texts: Store, total: int) -> LatentBatches:
    reader, words = store.open(numbered(total)), texts.open(numbered(CAPTIONS))
    slots = words.slots[np.arange(total) % CAPTIONS]
    told = CachedTexts(words, slots, np.arange(total + 1), int(words.slots[0]))
    latents = CachedRows(reader, reader.slots.reshape(-1, 2), "moments")
    return LatentBatches(cast(Any, Plain(total // 2)), 0, latents=latents, texts=told, dropout=0.1, flip=True)


def draw(total: int, batch: int) -> Any:
    """Endless batches of (image index, row)."""
    rows = np.random.default_rng(2).integers(total, size=(200, batch))
    return cycle([[(n * batch + i, int(x)) for i, x in enumerate(row)] for n, row in enumerate(rows)])


def training_step(case: Case, found: dict[str, torch.Tensor], net: Any, optimizer: torch.optim.Optimizer) -> None:
    mean, log_var = found["moments"].float().chunk(2, dim=1)
    x = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
    t = torch.rand(len(x)) * 999
    net(x, t, Cond(found["tokens"].float())).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main(argv: Sequence[str] | None = None) -> int:
    from ldm.models.unet import UNet

    args, console = options(argv), Console(width=None if sys.stdout.isatty() else 140)
    torch.set_num_threads(args.threads)
    about = machine(CPU)
    case = next(x for x in CASES if x.network == "unet" and x.size == args.size)
    net = UNet.from_diffusers(cast(Any, stock_of(case))).train()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    tokens = (case.text, case.config["cross_attention_dim"])
    speeds = Table(
        title="reading the cache", caption=f"{about['cpu']}, {args.threads} threads, load {about['load']:.1f}"
    )
    for name in ("moments", "stored as", "shards", "batch", "latents/s", "whole batches: images/s"):
        speeds.add_column(name, justify="right")
    shares = Table(title=f"beside a training step of the {args.size} unet, latents {case.shape}, text {tokens}")
    for name in ("stored as", "batch", "read ms", "step ms", "share"):
        shares.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as place:
        texts = filled(Path(place) / "texts", CAPTIONS, {"tokens": tokens}, "fp32", True)
        for side in sorted({*SIDES, case.shape[-1]}):
            for precision in args.precision:
                for whole in (False, True):
                    shape = {"moments": (8, side, side)}
                    store = filled(Path(place) / f"{side}{precision}{whole}", args.rows, shape, precision, whole)
                    rows = batches(store, texts, args.rows)
                    for batch in args.batches:
                        pairs = draw(len(rows), batch)
                        at = cycle(np.random.default_rng(3).integers(len(rows), size=(200, batch)))
                        calls = {
                            "latents": partial(lambda rows, at: rows.latents(next(at)), rows, at),
                            "batch": partial(lambda rows, pairs: rows.__getitems__(next(pairs)), rows, pairs),
                        }
                        times = interleave(calls, args.rounds, device=CPU)
                        speed = [f"{batch / np.median(times[name]):,.0f}" for name in calls]
                        shards = str(len(store.shards()))
                        speeds.add_row(f"8 x {side} x {side}", precision, shards, str(batch), *speed)
                        if whole and side == case.shape[-1] and batch <= 16:
                            kept = rows.__getitems__(next(pairs))
                            calls["step"] = partial(training_step, case, kept, net, optimizer)
                            times = interleave(calls, max(5, args.rounds // 3), device=CPU)
                            read, step = (1e3 * float(np.median(times[name])) for name in ("batch", "step"))
                            cells = (f"{read:.3f}", f"{step:.1f}", f"{read / step:.2%}")
                            shares.add_row(precision, str(batch), *cells)
    console.print(speeds)
    console.print(shares)
    return 0


if __name__ == "__main__":
    sys.exit(main())
