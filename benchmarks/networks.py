"""Our networks and the stock ones with the same weights, timed in turns: ``python benchmarks/networks.py``.

Each row is one network at one size, batch and pass. Both sides share their weights (``X.from_diffusers(stock)``) and
see the same input. Outputs, and gradients where there are any, are compared first: a network that computes something
else is reported and not timed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory, and says nothing
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, only this folder is on the path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.cases import CASES, NETWORKS, SIZES, Case, Forward, forwards, ours_of, stock_of
from benchmarks.measure import CLOCKS, difference, interleave, machine, operators, peak_bytes, ratio_of_medians

PASSES = ("forward", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}  # rounding, carried through some dozens of layers
SLACK = 3  # for gradients: on the way back through as many layers, stock's own rounding alone comes to 1e-5
SIDES = ("ours", "stock")
TOP = 12  # operators of each side that --profile shows
FEWEST, MOST = 5, 51  # rounds, where --seconds decides
USUAL = {"networks": NETWORKS, "passes": PASSES, "seconds": 1.5}
QUICK = {**USUAL, "rounds": 3, "sizes": ["demo", "64"], "batches": [1]}
Row = dict[str, Any]


def options(argv: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python benchmarks/networks.py", description=(__doc__ or "").split("\n\n")[0])

    def several(name: str, choices: Sequence[str], default: str) -> None:
        p.add_argument(name, nargs="+", choices=choices, metavar="NAME", help=f"%(choices)s (default: {default})")

    several("--networks", NETWORKS, "all")
    several("--sizes", SIZES, "what fits the device")
    several("--passes", PASSES, "both")
    p.add_argument(
        "--batches", nargs="+", type=positive, metavar="N", help="default: on a CPU per size, on a GPU 1 2 8"
    )
    p.add_argument("--rounds", type=positive, metavar="N", help="how often each side is timed, instead of --seconds")
    p.add_argument("--seconds", type=float, help=f"of timing per row, in {FEWEST} to {MOST} rounds (default: 1.5)")
    p.add_argument("--threads", type=positive, default=1, metavar="N", help="of torch on the CPU (default: 1)")
    p.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a shared machine")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--dtype", choices=list(DTYPES), default="float32")
    p.add_argument("--compile", action="store_true", help="torch.compile both sides")
    p.add_argument("--profile", action="store_true", help="show which operators take the time, in each row")
    p.add_argument("--quick", action="store_true", help="a look in half a minute: the smallest sizes, batch 1")
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON: the rows, and what they were measured on")
    args = p.parse_args(argv)
    for name, value in (QUICK if args.quick else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device here")
    if args.sizes and not chosen(args):
        sizes = ", ".join(dict.fromkeys(x.size for x in CASES if x.network in args.networks))
        p.error(f"--sizes {' '.join(args.sizes)}: {' and '.join(args.networks)} have {sizes}")
    return args


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def chosen(args: argparse.Namespace) -> list[Case]:
    def wanted(case: Case) -> bool:
        if args.sizes is not None:
            return case.size in args.sizes
        return not case.on_request and (args.device == "cuda" or not case.large)

    return [x for x in CASES if x.network in args.networks and wanted(x)]


def measure(case: Case, stock: nn.Module, batch: int, kind: str, args: argparse.Namespace) -> Row:
    """One row: memory, agreement, time."""
    device, training = torch.device(args.device), kind == "train"
    ours = ours_of(case, stock)
    for net in (ours, stock):
        net.train(training).requires_grad_(training)
    calls: Sequence[Forward] = forwards(case, ours, stock, batch)
    if args.compile:
        torch.compiler.reset()  # the code is the same in every row, the network is not
        calls = [torch.compile(f, dynamic=False) for f in calls]
    with torch.no_grad():
        slopes = [torch.randn_like(y) for y in calls[1]()]  # what a library sets up at its first call is not counted
    sides = [partial(backward, f, slopes) if training else torch.no_grad()(f) for f in calls]

    def clear() -> None:
        for net in (ours, stock):
            net.zero_grad(set_to_none=True)

    outputs, slopes_of_weights, peaks = [], [], []
    for net, side in zip((ours, stock), sides, strict=True):
        kept = []
        calls_seen = [side] if training else [side, side]  # what a first call keeps for later ones counts in the second
        peaks.append(peak_bytes(partial(last_of, calls_seen, kept), device))
        outputs += kept
        slopes_of_weights.append([p.grad for _, p in sorted(net.named_parameters())])
        clear()
    apart, slopes_apart = difference(*outputs), difference(*slopes_of_weights)
    row: Row = {
        "difference": max(apart, slopes_apart),
        "agrees": apart < TOLERANCE[args.dtype] and slopes_apart < SLACK * TOLERANCE[args.dtype],
        "peak_mb": {name: round(x / 2**20, 3) for name, x in zip(SIDES, peaks, strict=True)},
        "peak_ratio": peaks[0] / peaks[1],
    }
    del outputs, slopes_of_weights
    return row | (in_turns(sides, clear, device, args) if row["agrees"] else {})


def last_of(calls: Sequence[Forward], into: list[tuple[Tensor, ...]]) -> None:
    """Call one after the other; keep what the last one gives."""
    for call in calls[:-1]:
        call()
    into.append(calls[-1]())


def backward(forward: Forward, slopes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward pass; the gradients are left in the parameters."""
    outputs = forward()
    torch.autograd.backward(outputs, list(slopes))
    return tuple(x.detach() for x in outputs)


