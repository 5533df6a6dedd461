"""Outputs that cannot be written are refused before anything is read, and what was drawn is never lost."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipelines.outputs import check_output, write_or_keep
from training import cli

FILE, FOLDER = "file", "folder"
CONFIG = "configs/openmoji/vae.yaml"
NONE = "no/such/input"  # inputs are missing: they are looked at only after the output
COMMANDS: dict[str, tuple[list[str], str]] = {  # command -> arguments with OUT, and what OUT is to be
    "data openmoji": (["--out", "OUT"], FOLDER),
    "data style": (["--out", "OUT"], FOLDER),
    "data subject": (["--out", "OUT"], FOLDER),
    "inspect data": ([NONE, "-o", "OUT"], FILE),
    "inspect path": ([NONE, "-o", "OUT"], FILE),
    "lora merge": ([NONE, "-o", "OUT", "--base", NONE], FOLDER),
    "lora extract": ([NONE, NONE, "-o", "OUT"], FOLDER),
    "lora resize": ([NONE, "-o", "OUT"], FOLDER),
    "lora convert": ([NONE, "-o", "OUT", "--format", "kohya"], FOLDER),
    "train": ([CONFIG, "--out", "OUT"], FOLDER),
    "check": ([CONFIG, "output_dir=OUT"], FOLDER),
    "cache": ([CONFIG, "--out", "OUT"], FOLDER),
    "adapt": (["--base", NONE, "--images", NONE, "--trigger", "a sks dog", "--out", "OUT"], FOLDER),
    "ema": ([NONE, "--sigma-rel", "0.1", "--out", "OUT"], FOLDER),
    "sample": ([NONE, "a dog", "-o", "OUT"], FILE),
    "evaluate": ([NONE, "--data", NONE, "--out", "OUT"], FOLDER),
    "convert": (["docs", "OUT"], FILE),
    "init": (["openmoji/vae", "--out", "OUT"], FILE),
    "app": ([NONE, "--out", "OUT"], FOLDER),
}


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name}{key} ")
        else:
            yield f"{name}{key}", command


def test_every_command_with_an_output_is_in_the_table() -> None:
    every = commands(typer.main.get_command(cli.app))
    writing = {name for name, command in every if {"out", "target", "configs"} & {p.name for p in command.params}}
    assert writing == set(COMMANDS)


@pytest.mark.parametrize("place", ["the other kind", "below a file", "below /dev/null", "in /proc"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written_is_refused_first(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, kind = COMMANDS[command]
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    if command == "sample" and place == "the other kind":
        return  # it takes a folder too
    name = "x.png" if kind == FILE else "x"
    target = {
        "the other kind": tmp_path / ("folder.png" if kind == FILE else "file"),
        "below a file": tmp_path / "file" / name,
        "below /dev/null": f"/dev/null/{name}",
        "in /proc": f"/proc/{name}",
    }[place]
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "x")  # restored afterwards
    line = [argument.replace("OUT", str(target)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["ldm", *command.split(), *line])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and said.startswith("ldm: "), said
    assert str(target) in said and ("cannot be written" in said or " is a f" in said), said
    assert "choose another" in said and said.count("\n") == 1


def test_what_can_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(b"old")
    assert check_output(tmp_path / "a" / "b.png", "--out", "file") == tmp_path / "a" / "b.png"
    check_output(tmp_path / "old.png", "--out", "file")
    check_output(tmp_path, "--out", "folder")
    assert [x.name for x in tmp_path.iterdir()] == ["old.png"] and (tmp_path / "old.png").read_bytes() == b"old"
    with pytest.raises(ValueError, match="File name too long"):
        check_output(tmp_path / ("x" * 300) / "a.png", "--out")


def test_a_failed_write_goes_elsewhere_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "a-2.png").write_bytes(b"another")

    def write(file: Path) -> None:
        if file == tmp_path / "a.jpg" or (full and file.parent == tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write_bytes(b"picture")

    full = False
    assert write_or_keep(tmp_path / "a.jpg", write, ".png") == tmp_path / "a-3.png"
    assert str(tmp_path / "a-3.png") in caplog.text and "No space left" in caplog.text
    full, spare = True, tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    assert write_or_keep(tmp_path / "a.jpg", write, ".png") == spare / "a-2.png"
    with pytest.raises(OSError, match="No space left"):
        write_or_keep(tmp_path / "a.jpg", lambda file: write(tmp_path / "a.jpg"), ".png")
