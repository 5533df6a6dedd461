"""The tokenizer and the text encoder against the stock pipelines' own encode_prompt."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.models.bpe import train_tokenizer
from ldm.models.text import TextEncoder
from tests import tiny

LONG = "a red apple and a green apple and a zebra and a hot dog and a car"
PROMPTS = ["a red apple", "", LONG, "Grinning FACE!", "žluťoučký 苹果 🍎"]


# --- the tokenizer -----------------------------------------------------------------------------------------------


def test_tokenizer_comes_back_from_its_folder(tmp_path):
    ours = train_tokenizer(tiny.CAPTIONS, vocab_size=560, max_length=32)
    ours.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 32
    assert again.get_vocab() == ours.get_vocab()
    assert again(PROMPTS).input_ids == ours(PROMPTS).input_ids
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (len(ours) - 2, len(ours) - 1, len(ours) - 1)


@pytest.mark.parametrize("text", ["naïve café", "苹果与橙", "🍎🇨🇭👩‍🚀", "\x00\x7f\u200d", "Ω≈ç√∫", "don't we'll 42"])
def test_any_text_is_written_without_an_unknown(text):
    """The unknown token is the end token, and would cut the prompt for CLIP's pooling."""
    known = tiny.tokenizer()
    ids = known(text).input_ids
    assert known.eos_token_id not in ids[1:-1]
    assert known.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_tokenizer_depends_on_the_captions_not_on_their_order():
    first = train_tokenizer(tiny.CAPTIONS, vocab_size=600)
    assert train_tokenizer(tiny.CAPTIONS[::-1], vocab_size=600).get_vocab() == first.get_vocab()


def test_frequent_words_become_one_token():
    assert len(tiny.tokenizer()("a red apple").input_ids) == 5  # start, three words, end