def in_turns(
    sides: Sequence[Forward], clear: Callable[[], None], device: torch.device, args: argparse.Namespace
) -> Row:
    """The times of one row."""
    calls: dict[str, Callable[[], Any]] = dict(zip(SIDES, sides, strict=True))
    turns = partial(interleave, calls, device=device, between=clear, clock=args.clock)
    warm = turns(rounds=1)
    rounds = args.rounds or min(MOST, max(FEWEST, round(args.seconds / sum(x[0] for x in warm.values()))))
    seconds = turns(rounds=rounds)
    ratio = ratio_of_medians(seconds["ours"], seconds["stock"])
    return {
        "rounds": rounds,
        "ms": {name: round(1e3 * float(np.median(x)), 4) for name, x in seconds.items()},
        "ratio": ratio.value,
        "ratio_90": [ratio.low, ratio.high],
        "operators": {name: operators(call, device) for name, call in calls.items()} if args.profile else {},
    }


def report(rows: Sequence[Row], about: Row, console: Console) -> None:
    versions = ", ".join(f"{name} {x}" for name, x in about["versions"].items() if x)
    table = Table(
        title="ours and stock diffusers, same weights, in turns",
        caption=f"{about['device']}, {about['cpu']}, {about['threads']} threads, load {about['load']:.1f}; {versions}\n"
        "time: medians, their ratio and its 90% interval; peak: of memory, above the weights",
    )
    for name in ("network", "size", "input", "text", "pass"):
        table.add_column(name)
    for name in ("ours ms", "stock ms", "ratio", "90%", "peak MB", "stock MB", "ratio", "difference"):
        table.add_column(name, justify="right")
    for x in rows:
        times = ["not timed", "", "", ""]
        if "ms" in x:
            low, high = x["ratio_90"]
            colour = "green" if high <= 1 else "red" if low > 1 else "default"
            times = [f"{x['ms']['ours']:.2f}", f"{x['ms']['stock']:.2f}", f"[{colour}]{x['ratio']:.3f}[/]"]
            times.append(f"{low:.3f} to {high:.3f}")
        peaks = ["", "", ""]
        if "peak_mb" in x:
            peaks = [f"{x['peak_mb']['ours']:.1f}", f"{x['peak_mb']['stock']:.1f}", f"{x['peak_ratio']:.3f}"]
        apart = f"{x['difference']:.1e}" if "difference" in x else "failed"
        apart = apart if x["agrees"] else f"[bold red]{apart}[/]"
        what = [x["network"], x["size"], " × ".join(map(str, x["input"])), str(x["text"] or ""), x["pass"]]
        table.add_row(*what, *times, *peaks, apart)
    console.print(table)
    for x in rows:
        if x.get("operators"):
            console.print(profile_of(x))
    for name, x in summary(rows).items():
        console.print(
            f"{name}: {x['ratio']:.3f} of the stock time (geometric mean of {x['rows']} rows), at most "
            f"{x['worst']:.3f} ({x['worst_row']}); memory at most {x['peak_worst']:.3f}"
        )


