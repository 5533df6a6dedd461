"""New words of the text encoders: they alone train, they are read as stock reads them, and they go without a trace."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn

from ldm.models.new_tokens import GrownEmbedding, add_tokens, check_words, merged, place, remove_tokens, vectors_of
from ldm.models.text import TextEncoder
from ldm.models.text_files import spelled_out
from pipelines.folder import load_parts, save_parts
from pipelines.stock import from_stock_pipeline
from pipelines.text_to_image import TextToImagePipeline
from tests import families, tiny
from tests.families import quiet
from training.encoders import text_hash

FAMILIES = ["sd", "sdxl", "sd3", "pixart"]
TOY = ("<toy>", "apple", 3)
PROMPTS = ["<toy>", "a <toy> and a <toy>", "a red<toy>, zebra", "<toy>. (<toy>)!", "a red apple", ""]


def text_of(family: str) -> TextEncoder:
    """With weights of its own."""
    make: Any = families.pixart if family == "pixart" else families.PIPELINES[family]
    return from_stock_pipeline(make()).text


def tensors(text: TextEncoder, prompts: list[str]) -> list[Tensor]:
    cond = text.encode(prompts)
    return [x for x in (cond.tokens, cond.pooled, cond.bias) if x is not None]


def words_of(tokenizer: Any) -> str:
    """All that it knows; its last call's padding and truncation are no part of it."""
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**known, "padding": None, "truncation": None})


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_new_rows_alone_train_and_leave_no_trace(family):
    text = text_of(family).requires_grad_(False)
    before, known = tensors(text, ["a red apple", ""]), {k: v.clone() for k, v in text.state_dict().items()}
    tokenizers, hashed = {k: t for k, (t, _) in text.towers().items()}, text_hash(text)
    words = {k: words_of(t) for k, t in tokenizers.items()}

    new = add_tokens(text, [TOY, ("<other>", None, 1)])
    tables: list[Any] = [model.get_input_embeddings() for _, model in text.towers().values()]
    assert [p.shape for p in new] == [(4, table.weight.shape[1]) for table in tables]
    trains = [p for p in text.parameters() if p.requires_grad]
    assert {id(p) for p in trains} == {id(p) for p in new} and all(p.dtype == torch.float32 for p in new)
    assert text_hash(text) != hashed
    assert equal(tensors(text, ["a red apple", ""]), before)

    optimizer, start = torch.optim.AdamW(new, lr=0.1), vectors_of(text)
    sum(x[x.isfinite()].square().sum() for x in tensors(text, ["a <toy>"])).backward()
    assert all((p.grad[:3] != 0).any(dim=1).all() and (p.grad[3:] == 0).all() for p in new)
    optimizer.step()
    for tower, tokens in vectors_of(text).items():
        assert (tokens["<toy>"] != start[tower]["<toy>"]).all()
    now = text.state_dict()
    assert all(torch.equal(now[key], value) for key, value in known.items())

    remove_tokens(text)
    assert {k: t for k, (t, _) in text.towers().items()} == tokenizers
    assert {k: words_of(t) for k, t in tokenizers.items()} == words
    assert text_hash(text) == hashed and vectors_of(text) == {} and merged(text) is text
    assert equal(tensors(text, ["a red apple", ""]), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_starts_as_a_word_says_what_the_word_says(family):
    text = text_of(family)
    add_tokens(text, [("<toy>", "apple", 1), ("<two>", "face", 2)])
    ours = ["a red <toy>", "a <toy> and <two> and a <toy>"]
    words = ["a red apple", "a apple and face face and a apple"]
    # T5 marks where a word begins, which the piece after a new token loses in stock's tokenizer as well
    assert equal(tensors(text, ours)[:1], tensors(text, words)[:1]) or family in ("sd3", "pixart")
    for tokenizer, model in text.towers().values():
        table: Any = model.get_input_embeddings()
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(x) for x in ("<toy>", "<two>", "<two>_1")])
        old = torch.tensor([tokenizer(x, add_special_tokens=False).input_ids[0] for x in ("apple", "face", "face")])
        assert torch.equal(table(ids), table(old))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_table_of_all_rows_answers_the_same(family):
    text = text_of(family)
    add_tokens(text, [TOY])
    plain = merged(text)
    assert equal(tensors(plain, PROMPTS), tensors(text, PROMPTS))
    for (tokenizer, model), (_, live) in zip(plain.towers().values(), text.towers().values(), strict=True):
        table: Any = model.get_input_embeddings()
        assert type(table) is nn.Embedding and len(table.weight) == model.config.vocab_size == len(tokenizer)
        assert isinstance(live.get_input_embeddings(), GrownEmbedding)
    mine = {id(p) for p in text.parameters()}
    assert sum(id(p) not in mine for p in plain.parameters()) == len(text.towers())  # the tables


