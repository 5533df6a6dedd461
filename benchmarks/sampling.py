"""Our pipelines beside the stock ones, from prompts to pictures, in turns: ``python benchmarks/sampling.py``.

Each row is one pipeline at one batch size. Both sides share their weights (``TextToImagePipeline.from_diffusers``) and
draw the same prompts from the same noise in as many steps. The pictures are compared first: where they are not the
same nothing is timed, and the exit status is 1. Then ours with what is inexact, and how far its pictures are from the
exact ones. With random weights that distance says little; ``--folder`` takes a trained pipeline.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, only this folder is on the path
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from benchmarks.measure import CLOCKS, interleave, machine, ratio_of_medians
from benchmarks.pipes import PIPELINES, PROMPTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # relative L2 of the pictures, over all steps
FEWEST, MOST = 3, 31  # rounds, where --seconds decides
INEXACT: dict[str, dict[str, Any]] = {
    "step cache, 2": {"step_cache": 2},
    "step cache, 3": {"step_cache": 3},
    "guidance in 0.2 < t <= 0.8": {"guidance": {"name": "interval", "low": 0.2, "high": 0.8}},
    "guidance so, step cache, 2": {"guidance": {"name": "interval", "low": 0.2, "high": 0.8}, "step_cache": 2},
}
Row = dict[str, Any]


def options(argv: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python benchmarks/sampling.py", description=(__doc__ or "").split("\n\n")[0])
    usual = [name for name in PIPELINES if name != "tiny"]
    p.add_argument("--pipelines", nargs="*", choices=[*PIPELINES], metavar="NAME", help="%(choices)s (default: all)")
    p.add_argument("--folder", type=Path, metavar="PATH", help="a stock pipeline folder, timed beside them; with it "
                   "and no --pipelines, alone")  # fmt: skip
    p.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="(default: 1 2 4 8)")
    p.add_argument("--steps", type=int, default=20, metavar="N", help="of the sampler (default: 20)")
    p.add_argument("--guidance-scale", type=float, default=5.0, metavar="W", help="(default: 5)")
    p.add_argument("--rounds", type=int, metavar="N", help="how often each side is timed, instead of --seconds")
    p.add_argument("--seconds", type=float, default=20.0, help=f"per row, in {FEWEST} to {MOST} rounds (default: 20)")
    p.add_argument("--exact", action="store_true", help="leave out what is inexact")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of torch on the CPU (default: 1)")
    p.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a shared machine")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--dtype", choices=list(DTYPES), default="float32")
    p.add_argument("--check", action="store_true", help="exit status 1 too where exact is above 1.0, or nothing "
                   "inexact at most 0.6")  # fmt: skip
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON: the rows, and what they were measured on")
    args = p.parse_args(argv)
    if args.pipelines is None:
        args.pipelines = [] if args.folder else usual
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device here")
    if min(args.batches) < 1 or args.steps < 1:
        p.error("--batches and --steps: expected 1 or more")
    return args


def stock_pipelines(args: argparse.Namespace) -> dict[str, tuple[str, Callable[[], Any]]]:
    from diffusers import DiffusionPipeline

    chosen = {name: PIPELINES[name] for name in args.pipelines}
    if args.folder:
        chosen["trained"] = (str(args.folder), partial(DiffusionPipeline.from_pretrained, args.folder))
    return chosen


def measure(stock: Any, batch: int, args: argparse.Namespace) -> Row:
    """One row: agreement, distances, times."""
    from pipelines.fast import apart
    from pipelines.text_to_image import TextToImagePipeline

    ours = TextToImagePipeline.from_diffusers(stock)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    call: Row = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    if "PixArt" in type(stock).__name__:
        call |= {"clean_caption": False, "max_sequence_length": 120}
    only = {"use_resolution_binning": False} if "PixArt" in type(stock).__name__ else {}  # ours draws what it is told

    def draw(pipe: Any, output: str = "pt", **rest: Any) -> Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(batch)]
        return pipe(prompts, generator=seeds, output_type=output, **call, **rest).images

    inexact = {} if args.exact else INEXACT
    sides = {"ours": partial(draw, ours), "stock": partial(draw, stock, **only)}
    exact, theirs = (side().float() for side in sides.values())
    difference = float((exact - theirs).norm() / (theirs - theirs.mean()).norm())
    row: Row = {"difference": difference, "agrees": difference < TOLERANCE[args.dtype]}
    if not row["agrees"]:
        return row
    latents = draw(ours, "latent").float()
    for name, rest in inexact.items():
        far = apart(draw(ours, "latent", **rest).float(), latents, draw(ours, **rest).float(), exact)
        row.setdefault("distance", {})[name] = {"latents": far.relative, "psnr": far.psnr}
        sides[name] = partial(draw, ours, **rest)
    turns = partial(interleave, sides, device=torch.device(args.device), clock=args.clock)
    warm = turns(rounds=1)
    rounds = args.rounds or min(MOST, max(FEWEST, round(args.seconds / sum(x[0] for x in warm.values()))))
    seconds = turns(rounds=rounds)
    ratios = {name: ratio_of_medians(x, seconds["stock"]) for name, x in seconds.items() if name != "stock"}
    return row | {
        "rounds": rounds,
        "ms_per_image": {name: 1e3 * float(np.median(x)) / batch for name, x in seconds.items()},
        "ratio": {name: x.value for name, x in ratios.items()},
        "ratio_90": {name: [x.low, x.high] for name, x in ratios.items()},
    }


def report(rows: Sequence[Row], about: Row, console: Console) -> None:
    versions = ", ".join(f"{name} {x}" for name, x in about["versions"].items() if x)
    table = Table(
        title="from prompts to pictures, ours and stock diffusers, same weights, in turns",
        caption=f"{about['device']}, {about['cpu']}, {about['threads']} threads, load {about['load']:.1f}; {versions}\n"
        "ratio: of medians, ours / stock, and its 90% interval; distance: from our exact pictures",
    )
    for name in ("pipeline", "batch", "", "ms per image", "ratio", "90%", "distance"):
        table.add_column(name, justify="left" if name in ("pipeline", "") else "right")
    for x in rows:
        first = [x["pipeline"], str(x["batch"])]
        if "ratio" not in x:
            told = f"{x['difference']:.1e}" if "difference" in x else "failed"
            table.add_row(*first, "not timed", "", "", "", f"[bold red]{told}[/]")
            continue
        table.add_row(*first, "stock", f"{x['ms_per_image']['stock']:.1f}", "1", "", f"{x['difference']:.1e} from ours")
        for name, ratio in x["ratio"].items():
            low, high = x["ratio_90"][name]
            far = x.get("distance", {}).get(name)
            far = f"latents {far['latents']:.4f}, {far['psnr']:.1f} dB" if far else "exact"
            colour = "green" if high <= 1 else "red" if low > 1 else "default"
            cells = [f"{x['ms_per_image'][name]:.1f}", f"[{colour}]{ratio:.3f}[/]", f"{low:.3f} to {high:.3f}", far]
            table.add_row("", "", name, *cells)
    console.print(table)
    for name, x in summary(rows).items():
        console.print(f"{name}: {x['ratio']:.3f} (geometric mean of {x['rows']} rows), at most {x['worst']:.3f} "
                      f"({x['worst_row']})")  # fmt: skip


def summary(rows: Sequence[Row]) -> dict[str, Row]:
    """Of each way to draw, over the rows that were timed."""
    found = {}
    for name in dict.fromkeys(name for x in rows for name in x.get("ratio", ())):
        of = [x for x in rows if name in x.get("ratio", ())]
        worst = max(of, key=lambda x: x["ratio"][name])
        found[name] = {
            "rows": len(of),
            "ratio": float(np.exp(np.mean(np.log([x["ratio"][name] for x in of])))),
            "worst": worst["ratio"][name],
            "worst_row": f"{worst['pipeline']}, batch {worst['batch']}",
        }
    return found


def missed(row: Row) -> str | None:
    """What of the targets a row misses: exact at most 1.0 of stock's time, something inexact at most 0.6."""
    ratio = dict(row["ratio"])
    if (exact := ratio.pop("ours")) > 1.0:
        return f"exact takes {exact:.3f} of stock's time, expected 1.0 at most"
    if ratio and min(ratio.values()) > 0.6:
        return f"nothing inexact is below {min(ratio.values()):.3f} of stock's time, expected 0.6 at most"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = options(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    torch.set_num_threads(args.threads)
    from diffusers.utils import logging

    logging.set_verbosity_error()
    date, about = datetime.now(UTC).isoformat(timespec="seconds"), machine(torch.device(args.device))
    rows: list[Row] = []
    wrong: dict[str, str] = {}
    for name, (what, build) in stock_pipelines(args).items():
        stock = build().to(args.device, DTYPES[args.dtype])
        for batch in args.batches:
            row: Row = {"pipeline": name, "about": what, "batch": batch, "steps": args.steps}
            try:
                row |= measure(stock, batch, args)
            except (RuntimeError, ValueError) as error:  # out of memory, or refused: the other rows still count
                row |= {"agrees": False, "error": str(error)}
            rows.append(row)
            why = row.get("error")
            if why is None and not row["agrees"]:
                why = f"differs from stock by {row['difference']:.1e}, allowed is {TOLERANCE[args.dtype]:g}"
            elif why is None and args.check:
                why = missed(row)
            if why:
                wrong[f"{name}, batch {batch}"] = why
    report(rows, about, console)
    if args.out:
        result = {
            "date": date,
            "command": shlex.join(["python", "benchmarks/sampling.py", *argv]),
            **about,
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"},
            "summary": summary(rows),
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {args.out}")
    for name, why in wrong.items():
        console.print(f"[bold red]{name}:[/] {escape(why)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
