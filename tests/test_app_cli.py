"""``ldm app``: where its password comes from, and what it refuses before a model is opened."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from pipelines.app import check_port, ready
from training import cli_app
from training.cli_app import PASSWORD, page


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    """gradio reads where to keep things from the environment; it is as it was after each test."""
    monkeypatch.delenv(PASSWORD, raising=False)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "x")


def test_where_the_password_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert cli_app._password(None, False, False) is None
    monkeypatch.setenv(PASSWORD, "from the environment")
    assert cli_app._password(None, False, False) == "from the environment"
    assert cli_app._password(None, False, True) is None  # said aloud
    (tmp_path / "word").write_text("from a file\n")
    assert cli_app._password(tmp_path / "word", False, False) == "from a file"
    monkeypatch.setattr(cli_app.typer, "prompt", lambda *_, **kw: "asked for" if kw["hide_input"] else "shown")
    assert cli_app._password(None, True, False) == "asked for"
    with pytest.raises(ValueError, match="one of them"):
        cli_app._password(tmp_path / "word", True, False)
    (tmp_path / "word").write_text(" \n")
    with pytest.raises(ValueError, match="empty"):
        cli_app._password(tmp_path / "word", False, False)


def test_no_option_takes_a_password_itself():
    """It would stand in the list of processes."""
    given = {name for name in page.__annotations__ if "password" in name}
    assert given == {"password_file", "ask_password", "no_password"}


def test_what_is_refused_before_a_model_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="needs a password: set LDM_APP_PASSWORD"):
        page(str(tmp_path / "none"), out=tmp_path / "out", host="0.0.0.0")
    with pytest.raises(ValueError, match=r"--loras .*: no such folder"):
        page(str(tmp_path / "none"), out=tmp_path / "out", loras=tmp_path / "loras")
    with pytest.raises(ValueError, match="dtype fp8: expected one of fp32, bf16, fp16"):
        page(str(tmp_path / "none"), out=tmp_path / "out", dtype="fp8")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"the page needs gradio .*: pip install 'gradio>=6.31,<7'$"):
        ready(tmp_path / "out")


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match=f"--port {other.getsockname()[1]}: taken"):
            check_port(other.getsockname()[1])
    check_port(0)


@pytest.mark.browser
def test_the_command_serves_a_folder_until_it_is_told_to_end(tmp_path: Path):
    from pipelines.text_to_image import TextToImagePipeline
    from tests import families

    TextToImagePipeline.from_diffusers(families.sd()).save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; sys.argv = ['ldm', *sys.argv[1:]]; from training.cli import main; main()"
    command = [sys.executable, "-c", code, "app", "model", "--port", f"{port}"]
    running = subprocess.Popen(
        command,
        env={**os.environ, PASSWORD: "correct horse", "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    try:
        said = []
        assert running.stdout is not None
        for line in running.stdout:
            said.append(line)
            if line.startswith("page"):
                break
        assert f"http://127.0.0.1:{port}/" in said[-1], said
        assert "correct horse" not in Path(f"/proc/{running.pid}/cmdline").read_text()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=20)
        assert (tmp_path / "outputs/app/pictures").is_dir()  # the default --out, from where it was started
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(timeout=30)
