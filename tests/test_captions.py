"""Captions: where they come from, which one an image shows, how long they are, and that none is held in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from ldm.models.long_text import chunks
from tests.datasets_made import encoded, flat, imagefolder, parquet
from training.captions import check_lengths, chosen, lengths, lines_advice, shuffled, variants
from training.data import DataError, open_rows
from training.schema import Data

PLAIN = Data(path="a")


def with_keys(**keys) -> Data:
    return PLAIN.model_copy(update=keys)


# ---- variants


@pytest.mark.parametrize(
    ("raw", "keys", "expected"),
    [
        (" a cat ", {}, ("a cat",)),
        (["a cat", " ", None, "a pet", "a cat"], {}, ("a cat", "a pet")),
        ("a cat\n\na pet\n", {}, ("a cat\n\na pet",)),
        ("a cat\n\na pet\n", {"split_captions_at": "\n"}, ("a cat", "a pet")),
        ("cat", {"caption_templates": ("a photo of {}", "{}!")}, ("a photo of cat", "cat!")),
        (["x", "y"], {"caption_templates": ("a {}", "{}")}, ("a x", "x", "a y", "y")),
        ("{} {0}", {"caption_templates": ("<{}>",)}, ("<{} {0}>",)),  # a caption is no format
    ],
)
def test_variants(raw, keys: dict, expected: tuple[str, ...]):
    assert variants(raw, with_keys(**keys)) == expected


@pytest.mark.parametrize(
    ("raw", "told"),
    [(None, "is empty"), ("", "is empty"), (["", None], "is empty"), (3, "is 3, not"), ([3], "is 3")],
)
def test_no_caption(raw, told: str):
    with pytest.raises(ValueError, match=told):
        variants(raw, PLAIN)


def test_each_variant_in_turn_by_the_image_index():
    texts = [("a", "b", "c")] * 3000
    index = torch.arange(3000)
    picked = chosen(texts, index, 5, PLAIN)
    assert all(abs(n - 1000) < 100 for n in Counter(picked).values()) and len(set(picked)) == 3
    assert chosen(texts[7:9], index[7:9], 5, PLAIN) == picked[7:9]  # of the index alone, not of the batch
    assert chosen(texts, index, 6, PLAIN) != picked


def test_tags_are_shuffled_and_the_first_kept():
    data = with_keys(shuffle_tags=True, keep_tags=2)
    texts = [("one, two,three , four,, five",)] * 400 + [("one, two",), ("one",)]
    picked = chosen(texts, torch.arange(402), 1, data)
    assert all(x.split(", ")[:2] == ["one", "two"] for x in picked[:400])
    orders = Counter(tuple(x.split(", ")[2:]) for x in picked[:400])
    assert len(orders) == 6 and min(orders.values()) > 40  # all of 3!, about as often
    assert picked[400:] == ["one, two", "one"]
    assert chosen(texts[3:5], torch.arange(3, 5), 1, data) == picked[3:5]
    assert chosen(texts, torch.arange(402), 1, PLAIN)[0] == "one, two,three , four,, five"  # as it was written


def test_other_separators():
    keys = torch.tensor([0.3, 0.1, 0.2])
    assert shuffled("a; b; c", ";", 0, keys) == "b; c; a"
    assert shuffled("a b c", " ", 1, keys) == "a c b"
    assert shuffled("a | b", "|", 5, keys) == "a| b"


# ---- lengths


def words(texts: list[str]) -> list[int]:
    return [len(x.split()) + 2 for x in texts]  # two for the ends


def test_lengths():
    found = lengths((f"{'w ' * n}" for n in range(10_000) if n < 90), words, 77)
    assert (found.texts, found.long, found.longest, found.limit) == (90, 14, 91, 77)  # 76 to 89 words
    assert len(found.examples) == 5 and "14 of 90 captions have more than 77 tokens" in str(found)
    assert check_lengths(["a"], words, 3, "refuse").long == 0
    assert check_lengths(["a b"], words, 3, "cut").long == 1
    with pytest.raises(DataError, match=r"1 of 2 captions .*'a b'.*long_captions"):
        check_lengths(["a", "a b"], words, 3, "refuse")


@pytest.mark.parametrize("limit", [3, 5, 12, 100])
def test_chunks_hold_all_words_and_fit(limit: int):
    text = " ".join(f"w{i}" for i in range(50))
    parts = chunks(text, words, limit)
    assert " ".join(parts) == text
    assert all(n <= limit for n in words(parts)) and len(parts) == -(-50 // (limit - 2))
    assert chunks("", words, limit) == [""]


def test_a_word_that_is_too_long_stays_whole():
    assert chunks("aa b", lambda texts: [len(x) for x in texts], 1) == ["aa", "b"]


# ---- where they come from


def folder_with_texts(root: Path, count: int = 9, ending: str = ".txt") -> Path:
    root.mkdir()
    for i in range(count):
        (root / f"{i}.png").write_bytes(encoded(flat(i)))
        (root / f"{i}{ending}").write_text(f"number {i}\nthe {i}th\n")
    return root


@pytest.mark.parametrize("ending", [".txt", ".caption"])
def test_a_text_beside_each_picture(tmp_path: Path, ending: str):
    root = folder_with_texts(tmp_path / "a", ending=ending)
    data = Data(path=str(root), resolution=8, caption_extension=ending, split_captions_at="\n")
    rows = open_rows(data)
    for i in range(len(rows)):
        n = int(rows.pictures([i])[0, 0, 4, 4])
        assert rows.texts[i] == (f"number {n}", f"the {n}th") and rows.captions[i] == f"number {n}"
    (root / Path(rows.name(2)).with_suffix(ending).name).write_text("another")
    assert rows.captions[2] == "another"  # read when it is asked for
    assert open_rows(data).fingerprint != open_rows(data.model_copy(update={"split_captions_at": None})).fingerprint


def test_texts_in_folders_of_splits(tmp_path: Path):
    folder_with_texts(tmp_path / "train", 5)
    folder_with_texts(tmp_path / "test", 3)
    data = Data(path=str(tmp_path), resolution=8)
    assert len(open_rows(data)) == 5 and len(open_rows(data, split="test")) == 3


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "is missing"), (b" \n", "is empty"), ("é".encode("latin-1"), "not UTF-8"), (b"\xff\xfea\0", "not UTF-8")],
)
def test_a_text_that_says_nothing_is_counted(tmp_path: Path, content: bytes | None, told: str):
    root = folder_with_texts(tmp_path / "a")
    victim = Path(open_rows(Data(path=str(root), resolution=8)).name(3)).with_suffix(".txt")
    victim.unlink() if content is None else victim.write_bytes(content)
    with pytest.raises(DataError, match=rf"1 of \d rows are of no use: .*{victim.stem}\.png: its caption.*{told}"):
        open_rows(Data(path=str(root), resolution=8))
    rows = open_rows(Data(path=str(root), resolution=8, max_skipped=0.5))
    assert [Path(x.name).stem for x in rows.skipped] == [victim.stem]


def test_a_byte_order_mark_is_no_letter(tmp_path: Path):
    root = folder_with_texts(tmp_path / "a")
    for file in root.glob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbfa cat")
    assert set(open_rows(Data(path=str(root), resolution=8)).captions) == {"a cat"}


def test_no_text_at_all_names_both_ways(tmp_path: Path):
    root = folder_with_texts(tmp_path / "a")
    for file in root.glob("*.txt"):
        file.unlink()
    with pytest.raises(
        DataError, match=r"expected 0\.txt beside 0\.png, or metadata\.jsonl; or .* data\.instance_prompt"
    ):
        open_rows(Data(path=str(root), resolution=8))
    assert open_rows(Data(path=str(root), resolution=8, caption_column=None)).texts[0] == ("",)


def test_a_column_of_lists(tmp_path: Path):
    lists = [[f"number {i}", f"the {i}th"] for i in range(9)]
    file = parquet(tmp_path / "a.parquet", {"image": [encoded(flat(i)) for i in range(9)], "text": lists})
    rows = open_rows(file, resolution=8)
    for i in range(len(rows)):
        assert list(rows.texts[i]) == lists[int(rows.pictures([i])[0, 0, 4, 4])]
    folder = imagefolder(tmp_path / "b", [flat(i) for i in range(9)], lists)
    both = [text for split in ("train", "test") for text in open_rows(folder, split=split, resolution=8).texts]
    assert sorted(both) == sorted(map(tuple, lists))


def test_text_that_is_not_utf8_in_parquet(tmp_path: Path):
    import pyarrow as pa

    raw = pa.array([*(f"number {i}".encode() for i in range(29)), b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 30, raw.buffers())
    columns = {"image": [encoded(flat(i)) for i in range(30)], "text": text}
    file = parquet(tmp_path / "train.parquet", columns)
    parquet(tmp_path / "test.parquet", {"image": columns["image"][:2], "text": ["a", "b"]})
    rows = open_rows(file.parent, resolution=8, max_skipped=0.1)
    assert len(rows) == 29 and "not UTF-8" in rows.skipped[0].reason and "row 29" in rows.skipped[0].name


def test_captions_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sequence like a list, of which a part that is asked for is read and no more."""
    import training.tables

    captions = [f"number {i}" for i in range(40)]
    file = parquet(tmp_path / "train.parquet", {"image": [encoded(flat(i)) for i in range(40)], "text": captions})
    parquet(tmp_path / "test.parquet", {"image": [encoded(flat(1))], "text": ["a"]})
    rows = open_rows(file.parent, resolution=8)
    read = []
    real = training.tables.Column.__getitem__
    monkeypatch.setattr(training.tables.Column, "__getitem__", lambda self, i: (read.append(i), real(self, i))[1])
    assert rows.captions[7] == "number 7" and rows.captions[-1] == "number 39" and len(read) == 2
    assert rows.captions[3:5] == captions[3:5] and len(read) == 4
    assert rows.captions == captions and list(rows.captions) == captions and rows.captions != captions[1:]
    assert rows.texts == [(x,) for x in captions]
    with pytest.raises(IndexError):
        rows.captions[40]


