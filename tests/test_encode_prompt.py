"""Every family's text encoders against the stock pipelines' own encode_prompt, with the same weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel

from ldm.cond import Cond
from ldm.models.text import TextEncoder
from pipelines.folder import load_parts, save_parts
from pipelines.stock import from_stock_pipeline
from tests import families
from tests.families import LENGTH, LONG, PIPELINES, POOLED, POOLED_2, PROMPTS, T5_WIDTH, WIDTH, WIDTH_2

NEGATIVE = ["green", "a dog", LONG, "Face", ""]


@pytest.fixture(scope="module")
def stocks() -> dict[str, Any]:
    return {name: make() for name, make in PIPELINES.items()}


def stock_conds(pipe: Any, prompts: list[str], negative: list[str] | None, **kw: Any) -> tuple[Cond, Cond]:
    """What the stock pipeline's networks are told: of the prompts, and of what is led away from."""
    name = type(pipe).__name__
    if name == "StableDiffusionPipeline":
        tokens, null = pipe.encode_prompt(prompts, "cpu", 1, True, negative_prompt=negative)
        return Cond(tokens), Cond(null)
    if name.startswith("PixArt"):
        negative = [""] * len(prompts) if negative is None else negative
        tokens, mask, null, null_mask = pipe.encode_prompt(prompts, negative_prompt=negative, **kw)
        return Cond(tokens, bias(mask)), Cond(null, bias(null_mask))
    texts = (prompts, None, None) if name == "StableDiffusion3Pipeline" else (prompts, None)
    tokens, null, pooled, null_pooled = pipe.encode_prompt(*texts, negative_prompt=negative, device="cpu", **kw)
    return Cond(tokens, pooled=pooled), Cond(null, pooled=null_pooled)


def bias(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask == 0, -math.inf)


def unfolded(cond: Cond, tokens: int = 256) -> Cond:
    """SD3 without T5: our one token of zeros as the many that stock has."""
    assert cond.bias is not None and cond.bias[:, -1].allclose(torch.tensor(math.log(tokens)))
    assert not cond.bias[:, :-1].any()
    return Cond(torch.cat([cond.tokens[:, :-1], cond.tokens[:, -1:].expand(-1, tokens, -1)], 1), pooled=cond.pooled)


def same(ours: Cond, stock: Cond) -> None:
    """Bit for bit: the same modules are called with the same batch."""
    for name in ("tokens", "bias", "pooled"):
        a, b = getattr(ours, name), getattr(stock, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.shape == b.shape and torch.equal(a, b)), name


@torch.no_grad()
@pytest.mark.parametrize("name", PIPELINES)
def test_equals_encode_prompt(stocks, name):
    """Prompts that are short, empty, of other scripts, too long for every encoder; negative ones given and left out."""
    pipe = stocks[name]
    text = from_stock_pipeline(pipe).text
    fold = unfolded if name == "sd3 without t5" else lambda cond: cond
    for negative in (None, NEGATIVE, [""] * len(PROMPTS)):
        expected, away = stock_conds(pipe, PROMPTS, negative)
        same(fold(text.encode(PROMPTS)), expected)
        if negative is not None:
            same(fold(text.encode(negative)), away)
            continue
        null = fold(text.null())
        assert len(null) == 1
        for key in ("tokens", "bias", "pooled"):
            a, b = getattr(null, key), getattr(away, key)
            assert a is b is None or torch.allclose(a.expand_as(b), b, atol=1e-6)  # a batch of one sums otherwise


@torch.no_grad()
def test_sizes(stocks):
    """Widths and lengths, which networks are built to fit."""
    shapes = {
        "sd": (LENGTH, WIDTH, None),
        "sdxl": (LENGTH, WIDTH + WIDTH_2, POOLED_2),
        "sdxl second alone": (LENGTH, WIDTH_2, POOLED_2),
        "sd3": (LENGTH + 256, T5_WIDTH, POOLED + POOLED_2),
        "sd3 without t5": (LENGTH + 1, T5_WIDTH, POOLED + POOLED_2),
        "pixart alpha": (120, T5_WIDTH, None),
        "pixart sigma": (300, T5_WIDTH, None),
    }
    for name, (length, width, pooled) in shapes.items():
        text = from_stock_pipeline(stocks[name]).text
        cond = text.encode(PROMPTS)
        assert cond.tokens.shape == (len(PROMPTS), length, width) and text.width == width
        assert (None if cond.pooled is None else cond.pooled.shape[1]) == pooled == text.pooled_width
        assert text.max_length == (length if name.startswith("pixart") else LENGTH)


