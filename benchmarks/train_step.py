"""A step of our training beside one of diffusers' text-to-image script, in turns: ``python benchmarks/train_step.py``.

Ours is the whole loop as ``ldm train`` runs it (loader, cached latents and text, guards, optimizer, average, log); the
script's is in ``stock_script.py``. Both train the same network from the same weights, on the same pictures in the same
batches, in one process: our loop is held at the start of its steps, and while it waits the script makes as many. The
loop's own time is what is left of a step without network, objective, backward pass, optimizer and average.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, only this folder is on the path

import datasets
import diffusers
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.measure import CLOCKS, interleave, machine, ratio_of_medians, synchronize
from benchmarks.settings import SETTINGS, Setting
from benchmarks.turns import PARTS, InTurns, prepared

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # that accelerate takes
FEWEST, MOST = 4, 40  # rounds, where --seconds decides
SECONDS = {"small": 60.0, "sd": 180.0}
GATHERED = 100_000  # latents a second
STORED = 20_000  # rows of the cache that is read
Row = dict[str, Any]


def options(argv: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python benchmarks/train_step.py", description=(__doc__ or "").split("\n\n")[0])
    rows = [*SETTINGS, "cache"]
    usual = [name for name in rows if name != "tiny"]
    p.add_argument("--rows", nargs="+", choices=rows, default=usual, metavar="NAME", help="%(choices)s")
    p.add_argument("--rounds", type=int, metavar="N", help="steps of each side that are timed, instead of --seconds")
    p.add_argument("--seconds", type=float, help=f"of timing per row, in {FEWEST} to {MOST} rounds (default: 60, 180)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    p.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a shared machine")
    p.add_argument("--check", action="store_true", help="exit status 1 if a target is missed")
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON: the rows, and what they were measured on")
    args = p.parse_args(argv)
    if args.rounds is not None and args.rounds < 2:
        p.error(f"--rounds {args.rounds}: expected 2 or more")
    return args


# --- the rows --------------------------------------------------------------------------------------------------------


def in_turns(setting: Setting, args: argparse.Namespace) -> Row:
    """Our loop and the script on one setting."""

    def rounds(seconds: float) -> int:
        """After a warm-up that took so long for one step of each; an even number: the order turns round each time."""
        wanted = args.rounds
        if wanted is None:
            budget = args.seconds or SECONDS.get(setting.name, 1.0)
            wanted = min(MOST, max(FEWEST, round(budget / seconds)))
        return 2 * ((wanted + 1) // 2)

    with tempfile.TemporaryDirectory(prefix="ldm-train-step-") as place:
        config, task, accelerator, stock = prepared(setting, Path(place))
        turns = InTurns(task, accelerator, stock, rounds, partial(read, CLOCKS[args.clock], accelerator.device))
        turns.run(config, accelerator)
        accelerator.free_memory()
    step, tail = turns.seconds["ours"], [x["optimizer"] + x["average"] for x in turns.parts]
    own = [whole - sum(parts.values()) for whole, parts in zip(step, turns.parts, strict=True)]
    stock, loader = turns.seconds["stock"], turns.seconds["loader"]
    spared = [a - b for a, b in zip(stock, loader, strict=True)]
    ratio, beside, tail_share, own_share = (
        ratio_of_medians(a, b) for a, b in ((step, stock), (step, spared), (tail, step), (own, step))
    )
    parts = {name: 1e3 * float(np.median([x[name] for x in turns.parts])) for name in PARTS}
    checks = [check("time of a step, ours / stock", ratio.value, setting.ratio)]
    checks += [check("optimizer, clipping and average", tail_share.value, setting.tail)] if setting.tail else []
    checks += [check("the loop's own time", own_share.value, setting.loop)]
    return {
        "row": setting.name,
        "about": setting.about,
        "pixels": setting.pixels,
        "batch": setting.batch,
        "parameters": turns.parameters,
        "rounds": len(step),
        "steps": {"ours": turns.steps["ours"], "stock": turns.steps["stock"]},
        "ms_per_image": {name: 1e3 * float(np.median(x)) / setting.batch for name, x in turns.seconds.items()},
        "ratio": ratio.value,
        "ratio_90": [ratio.low, ratio.high],
        "ratio_to_stock_without_loader": beside.value,
        "tail": tail_share.value,
        "tail_90": [tail_share.low, tail_share.high],
        "loop": own_share.value,
        "loop_90": [own_share.low, own_share.high],
        "ms_of_a_step": parts | {"loop": 1e3 * float(np.median(own))},
        "losses": turns.losses(),
        "moved": turns.moved(),
        "checks": checks,
    }


def read(clock: Callable[[], float], device: torch.device) -> float:
    """The clock, once the device has done what it was given: on a GPU the loop cannot run ahead of it here."""
    synchronize(device)
    return clock()


def gathering(args: argparse.Namespace) -> Row:
    """Latents of 64 px pictures read from a cache in memory-mapped files, by batches of random rows."""
    from benchmarks.cache import CAPTIONS, batches, filled

    with tempfile.TemporaryDirectory(prefix="ldm-train-step-") as place:
        texts = filled(Path(place) / "texts", CAPTIONS, {"tokens": (4, 8)}, "fp32", True)
        store = filled(Path(place) / "latents", STORED, {"moments": (8, 16, 16)}, "fp32", True)
        latents: Any = batches(store, texts, STORED).latents
        generator, sizes = np.random.default_rng(0), (16, 64, 256)
        wanted = {n: iter(generator.integers(STORED // 2, size=(1000, n))) for n in sizes}
        calls = {str(n): lambda at=at: latents(next(at)) for n, at in wanted.items()}
        interleave(calls, 20, device=CPU)
        seconds = interleave(calls, 201, device=CPU, clock=args.clock)
    speeds = {n: n / float(np.median(seconds[str(n)])) for n in sizes}
    worst = min(speeds.values())
    return {
        "row": "cache",
        "about": "8 x 16 x 16 moments, float32, latents a second by batch",
        "latents_per_second": speeds,
        "checks": [check("latents gathered a second", worst, GATHERED, least=True)],
    }


def check(what: str, value: float, target: float, *, least: bool = False) -> Row:
    met = value >= target if least else value <= target
    return {"what": what, "value": value, "target": target, "least": least, "met": met}


# --- what is told ----------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], about: Row, console: Console) -> None:
    versions = ", ".join(f"{name} {x}" for name, x in about["versions"].items() if x)
    table = Table(
        title="a training step, ours and the stock script's, in turns",
        caption=f"{about['device']}, {about['cpu']}, {about['threads']} threads, load {about['load']:.1f}; {versions}\n"
        "float32; medians, the ratio's 90% interval",
    )
    for name in ("row", "network", "input"):
        table.add_column(name)
    for name in ("rounds", "ours ms/image", "stock ms/image", "ratio", "90%", "optimizer + average", "loop"):
        table.add_column(name, justify="right")
    trained = [x for x in rows if "ratio" in x]
    for x in trained:
        low, high = x["ratio_90"]
        ms = x["ms_per_image"]
        cells = [x["row"], f"{x['parameters'] / 1e6:.1f}M", f"{x['batch']} x {x['pixels']} px", str(x["rounds"])]
        cells += [f"{ms['ours']:.2f}", f"{ms['stock']:.2f}", f"{x['ratio']:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(*cells, f"{x['tail']:.1%}", f"{x['loop']:.2%}")
    if trained:
        console.print(table)
    for x in trained:
        parts = ", ".join(f"{name} {ms:.2f}" for name, ms in x["ms_of_a_step"].items())
        console.print(f"{x['row']} ({x['about']}), ms of a step of ours: {parts}")
        console.print(f"{x['row']}: beside the script without its loader {x['ratio_to_stock_without_loader']:.3f}")
    for x in rows:
        if "latents_per_second" in x:
            speeds = ", ".join(f"{n} at once {speed:,.0f}" for n, speed in x["latents_per_second"].items())
            console.print(f"{x['row']} ({x['about']}): {speeds}")
    for x in rows:
        for y in x["checks"]:
            colour, word = ("green", "met") if y["met"] else ("red", "missed")
            bound = "at least" if y["least"] else "at most"
            console.print(
                f"[{colour}]{word}[/] {x['row']}, {y['what']}: {y['value']:,.4g}, {bound} {y['target']:,.4g} asked for"
            )


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = options(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    torch.set_num_threads(args.threads)
    for quiet in (transformers.utils.logging, diffusers.utils.logging, datasets):
        quiet.disable_progress_bar()
    date, about = datetime.now(UTC).isoformat(timespec="seconds"), machine(DEVICE)
    rows = [gathering(args) if name == "cache" else in_turns(SETTINGS[name], args) for name in args.rows]
    about["load_after"] = os.getloadavg()[0]
    report(rows, about, console)
    if args.out:
        result = {
            "date": date,
            "command": shlex.join(["python", "benchmarks/train_step.py", *argv]),
            **about,
            "settings": {k: v for k, v in vars(args).items() if k != "out"},
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {args.out}")
    missed = [y for x in rows for y in x["checks"] if not y["met"]]
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