# ---- several lines

LANGUAGES = "de.utf8=ein Haus\nen.utf8=a house\npt_BR.utf8=uma casa\n"


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        ("one\ntwo\n", "all", "one\ntwo"),
        ("\n one \r\ntwo\n", "first", "one"),
        (LANGUAGES, "en", "a house"),
        (LANGUAGES, "pt", "uma casa"),
        (LANGUAGES, "PT-br", "uma casa"),
        ("[de] ein Haus\n[en] a house: red", "en", "a house: red"),
        ("de: ein Haus\nen = a house", "de", "ein Haus"),
    ],
)
def test_a_line_of_a_caption(tmp_path: Path, text: str, lines: str, expected: str):
    root = folder_with_texts(tmp_path / "a", 3)
    for file in root.glob("*.txt"):
        file.write_text(text)
    rows = open_rows(Data(path=str(root), resolution=8, held_out=0.0, caption_lines=lines))
    assert list(rows.captions) == [expected] * 3
    table = parquet(tmp_path / "a.parquet", {"image": [encoded(flat(n)) for n in range(2)], "text": [text] * 2})
    assert set(open_rows(Data(path=str(table), resolution=8, held_out=0.0, caption_lines=lines)).captions) == {expected}


def test_a_language_that_is_not_there_is_named(tmp_path: Path):
    root = folder_with_texts(tmp_path / "a", 3)
    (root / "1.txt").write_text(LANGUAGES)
    with pytest.raises(DataError, match=r"3 of 3 .*1\.png: its caption.* no line of language 'fr'.*are: de, en, pt-br"):
        open_rows(Data(path=str(root), resolution=8, held_out=0.0, caption_lines="fr"))
    for wrong in ("second", "", "1"):
        with pytest.raises(ValueError, match="expected all, first, or a language"):
            Data(path="a", caption_lines=wrong)


def test_lines_are_advised_of():
    assert lines_advice(["a", "b\n"]) == ""
    assert lines_advice(["a", "b\nc: d"]).startswith("1 of 2 captions has several lines, which are read as one")
    told = lines_advice([LANGUAGES, LANGUAGES])
    assert told.startswith("2 of 2 captions have several lines, each in a language (de, en, pt_BR); ")
    assert told.endswith("data.caption_lines: de takes one")
