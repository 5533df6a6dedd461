"""The benchmark for a machine with a GPU: whatever happens to a row, the file says so; and each row's code runs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks import gpu  # noqa: E402
from benchmarks.gpu_jobs.rows import Settings  # noqa: E402
from tests import failing_rows  # noqa: E402

MODULE = failing_rows.__name__
NAMES = [row.name for job in gpu.PLAN for row in job.rows]
LONG = {
    # rows that the slow test runs: compiled ones, and works like those that other rows do
    *(name for name in NAMES if name.endswith("-compile")), "train/unet-32", "train/unet-32-channels-last",
    "works/lora-sdxl", "works/lora-sd3", "works/lora-pixart", "works/whole", "works/fp16", "works/gan", "works/nf4",
    "works/flash",
}  # fmt: skip


def job(*rows: tuple[str, float]) -> gpu.Job:
    return gpu.Job(MODULE, tuple(gpu.Row(name, seconds) for name, seconds in rows))


def reported(tmp_path: Path, *plan: gpu.Job, budget: float = 100.0) -> dict[str, Any]:
    """The file, with the rows by name."""
    report = gpu.Report(tmp_path / "new" / "out.json", {}, say=lambda _: None)
    gpu.run(plan, report, budget=budget, device="cpu", tiny=True)
    report.write(complete=True)
    found = json.loads(report.out.read_text())
    assert not list(report.out.parent.glob("*.partial"))
    return found | {"rows": {f"{row['group']}/{row['row']}": row for row in found["rows"]}}


# --- rows that fail --------------------------------------------------------------------------------------------------


def test_a_row_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An exception, a package that is not there, a process that dies, one that hangs, a device that is lost."""
    monkeypatch.setattr(gpu, "LEAST", 1.0)
    monkeypatch.setattr(gpu, "PATIENCE", 1.0)
    names = ["good-1", "bad", "good-2", "dead", "absent", "hung", "good-3", "broken", "good-4"]
    rows = reported(tmp_path, job(*((f"x/{name}", 0.1) for name in names)), job(("y/good", 0.1)))["rows"]
    assert list(rows) == [*(f"x/{name}" for name in names), "y/good"]
    assert {name: row["status"] for name, row in rows.items() if row["status"] != "ok"} == {
        "x/bad": "failed", "x/dead": "failed", "x/absent": "skipped", "x/hung": "failed",
    }  # fmt: skip
    assert rows["x/bad"]["error"] == "ValueError: expected 3 channels,\nfound 4"
    assert "in bad" in "".join(rows["x/bad"]["traceback"]) and rows["x/bad"]["seconds"] >= 0
    assert rows["x/dead"]["error"] == "its process died: CUDA error: device-side assert triggered"
    assert rows["x/absent"]["error"] == "xformers is not installed"
    assert rows["x/hung"]["error"].startswith("killed after 1 s")
    pids = [rows[f"x/good-{i}"]["values"]["pid"] for i in (1, 2, 3, 4)] + [rows["y/good"]["values"]["pid"]]
    assert pids[0] == pids[1] and len(set(pids)) == 4  # a new process after each that ended, and for the next job
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_row_that_does_not_fit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before it begins, by its estimate; and one that takes longer than what is left, when that is spent."""
    monkeypatch.setattr(gpu, "COLD", 1.0)
    plan = job(("x/good-1", 0.1), ("x/hung", 1.0), ("x/good-2", 9.0)), job(("x/good-3", 1000.0), ("x/good-4", 0.1))
    start = time.monotonic()
    found = reported(tmp_path, *plan, budget=7)
    rows = found["rows"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "x/good-1": "ok", "x/hung": "failed", "x/good-2": "skipped", "x/good-3": "skipped", "x/good-4": "skipped",
    }  # fmt: skip
    assert "the budget of 7 s was spent while it ran" in rows["x/hung"]["error"]
    assert rows["x/good-3"]["error"] == "needs about 1001 s, and 0 s of the budget are left"
    assert found["spent_s"] <= 7 and time.monotonic() - start < 9 and found["complete"]


def test_a_process_that_cannot_begin_fails_all_its_rows(tmp_path: Path):
    """A module that does not import; the next job is not touched by it."""
    broken = gpu.Job("tests.no_such_module", (gpu.Row("x/a", 0.1), gpu.Row("x/b", 0.1)))
    rows = reported(tmp_path, broken, job(("y/good", 0.1)))["rows"]
    assert {name: row["status"] for name, row in rows.items()} == {"x/a": "failed", "x/b": "failed", "y/good": "ok"}
    for name in ("x/a", "x/b"):
        assert "No module named 'tests.no_such_module'" in rows[name]["error"]


def test_a_row_of_another_device_is_skipped(tmp_path: Path):
    rows = reported(tmp_path, gpu.Job(MODULE, (gpu.Row("x/good", 1, "cuda"),)), budget=1)["rows"]
    assert rows["x/good"]["status"] == "skipped" and rows["x/good"]["error"] == "needs a cuda device"


def test_the_file_is_whole_and_no_process_is_left_when_it_is_stopped(tmp_path: Path):
    """SIGTERM in the middle of a row."""
    code = (
        "import sys; from benchmarks import gpu\n"
        f"gpu.PLAN = (gpu.Job({MODULE!r}, (gpu.Row('x/good', 1), gpu.Row('x/hung', 50))),)\n"
        f"sys.exit(gpu.main(['--out', {str(tmp_path / 'out.json')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()  # the first row is done, the second one hangs
    process.terminate()
    assert process.wait(30) != 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert "ok" in first and not found["complete"] and [row["row"] for row in found["rows"]] == ["good"]
    assert found["planned"] == ["x/good", "x/hung"]
    with pytest.raises(ProcessLookupError):
        os.kill(found["rows"][0]["values"]["pid"], 0)


# --- the rows --------------------------------------------------------------------------------------------------------


class Forked:
    """``gpu.Worker`` that starts from what this process has imported."""

    def __init__(self, module: str, device: str):
        self.module, self.pid, self.status = module, 0, None

    def begin(self, settings: Settings) -> None:
        module = gpu.importlib.import_module(self.module)
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.setpgrp()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.environ["ACCELERATE_USE_CPU"] = "true"
            torch.set_num_threads(1)
            gpu.work(module, settings)
            status = 0
        finally:
            os._exit(status)

    def running(self) -> bool:
        if self.status is None and self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return bool(self.pid) and self.status is None

    def end(self) -> None:
        if self.running():
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.status = signal.SIGKILL

    def said(self) -> str:
        return f"exit status {self.status}"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes, with tiny networks on a CPU, but for the long rows."""
    import training.evaluate.report

    out = tmp_path_factory.mktemp("gpu") / "out.json"
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(training.evaluate.report, "write_report", lambda *_, **__: None)  # most of a tiny run's time
        names = [name for name in NAMES if name not in LONG]
        argv = ["--device", "cpu", "--tiny", "--budget", "550", "--out", str(out), "--only", *names]
        status = gpu.main(argv, launch=Forked)
    found = json.loads(out.read_text())
    failed = [row for row in found["rows"] if row["status"] == "failed"]
    assert status == 0 and not failed, json.dumps(failed, indent=1)
    return found


