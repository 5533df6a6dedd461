"""Data on an S3 server that cuts connections and on a web server: the same rows as from a local folder."""

from __future__ import annotations

import errno
import functools
import http.server
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.datasets_made import encoded, imagefolder, noise, parquet, tar
from tests.object_store import CuttingProxy, file_system, s3_server, upload
from tests.stand_in import forked
from training import remote
from training.data import DataError, open_rows
from training.remote import RemoteError, ShardCache, expand_braces
from training.schema import Data
from training.streams import RowStream

SIZES = [(16, 16), (16, 16), (24, 16), (16, 24)]  # width, height
FILES, ROWS = 4, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in tars and in parquet files, and a folder of pictures."""
    root = tmp_path_factory.mktemp("remote")
    for k in range(FILES):
        rows = [(n, encoded(noise(n, *SIZES[n % 4]))) for n in range(ROWS * k, ROWS * (k + 1))]
        members = [(f"{n:04}.{e}", x) for n, p in rows for e, x in (("png", p), ("txt", f"number {n}".encode()))]
        tar(root / "tar" / f"train-{k}.tar", members)
        columns = {"image": [x for _, x in rows], "text": [f"number {n}" for n, _ in rows]}
        parquet(root / "parquet" / f"train-{k}.parquet", columns, row_group_size=4)
    tar(root / "tar" / "test-0.tar", members[:4])
    parquet(root / "parquet" / "test-0.parquet", {name: x[:2] for name, x in columns.items()})
    imagefolder(root / "pictures", [noise(n, 16, 16) for n in range(30)])
    return root


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[int]:
    with s3_server() as port:
        upload(place, port, "data")
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    """It cuts every fifth connection after 2 kB."""
    monkeypatch.setattr(remote, "RANGE", 3000)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    proxy = CuttingProxy(server, 2000)
    yield proxy
    proxy.close()


def data_at(path: str | Path, folder: Path, port: int = 0, **keys: Any) -> Data:
    options = {"storage_options": {"endpoint_url": f"http://127.0.0.1:{port}"}} if port else {}
    common = {"resolution": 16, "bucket_step": 4, "shard_cache": str(folder), **options, **keys}
    return Data(path=str(path), **common)


def same(one: list[dict], two: list[dict]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_rows_on_s3_are_those_of_the_local_folder(kind: str, place: Path, proxy: CuttingProxy, tmp_path: Path):
    """With cut connections, room for two files alone, and a stop in between."""
    local = RowStream(data_at(place / kind, tmp_path, streaming=True), seed=3, batch=4)
    whole = list(islice(local, 24))  # four epochs
    size = max(x.stat().st_size for x in (place / kind).iterdir())
    data = data_at(f"s3://data/{kind}", tmp_path / "cache", proxy.port, streaming=True, shard_cache_gb=2.5 * size / 1e9)
    first = RowStream(data, seed=3, batch=4)
    before = list(islice(first, 7))
    state = json.loads(json.dumps(first.state_dict()))
    rest = RowStream(data, seed=3, batch=4)
    rest.load_state_dict(state)
    assert same(before + list(islice(rest, 17)), whole)
    assert proxy.cuts > 0
    copies = [x for x in (tmp_path / "cache").glob("*/*") if x.is_file()]
    assert 0 < sum(x.stat().st_size for x in copies) <= 2.5 * size
    held = open_rows(data.model_copy(update={"shard_cache_gb": 1.0}), split="test")
    own = open_rows(data_at(place / kind, tmp_path, streaming=True), split="test")
    assert list(held.captions) == list(own.captions) and held.pictures([0]).equal(own.pictures([0]))
    assert held.name(0).startswith(f"s3://data/{kind}/test-0.")


def test_a_killed_process_leaves_nothing_behind(
    place: Path, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It dies as it downloads; the next one takes its room and its turn."""
    url, options = "s3://data/tar/train-0.tar", {"endpoint_url": f"http://127.0.0.1:{server}"}
    size = (place / "tar" / "train-0.tar").stat().st_size
    cache = ShardCache(tmp_path, int(1.5 * size))

    def work(pipe: Any) -> None:
        def stuck(*_: Any) -> None:
            pipe.send("here")
            time.sleep(60)

        remote.download = stuck
        cache.fetch(url, options)

    child, pipe = forked(work)
    assert pipe.poll(30) and pipe.recv() == "here"
    partial = next(tmp_path.glob("*/.partial-*"))
    assert partial.stat().st_size == size  # its room is taken while it is written
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    lease = cache.fetch(url, options)
    assert lease.path.read_bytes() == (place / "tar" / "train-0.tar").read_bytes() and not partial.exists()
    monkeypatch.setattr(remote, "ROOM_WAIT", 0.1)
    with pytest.raises(RemoteError, match=r"train-1\.tar: no room for its .* are in use; raise data\.shard_cache_gb"):
        cache.fetch("s3://data/tar/train-1.tar", options)
    assert lease.path.exists()
    lease.close()
    cache.fetch("s3://data/tar/train-1.tar", options)
    assert not lease.path.exists()


