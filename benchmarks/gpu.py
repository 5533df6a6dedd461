"""What a machine with a GPU can do with this package, in one command: ``python benchmarks/gpu.py --out FILE``.

Rows are measured in subprocesses, the most valuable first, within ``--budget`` seconds. FILE is rewritten after every
row. A row that fails is a row with its error; a row that does not fit into the rest of the budget is a row that says
so. A process that crashes or hangs costs the row that it was at: the rows after it get a new process.

``--device cpu --tiny`` runs the same code on tiny networks, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, only this folder is on the path

# Nothing above imports torch: the parent process starts at once and never touches the GPU.
from benchmarks.gpu_jobs.rows import Settings, Skipped  # noqa: E402

START = 3.0  # seconds from the order to begin until the first row: the CUDA context (imports are done ahead)
COLD = 10.0  # seconds until a process that was not started ahead has imported everything
IMPORT = 120.0  # seconds that a process may take to import everything: disks can be slow the first time
PATIENCE = 3.0  # a row may take this many times its estimate ...
LEAST = 30.0  # ... and at least this many seconds
RESERVE = 2.0  # seconds of the budget that are left for ending a process and writing the file
TAIL = 12  # lines of a traceback that are kept


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        name: group/what.
        seconds: it is expected to take on an H100 or H200.
        device: of the only kind of device that has it.
    """

    name: str
    seconds: float
    device: str = ""


@dataclass(frozen=True)
class Job:
    """Rows that share a process: ``module.rows(settings)`` gives a function for each name."""

    module: str
    rows: tuple[Row, ...]


JOBS = "benchmarks.gpu_jobs."
# In order of worth. Groups take turns, so that neither a short budget nor a crash costs a whole group.
PLAN = (
    Job(JOBS + "facts", (Row("facts/machine", 3), Row("facts/speed", 4), Row("facts/xformers", 8))),
    Job(JOBS + "works", (
        Row("works/lora-sd", 5), Row("works/lora-sdxl", 3), Row("works/lora-sd3", 3), Row("works/lora-pixart", 3),
        Row("works/whole", 3), Row("works/fp16", 3),
    )),
    Job(JOBS + "train", (Row("train/unet-64", 16), Row("train/unet-64-channels-last", 7))),
    Job(JOBS + "attention", (
        Row("attention/unet-4096", 2), Row("attention/mmdit-4096+78", 3), Row("attention/dit-256", 2),
        Row("attention/unet-1024", 1), Row("attention/unet-256", 1), Row("attention/unet-cross-77", 1),
    )),
    Job(JOBS + "train", (Row("train/mmdit-2b-64", 18),)),
    Job(JOBS + "train", (Row("train/dit-xl-32", 16),)),
    Job(JOBS + "works", (
        Row("works/flash", 3), Row("works/resume", 6), Row("works/gan", 4), Row("works/export", 4),
        Row("works/xformers", 3, "cuda"), Row("works/offload", 3, "cuda"), Row("works/nf4", 4),
        Row("works/compile", 20, "cuda"),
    )),
    Job(JOBS + "sampling", (Row("sampling/sd15-batch-1", 10), Row("sampling/sd15-batch-4", 12))),
    Job(JOBS + "sampling", (Row("sampling/sd3-batch-1", 12), Row("sampling/sd3-batch-4", 22))),
    Job(JOBS + "train", (Row("train/unet-32", 16), Row("train/unet-32-channels-last", 7))),
    Job(JOBS + "train", (Row("train/dit-xl-32-compile", 30),)),
    Job(JOBS + "train", (Row("train/mmdit-2b-64-compile", 35),)),
    Job(JOBS + "train", (Row("train/unet-64-compile", 70),)),
)  # fmt: skip


class Worker(Protocol):
    """A process that imports its job's module, waits for ``begin`` and appends lines of JSON to ``Settings.lines``."""

    def begin(self, settings: Settings) -> None: ...
    def running(self) -> bool: ...
    def end(self) -> None: ...  # at once, with its children
    def said(self) -> str: ...  # the end of what it wrote, for a process that died without a word


class Subprocess:
    """``Worker`` in a Python process of its own."""

    def __init__(self, module: str, device: str):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "MPLBACKEND": "agg"}
        if device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", module], stdin=subprocess.PIPE,
            stdout=self.output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip

    def begin(self, settings: Settings) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead: ``running`` says so
            self.process.stdin.write(json.dumps(asdict(settings)).encode() + b"\n")
            self.process.stdin.close()

    def running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its children too, also where it has ended before them
        self.process.wait()

    def said(self) -> str:
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - 4000))
        said = self.output.read().decode(errors="replace").strip()
        return said or f"exit status {self.process.returncode}"


