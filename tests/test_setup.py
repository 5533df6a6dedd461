"""The installation: scripts/setup.py, the lists of versions, and what a built wheel holds."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from training import config_files

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(x.split("==") for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#"))


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "scripts" / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout whose .venv holds a Python that does nothing but answer: version 3.11, torch 2.13.0+cpu."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("version = 3.11.7\n")
    program = tmp_path / ".venv" / "bin" / "python"
    program.write_text(
        '#!/bin/sh\necho "$*" >> "$(dirname "$0")/../log"\n'
        'case "$*" in *version_info*) echo 3 11;; *importlib.metadata*) echo 2.13.0+cpu;; esac\n'
    )
    program.chmod(0o755)
    return tmp_path


def log(tree: Path) -> str:
    file = tree / ".venv" / "log"
    return file.read_text() if file.exists() else ""


def test_a_second_run_does_nothing_and_a_change_is_seen(setup, tree: Path):
    setup.main(tree)
    assert f"-c {tree}/constraints.txt -e {tree}[app,demo,dev]" in log(tree)
    first = log(tree)
    start = time.perf_counter()
    setup.main(tree)
    assert log(tree) == first  # not one command was run
    assert time.perf_counter() - start < 1
    for name in ("pyproject.toml", "constraints.txt", ".venv/pyvenv.cfg"):
        before = log(tree)
        with (tree / name).open("a") as file:
            file.write("# changed\n")
        setup.main(tree)
        assert log(tree) != before, name


def test_a_failed_install_leaves_no_stamp(setup, tree: Path, monkeypatch):
    setup.main(tree)
    (tree / "constraints.txt").write_text("torch==2.13.0\n")
    monkeypatch.setattr(setup, "pip", lambda *_, **__: sys.exit("no network"))
    with pytest.raises(SystemExit, match="no network"):
        setup.main(tree)
    assert not (tree / ".venv" / "latent-t2i.stamp").exists()


def test_torch_that_fits_stays(setup, tree: Path, capsys):
    setup.install_torch(tree / ".venv", "2.13.0", card=False)
    assert "pip" not in log(tree)
    assert "stays\n" in capsys.readouterr().out
    setup.install_torch(tree / ".venv", "2.13.0", card=True)
    assert "pip" not in log(tree)
    assert "for the CUDA build remove" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("card", "found", "asked"),
    [
        (True, True, ["torch==9.9"]),
        (False, True, ["torch==9.9+cpu"]),
        (False, False, ["torch==9.9+cpu", "torch==9.9+cpu --index-url https://download.pytorch.org/whl/cpu"]),
    ],
)
def test_which_build_of_torch_is_asked_for(
    setup, tree: Path, monkeypatch, card: bool, found: bool, asked: list[str]
):  # fmt: skip
    """Without a card the suffix rules PyPI's CUDA build out, and torch's own index is asked only where it must be."""
    monkeypatch.setattr(setup.sys, "platform", "linux")
    if not found:
        program = tree / ".venv" / "bin" / "python"
        program.write_text(program.read_text() + 'case "$*" in *index-url*) ;; *-m\\ pip*) exit 1;; esac\n')
    setup.install_torch(tree / ".venv", "9.9", card)
    pips = [x.split("--no-deps ")[1] for x in log(tree).splitlines() if "-m pip" in x]
    assert [x.split(" --retries")[0] for x in pips] == asked


def test_a_missing_cpu_build_is_explained(setup, tree: Path, monkeypatch):
    monkeypatch.setattr(setup.sys, "platform", "linux")
    program = tree / ".venv" / "bin" / "python"
    program.write_text(program.read_text() + 'case "$*" in *-m\\ pip*) exit 1;; esac\n')
    with pytest.raises(SystemExit, match=r"by hand .* torch==9\.9"):
        setup.install_torch(tree / ".venv", "9.9", card=False)


def test_an_environment_is_made_once_and_mended(setup, tmp_path: Path, monkeypatch):
    """A new one, one whose Python is gone (after an upgrade of the system), and one without pip."""
    venv = tmp_path / ".venv"
    calls = []
    monkeypatch.setattr(setup, "run", lambda *command, **_: calls.append(command[1:]))
    setup.make_venv(venv)
    assert calls.pop(0) == ("-m", "venv", str(venv))
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(tmp_path / "gone")
    calls.clear()
    setup.make_venv(venv)
    assert calls.pop(0) == ("-m", "venv", "--clear", str(venv))
    calls.clear()
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").write_text('#!/bin/sh\n[ "$1" = -c ] && echo 3 11\n')
    (venv / "bin" / "python").chmod(0o755)
    setup.make_venv(venv)
    assert calls == [("-m", "ensurepip", "--upgrade")]
    (venv / "bin" / "python").write_text("#!/bin/sh\necho 3 9\n")
    with pytest.raises(SystemExit, match=r"of Python 3\.9, which is not supported"):
        setup.make_venv(venv)


def test_an_old_python_hears_which_ones_will_do(setup, monkeypatch):
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(setup.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match=r"Python 3\.9 .* is not supported: 3\.11, 3\.12, 3\.13 are"):
        setup.check_python()


def test_an_old_python_hands_over_to_a_newer_one(setup, monkeypatch):
    handed = []
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/x/{name}" if name == "python3.12" else None)

    def execv(path: str, args: list[str]) -> None:
        handed.append((path, args))
        raise InterruptedError  # the real one never returns

    monkeypatch.setattr(setup.os, "execv", execv)
    with pytest.raises(InterruptedError):
        setup.check_python()
    assert handed == [("/x/python3.12", ["/x/python3.12", *sys.argv])]


def test_missing_venv_names_the_package_to_install(setup, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else True)
    a, b = sys.version_info[:2]
    with pytest.raises(SystemExit, match=rf"lacks ensurepip.* apt install python{a}\.{b}-venv"):
        setup.check_python()


def test_a_card_is_found_by_its_driver(setup, tmp_path: Path, monkeypatch):
    cards, programs = tmp_path / "proc", tmp_path / "bin"
    cards.mkdir()
    programs.mkdir()
    monkeypatch.setattr(setup, "Path", lambda _: cards)  # stands for /proc/driver/nvidia/gpus
    monkeypatch.setenv("PATH", str(programs))
    assert not setup.nvidia_card()
    smi = programs / "nvidia-smi"
    for text, code, there in [
        ("GPU 0: NVIDIA H100 (UUID: x)", 0, True),
        ("No devices were found", 0, False),
        ("GPU access failed", 9, False),
    ]:
        smi.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        smi.chmod(0o755)
        assert setup.nvidia_card() is there, text
    (cards / "0000:01:00.0").mkdir()
    assert setup.nvidia_card()


def test_supported_pythons_are_named_alike(setup):
    least, past = map(int, re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"]))
    assert sorted(setup.SUPPORTED) == [(3, minor) for minor in range(least, past)]


def test_the_setup_script_parses_in_old_pythons():
    """The message about an old Python must reach an old Python."""
    ast.parse((ROOT / "scripts" / "setup.py").read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("extra", ["", *PROJECT["project"]["optional-dependencies"]])
def test_every_dependency_is_pinned_within_its_bounds(extra: str):
    project = PROJECT["project"]
    for text in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)]), text


def test_pins_are_plain_and_sorted():
    assert list(PINS) == sorted(PINS) == [canonicalize_name(x) for x in PINS]
    assert not any(Version(x).local for x in PINS.values())  # torch 2.13.0+cpu and +cu130 both are 2.13.0
    assert "torchvision" not in PINS  # does not import beside a CPU build of torch


def test_what_is_installed_needs_no_torchvision():
    wanting = {
        d.name
        for d in distributions()
        for text in d.requires or []
        if Requirement(text).name == "torchvision" and "extra" not in str(Requirement(text).marker)
    }
    assert not wanting


def test_every_package_is_listed():
    found = {".".join(x.parent.relative_to(ROOT).parts) for p in ("ldm", "pipelines", "training")
             for x in (ROOT / p).rglob("__init__.py")}  # fmt: skip
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"training.configs"}


def test_configs_are_found_by_name():
    files = config_files()
    assert {"openmoji/clip", "openmoji/vae", "openmoji/unet", "openmoji/mmdit", "openmoji/concepts.txt"} <= set(files)
    assert all(x.is_file() for x in files.values())
    assert {x for x in (ROOT / "configs").rglob("*") if x.is_file()} == set(files.values())
    assert isinstance(yaml.safe_load(files["openmoji/unet"].read_text()), dict)


def test_a_wheel_holds_the_code_and_the_configs(tmp_path: Path):
    """Built as pip builds it, and used with this checkout out of sight."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "ldm", "pipelines", "training", "configs"):
        (copy / name).symlink_to(ROOT / name)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("latent_t2i-*.whl"))) as wheel:
        tops = {x.split("/")[0] for x in wheel.namelist()}
        assert {x for x in tops if not x.endswith(".dist-info")} == {"ldm", "pipelines", "training"}
        wheel.extractall(site)
    code = "import training; print(training.__file__, *(f'{k}={v}' for k, v in training.config_files().items()))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    where, *found = done.stdout.split()
    assert Path(where) == site / "training" / "__init__.py", done.stderr
    assert dict(x.split("=") for x in found) == {
        name: str(site / "training" / "configs" / file.relative_to(ROOT / "configs"))
        for name, file in config_files().items()
    }
