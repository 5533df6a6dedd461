"""Checkpoints on an S3 server that cuts connections: a fresh machine goes on from them in the same bits."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.killed import configs
from tests.object_store import CuttingProxy, file_system, s3_server
from tests.toy import IMAGES, differing, go
from training import remote
from training.checkpoint import MANIFEST, Keep, listed
from training.config import dump, parse
from training.fit import ConfigError
from training.loop import Interrupted
from training.mirror import Mirror
from training.remote import RemoteError
from training.run import _restore

URL = "s3://bucket/runs/toy"
ALL = Keep(9)


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    """An empty bucket, behind a proxy that cuts every fifth connection after 2 kB."""
    fs = file_system(server)
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "RANGE", 4000)
    proxy = CuttingProxy(server, 2000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    type(fs).clear_instance_cache()
    yield proxy
    type(fs).clear_instance_cache()
    proxy.close()


def stop_at(images: int):
    return lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == images else None


def test_a_fresh_machine_goes_on_from_the_mirror(proxy: CuttingProxy, tmp_path: Path):
    """Stopped, its folder lost, gone on from the mirror: the weights of a run that was never stopped."""
    whole = go(tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(tmp_path / "run", config={"mirror": URL}, act=stop_at(40))
    last = listed(tmp_path / "run" / "checkpoints")[-1]
    hashes = (last / MANIFEST).read_bytes()
    shutil.rmtree(tmp_path / "run")
    run = tmp_path / "elsewhere" / "run"
    restored = Mirror(URL, run).restore("task: toy")
    assert restored is not None and restored == run / "checkpoints" / last.name
    assert (restored / MANIFEST).read_bytes() == hashes
    assert (run / "config.yaml").read_text() == "task: toy"
    assert [x.name for x in (run / "checkpoints").iterdir()] == [last.name]
    task = go(run, config={"mirror": URL})
    assert task.seen == list(range(48, IMAGES)) and differing(task.state(), whole.state()) == []
    assert Mirror(URL, run).names() == [x.name for x in listed(run / "checkpoints")]  # as keep_last says
    assert proxy.cuts > 0 and not (run / "checkpoints" / ".mirror").exists()
    assert Mirror(URL, run).restore("") is None  # nothing is newer there


def checkpoint(root: Path, images: int) -> Path:
    from training import checkpoint as module

    return module.save(root, images, {}, {"images": images}, Keep(9))


def pushed(mirror: Mirror, *images: int, keep: Keep = ALL) -> None:
    for n in images:
        mirror.push(checkpoint(mirror.root, n), keep)
        mirror.wait()


def test_half_a_checkpoint_and_a_damaged_one_are_not_chosen(
    proxy: CuttingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    mirror, fs = Mirror(URL, tmp_path / "a"), file_system(proxy.target)
    pushed(mirror, 8, 16)
    put = Mirror._put

    def broken(self: Mirror, content: bytes | Path, name: str) -> None:
        if name.endswith(MANIFEST):
            raise RemoteError(f"{name}: the connection is lost")
        put(self, content, name)

    with monkeypatch.context() as patched:
        patched.setattr(Mirror, "_put", broken)
        pushed(mirror, 24)
    assert "images_000000024 was not mirrored (" in caplog.text
    assert fs.exists("bucket/runs/toy/images_000000024/state.json")
    assert mirror.names() == ["images_000000008", "images_000000016"]
    fs.pipe_file("bucket/runs/toy/images_000000016/state.json", b'{"images": 17}')
    assert Mirror(URL, tmp_path / "b").restore("") == tmp_path / "b" / "checkpoints" / "images_000000008"
    assert "images_000000016: is not used, an older one is tried" in caplog.text
    pushed(mirror, 24)  # what failed is made good by the next
    assert mirror.names()[-1] == "images_000000024"
    fs.pipe_file(f"bucket/runs/toy/images_000000024/{MANIFEST}", b'{"../x": "0"}')
    with pytest.raises(RemoteError, match=r"names a file outside of it, '\.\./x'"):
        Mirror(URL, tmp_path / "c").restore("")


def test_the_mirror_holds_what_the_run_would(proxy: CuttingProxy, tmp_path: Path):
    mirror = Mirror(URL, tmp_path / "a")
    pushed(mirror, 8, 16, 24, 32, keep=Keep(2, every=16))
    assert mirror.names() == ["images_000000016", "images_000000024", "images_000000032"]
    pushed(mirror, 20)  # of a run that went back: what is newer is another future's
    assert mirror.names() == ["images_000000016", "images_000000020"]
    staged = checkpoint(tmp_path / "a" / "checkpoints", 40)
    mirror.push(staged, Keep(9))
    shutil.rmtree(staged)  # the run's own may go while it is uploaded
    mirror.close()
    assert mirror.names()[-1] == "images_000000040"


def test_a_mirror_is_of_one_run(proxy: CuttingProxy, tmp_path: Path):
    def config(out: Path, **train):
        return parse(configs(tmp_path, out, mirror=URL, **train)["clip"], "clip")

    first = config(tmp_path / "a")
    _restore(first, "auto")
    assert not (tmp_path / "a").exists()
    mirror = Mirror(URL, tmp_path / "a" / "clip")
    mirror.put_config(dump(first))
    pushed(mirror, 8)
    with pytest.raises(ConfigError, match=r"train\.mirror s3://.*another run \(train\.batch_size: 2 there, 4 here\)"):
        _restore(config(tmp_path / "b", batch_size=4), "auto")
    with pytest.raises(ConfigError, match=r"train\.mirror .*: holds images_000000008, and --resume never"):
        _restore(first, "never")
    _restore(config(tmp_path / "c"), "auto")
    assert [x.name for x in listed(tmp_path / "c" / "clip" / "checkpoints")] == ["images_000000008"]
    written = yaml.safe_load((tmp_path / "c" / "clip" / "config.yaml").read_text())
    assert written["output_dir"] == str(tmp_path / "c" / "clip")
    lost = parse(configs(tmp_path, tmp_path / "d", mirror="s3://nowhere/a")["clip"], "clip")
    with pytest.raises(RemoteError, match=r"s3://nowhere/a/\.probe: no such file, folder or bucket"):
        _restore(lost, "auto")
