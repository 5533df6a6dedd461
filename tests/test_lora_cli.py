"""``ldm lora``: what it prints and what it writes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.lora.files import read_lora, write_lora
from tests import lora_made
from training import cli_lora


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(cli_lora, "say", lambda: None)  # it would change logging for all tests after this one

    def call(*arguments: object) -> list[str]:
        result = CliRunner().invoke(cli_lora.app, [str(x) for x in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("loras")
    lora_made.stock("sd15").save_pretrained(place / "base")
    write_lora(place / "a.safetensors", lora_made.lora("sd15"), "kohya", base="sd15", trigger=["sks dog"])
    write_lora(place / "b", lora_made.lora("sd15", "to_q$", varied=True))
    return place


def test_info(files: Path, run):
    lines = run("info", files / "a.safetensors", "--norms", "--metadata")
    layers = lora_made.lora("sd15").components
    count = sum(x.down.numel() + x.up.numel() for x in layers["unet"].values())
    convolutions = sum(x.down.ndim == 4 for x in layers["unet"].values())
    assert lines[:3] == ["form: kohya, float32", "model: sd15", "title: a"]
    assert lines[3] == f"unet: LoRA of {len(layers['unet'])} layers ({convolutions} convolutions), {count:,} numbers"
    assert lines[4] == "  rank 2; alpha 3"
    assert lines[5].startswith("  norm ") and "trigger words: sks dog" in lines
    assert "ss_network_alpha: 3.0" in lines
    ranks = [layer.rank for layer in read_lora(files / "b").components["unet"].values()]
    said = run("info", files / "b")[4]
    assert all(f"{rank} ({ranks.count(rank)})" in said for rank in ranks)


def test_merge_extract_resize_convert(files: Path, tmp_path: Path, run):
    """Through all of them: two LoRA into a base, out again, smaller, into another form."""
    loras = [files / "a.safetensors", files / "b"]
    out = run("merge", *loras, "--base", files / "base", "--weight", 1, "--weight", 0.5, "-o", tmp_path / "merged")
    assert out == [str(tmp_path / "merged")]
    one = run("merge", *loras, "--weight", 1, "--weight", 0.5, "-o", tmp_path / "one.safetensors", "--format", "kohya",
              "--family", "sd15")  # fmt: skip
    assert one == [str(tmp_path / "one.safetensors")]
    lines = run("extract", files / "base", tmp_path / "merged", "--rank", 5, "--trigger", "sks", "-o", tmp_path / "x")
    assert lines[0] == str(tmp_path / "x" / "pytorch_lora_weights.safetensors")
    assert lines[1].endswith("100.00% of the energy kept")
    known, found = read_lora(tmp_path / "one.safetensors").layers(), read_lora(tmp_path / "x").layers()
    assert found.keys() == known.keys()
    for name, layer in found.items():
        assert (layer.delta() - known[name].delta()).abs().max() < 1e-5
    assert run("resize", tmp_path / "x", "--rank", 1, "-o", tmp_path / "y")[1].startswith(
        f"{len(found)} layers of rank 1 to 1"
    )
    run("convert", tmp_path / "y", "--format", "kohya", "--family", "sd15", "-o", tmp_path / "z.safetensors")
    lora_made.same(read_lora(tmp_path / "z.safetensors"), read_lora(tmp_path / "y"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "none.safetensors"], r"none\.safetensors: no such file or folder"),
        (
            ["merge", "a.safetensors", "--base", "base", "--rank", "2", "-o", "x"],
            "--rank: with --base a pipeline",
        ),
        (["merge", "a.safetensors", "-o", "b/pytorch_lora_weights.safetensors"], "is there already; --overwrite"),
        (["merge", "a.safetensors", "--base", "base", "-o", "b"], "b: is there already; --overwrite"),
        (["resize", "a.safetensors", "-o", "x.safetensors", "--rank", "0"], "rank is 0"),
        (
            ["resize", "a.safetensors", "-o", "x.safetensors", "--rank", "1", "--format", "x"],
            "format 'x' is not one of",
        ),
        (["convert", "b", "-o", "x.safetensors", "--format", "kohya"], "give its family"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, files: Path, run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    with pytest.raises(ValueError, match=said):
        run(*arguments)
    assert sorted(files.rglob("*")) == before