def test_a_full_disk_is_said_at_once(place: Path, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not after six attempts; nothing is left, and the next one finds room."""
    url, options = "s3://data/tar/train-0.tar", {"endpoint_url": f"http://127.0.0.1:{server}"}
    cache, attempts = ShardCache(tmp_path / "cache", 10**6), []

    def full(*_: Any, **__: Any) -> None:
        attempts.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(remote.filesystem(url, options)[0], "cat_ranges", full)
        with pytest.raises(RemoteError, match=r"train-0\.tar: cannot be copied to .*cache.* \(.*No space left"):
            cache.fetch(url, options)
    assert len(attempts) == 1 and not [x for x in (tmp_path / "cache").glob("*/*") if x.is_file()]
    assert cache.fetch(url, options).path.read_bytes() == (place / "tar" / "train-0.tar").read_bytes()
    (tmp_path / "file").touch()
    with pytest.raises(RemoteError, match=r"data\.shard_cache: .*file/x cannot be made \(.*Not a directory"):
        ShardCache(tmp_path / "file" / "x", 10**6).fetch(url, options)


def test_one_process_of_a_machine_downloads(server: int, tmp_path: Path):
    url, options = "s3://data/tar/train-0.tar", {"endpoint_url": f"http://127.0.0.1:{server}"}

    def work(pipe: Any) -> None:
        calls, own = [], remote.download
        remote.download = lambda *x: (calls.append(1), time.sleep(0.2), own(*x))
        ShardCache(tmp_path, 10**6).fetch(url, options)
        pipe.send(len(calls))

    children = [forked(work) for _ in range(3)]
    assert sum(pipe.recv() for _, pipe in children if pipe.poll(30)) == 1
    for child, _ in children:
        child.join()


def test_a_folder_of_pictures_is_copied_once(place: Path, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = data_at("s3://data/pictures", tmp_path, server)
    copied, own = [], remote.download
    monkeypatch.setattr(remote, "download", lambda url, *x: (copied.append(url), own(url, *x))[1])
    rows, local = open_rows(data), open_rows(data_at(place / "pictures", tmp_path))
    assert list(rows.captions) == list(local.captions) and rows.fingerprint == local.fingerprint
    assert len(copied) == 31
    fs = file_system(server)
    kept = fs.cat_file("data/pictures/3.png")
    try:
        fs.pipe_file("data/pictures/3.png", encoded(noise(99, 16, 16)))
        assert open_rows(data).fingerprint != local.fingerprint
        assert copied[31:] == ["s3://data/pictures/3.png"]
    finally:
        fs.pipe_file("data/pictures/3.png", kept)
    with pytest.raises(DataError, match=r"s3://data/pictures: 31 files .* data\.shard_cache_gb allows .*streaming"):
        open_rows(data.model_copy(update={"shard_cache_gb": 1e-6}))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Knows no ranges."""

    def log_message(self, *_: Any) -> None:
        pass


def test_tars_of_a_web_server(place: Path, tmp_path: Path):
    handler = functools.partial(Quiet, directory=str(place))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}/tar"
        for url in (root + "/train-{0..3}.tar", root):
            held = {"held_out": 0} if "{" in url else {}
            stream = RowStream(data_at(url, tmp_path / "cache", streaming=True, **held), seed=3, batch=4)
            local = RowStream(data_at(place / "tar", tmp_path, streaming=True), seed=3, batch=4)
            assert same(list(islice(stream, 8)), list(islice(local, 8)))
        with pytest.raises(DataError, match=rf"{root}/train-7\.tar: no such file"):
            next(
                iter(
                    RowStream(
                        data_at(root + "/train-{7..8}.tar", tmp_path, streaming=True, held_out=0), seed=3, batch=4
                    )
                )
            )
        server.shutdown()


def test_braces():
    assert expand_braces("a") == ["a"]
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]


def test_what_is_wrong_is_said_in_a_line(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)

    def fails(path: str, match: str, **keys: Any) -> None:
        with pytest.raises(DataError, match=match):
            next(iter(RowStream(data_at(path, tmp_path, server, streaming=True, **keys), seed=3, batch=2)))

    fails("s3://nowhere/tar", r"s3://nowhere/tar: no such file, folder or bucket \(.*bucket does not exist")
    fails("s3://data/nothing", r"s3://data/nothing: no such folder or bucket, or nothing in it")
    fails("s3://data/pictures", r"streaming reads parquet and tar files; none of its 31 files is one")
    fails("s3://data", r"s3://data: holds parquet files and tars")
    fails("nosuch://data", r"nosuch://data: cannot be opened|nosuch://data: needs")
    content = file_system(server).cat_file("data/tar/train-0.tar")
    for name in ("train-0.tar", "test-0.tar"):
        file_system(server).pipe_file(f"data/cut/{name}", content[:1900])
    try:
        fails("s3://data/cut", r"s3://data/cut/train-0\.tar: is no tar file that can be read|is damaged at byte")
    finally:
        file_system(server).rm("data/cut", recursive=True)

    class Denied(Exception):
        pass

    def answer(error: Exception) -> None:
        fs = file_system(server)
        monkeypatch.setattr(fs, "find", lambda *_, **__: (_ for _ in ()).throw(error))
        monkeypatch.setattr(remote, "filesystem", lambda url, options: (fs, "data/tar"))

    answer(PermissionError("Forbidden"))
    fails("s3://data/tar", r"s3://data/tar: access denied \(Forbidden\); credentials are read from the environment")
    answer(ConnectionResetError("by peer"))
    fails("s3://data/tar", r"s3://data/tar: failed 6 times, at last with: ConnectionResetError: by peer")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    import fsspec.core

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(RemoteError, match=r"s3://a/b: needs .*: pip install 's3fs>="):
        remote.filesystem("s3://a/b", {})


def test_credentials_are_refused_in_a_config():
    with pytest.raises(ValidationError, match="set them in the environment"):
        Data(path="s3://a/b", storage_options={"secret": "x"})
    assert Data(path="gs://a/b", storage_options={"token": "anon"}).storage_options == {"token": "anon"}
