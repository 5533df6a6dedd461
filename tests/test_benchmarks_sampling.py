"""The benchmark of sampling: a row that can be relied on, and a pipeline that draws other pictures is not timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks import sampling  # noqa: E402
from benchmarks.pipes import PIPELINES  # noqa: E402

TINY = ["--pipelines", "tiny", "--batches", "2", "--steps", "3", "--rounds", "1"]


def test_a_row(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Agreement, the time of each way to draw, and what is inexact with its distance."""
    threads = torch.get_num_threads()
    try:
        assert sampling.main([*TINY, "--out", str(tmp_path / "out.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "out.json").read_text())
    (row,) = result["rows"]
    assert row["agrees"] and row["difference"] < 1e-4 and (row["batch"], row["steps"], row["rounds"]) == (2, 3, 1)
    assert set(row["ratio"]) == {"ours", *sampling.INEXACT} and set(row["ms_per_image"]) == {*row["ratio"], "stock"}
    assert row["ratio"]["ours"] == pytest.approx(row["ms_per_image"]["ours"] / row["ms_per_image"]["stock"])
    assert set(row["distance"]) == set(sampling.INEXACT)
    assert all(0 < x["latents"] < 1 and x["psnr"] > 5 for x in row["distance"].values())
    assert result["summary"]["ours"] == {
        "rows": 1, "ratio": pytest.approx(row["ratio"]["ours"]), "worst": row["ratio"]["ours"],
        "worst_row": "tiny, batch 2",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "step cache, 2" in said and "dB" in said and result["command"].startswith("python benchmarks/sampling.py")


def test_other_pictures_are_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """A stock pipeline of a folder, here one with another guidance than it is told."""
    stock = PIPELINES["tiny"][1]()
    stock.set_progress_bar_config(disable=True)
    right = stock.__class__.__call__
    monkeypatch.setattr(
        stock.__class__, "__call__", lambda self, *a, **kw: right(self, *a, **kw | {"guidance_scale": 1.0})
    )
    monkeypatch.setitem(sampling.PIPELINES, "tiny", ("", lambda: stock))
    assert sampling.main(TINY) == 1
    said = capsys.readouterr().out
    assert "not timed" in said and "differs from stock" in said


def test_targets_and_choices(capsys: pytest.CaptureFixture):
    row: dict[str, Any] = {"ratio": {"ours": 0.9, "step cache, 2": 0.7, "step cache, 3": 0.6}}
    assert sampling.missed(row) is None
    assert "1.100 of stock" in (sampling.missed({"ratio": {"ours": 1.1}}) or "")
    assert "below 0.700" in (sampling.missed({"ratio": {"ours": 0.9, "step cache, 2": 0.7}}) or "")
    assert sampling.options([]).pipelines == ["demo", "sd", "sdxl", "dit", "mmdit"]
    assert sampling.options(["--folder", "x"]).pipelines == []
    with pytest.raises(SystemExit):
        sampling.options(["--batches", "0"])
    assert "1 or more" in capsys.readouterr().err