def test_spare_rows_of_a_table_are_taken_first():
    """T5's table is longer than its tokenizer; stock would cut the rest off."""
    text = text_of("pixart")
    model: Any = text.model
    model.resize_token_embeddings(len(text.tokenizer) + 5)
    add_tokens(text, [TOY])
    assert model.config.vocab_size == len(text.tokenizer) + 2 == len(merged(text).model.get_input_embeddings().weight)
    assert equal(tensors(merged(text), PROMPTS), tensors(text, PROMPTS))


def test_tokens_come_in_several_times():
    text = text_of("sdxl")
    add_tokens(text, [TOY])
    first = vectors_of(text)
    new = add_tokens(text, [("<other>", "apple", 2)])
    assert list(vectors_of(text)["text_encoder"]) == ["<toy>", "<other>"]
    assert all(torch.equal(vectors_of(text)[k]["<toy>"], first[k]["<toy>"]) for k in first)
    assert all(torch.equal(p[0], p[1]) for p in new) and len(new) == 2
    assert equal(tensors(merged(text), ["<other> <toy>"]), tensors(text, ["<other> <toy>"]))
    remove_tokens(text)
    assert vectors_of(text) == {}


def test_nothing_waits_for_a_device():
    """On the meta device whatever asks for a value raises."""
    table = GrownEmbedding(nn.Embedding(10, 4), tiny.tokenizer(), 8)
    table.new.append(nn.Parameter(torch.zeros(3, 4)))
    assert table.to("meta")(torch.zeros(2, 5, dtype=torch.long, device="meta")).shape == (2, 5, 4)


def test_a_random_start_is_of_the_tables_size_and_of_the_global_generator():
    drawn = []
    for _ in range(2):
        text = text_of("sd")
        torch.manual_seed(3)
        add_tokens(text, [("<toy>", None, 400)])
        drawn.append(vectors_of(text)["text_encoder"]["<toy>"])
    weight: Any = text.model.get_input_embeddings().weight
    assert torch.equal(*drawn)
    assert abs(drawn[0].std() / weight.std() - 1) < 0.05 and abs(drawn[0].mean() - weight.mean()) < 0.01


def test_half_precision_keeps_its_table_and_trains_in_float32():
    text = text_of("sd").to(torch.bfloat16)
    (new,) = add_tokens(text, [TOY])
    assert new.dtype == torch.float32 and text.dtype == torch.bfloat16
    assert text.encode(["a <toy>"]).tokens.dtype == torch.bfloat16


def test_prompts_are_spelled_out_as_by_stock():
    text = text_of("sd")
    add_tokens(text, [TOY, ("<one>", None, 1), ("sks", None, 2), ("sksy", None, 3)])
    stock: Any = object.__new__(StableDiffusionPipeline)
    tokenizer: Any = text.tokenizer
    prompts = [*PROMPTS, "a <one> <toy>", "<toy><toy>", "sks dog", "risks", "SKS <TOY>", "a <toy>_1", "a sks, <one>"]
    assert spelled_out(tokenizer, prompts) == stock.maybe_convert_prompt(prompts, tokenizer)
    assert spelled_out(tokenizer, ["a <toy>"]) == ["a <toy> <toy>_1 <toy>_2"]
    assert spelled_out(tokenizer, ["a <toy> <toy>_1 <toy>_2"]) == ["a <toy> <toy>_1 <toy>_2"]
    assert text.count_tokens(["a <toy>", "a <one>"]) == [6, 4]  # with start and end
    assert text.tokenize(["a <toy>"])[0, 2:5].tolist() == tokenizer.convert_tokens_to_ids(
        ["<toy>", "<toy>_1", "<toy>_2"]
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no new tokens"),
        ([("apple", None, 1)], "knows already"),
        ([("<toy>", None, 2), ("<toy>_1", None, 1)], "'<toy>_1' is in the vocabulary"),
        ([("<toy>", None, 1), ("<toy>", None, 2)], "given twice"),
        ([("<toy>_1", None, 1), ("<toy>", None, 1)], "'<toy>_1' is in the vocabulary"),
        ([("<toy>", None, 0)], "expected 1 or more"),
        ([("a toy", None, 1)], "without spaces"),
        ([("", None, 1)], "without spaces"),
        ([("<toy>", "red apple", 1)], r"splits it into 'red</w>', 'apple</w>'"),
        ([("<toy>", "  ", 1)], "splits it into nothing"),
        ([("<toy>", None, 1), ("<TOY>", None, 1)], "too like another"),
    ],
)
def test_tokens_that_cannot_be_are_refused_and_nothing_changes(tokens, message):
    text = text_of("sdxl")
    before = text_hash(text)
    with pytest.raises(ValueError, match=message):
        add_tokens(text, tokens)
    assert text_hash(text) == before and vectors_of(text) == {}


