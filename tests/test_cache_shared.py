"""Several processes make one cache: each row once, the same bits as one process alone makes."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import socket
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from ldm.models.vae import VAE
from tests.stand_in import Bucketed, all_of, forked, made
from training import cache
from training.cache import Together, fill
from training.store import Store


class Alone(Together):
    """One of several processes, without the others."""

    def told(self, find: Any) -> Any:
        return find()


def test_every_process_takes_its_share(tmp_path: Path):
    keys = np.frombuffer(bytes(range(16 * 10)), "S16")
    group, taken = np.array([0, 1] * 5), []

    def encode(block: np.ndarray) -> dict[str, np.ndarray]:
        taken.append(block.tolist())
        return {"x": block.astype(np.float32)}

    for rank in range(3):
        store, waits = Store(tmp_path / f"{rank}"), []
        together = replace(Alone(rank, 3), wait=lambda waits=waits: waits.append(1))
        missing = fill(store, keys, encode, together, group=group, size=lambda g: 2 + g, what="rows")
        assert missing == 10 and len(waits) == 2  # all wait in each of the rounds, busy or not
    assert taken == [[0, 2], [1, 3, 5], [4, 6], [7, 9], [8]]


def shared_rows() -> Bucketed:
    rows = Bucketed(40)
    rows.texts[0] = ("a " * 40, *("b " * n for n in range(30, 40)))
    return rows


def digest(caches: cache.Caches) -> str:
    return hashlib.sha256(repr(all_of(caches, shared_rows(), 2)).encode()).hexdigest()


def one_of_two(root: Path, rank: int, port: int, pipe: Connection) -> None:
    """A process of a pair, as a launcher starts it."""
    spread = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {k: str(v) for k, v in spread.items()} | {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(True)
    asked, plain, said = [], VAE.encode, io.StringIO()

    def encode(self: VAE, x: Tensor) -> Any:
        asked.append(len(x))
        return plain(self, x)

    VAE.encode = encode
    logging.getLogger("training").addHandler(logging.StreamHandler(said))
    caches, counts = made(root, shared_rows(), flip=True, together=Together.of(Accelerator(cpu=True)))
    pipe.send((sum(asked), counts, digest(caches), said.getvalue()))


def test_two_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Real ones. Together they make each row once, and read the same bits as one alone makes."""
    monkeypatch.setattr(cache, "ROWS", 4)
    monkeypatch.setattr(cache, "BATCH", 3)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pair = [forked(partial(one_of_two, tmp_path / "two", rank, port)) for rank in range(2)]
    assert all(pipe.poll(120) for _, pipe in pair)
    (asked, counts, seen, said), (other_asked, other_counts, other_seen, other_said) = (p.recv() for _, p in pair)
    for child, _ in pair:
        child.join(60)
        assert child.exitcode == 0
    assert (counts, seen) == (other_counts, other_seen)
    assert counts["pictures_made"] == 80 == asked + other_asked and 36 <= asked <= 44
    assert "11 captions have more than 12 tokens" in said and other_said == ""
    alone, counts_alone = made(tmp_path / "one", shared_rows(), flip=True)
    assert digest(alone) == seen and counts == counts_alone
