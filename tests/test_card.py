"""The model card: the hub's own reader takes its front matter, and its code does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from pipelines.card_defaults import sampling_defaults
from tests.adapting import config, trained
from training.card import license_of, trigger_words, write_card
from training.config import load
from training.schema import DiffusionConfig

DREAM = {"lora": {"rank": 2}, "data": {"instance_prompt": "a sks box"}, "sample": {"prompts": ["a sks box"]}}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("card")


@pytest.fixture(scope="module")
def card(root: Path) -> Path:
    """Of a LoRA with an instance prompt."""
    run = trained("sd", root, "lora", **DREAM)
    sheet = root / "sheet.png"
    Image.new("RGB", (32, 32)).save(sheet)
    return write_card(run / "adapter", config("sd", root, "lora", **DREAM), data={"rows": 5}, samples=sheet)


def code_of(file: Path) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    return found


def test_the_hub_reads_it(card: Path) -> None:
    told = ModelCard.load(card)
    data = told.data.to_dict()
    assert data["library_name"] == "diffusers" and data["license"] == "other"
    assert {"text-to-image", "lora", "diffusers"} <= set(data["tags"])
    assert data["instance_prompt"] == "a sks box"
    assert data["widget"] == [{"text": "a sks box", "output": {"url": "samples.png"}}]
    assert "base_model" not in data  # a folder is none of the hub's
    assert "Unknown: the licence of the base" in told.text and "- pictures: 5" in told.text
    assert (card.parent / "samples.png").is_file()


def test_its_code_loads_the_lora(card: Path, monkeypatch) -> None:
    monkeypatch.chdir(card.parent)
    inside: dict = {}
    exec(code_of(card), inside)  # our own text
    assert "unet" in inside["pipe"].get_list_adapters()
    picture = Image.open(card.parent / "picture.png")
    assert picture.size == inside["image"].size == (16, 16)


def test_its_code_loads_a_new_word_and_a_whole_pipeline(root: Path, monkeypatch) -> None:
    how = {"train_denoiser": False, "new_tokens": [{"token": "<toy>"}], "data": {"instance_prompt": "a <toy>"}}
    run = trained("sd", root, "toy", **how)
    file = write_card(run / "adapter", config("sd", root, "toy", **how))
    monkeypatch.chdir(file.parent)
    inside: dict = {}
    exec(code_of(file), inside)
    assert inside["pipe"].tokenizer.convert_tokens_to_ids("<toy>") >= 0
    assert "textual_inversion" in ModelCard.load(file).data.tags
    assert trigger_words(config("sd", root, "toy", **how)) == ["a <toy>", "<toy>"]
    one = config("sd", root, "one", data={"caption_templates": ["sks dog, {}"]})
    assert trigger_words(one) == ["sks dog"]  # as `ldm adapt` writes it beside captions of one's own

    inside["pipe"].save_pretrained(root / "whole")
    whole = write_card(root / "whole", config("sd", root, "toy"))
    monkeypatch.chdir(whole.parent)
    exec(code_of(whole), inside := {})
    assert torch.is_tensor(next(inside["pipe"].unet.parameters()))
    assert "lora" not in ModelCard.load(whole).data.tags


@pytest.mark.parametrize("family", ["sdxl", "sd3", "pixart alpha"])
def test_its_code_loads_a_new_word_of_other_families(family: str, root: Path, monkeypatch) -> None:
    """SDXL's encoders one at a time; where stock has no loader, ours."""
    token = "toyz" if family == "pixart alpha" else "<toy>"
    how = {"train_denoiser": False, "new_tokens": [{"token": token}], "data": {"instance_prompt": f"a {token} box"}}
    run = trained(family, root, f"toy_{family[:4]}", **how)
    monkeypatch.chdir(run / "adapter")
    inside: dict = {}
    exec(code_of(run / "adapter" / "README.md"), inside)
    pipe = inside["pipe"]
    tokenizers = [pipe.tokenizer, pipe.tokenizer_2] if family == "sdxl" else [t for t, _ in pipe.text.towers().values()]
    assert all(token in tokenizer.get_vocab() for tokenizer in tokenizers)


def test_folders_of_the_machine_are_not_told(card: Path, root: Path) -> None:
    text = card.read_text(encoding="utf-8")
    shown = text.split("```yaml")[1]
    assert str(root) not in shown and "path: data" in shown


def test_the_licence_is_the_bases(tmp_path: Path) -> None:
    assert license_of(tmp_path) == (None, None)
    (tmp_path / "LICENSE").write_text("Apache License\n Version 2.0")
    assert license_of(tmp_path) == ("apache-2.0", "LICENSE")
    (tmp_path / "LICENSE").write_text("Mine alone")
    assert license_of(tmp_path) == ("other", "LICENSE")
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n# x")
    assert license_of(tmp_path) == ("openrail++", "README.md")
    (tmp_path / "README.md").write_text("---\n: {\n---\n")
    assert license_of(tmp_path) == ("other", "LICENSE")


def test_a_hub_name_is_the_base_model(tmp_path: Path, root: Path) -> None:
    made = config("sd", root, "hub").model_copy(update={"base": "stable-diffusion-v1-5/stable-diffusion-v1-5"})
    file = write_card(tmp_path, made)
    assert ModelCard.load(file).data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert "on its page on the hub" in file.read_text()


def test_a_model_from_scratch_says_how_it_is_drawn(tmp_path: Path) -> None:
    made = load("configs/openmoji/unet.yaml", ["sample.prompts=[a cat]", "sample.num_inference_steps=7"])
    assert isinstance(made, DiffusionConfig)
    card = ModelCard.load(write_card(tmp_path, made, data={"rows": 166}))
    said = card.data.to_dict()
    assert said["inference"] == {"parameters": {"num_inference_steps": 7, "guidance_scale": 3.0}}
    assert said["widget"] == [{"text": "a cat"}] and "base_model" not in said
    assert "pipe('a cat', num_inference_steps=7, guidance_scale=3.0)" in card.text and "- pictures: 166" in card.text
    assert sampling_defaults(tmp_path, (50, 7.5)) == (7, 3.0)


def test_an_adapter_says_how_it_is_drawn(card: Path) -> None:
    assert sampling_defaults("none", (50, 7.5), [card.parent]) == (4, 3.0)  # those of the run's samples
