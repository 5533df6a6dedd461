"""``ldm evaluate`` as it is typed, and the report that it leaves, in a parser and in a real browser."""

import json
import sys
from pathlib import Path

import pytest

from tests.test_evaluate_measures import judge, run  # noqa: F401 (fixtures)
from tests.test_evaluate_report import Page
from training import cli

OPTIONS = ["--samples", "8", "--steps", "2", "--guidance", "2", "--seed", "5", "--batch-size", "4", "--device", "cpu"]


def ldm(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["ldm", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


def measured(monkeypatch: pytest.MonkeyPatch, place: Path, out: Path) -> Path:
    data = place / "data"
    ldm(monkeypatch, "evaluate", place / "run" / "pipeline", "--data", data, *OPTIONS, "--out", out)
    return out / "report.html"


def test_the_command_measures_and_reports(run, judge, monkeypatch, capsys, tmp_path):  # noqa: F811
    (run / "data" / "ATTRIBUTION.md").write_text("By <them>")
    report = measured(monkeypatch, run, tmp_path)
    said, saved = capsys.readouterr().out, json.loads((tmp_path / "measures.json").read_text())["measures"]
    page = Page(report.read_text(encoding="utf-8"))
    assert not page.open and all(s.startswith("data:image/") for s in page.sources) and "script" not in page.tags
    for name, figure in saved.items():
        assert name in page.words and name in said
        assert f"{figure['value']:.4g}" in page.words and f"{figure['value']:.4g}" in said
    assert "fid_mobilenetv2" in saved and "fid" not in saved  # a name says whose features they are
    assert len(page.sources) == 4  # two charts, drawings, pairs
    assert "By <them>" in page.words and "Drawings nearest to a training picture" in page.words
    assert f"of 6 drawings {saved['fid_mobilenetv2']['drawings_of_as_many']:.4g}, of 6 held-out" in page.words


def test_what_is_wrong_is_one_message(run, monkeypatch, capsys, tmp_path):  # noqa: F811
    command = ["evaluate", run / "run" / "pipeline", "--data", run / "data", "--out", tmp_path / "out"]
    for words, message in (
        (["--measures", "fid,vibes"], "ldm: measures: vibes; expected some of fid, kid, precision_recall"),
        (["--measures", "fid", "--retrieval"], "--measures does not go with it"),
        (["--sampler", "heun", "--retrieval"], "--sampler does not go with it"),
        (["--samples", "1"], "ldm: measures: fid needs 2 drawings or more, and there are 1; raise --samples"),
    ):
        monkeypatch.setattr(sys, "argv", ["ldm", *map(str, [*command, *words])])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.browser
def test_the_report_opens_in_a_browser(run, judge, monkeypatch, tmp_path):  # noqa: F811
    from tests.browser import browser, requested

    report = measured(monkeypatch, run, tmp_path)
    with browser() as driver:
        driver.get(report.resolve().as_uri())
        assert requested(driver) == [report.resolve().as_uri()]  # one file, and nothing from anywhere else
        assert driver.get_log("browser") == []
        sizes = driver.execute_script(
            "return [...document.images].map(x => { x.loading = 'eager'; return x }).map(x => x.decode().then("
            "() => [x.naturalWidth, x.clientWidth])).reduce(async (a, x) => [...await a, await x], [])"
        )
        assert len(sizes) == 4 and all(natural > 100 and shown > 100 for natural, shown in sizes)
        heads = [x.text for x in driver.find_elements("css selector", "h1, h2")]
        assert heads[0].endswith(": what it draws") and heads[1:4] == [
            "Measures",
            "Drawings",
            "Drawings nearest to a training picture",
        ]
        rows = driver.find_elements("css selector", "table.measures tr")
        assert any(row.text.startswith("fid_mobilenetv2") for row in rows) and len(rows) >= 10
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