def test_vectors_that_do_not_fit_are_refused():
    text = text_of("sdxl")
    with pytest.raises(ValueError, match=r"vectors of \(1, 5\), but text_encoder takes \(n, 16\)"):
        place(text, {"text_encoder": {"<toy>": torch.zeros(1, 5)}})
    with pytest.raises(ValueError, match="the encoders are text_encoder, text_encoder_2"):
        place(text, {"text_encoder_3": {"<toy>": torch.zeros(1, 5)}})
    assert vectors_of(text) == {}


def test_pixart_reads_in_lower_case_and_says_what_stock_drops(caplog):
    text = text_of("pixart")
    with pytest.raises(ValueError, match="not in lower case"):
        add_tokens(text, [("<Toy>", None, 1)])
    add_tokens(text, [TOY])
    assert "clean_caption=False" in caplog.text
    assert text.count_tokens(["A <TOY>"]) == text.count_tokens(["a <toy> "]) == [5]


def test_triggers_that_say_nothing_are_refused():
    for family in FAMILIES:
        check_words(text_of(family), ["sks dog", "apple"])
        with pytest.raises(ValueError, match="'  ' says nothing to text_encoder"):
            check_words(text_of(family), ["apple", "  "])
    with pytest.raises(ValueError, match="'苹果' says nothing"):
        check_words(text_of("pixart"), ["苹果"])  # a T5 that knows none of it


# --- whole pipelines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "sdxl, end 2", "sd3"])
def test_a_saved_folder_opens_in_stock_with_the_tokens_inside(family, tmp_path):
    pipe = families.PIPELINES[family.split(",")[0]]()
    if family.endswith("2"):  # as the published SDXL has it: the end is the highest id of a prompt
        pipe.text_encoder_2.config.eos_token_id = pipe.text_encoder_2.text_model.eos_token_id = 2
        pipe.text_encoder_2.text_model.config.eos_token_id = 2
    parts = from_stock_pipeline(pipe)
    torch.manual_seed(0)
    add_tokens(parts.text, [("<toy>", None, 3)])
    save_parts(tmp_path / "pipeline", replace(parts, text=merged(parts.text)))
    assert isinstance(parts.text.model.get_input_embeddings(), GrownEmbedding)  # it trains on
    stock = quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipeline"))
    again = load_parts(tmp_path / "pipeline")
    prompts = ["a <toy> and a zebra", "<toy>"]
    assert equal(tensors(again.text, prompts), tensors(parts.text, prompts))
    drawn = []
    for one in (parts, again):
        ours = quiet(TextToImagePipeline.from_parts(one))
        drawn.append(ours("a <toy> and a zebra", num_inference_steps=3, output_type="latent", latents=noise()).images)
    asked = "a <toy> <toy>_1 <toy>_2 and a zebra" if family == "sd3" else "a <toy> and a zebra"  # SD3's cannot convert
    theirs = stock(asked, num_inference_steps=3, output_type="latent", latents=noise()).images
    for ours in drawn:  # float32 over three steps: 1e-6 of the largest
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    other = stock("a red apple", num_inference_steps=3, output_type="latent", latents=noise()).images
    assert (other - theirs).abs().max() > 1e-3 * theirs.abs().max()


def noise() -> Tensor:
    return families.waves(1, 4, 8, 8)


def test_other_users_of_a_tokenizer_see_nothing():
    text = text_of("sd")
    tokenizer: Any = text.tokenizer
    before = words_of(tokenizer)
    add_tokens(text, [TOY])
    assert text.tokenizer is not tokenizer and words_of(tokenizer) == before
    assert copy.deepcopy(text).encode(["a <toy>"]).tokens.equal(text.encode(["a <toy>"]).tokens)