# --- the parent ------------------------------------------------------------------------------------------------------


class Report:
    """The JSON file: what the numbers depend on, and a row for everything that was planned."""

    def __init__(self, out: Path, about: dict[str, Any], say: Callable[[str], None] = print):
        self.out, self.about, self.say, self.rows = out, about, say, []
        self.start = time.monotonic()
        out.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, name: str, status: str, **rest: Any) -> None:
        """status: ``ok`` with ``values``, or ``failed`` or ``skipped`` with ``error``."""
        group, _, what = name.partition("/")
        self.rows.append({"group": group, "row": what, "status": status, **rest})
        self.write()
        shown = rest.get("error") or json.dumps(rest.get("values", {}))
        self.say(f"{self.spent():6.1f} s  {status:7}  {name}: {shown.splitlines()[0][:300] if shown else ''}")

    def spent(self) -> float:
        return time.monotonic() - self.start

    def value(self, name: str, key: str) -> Any:
        """Of a row that is done; None where it is not, or has no such value."""
        rows = [x for x in self.rows if f"{x['group']}/{x['row']}" == name]
        return rows[0].get("values", {}).get(key) if rows else None

    def write(self, complete: bool = False) -> None:
        """In one move: whoever reads the file sees whole JSON, however this process ends."""
        content = {**self.about, "spent_s": round(self.spent(), 1), "complete": complete, "rows": self.rows}
        beside = self.out.with_name(self.out.name + ".partial")
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.out)


def run(
    plan: Sequence[Job],
    report: Report,
    *,
    budget: float,
    device: str,
    tiny: bool,
    launch: Callable[[str, str], Worker] = Subprocess,
) -> None:
    """All rows of the plan, as far as the budget goes. The next job's process imports while this one measures."""
    # A row that this device does not have is said at once and costs no time.
    jobs = []
    for job in plan:
        for row in job.rows:
            if row.device not in ("", device):
                report.add(row.name, "skipped", error=f"needs a {row.device} device")
        if rows := tuple(row for row in job.rows if row.device in ("", device)):
            jobs.append(replace(job, rows=rows))
    ahead: Worker | None = None
    worker: Worker | None = None
    try:
        for i, job in enumerate(jobs):
            rows, start = list(job.rows), START if ahead else COLD
            while rows := _fitting(rows, report, budget, start):
                worker, ahead = ahead or launch(job.module, device), None
                if i + 1 < len(jobs):
                    ahead = launch(jobs[i + 1].module, device)
                rows = _attended(worker, rows, report, budget, device, tiny)
                worker.end()
                start = COLD
                if rows and ahead is not None:  # these rows get a process first
                    ahead.end()
                    ahead = None
    finally:
        for x in (worker, ahead):
            if x is not None:
                x.end()


def _fitting(rows: list[Row], report: Report, budget: float, start: float) -> list[Row]:
    """Without the rows at the head that do not fit into what is left, which are reported."""
    rows = list(rows)
    while rows and (error := _too_long(rows[0].seconds + start, budget - RESERVE - report.spent())):
        report.add(rows.pop(0).name, "skipped", error=error)
    return rows


def _too_long(needed: float, left: float) -> str:
    return "" if needed <= left else f"needs about {needed:.0f} s, and {max(0.0, left):.0f} s of the budget are left"


def _attended(worker: Worker, rows: list[Row], report: Report, budget: float, device: str, tiny: bool) -> list[Row]:
    """Let a worker measure; kill it when a row hangs or the budget is spent.

    Returns:
        rows that it did not come to.
    """
    waiting = {row.name: row for row in rows}
    with tempfile.TemporaryDirectory(prefix="ldm-gpu-") as folder:
        lines = Path(folder) / "lines"
        lines.touch()
        left = budget - RESERVE - report.spent()
        estimates = {row.name: row.seconds for row in rows}
        peak = report.value("facts/speed", "bf16_tflops")
        worker.begin(Settings(folder, str(lines), device, tiny, time.time() + left, estimates, peak))
        now, since, position = "", report.spent(), 0
        while waiting:
            alive = worker.running()  # before its lines are read: what it wrote at the end is not missed
            with lines.open(encoding="utf-8") as file:
                file.seek(position)
                written = file.read()
            written = written[: written.rfind("\n") + 1]
            position += len(written.encode())
            for line in map(json.loads, written.splitlines()):
                since = report.spent()
                if "begin" in line:
                    now = line["begin"]
                else:
                    report.add(**line)
                    del waiting[line["name"]]
                    now = ""
            if not waiting or (not alive and not now and len(waiting) < len(rows)):
                break  # done, or it ended itself between two rows: the device was of no more use to it
            row = waiting[now or next(iter(waiting))]
            limit = max(LEAST, PATIENCE * row.seconds) if now else IMPORT
            error = ""
            if report.spent() > budget - RESERVE:
                error = f"the budget of {budget:.0f} s was spent while it ran"
            elif report.spent() - since > limit:
                error = f"killed after {limit:.0f} s (about {row.seconds:.0f} s were expected)"
            elif not alive:
                error = "its process died"
            if error:
                alive = worker.running()
                worker.end()
                tail = worker.said().splitlines()[-TAIL:]
                if not alive and tail:
                    error += f": {tail[-1]}"
                # Before its first row it failed to import, or has no device: that would go on for all of its rows.
                lost = [row] if now or len(waiting) < len(rows) else list(waiting.values())
                for row in lost:
                    report.add(row.name, "failed", error=error, traceback=tail)
                    del waiting[row.name]
                break
            time.sleep(0.05)
    return list(waiting.values())