@torch.no_grad()
def test_sdxl_leads_away_from_zeros_only_where_nothing_is_given(stocks):
    text = from_stock_pipeline(stocks["sdxl"]).text
    null, empty = text.null(), text.encode([""])
    assert not null.tokens.any() and null.pooled is not None and not null.pooled.any()
    assert empty.tokens.any() and empty.pooled is not None and empty.pooled.any()
    assert from_stock_pipeline(stocks["sdxl no zeros"]).text.null().tokens.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "sd3 without t5", "pixart alpha", "pixart sigma"])
def test_another_number_of_t5_tokens(stocks, name):
    pipe, text = stocks[name], from_stock_pipeline(stocks[name]).text
    expected, _ = stock_conds(pipe, PROMPTS, None, max_sequence_length=40)
    ours = text.encode(PROMPTS, max_sequence_length=40)
    same(unfolded(ours, 40) if name == "sd3 without t5" else ours, expected)


@torch.no_grad()
def test_each_encoder_may_read_a_text_of_its_own(stocks):
    other, third = PROMPTS[::-1], ["zebra"] * len(PROMPTS)
    pipe, text = stocks["sdxl"], from_stock_pipeline(stocks["sdxl"]).text
    tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, other, device="cpu")
    same(text.encode(PROMPTS, other), Cond(tokens, pooled=pooled))
    pipe, text = stocks["sd3"], from_stock_pipeline(stocks["sd3"]).text
    tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, other, third, device="cpu")
    same(text.encode(PROMPTS, other, third), Cond(tokens, pooled=pooled))
    with pytest.raises(ValueError, match="5, 1, 5 rows"):
        text.encode(PROMPTS, ["a"])


@torch.no_grad()
def test_masked_padding_says_nothing_and_unmasked_padding_does(stocks):
    """PixArt's masked tokens may be anything; SD3's T5 reads its padding, which is why its length matters."""
    text = from_stock_pipeline(stocks["pixart alpha"]).text
    short, long = (text.encode(["a red apple"], max_sequence_length=n) for n in (10, 120))
    assert short.bias is not None and long.bias is not None
    seen = int((short.bias == 0).sum())
    assert seen == 4 == int((long.bias == 0).sum())
    assert torch.allclose(short.tokens[:, :seen], long.tokens[:, :seen], atol=1e-5)
    text = from_stock_pipeline(stocks["sd3"]).text
    short, long = (text.encode(["a red apple"], max_sequence_length=n).tokens for n in (10, 120))
    assert not torch.allclose(short[:, LENGTH : LENGTH + 4], long[:, LENGTH : LENGTH + 4], atol=1e-2)


@torch.no_grad()
def test_a_clip_in_the_place_of_pixarts_t5(tmp_path):
    """As one trains it where no T5 can be had. Stock has to be told the length."""
    pipe = families.pixart(caption_channels=WIDTH)
    pipe.register_modules(text_encoder=families.clip(CLIPTextModel), tokenizer=families.clip_tokenizer())
    parts = from_stock_pipeline(pipe)
    for negative in (None, NEGATIVE):
        expected, away = stock_conds(pipe, PROMPTS, negative, max_sequence_length=LENGTH)
        same(parts.text.encode(PROMPTS), expected)
        same(parts.text.encode(negative or [""] * len(PROMPTS)), away)
    again = load_parts(save_parts(tmp_path / "pipeline", parts))
    same(again.text.encode(PROMPTS), parts.text.encode(PROMPTS))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdxl", "sdxl second alone", "sd3", "sd3 without t5", "pixart sigma"])
