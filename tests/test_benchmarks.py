"""The benchmark of the networks: what it says can be relied on, and a wrong network is not timed."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks import networks  # noqa: E402
from benchmarks.cases import CASES, Case, ours_of, stock_of  # noqa: E402
from benchmarks.measure import difference, interleave, peak_bytes, ratio_of_medians  # noqa: E402

CPU = torch.device("cpu")
TINY = ["--quick", "--sizes", "tiny", "--rounds", "1"]


def test_the_ratio_is_of_medians_and_rounds_are_drawn_whole():
    """Stock takes twice as long in every round, however the rounds differ: the ratio is known without doubt."""
    slow = [3.0, 1.0, 100.0, 2.0]
    assert ratio_of_medians(slow, [2 * x for x in slow]) == (0.5, 0.5, 0.5)
    assert ratio_of_medians([1.0, 9.0, 2.0], [4.0, 4.0, 4.0]).value == 0.5
    assert ratio_of_medians([3.0], [4.0]) == (0.75, 0.75, 0.75)
    for ours, theirs in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="as many of both"):
            ratio_of_medians(ours, theirs)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Times of known medians (ratio 0.9) in 300 runs of 25 rounds. The bootstrap of a median is a little too careful at
    such sizes (93% and 55% in long runs); the standard error of what is counted here is 1.5% and 2.9%."""
    rng = np.random.default_rng(0)
    runs = np.exp(0.1 * rng.standard_normal((300, 2, 25)))
    for level, fewest, most in ((0.9, 0.87, 0.98), (0.5, 0.46, 0.66)):
        found = [ratio_of_medians(0.9 * a, b, level=level, draws=500) for a, b in runs]
        assert fewest < np.mean([x.low <= 0.9 <= x.high for x in found]) < most


def test_sides_take_turns_and_the_order_turns_round():
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name + str(gc.isenabled())[0]) for name in "ab"}
    seconds = interleave(calls, 3, device=CPU, between=lambda: seen.append("-"))
    assert "".join(seen) == "aF-bF-bF-aF-aF-bF-"
    assert {name: len(x) for name, x in seconds.items()} == {"a": 3, "b": 3} and min(map(min, seconds.values())) >= 0

    def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        interleave({"a": fail}, 1, device=CPU)
    assert gc.isenabled()


def test_difference_is_relative_to_each_tensor():
    a, small = torch.tensor([2.0, -4.0]), torch.tensor([1.0])
    assert difference([a], [a]) == 0
    assert difference([a + 1, small], [a, small]) == 0.25
    assert difference([a, small * 1.5], [a, small]) == 0.5
    assert difference([a, small * 1e-5], [a, small * 0]) == pytest.approx(1e-5 / 0.4)  # below a tenth of 4
    assert difference([a, None, None], [a, 0 * small, None]) == 0
    assert difference([a, None], [a, small]) == 1
    assert difference([a * math.nan], [a]) == difference([a], [a * math.nan]) == math.inf
    assert difference([a[None]], [a]) == math.inf


def test_peak_counts_what_is_alive_at_once():
    """Allocations of known sizes, and what a graph keeps for its backward pass."""
    mb = 2**18  # float32 values in 2^20 bytes

    def call() -> None:
        torch.empty(4 * mb)
        kept = torch.empty(2 * mb)
        torch.empty(3 * mb)
        del kept

    assert peak_bytes(call, CPU) == 5 * 2**20
    assert peak_bytes(lambda: None, CPU) == 0
    x = torch.ones(mb, requires_grad=True)
    with torch.no_grad():
        without = peak_bytes(lambda: x.exp().exp().exp(), CPU)
    assert (without, peak_bytes(lambda: x.exp().exp().exp(), CPU)) == (2 * 2**20, 3 * 2**20)


def run(*argv: str, out: Path) -> tuple[int, dict]:
    status = networks.main([*TINY, "--out", str(out), *argv])
    return status, json.loads(out.read_text())


