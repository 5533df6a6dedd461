"""New tokens as files: what we write stock reads, what others write we read, and both draw the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.models.new_tokens import GrownEmbedding, add_tokens, vectors_of
from ldm.models.text import TextEncoder
from pipelines.core import Parts
from pipelines.folder import load_parts
from pipelines.stock import from_stock_pipeline
from pipelines.text_to_image import TextToImagePipeline
from pipelines.textual_inversion import load_embeddings, save_embeddings
from tests import families
from tests.families import quiet, waves

PROMPTS = [
    "a <toy>", "<toy> and a face", "<toy>, a red <toy>", "(<toy>)!", "red<toy>face", "a red apple", "<toy>",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name in ("sd", "sdxl"):
        made[name] = tmp_path_factory.mktemp(name) / "stock"
        families.PIPELINES[name]().save_pretrained(made[name])
    return made


def trained(text: TextEncoder, *tokens: tuple[str, int]) -> TextEncoder:
    """With vectors that are far from each other."""
    torch.manual_seed(1)
    for p in add_tokens(text, [(token, None, count) for token, count in tokens]):
        p.data.mul_(3)
    return text


def stock_with(folder: Path, file: Path, token: str) -> Any:
    stock = quiet(DiffusionPipeline.from_pretrained(folder))
    state = load_file(file)
    if "clip_g" not in state:
        stock.load_textual_inversion(str(file))
        return stock
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        own = dict(text_encoder=getattr(stock, f"text_encoder{end}"), tokenizer=getattr(stock, f"tokenizer{end}"))
        stock.load_textual_inversion(state[key], token=token, **own)
    return stock


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("count", [1, 3])
def test_stock_reads_the_file_and_draws_the_same(folders, name, count, tmp_path):
    trainer = load_parts(folders[name])
    trained(trainer.text, ("<toy>", count))
    (file,) = save_embeddings(tmp_path / "learned_embeds.safetensors", trainer.text)
    ours = load_parts(folders[name])
    assert load_embeddings(ours.text, file) == ["<toy>"]
    stock = stock_with(folders[name], file, "<toy>")
    for prompt in PROMPTS:
        given = stock.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        cond = ours.text.encode([prompt])
        assert (cond.tokens - given[0]).abs().max() < 1e-5  # of about 3: another kernel, the same sum
        if cond.pooled is not None:
            assert (cond.pooled - given[2]).abs().max() < 1e-5
        same = trainer.text.encode([prompt])
        assert torch.equal(cond.tokens, same.tokens)
    call: dict[str, Any] = dict(num_inference_steps=10, output_type="latent", latents=waves(1, 4, 8, 8))
    theirs = stock("a <toy> and a face", **call).images
    for parts in (ours, trainer):
        drawn = quiet(TextToImagePipeline.from_parts(parts))("a <toy> and a face", **call).images
        assert (drawn - theirs).abs().max() < 1e-4 * max(1, theirs.abs().max())
    assert (stock("a face", **call).images - theirs).abs().max() > 1e-2  # the token says something


def test_a_file_is_the_same_in_every_writing(tmp_path):
    """safetensors writes the entries of its metadata in the order of a hash that is drawn anew each time."""
    text = trained(text_of("sd"), ("<toy>", 2))
    assert len({save_embeddings(tmp_path / "a.safetensors", text)[0].read_bytes() for _ in range(12)}) == 1


def test_several_tokens_are_several_files_and_come_back(folders, tmp_path):
    parts = load_parts(folders["sd"])
    trained(parts.text, ("<toy>", 2), ("<<toy>>", 1), ("sks", 1), ("***", 1))
    run = tmp_path / "run"
    files = save_embeddings(run / "adapter" / "learned_embeds.safetensors", parts.text)
    assert [x.stem.removeprefix("learned_embeds_") for x in files] == ["toy", "toy-1", "sks", "token"]
    for source in (run, run / "adapter"):
        again = load_parts(folders["sd"]).text
        assert sorted(load_embeddings(again, source)) == sorted(["<toy>", "<<toy>>", "sks", "***"])
        assert same(vectors_of(again), vectors_of(parts.text))
        assert not any(p.requires_grad for p in table(again).new)
    with pytest.raises(ValueError, match="holds 4 files"):
        load_embeddings(again, run, token="<other>")


def table(text: TextEncoder) -> GrownEmbedding:
    found: Any = text.model.get_input_embeddings()
    return found


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    pairs = [(a[tower][token], b[tower][token]) for tower in a for token in a[tower]]
    return a.keys() == b.keys() and all(a[x].keys() == b[x].keys() for x in a) and all(torch.equal(*p) for p in pairs)


@pytest.mark.parametrize("name", ["sd3", "sd3 without t5", "pixart alpha", "sdxl second alone"])
def test_other_families_come_back(name, tmp_path):
    text = text_of(name)
    trained(text, ("<toy>", 2))
    (file,) = save_embeddings(tmp_path / "x.safetensors", text)
    keys = {"sd3": {"clip_l", "clip_g", "t5"}, "sd3 without t5": {"clip_l", "clip_g"}, "sdxl second alone": {"clip_g"}}
    assert set(load_file(file)) == keys.get(name, {"<toy>"})
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"token": "<toy>"}
    again = text_of(name)
    assert load_embeddings(again, file) == ["<toy>"] and same(vectors_of(again), vectors_of(text))


def text_of(name: str) -> TextEncoder:
    parts: Parts = from_stock_pipeline(families.PIPELINES[name]())
    return parts.text


def test_files_of_others(tmp_path):
    rows = torch.randn(2, families.WIDTH)
    save_file({"emb_params": rows}, tmp_path / "easy.safetensors")  # AUTOMATIC1111
    text = text_of("sd")
    assert load_embeddings(text, tmp_path / "easy.safetensors") == ["easy"]
    assert torch.equal(vectors_of(text)["text_encoder"]["easy"], rows)
    assert load_embeddings(text_of("sd"), str(tmp_path / "easy.safetensors"), token="<mine>") == ["<mine>"]
    assert load_embeddings(text, {"<single>": rows[0]}) == ["<single>"]  # of one vector, without its dimension
    assert load_embeddings(text, {"<single>": rows[0]}, token="<again>") == ["<again>"]
    assert load_embeddings(text, {"<s>": rows}, token=["<s0>", "<s1>"]) == ["<s0>", "<s1>"]
    assert torch.equal(vectors_of(text)["text_encoder"]["<s1>"], rows[1:])
    both = {"clip_l": rows, "clip_g": torch.randn(2, families.WIDTH_2)}
    assert load_embeddings(text_of("sdxl"), both, token=["<s0>", "<s1>"]) == ["<s0>", "<s1>"]
    save_file(both, tmp_path / "pair.safetensors")
    assert load_embeddings(text_of("sdxl"), tmp_path / "pair.safetensors") == ["pair"]


@pytest.mark.parametrize(
    ("family", "state", "token", "message"),
    [
        ("sd", {"clip_l": (1, 16), "clip_g": (1, 24)}, None, "it is for another model"),
        ("sdxl", {"clip_g": (1, 24)}, "<a>", "holds clip_g, but .* has text_encoder, text_encoder_2"),
        ("sdxl", {"<a>": (1, 16)}, None, "for a model of one text encoder"),
        ("sd", {"<a>": (1, 20)}, None, r"'<a>': vectors of \(1, 20\), but text_encoder takes \(n, 16\)"),
        ("sd", {"<a>": (1, 2, 16)}, None, r"expected vectors \(n, D\)"),
        ("sd", {"<a>": (1, 16), "<b>": (1, 16)}, "<c>", "holds 2 tokens"),
        ("sd", {"<a>": (2, 16)}, ["<a>", "<b>", "<c>"], "expected as many tokens"),
        ("sd", {"emb_params": (1, 16)}, None, "give token="),
        ("sd", {"apple</w>": (1, 16)}, None, "is in the vocabulary"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_changes(family, state, token, message):
    text = text_of(family)
    with pytest.raises(ValueError, match=message):
        load_embeddings(text, {key: torch.zeros(shape) for key, shape in state.items()}, token)
    assert vectors_of(text) == {}


def test_files_that_are_none_are_refused(tmp_path):
    text = text_of("sd")
    pickled, odd = tmp_path / "a.pt", tmp_path / "a.safetensors"
    torch.save({"string_to_param": {"*": torch.zeros(1, 16)}}, pickled)
    odd.write_bytes(pickled.read_bytes())
    (tmp_path / "empty").mkdir()
    for file, message in (
        (pickled, "a pickle may run code"),
        (odd, "is no safetensors file"),
        (tmp_path / "none.safetensors", "no such file"),
        (tmp_path / "empty", "no learned_embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            load_embeddings(text, file)
    with pytest.raises(ValueError, match="have no new tokens"):
        save_embeddings(odd, text)
    add_tokens(text, [("<toy>", None, 1)])
    with pytest.raises(ValueError, match=r"written as \.safetensors"):
        save_embeddings(tmp_path / "x.bin", text)
    save_embeddings(odd, text)
    with pytest.raises(ValueError, match="'<toy>' is in the vocabulary"):
        load_embeddings(text, odd)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.pt", "a.safetensors", "empty"]  # nothing lies about