def test_opens_the_folders_of_a_stock_pipeline(stocks, name, tmp_path):
    pipe = stocks[name]
    parts = {key: part for key, part in pipe.components.items() if "text_encoder" in key or "tokenizer" in key}
    for key, part in parts.items():
        if part is not None:
            part.save_pretrained(tmp_path / key)
    expected = from_stock_pipeline(pipe).text
    settings = dict(joint_width=T5_WIDTH) if expected.family == "sd3" else {}
    text = TextEncoder.from_pretrained(tmp_path, expected.family, max_sequence_length=80, **settings)
    same(text.encode(PROMPTS), expected.encode(PROMPTS, max_sequence_length=80))
    if name == "sd3":
        without = TextEncoder.from_pretrained(tmp_path, "sd3", T5_WIDTH, t5=None)
        same(without.encode(PROMPTS), from_stock_pipeline(stocks["sd3 without t5"]).text.encode(PROMPTS))


@torch.no_grad()
def test_shards_and_variants(stocks, tmp_path):
    text = from_stock_pipeline(stocks["pixart alpha"]).text
    text.model.save_pretrained(tmp_path / "text_encoder", max_shard_size="8KB")
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert len(list(tmp_path.glob("text_encoder/model-0*.safetensors"))) > 2
    same(TextEncoder.from_pretrained(tmp_path, "pixart").encode(PROMPTS), text.encode(PROMPTS))
    for file in tmp_path.glob("text_encoder/model*"):
        file.unlink()
    families.t5().half().save_pretrained(tmp_path / "text_encoder", variant="fp16")
    with pytest.raises(ValueError, match="no weights without a variant; give variant='fp16'"):
        TextEncoder.from_pretrained(tmp_path, "pixart")
    again = TextEncoder.from_pretrained(tmp_path, "pixart", variant="fp16", dtype=torch.float32)
    assert again.dtype == torch.float32
    assert torch.allclose(again.encode(["zebra"]).tokens, text.encode(["zebra"]).tokens, atol=0.02)  # half's digits


def test_eight_bits_need_bitsandbytes(stocks, tmp_path, monkeypatch):
    text = from_stock_pipeline(stocks["pixart alpha"]).text
    text.model.save_pretrained(tmp_path / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr("ldm.models.text_files.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"load_in_8bit needs .*pip install 'bitsandbytes>="):
        TextEncoder.from_pretrained(tmp_path, "pixart", load_in_8bit=True)
    asked: dict[str, Any] = {}  # where it is there, transformers is asked for it, and for T5 alone
    monkeypatch.setattr("ldm.models.text_files.find_spec", lambda name: object())

    def opened(source, **kw):
        asked.update(kw)
        return text.model, {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(type(text.model), "from_pretrained", opened)
    TextEncoder.from_pretrained(tmp_path, "pixart", load_in_8bit=True)
    assert asked["quantization_config"].load_in_8bit


def test_encoders_that_do_not_fit_are_refused(stocks):
    towers = from_stock_pipeline(stocks["sd3"]).text.towers()
    clip, second, t5 = towers.values()
    plain = from_stock_pipeline(stocks["sd"]).text.towers()["text_encoder"]
    for make, message in (
        (lambda: TextEncoder(*clip, "sd3", 30, second=second), r"16 \+ 24 does not fit into joint_attention_dim 30"),
        (lambda: TextEncoder(*clip, "sd3", 50, second=second, t5=t5), "T5's width is 48, .* joint_attention_dim 50"),
        (lambda: TextEncoder(*plain, "sd", second=second), "takes a no text_encoder_2"),
        (lambda: TextEncoder(*plain, "sdxl"), "takes a CLIPTextModelWithProjection, got CLIPTextModel"),
        (lambda: TextEncoder(*clip, "sdxl", second=second), "takes a CLIPTextModel, got CLIPTextModelWithProjection"),
        (lambda: TextEncoder(*t5, "sd3"), "takes a CLIPTextModelWithProjection, got T5EncoderModel"),
        (
            lambda: TextEncoder.from_towers({"text_encoder_2": second}, "sd3"),
            "needs a text_encoder, got text_encoder_2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
