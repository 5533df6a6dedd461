"""The page about a data set tells what is there and what is not, whatever is wrong with it, and needs no server."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.datasets_made import encoded, flat, imagefolder, noise, parquet, tar
from training import cli_inspect
from training.config import load, parse
from training.data import DataError, open_rows
from training.fit import side_step
from training.inspect_page import inspect, summary, write_data_page
from training.schema import Data

VOID = {"meta", "img", "br"}


class _Reader(HTMLParser):
    """Text, headings and pictures; refuses tags that do not close."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.text, self.sources = "", []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs) -> None:
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def page_of(config, out: Path, **options) -> tuple[str, list]:
    file = write_data_page(config, out, **options)
    assert file == out and not list(out.parent.glob(f".{out.name}*"))
    read = _Reader(file.read_text())
    assert all(source.startswith("data:image/") for source in read.sources)  # nothing from elsewhere
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in read.sources]
    for picture in pictures:
        picture.load()
    return read.text, pictures


def mixed(root: Path) -> Path:
    root.mkdir()
    sizes = [(32, 32), (60, 30), (30, 48)]
    for i in range(30):
        (root / f"{i}.png").write_bytes(encoded(noise(i, *sizes[i % 3])))
        (root / f"{i}.txt").write_text(f"<i>number</i> {i}" if i else "word " * 80 + "tail")
    return root


def test_a_mixed_folder(tmp_path: Path):
    root = mixed(tmp_path / "a & b")
    (root / "3.png").write_bytes(b"junk")
    (root / "4.png").write_bytes((root / "5.png").read_bytes()[:700])
    (root / "6.txt").write_bytes(b"caf\xe9")
    (root / "7.txt").write_text(" ")
    (root / "copy.png").write_bytes((root / "9.png").read_bytes())
    (root / "copy.txt").write_text("a copy")
    before = {x.name: x.read_bytes() for x in root.iterdir()}
    data = Data(path=str(root), resolution=32, bucket_step=8)
    text, pictures = page_of(data, tmp_path / "pages" / "data.html")
    assert {x.name: x.read_bytes() for x in root.iterdir()} == before
    assert "4 of 31 rows, 12.9%: 4 of the 29 in split train; data.max_skipped is 1.0%, a run would be refused" in text
    assert re.search(r"Broken or missing pictures: 2\n.*3\.png: does not decode.*\n.*4\.png: does not decode", text)
    assert re.search(
        r"Captions: 2\n.*6\.png: its caption \(6\.txt\) is not UTF-8.*\n.*7\.png: its caption.*empty", text
    )
    assert "<i>number</i>" in text  # as text, not as markup
    for shape in ("32×32", "40×24", "24×40"):
        assert shape in text
    assert 3 <= len(pictures) <= 12
    assert "over 75 words" in text and re.search(r"(word ){75}\|\s+(word ){5}tail", text)
    assert "Pictures that are there more than once: 1; rows that are copies: 1." in text
    assert re.search(r"copy\.png \(\w+\): a copy", text) and "9.png (" in text


def test_examples_show_what_is_cut(tmp_path: Path):
    """A white picture of 64 × 16 in a square of 16: three quarters of the left one are dark, the right one is white."""
    root = imagefolder(tmp_path / "a", [Image.new("RGB", (64, 16), "white") for _ in range(5)])
    text, pictures = page_of(Data(path=str(root), resolution=16, buckets=False), tmp_path / "data.html")
    shown = np.asarray(pictures[0].convert("L")).astype(int)
    assert shown.shape == (160, 326) and "75.0% cut off" in text
    whole = shown[:40, :160]
    assert whole[:, :55].max() < 110 and whole[:, 105:].max() < 110 and whole[:, 65:95].min() > 240
    assert shown[:, 170:].min() > 240


def test_what_is_in_both_splits_is_told(tmp_path: Path):
    imagefolder(tmp_path / "train", [noise(i) for i in range(5)])
    imagefolder(tmp_path / "test", [noise(i) for i in range(3, 7)])
    text, _ = page_of(Data(path=str(tmp_path), resolution=16), tmp_path / "data.html")
    assert "In both splits: 2. What is held out there is trained on." in text
    (tmp_path / "b").mkdir()
    imagefolder(tmp_path / "b" / "train", [noise(i) for i in range(5)])
    imagefolder(tmp_path / "b" / "test", [noise(i) for i in range(5, 7)])
    text, _ = page_of(Data(path=str(tmp_path / "b"), resolution=16), tmp_path / "data.html")
    assert "No two pictures are the same file." in text and "No row." in text


@pytest.mark.parametrize("kind", ["column", "evil", "gone", "empty"])
def test_data_that_cannot_be_opened_is_told_of(tmp_path: Path, kind: str):
    link = tarfile.TarInfo("x.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar(tmp_path / "evil" / "a.tar", [(link, b"")])
    parquet(tmp_path / "column" / "a.parquet", {"image": [encoded(flat(1))] * 3, "caption": ["a"] * 3})
    (tmp_path / "empty").mkdir()
    told = {"column": "no column 'text'", "evil": "is a link", "gone": "no such folder", "empty": "is empty"}[kind]
    text, _ = page_of(Data(path=str(tmp_path / kind), resolution=16), tmp_path / "data.html")
    assert f"train: {tmp_path / kind}" in text and told in text


def test_two_hundred_broken_pictures(tmp_path: Path):
    """A clear answer within seconds, from the page and from a run."""
    root = tmp_path / "a"
    whole = encoded(noise(1, 300, 200), "JPEG")
    imagefolder(root, [whole[: 20 + i] if i % 2 else b"\0" * i for i in range(200)])
    data = Data(path=str(root), resolution=64)
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"(\d+) of \1 rows are of no use: .*\.png: .*nothing was deleted"):
        open_rows(data)
    text, pictures = page_of(data, tmp_path / "data.html")
    assert time.perf_counter() - start < 10
    assert "200 of 200 rows, 100.0%" in text and "a run would be refused" in text and not pictures
    assert len(list(root.glob("*.png"))) == 200