def profile_of(row: Row) -> Table:
    """The operators that take longest on either side."""
    table = Table(title=f"{row['network']} {row['size']}, batch {row['batch']}, {row['pass']}: own time of operators")
    for name in ("operator", "ours ms", "calls", "stock ms", "calls"):
        table.add_column(name, justify="left" if name == "operator" else "right")
    ours, stock = row["operators"]["ours"], row["operators"]["stock"]
    for name in dict.fromkeys([*list(ours)[:TOP], *list(stock)[:TOP]]):
        cells = [ours.get(name, (0.0, 0)), stock.get(name, (0.0, 0))]
        table.add_row(name, *(f"{x:.2f}" if isinstance(x, float) else str(x) for cell in cells for x in cell))
    table.add_row("all", *(f"{sum(x):g}" for side in (ours, stock) for x in zip(*side.values(), strict=True)))
    return table


def summary(rows: Sequence[Row]) -> dict[str, Row]:
    """Per network and pass, over the rows that were timed."""
    found = {}
    for name in dict.fromkeys(f"{x['network']} {x['pass']}" for x in rows if "ms" in x):
        of = [x for x in rows if "ms" in x and f"{x['network']} {x['pass']}" == name]
        worst = max(of, key=lambda x: x["ratio"])
        found[name] = {
            "rows": len(of),
            "ratio": float(np.exp(np.mean(np.log([x["ratio"] for x in of])))),
            "worst": worst["ratio"],
            "worst_row": f"{worst['size']}, batch {worst['batch']}",
            "peak_worst": max(x["peak_ratio"] for x in of),
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = options(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    torch.set_num_threads(args.threads)
    date, about = datetime.now(UTC).isoformat(timespec="seconds"), machine(torch.device(args.device))
    todo = [
        (case, n, kind) for case in chosen(args) for n in args.batches or batches(case, args) for kind in args.passes
    ]
    rows: list[Row] = []
    last: Case | None = None
    stock: Any = None
    for case, batch, kind in track(todo, "timing", console=console, transient=True):
        if case is not last:
            last, stock = case, None  # the old one goes before the new one is made
            stock = stock_of(case).to(args.device, DTYPES[args.dtype])
        row = {"network": case.name, "size": case.size, "input": [batch, *case.shape], "text": case.text + case.empty}
        row |= {"batch": batch, "pass": kind}
        try:
            rows.append(row | measure(case, stock, batch, kind, args))
        except (RuntimeError, ValueError) as error:  # out of memory, or weights refused: the other rows still count
            rows.append(row | {"agrees": False, "error": str(error)})
    report(rows, about, console)
    if args.out:
        result = {
            "date": date,
            "command": shlex.join(["python", "benchmarks/networks.py", *argv]),
            **about,
            "settings": {k: v for k, v in vars(args).items() if k != "out"},
            "summary": summary(rows),
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {args.out}")
    wrong = [x for x in rows if not x["agrees"]]
    for x in wrong:
        why = x.get(
            "error", f"differs from stock by {x.get('difference', 0):.1e}, allowed is {TOLERANCE[args.dtype]:g}"
        )
        console.print(f"[bold red]{x['network']} {x['size']}, batch {x['batch']}, {x['pass']}:[/] {escape(why)}")
    return 1 if wrong else 0


def batches(case: Case, args: argparse.Namespace) -> Sequence[int]:
    return (1, 2, 8) if args.device == "cuda" else case.batches


if __name__ == "__main__":
    sys.exit(main())
