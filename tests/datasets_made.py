"""Small data sets of real files for the tests of the data: pictures whose pixels tell their number."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def flat(number: int, width: int = 16, height: int = 16) -> Image.Image:
    """One colour: red and green spell the number."""
    return Image.new("RGB", (width, height), (number % 256, number // 256, 77))


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises a picture, and nothing after it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    body = struct.pack(">I", len(head)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    idat = b"IDAT" + zlib.compress(b"\0")
    return b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))


def imagefolder(root: Path, pictures: Sequence[Image.Image | bytes], captions: Sequence[object] | None = None) -> Path:
    """0.png, 1.png, … with a metadata.jsonl."""
    root.mkdir(parents=True)
    lines = []
    for i, picture in enumerate(pictures):
        (root / f"{i}.png").write_bytes(picture if isinstance(picture, bytes) else encoded(picture))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": captions[i] if captions else f"picture {i}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def parquet(file: Path, rows: dict, **options) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), file, **options)
    return file


def tar(file: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as out:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content) if info.isfile() else 0
            out.addfile(info, io.BytesIO(content))
    return file