def test_a_stream_is_told_by_its_first_rows(tmp_path: Path):
    for name, count in (("train-0", 7), ("train-1", 5), ("test-0", 2)):
        columns = {"image": [encoded(noise(i)) for i in range(count)], "text": ["a"] * count}
        parquet(tmp_path / f"{name}.parquet", columns)
    text, pictures = page_of(Data(path=str(tmp_path), resolution=16, streaming=True), tmp_path / "data.html")
    assert "their first 2,000 rows were looked at" in text and pictures


def diffusion(data: dict, text: str) -> dict:
    return {
        "task": "diffusion", "output_dir": "out", "train": {"images": 9}, "data": data, "vae": {"pretrained": "v"},
        "text": {"pretrained": text}, "model": {"name": "unet"},
    }  # fmt: skip


def test_a_text_encoders_own_tokens_are_counted(tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # each letter a token
    folder = tmp_path / "clip"
    PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=14, unk_token="[UNK]").save_pretrained(folder)
    root = mixed(tmp_path / "a")
    (root / "1.txt").write_text("of letters too many")
    config = parse(diffusion({"path": str(root), "resolution": 32}, str(folder)), "here")
    text, _ = page_of(config, tmp_path / "data.html", step=8)
    assert "over 14 tokens" in text and re.search(r"of letters too \|\s+many", text) and "40×24" in text


def test_a_task_of_squares_has_no_buckets(tmp_path: Path):
    raw = {"task": "autoencoder", "output_dir": "out", "train": {"images": 9}}
    config = parse({**raw, "data": {"path": str(mixed(tmp_path / "a")), "resolution": 32, "bucket_step": 8}}, "here")
    text, _ = page_of(config, tmp_path / "data.html")
    assert "32×32: " in text and "40×" not in text


@pytest.mark.parametrize("place", ["beside", "named", "gone"])
def test_the_buckets_of_a_run_are_known_before_its_autoencoder_is_trained(tmp_path: Path, place: str):
    """The step is that of the autoencoder's config, or the summary and the page say that it is a guess."""
    root, home = mixed(tmp_path / "a"), tmp_path / "configs"
    home.mkdir()
    vae = {"task": "autoencoder", "output_dir": str(tmp_path / "vae"), "train": {"images": 9}, "data": {"path": "a"}}
    vae["model"] = {"block_out_channels": [8, 16]}  # 2 pixels to a latent
    unet = diffusion({"path": str(root), "resolution": 32}, "openai/clip")
    unet |= {"vae": {"pretrained": str(tmp_path / "vae")}, "model": {"name": "dit", "patch_size": 2}}
    (home / "other.yaml").write_text(json.dumps({**vae, "output_dir": "elsewhere", "model": {}}))
    (home / "u.yaml").write_text(json.dumps(unet))
    first = (home if place == "beside" else tmp_path) / "first.yaml"
    if place != "gone":
        first.write_text(json.dumps(vae))
    given = [str(home / "u.yaml"), *([str(first)] if place == "named" else [])]
    said = CliRunner().invoke(cli_inspect.app, ["data", *given, "-o", str(tmp_path / "d.html")])
    assert said.exit_code == 0, said
    text = _Reader((tmp_path / "d.html").read_text()).text
    if place == "gone":
        assert "are a guess" in text and "are a guess" in said.stdout and "1 bucket: 32×32" in said.stdout
        return
    config = load(home / "u.yaml")
    run = open_rows(config.data, step=side_step(config, [load(first)]))
    assert len(run.shapes) == 3
    assert all(f"{w}×{h} (" in said.stdout and f"{w}×{h}" in text for h, w in run.shapes)
    assert (str(first) in said.stdout.replace("\n", "")) is (place == "beside")


def test_a_summary(tmp_path: Path):
    root = mixed(tmp_path / "a")
    (root / "3.png").write_bytes(b"junk")
    (root / "5.txt").write_text("de=ein Haus\nen=a house")
    told = summary(inspect(Data(path=str(root), resolution=32, bucket_step=8, held_out=0.0)))
    assert told.startswith("train: 29 rows, 32×32 to 60×30 pixels\n")
    assert "test: the rows of train, as none is held out" in told
    assert "3 buckets: 40×24 (10), 32×32 (9), 24×40 (10)" in told
    assert "captions: 29, the longest of 81 words, 1 of more than 75" in told
    assert "captions: 1 of 29 captions has several lines, each in a language (de, en)" in told
    assert "left out: 1 row: " in told and "3.png: does not decode (not a picture in a known format)" in told
    told = summary(inspect(Data(path=str(tmp_path / "gone"))))
    assert told.startswith(f"train: {tmp_path / 'gone'}: no such folder")
