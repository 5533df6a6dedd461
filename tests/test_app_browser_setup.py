"""scripts/browser.py: what is done where there is no browser."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "browser.py"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch):
    """The script on a machine with ``there`` on its path, where apt-get installs ``brings``."""
    spec = importlib.util.spec_from_file_location("browser_setup", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.there, module.ran, module.brings, module.answers = set(), [], {"chromium", "chromedriver"}, []

    def run(command, **_):
        module.ran.append(" ".join(command))
        code = module.answers.pop(0) if module.answers else 0
        if "install" in command and code == 0:
            module.there |= module.brings
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(module.shutil, "which", lambda name: f"/bin/{name}" if name in module.there else None)
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    return module


@pytest.mark.parametrize("browser", ["chromium", "google-chrome"])
def test_a_browser_that_is_there_is_taken(setup, browser: str):
    setup.there = {browser, "chromedriver"}
    setup.main()
    assert setup.ran == []


def test_apt_installs_what_lacks(setup):
    setup.there = {"apt-get", "chromium"}
    setup.main()
    assert setup.ran == ["apt-get install --yes --no-install-recommends chromium chromium-driver"]


def test_old_lists_are_renewed_once(setup):
    setup.there, setup.answers = {"apt-get"}, [100, 0, 0]
    setup.main()
    assert setup.ran[1:2] == ["apt-get update"] and len(setup.ran) == 3


def test_what_cannot_be_installed_is_said(setup, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match="chromium and chromedriver not found, and apt-get is not here"):
        setup.main()
    setup.there, setup.answers = {"apt-get"}, [100, 0, 100]
    with pytest.raises(SystemExit, match="could not install"):
        setup.main()
    setup.there, setup.brings = {"apt-get"}, {"chromium"}
    with pytest.raises(SystemExit, match="but no chromedriver"):
        setup.main()
    monkeypatch.setattr(setup.os, "geteuid", lambda: 1000)
    setup.there, setup.answers = {"apt-get", "sudo"}, [1]
    with pytest.raises(SystemExit, match="may not be used without a password"):
        setup.main()