def test_quick_run_writes_all_that_a_number_depends_on(tmp_path: Path, capsys: pytest.CaptureFixture):
    status, result = run("--batches", "1", "2", out=tmp_path / "new" / "run.json")
    assert status == 0
    assert {"date", "command", "device", "cpu", "threads", "load", "versions", "settings", "summary", "rows"} == set(
        result
    )
    assert result["command"].startswith("python benchmarks/networks.py --quick --sizes tiny")
    assert result["versions"]["torch"] == torch.__version__ and "diffusers" in result["versions"]
    assert result["threads"] == result["settings"]["threads"] == 1
    rows = result["rows"]
    names = {"unet", "vae encode", "vae decode", "mmdit", "dit"}
    kinds = {(name, batch, kind) for name in names for batch in (1, 2) for kind in ("forward", "train")}
    assert {(x["network"], x["batch"], x["pass"]) for x in rows} == kinds and len(rows) == len(kinds)
    for x in rows:
        assert x["agrees"] and x["difference"] < 1e-5, x
        assert x["ratio"] == pytest.approx(x["ms"]["ours"] / x["ms"]["stock"], rel=0.01) and x["rounds"] == 1
        assert x["peak_ratio"] == pytest.approx(x["peak_mb"]["ours"] / x["peak_mb"]["stock"], rel=0.05)
    assert set(result["summary"]) == {f"{name} {kind}" for name in names for kind in ("forward", "train")}
    shown = capsys.readouterr().out
    assert "difference" in shown and all(name in shown for name in names)


class Hooked:
    """``ours_of``, with something done to what the network returns."""

    def __init__(self, change):
        self.change = change

    def __call__(self, case: Case, stock: nn.Module) -> nn.Module:
        net = ours_of(case, stock)
        net.register_forward_hook(lambda _, __, output: self.change(output))
        return net


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        pytest.param(lambda y: y * 1.0001, {"forward", "train"}, id="output"),
        pytest.param(lambda y: y / 2 + y.detach() / 2, {"train"}, id="gradient"),
    ],
)
def test_a_wrong_network_is_named_and_not_timed(
    change, wrong: set[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(networks, "ours_of", Hooked(change))
    status, result = run("--networks", "unet", out=tmp_path / "run.json")
    assert status == 1
    for x in result["rows"]:
        assert x["agrees"] == ("ms" in x) == (x["pass"] not in wrong)
    shown = capsys.readouterr().out
    assert {
        kind for kind in ("forward", "train") if f"unet tiny, batch 1, {kind}: differs from stock" in shown
    } == wrong


def test_a_network_that_fails_does_not_take_the_others_along(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def refuse(case: Case, stock: nn.Module) -> nn.Module:
        if case.network == "unet":
            raise ValueError("weights [of another model]")
        return ours_of(case, stock)

    monkeypatch.setattr(networks, "ours_of", refuse)
    status, result = run("--networks", "unet", "vae", "--passes", "forward", out=tmp_path / "run.json")
    assert status == 1
    assert [(x["network"], x["agrees"], x.get("error")) for x in result["rows"]] == [
        ("unet", False, "weights [of another model]"),
        ("vae encode", True, None),
        ("vae decode", True, None),
    ]
    assert "unet tiny, batch 1, forward: weights [of another model]" in capsys.readouterr().out


def test_profile_names_the_operators_of_both(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, result = run("--networks", "dit", "--passes", "forward", "--profile", out=tmp_path / "run.json")
    found = result["rows"][0]["operators"]
    assert all(found[name]["aten::addmm"][1] > 10 and found[name]["aten::addmm"][0] > 0 for name in ("ours", "stock"))
    assert "aten::addmm" in capsys.readouterr().out


def test_what_a_network_keeps_for_later_calls_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept: list[Tensor] = []

    def cache(y: Tensor) -> Tensor:
        if not kept:
            kept.append(torch.empty(2**22))  # 16 MB, at the end of the first call
        return y

    monkeypatch.setattr(networks, "ours_of", Hooked(cache))
    _, result = run("--networks", "unet", "--passes", "forward", out=tmp_path / "run.json")
    peak = result["rows"][0]["peak_mb"]
    assert 16 < peak["ours"] < 17 and peak["stock"] < 1


@pytest.mark.parametrize("case", [x for x in CASES if x.large], ids=lambda x: f"{x.name} {x.size}")
def test_large_sizes_are_ones_that_stock_builds(case: Case):
    with torch.device("meta"):
        stock = stock_of(case)
    assert sum(p.numel() for p in stock.parameters()) > 8e7


def test_what_runs_unless_asked():
    usual = networks.chosen(networks.options([]))
    assert usual == [x for x in CASES if not x.large and not x.on_request]
    assert [x.size for x in networks.chosen(networks.options(["--networks", "unet", "--sizes", "sd15"]))] == ["sd15"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--networks", "mmdit", "dit", "--sizes", "demo"], "mmdit and dit have 64, 256"),
        (["--networks", "unit"], "'unet', 'vae', 'mmdit', 'dit'"),
        (["--rounds", "0"], "--rounds: invalid positive value: '0'"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_refusals_say_what_would_do(
    argv: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        networks.main(argv)
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_runs_as_a_file_from_anywhere(tmp_path: Path):
    script = ROOT / "benchmarks" / "networks.py"
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(x in done.stdout for x in ("--networks", "--threads", "--compile", "256-folded"))