def values(result: dict[str, Any], name: str) -> dict[str, Any]:
    group, _, what = name.partition("/")
    return next(row["values"] for row in result["rows"] if (row["group"], row["row"]) == (group, what))


def test_the_file_has_all_that_a_number_depends_on(result: dict[str, Any]):
    assert {"date", "command", "budget_s", "spent_s", "device", "tiny", "python", "planned", "complete", "rows"} == set(
        result
    )
    assert result["complete"] and result["command"].startswith("python benchmarks/gpu.py --device cpu --tiny")
    names = [f"{row['group']}/{row['row']}" for row in result["rows"]]
    assert sorted(names) == sorted(result["planned"]) and len(set(names)) == len(names)
    for row in result["rows"]:
        keys = {"ok": {"values", "seconds", "estimate_s"}, "skipped": {"error"}}[row["status"]]
        assert set(row) == {"group", "row", "status", *keys}, row
    skipped = {name for name, row in zip(names, result["rows"], strict=True) if row["status"] == "skipped"}
    assert {"works/offload", "works/compile"} <= skipped <= {
        "works/offload", "works/compile", "works/xformers", "facts/xformers",
    }  # fmt: skip
    machine = values(result, "facts/machine")
    assert machine["torch"] == torch.__version__ and machine["versions"]["diffusers"] and machine["device"] == "cpu"
    assert all(values(result, "facts/speed")[f"{x}_tflops"] > 0 for x in ("bf16", "fp16", "tf32", "fp32"))