@pytest.mark.parametrize("wrong", [{"vocab_size": 500}, {"max_length": 2}])
def test_tokenizer_refuses_sizes_that_cannot_work(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        train_tokenizer(tiny.CAPTIONS, **wrong)


# --- the encoder -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sd_equals_the_stock_pipeline():
    text = tiny.text("sd")
    stock = StableDiffusionPipeline(
        vae=None, text_encoder=text.model, tokenizer=text.tokenizer, unet=None, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # type: ignore[arg-type]  # fmt: skip
    tokens, null = stock.encode_prompt(PROMPTS, "cpu", 1, True)
    ours = text.encode(PROMPTS)
    assert ours.tokens.shape == (len(PROMPTS), tiny.LENGTH, tiny.WIDTH) == (len(PROMPTS), text.max_length, text.width)
    assert torch.equal(ours.tokens, tokens)
    assert torch.allclose(text.null().tokens, null[:1], atol=1e-6)  # a batch of one sums in another order
    assert ours.bias is None and ours.pooled is None and text.pooled_width is None


@torch.no_grad()
@pytest.mark.parametrize("joint_width", [tiny.WIDTH, tiny.WIDTH + 2, tiny.JOINT])
def test_sd3_equals_the_stock_pipeline(joint_width):
    """The folded zero token unfolds to stock's 256; the second CLIP adds two zeros (cut off where there is no room)."""
    from pipelines.stock import empty_encoders

    text = tiny.text("sd3", joint_width=joint_width)
    clip_2, tokenizer_3, t5 = empty_encoders(text)
    stock = StableDiffusion3Pipeline(
        transformer=None, scheduler=None, vae=None, text_encoder=text.model, tokenizer=text.tokenizer,
        text_encoder_2=clip_2, tokenizer_2=text.tokenizer, text_encoder_3=t5, tokenizer_3=tokenizer_3,
    )  # type: ignore[arg-type]  # fmt: skip
    tokens, _, pooled, _ = stock.encode_prompt(PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False)
    ours = text.encode(PROMPTS)
    assert ours.tokens.shape == (len(PROMPTS), tiny.LENGTH + 1, joint_width)
    assert torch.equal(ours.tokens[:, :-1], tokens[:, : tiny.LENGTH])
    assert tokens.shape[1] == tiny.LENGTH + 256
    assert torch.equal(tokens[:, tiny.LENGTH :], torch.zeros(len(PROMPTS), 256, joint_width))
    assert torch.equal(ours.tokens[:, -1], torch.zeros(len(PROMPTS), joint_width))
    assert ours.pooled is not None and torch.equal(ours.pooled, pooled)
    assert ours.pooled.shape[1] == text.pooled_width == tiny.POOLED + 2
    assert ours.bias is not None and ours.bias.shape == ours.tokens.shape[:2]
    assert torch.equal(ours.bias[:, :-1], torch.zeros(len(PROMPTS), tiny.LENGTH))
    assert ours.bias[0, -1].item() == pytest.approx(math.log(256), rel=1e-6)


def test_count_tokens_finds_the_prompts_that_are_cut():
    text = tiny.text("sd")
    counts = text.count_tokens(PROMPTS)
    assert counts[:2] == [5, 2]
    assert counts[2] > text.max_length
    assert torch.equal(text.tokenize([LONG]), text.tokenize([LONG + " and more"]))


def test_gradients_reach_the_embeddings():
    text = tiny.text("sd")
    text.encode(["a red apple"]).tokens.square().sum().backward()
    assert text.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_dtype_moves_with_the_module():
    cond = tiny.text("sd3").to(torch.bfloat16).encode(["a red apple"])
    assert {x.dtype for x in (cond.tokens, cond.bias, cond.pooled) if isinstance(x, Tensor)} == {torch.bfloat16}


# --- folders -----------------------------------------------------------------------------------------------------


def save_clip(folder):
    tiny.clip().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize(("family", "kind"), [("sd", CLIPTextModel), ("sd3", CLIPTextModelWithProjection)])
def test_opens_a_clip_folder_as_stock_does(tmp_path, family, kind):
    folder = save_clip(tmp_path)
    text = TextEncoder.from_pretrained(folder, family)
    stock, clip = kind.from_pretrained(folder), tiny.clip()
    for name, p in stock.named_parameters():
        assert torch.equal(p, text.model.get_parameter(name))
    ids = text.tokenize(["a red apple"])
    assert torch.allclose(text.model(ids).last_hidden_state, clip.text_model(ids).last_hidden_state, atol=1e-6)
    assert text.max_length == tiny.LENGTH and not text.training


@torch.no_grad()
def test_opens_separate_subfolders(tmp_path):
    text = tiny.text("sd3")
    text.model.save_pretrained(tmp_path / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = TextEncoder.from_pretrained(tmp_path, "sd3", tiny.JOINT).encode(PROMPTS)
    expected = text.encode(PROMPTS)
    assert torch.equal(again.tokens, expected.tokens)
    assert again.pooled is not None and torch.equal(again.pooled, expected.pooled)


def test_a_length_that_was_not_stored_is_the_models(tmp_path):
    folder = save_clip(tmp_path)
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    del stored["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(stored))
    assert TextEncoder.from_pretrained(folder).max_length == tiny.LENGTH


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(name, **values):
    def change(folder):
        stored = json.loads((folder / name).read_text())
        if "text_config" in stored:
            stored["text_config"] |= values
        (folder / name).write_text(json.dumps(stored | values))

    return change


def only_text_tower(folder):
    shutil.rmtree(folder)
    tiny.text("sd").model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "damage", "message"),
    [
        ("sd", shutil.rmtree, "no such folder"),
        ("sd", remove("tokenizer.json"), "no tokenizer here"),
        ("sd", remove("config.json"), r"config\.json: missing"),
        ("sd", remove("model.safetensors"), r"no safetensors file \(model\.safetensors"),
        ("sd", edit("config.json", model_type="t5"), "model_type is 't5'"),
        ("sd3", edit("config.json", eos_token_id=7), "eos_token_id is 7"),
        ("sd", edit("tokenizer_config.json", model_max_length=77), "model_max_length is 77"),
        ("sd3", only_text_tower, r"lacks 1 weights .* text_projection\.weight"),
        ("flux", lambda _: None, "'flux' is not one of sd, sdxl, sd3, pixart"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, family, damage, message):
    folder = save_clip(tmp_path / "clip")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_pretrained(folder, family)


def test_parts_that_do_not_fit_are_refused():
    text = tiny.text("sd3")
    with pytest.raises(ValueError, match="takes a CLIPTextModel, got CLIPTextModelWithProjection"):
        TextEncoder(text.tokenizer, text.model, "sd")
    with pytest.raises(ValueError, match="does not fit into joint_attention_dim 8"):
        TextEncoder(text.tokenizer, text.model, "sd3", 8)
    with pytest.raises(ValueError, match="must be equal"):
        TextEncoder(text.tokenizer, tiny.text("sd").model, "sd", tiny.WIDTH + 1)
    with pytest.raises(ValueError, match="the text model only"):
        TextEncoder(train_tokenizer([*tiny.CAPTIONS, *["purple snail"] * 3], 560, 12), text.model, "sd3")


@pytest.mark.parametrize(("prompts", "message"), [([], "one or more"), ("a", "a list"), (["a", None], "prompt 1")])
def test_what_is_not_a_list_of_texts_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        tiny.text("sd").encode(prompts)