# --- the worker ------------------------------------------------------------------------------------------------------


def work(module: Any, settings: Settings) -> None:
    """Measure the rows one after the other; each leaves a line when it begins and one when it is done."""

    def write(**line: Any) -> None:
        with open(settings.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    functions = module.rows(settings)
    for name, estimate in settings.estimates.items():
        if error := _too_long(estimate, settings.deadline - time.time()):
            write(name=name, status="skipped", error=error)
            continue
        write(begin=name)
        start = time.perf_counter()
        try:
            values = functions[name]()
            write(name=name, status="ok", seconds=_since(start), estimate_s=estimate, values=values)
        except Skipped as reason:
            write(name=name, status="skipped", error=str(reason))
        except (Exception, SystemExit) as error:
            text = f"{type(error).__name__}: {error}"
            tail = traceback.format_exc().splitlines()[-TAIL:]
            write(name=name, status="failed", seconds=_since(start), estimate_s=estimate, error=text, traceback=tail)
        finish = getattr(module, "finish", None)
        if finish is not None:
            finish(settings)  # raises where the device is of no more use: a new process goes on


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


# --- the command -----------------------------------------------------------------------------------------------------


def options(argv: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = list(dict.fromkeys(row.name.split("/")[0] for job in PLAN for row in job.rows))
    p.add_argument("--budget", type=float, default=440.0, metavar="S", help="seconds in all (default: 440)")
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON, rewritten after every row")
    p.add_argument("--only", nargs="+", metavar="NAME", help=f"groups ({', '.join(groups)}) or rows (train/unet-64)")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--tiny", action="store_true", help="tiny networks: to try this script out")
    p.add_argument("--plan", action="store_true", help="print the rows and the seconds that they are expected to take")
    p.add_argument("--worker", metavar="MODULE", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    known = {row.name for job in PLAN for row in job.rows}
    for name in args.only or ():
        if name not in groups and name not in known:
            p.error(f"--only {name}: expected a group ({', '.join(groups)}) or a row, as --plan lists them")
    if args.device == "cpu" and not args.tiny and not args.worker:
        p.error("--device cpu: the networks of their real sizes need a GPU; add --tiny")
    if not (args.out or args.plan or args.worker):
        p.error("--out FILE: expected")
    return args


def chosen(only: Sequence[str] | None) -> list[Job]:
    jobs = []
    for job in PLAN:
        rows = tuple(x for x in job.rows if not only or x.name in only or x.name.split("/")[0] in only)
        jobs += [replace(job, rows=rows)] if rows else []
    return jobs


def main(argv: Sequence[str] | None = None, launch: Callable[[str, str], Worker] = Subprocess) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = options(argv)
    if args.worker:
        module = importlib.import_module(args.worker)
        line = sys.stdin.readline()
        if line:  # none: the parent has ended
            work(module, Settings(**json.loads(line)))
        return 0
    plan = chosen(args.only)
    if args.plan:
        for row in (row for job in plan for row in job.rows):
            print(f"{row.seconds:5.0f} s  {row.name}")
        rows = sum(row.seconds for job in plan for row in job.rows)
        print(f"{rows + COLD + START * len(plan):5.0f} s  in all, with {len(plan)} processes")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the workers are ended, and the file is whole
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/gpu.py", *argv]),
        "budget_s": args.budget,
        "device": args.device,
        "tiny": args.tiny,
        "python": platform.python_version(),
        "planned": [row.name for job in plan for row in job.rows],
    }
    report = Report(args.out, about)
    run(plan, report, budget=args.budget, device=args.device, tiny=args.tiny, launch=launch)
    report.write(complete=True)
    counts = {status: sum(x["status"] == status for x in report.rows) for status in ("ok", "failed", "skipped")}
    print(f"{', '.join(f'{n} {status}' for status, n in counts.items())}; written to {args.out}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