@pytest.mark.parametrize("name", ["unet-64", "dit-xl-32", "mmdit-2b-64"])
def test_a_training_row_has_both_sides(result: dict[str, Any], name: str):
    """The same weights on the same task: the first losses are alike (noise of unit variance, or a flow)."""
    row = values(result, f"train/{name}")
    speed, peak = row["images_per_second"], values(result, "facts/speed")["bf16_tflops"]
    assert row["step_ms"] == {side: pytest.approx(1e3 * row["batch"] / x, rel=1e-3) for side, x in speed.items()}
    assert row["tflops"] == pytest.approx(speed["ours"] * row["tflop_per_image"], rel=1e-3)
    assert row["mfu"] == pytest.approx(row["tflops"] / peak, rel=1e-3)
    assert row["time_over_stock"] == pytest.approx(speed["stock"] / speed["ours"], rel=1e-3)
    assert row["peak_gib"] > 0 and row["forecast_gib"] == pytest.approx(sum(row["forecast_parts_gib"].values()), 1e-3)
    first = {side: x[0] for side, x in row["first_and_last_loss"].items()}
    assert 0.5 < first["ours"] / first["stock"] < 2 and all(0.3 < x < 6 for x in first.values())


def test_other_rows(result: dict[str, Any]):
    row = values(result, "train/unet-64-channels-last")
    assert row["images_per_second"].keys() == {"ours"} and not {"time_over_stock", "forecast_gib"} & row.keys()
    for name in ("sd15-batch-1", "sd15-batch-4", "sd3-batch-1", "sd3-batch-4"):
        row = values(result, f"sampling/{name}")
        assert row["difference"] < 0.1 and row["4_steps"]["images_per_second"].keys() == {"ours", "stock"}
    for name, refused in (("unet-4096", {"xformers"}), ("mmdit-4096+78", {"flash", "xformers"})):
        backends = values(result, f"attention/{name}")["backends"]
        assert set(backends) == {"auto", "flash", "xformers", "plain"}
        assert {x for x, row in backends.items() if "error" in row} == refused
        assert all(row["ms"] > 0 and row["difference"] < 0.05 for x, row in backends.items() if x not in refused)
    resumed = values(result, "works/resume")
    assert resumed["checkpoints_when_killed"] == ["images_000000008"] and resumed["largest_difference"] == 0
    row = values(result, "works/lora-sd")
    assert row["learned"] and row["stock_loads"] and all(map(math.isfinite, row["losses"]))
    assert values(result, "works/export")["difference"] < 1e-4


def test_the_command_runs_as_a_file(tmp_path: Path):
    """Processes of its own, started ahead; the group that is quickly done."""
    argv = [
        "--device",
        "cpu",
        "--tiny",
        "--budget",
        "120",
        "--out",
        str(tmp_path / "a.json"),
        "--only",
        "facts/machine",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["status"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == ["ok"]
    assert "1 ok, 0 failed, 0 skipped" in done.stdout


@pytest.mark.slow
def test_the_long_rows(tmp_path: Path):
    """In processes of their own, as the command runs them."""
    argv = ["--device", "cpu", "--tiny", "--budget", "1000", "--out", str(tmp_path / "a.json"), "--only", *LONG]
    assert gpu.main(argv) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {f"{row['group']}/{row['row']}" for row in rows if row["status"] == "ok"} >= LONG - {
        "works/compile", "works/nf4",  # for CUDA alone; where bitsandbytes is there
    }  # fmt: skip


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_fits_into_its_budget(capsys: pytest.CaptureFixture[str]):
    """By its own estimates; and the default is less than ten minutes."""
    assert gpu.main(["--plan"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + sum(len(job.rows) for job in gpu.PLAN)
    assert float(shown[-1].split()[0]) <= gpu.options(["--plan"]).budget


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--device", "cpu", "--out", "x"], "add --tiny"),
        (["--only", "trains", "--out", "x"], "expected a group (facts, works, train, attention, sampling) or a row"),
        ([], "--out FILE: expected"),
    ],
)
def test_refusals(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        gpu.main(argv)
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["unet-64", "dit-xl-32", "mmdit-2b-64"])
def test_full_sizes_are_those_that_they_are_named_for(name: str):
    """Built without a byte: our network from the benchmark's config has the parameters of SD 2's UNet (866M),
    PixArt's DiT-XL/2 (611M) and SD 3 medium (2.03B), and the stock class with its config has the same ones."""
    from benchmarks.gpu_jobs.train import CASES, config_of
    from training.tasks.diffusion import network

    case = CASES[name]
    with torch.device("meta"):
        ours = network(config_of(case, "unused", 1), case.sizes)
        stock: Any = ours.stock_class()(**ours.stock_config())
    shapes = [{key: x.shape for key, x in net.state_dict().items()} for net in (ours, stock)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(case.parameters, abs=0.1)
