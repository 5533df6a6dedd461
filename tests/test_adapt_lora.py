"""LoRA and new tokens trained by a config: the trainer's own picture is drawn by our pipeline and by stock's with the
files that the run wrote."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from pipelines.lora.read import read_lora
from pipelines.text_to_image import TextToImagePipeline
from tests import adapting
from tests.adapting import base, config, drawn, stock, trained
from training.fit import ConfigError
from training.run import train_all

TOY = {"token": "<toy>", "initializer_token": "apple", "num_vectors": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lora")


spied = pytest.fixture(adapting.spied)


def _same(pipe: Any, kept: dict, **call: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(pipe, kept["prompts"], **call), kept["pictures"], atol=1e-4, rtol=0)


CASES = {
    "sd": {"lora": {"rank": 2, "lora_alpha": 5}},
    "sd everywhere": {
        "lora": {"rank": 3, "use_dora": True, "use_rslora": True, "target_modules": "conv", "text_encoder_rank": 2},
        "train_text_encoder": True, "ema_decay": 0.5,
    },
    "sd pissa": {"lora": {"rank": 2, "init_lora_weights": "pissa", "target_modules": ["to_q$", "attn2.to_v"]}},
    "sdxl": {
        "lora": {"rank": 2, "target_modules": "attention+ff", "rank_pattern": {"to_q$": 3}}, "train_text_encoder": True,
    },
    "sd3": {"lora": {"rank": 2, "lora_alpha": 4, "target_modules": "all-linear"}, "train_text_encoder": True},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_lora_is_the_users_picture(case: str, root: Path, spied: dict) -> None:
    family, out = case.split()[0], "run_" + case.replace(" ", "_")
    run = trained(family, root, out, train={"sample_every": 6}, **CASES[case])
    assert not (run / "pipeline").exists()
    ours = TextToImagePipeline.from_pretrained(base(family, root))
    ours.load_lora_weights(run)
    _same(ours, spied)
    theirs = DiffusionPipeline.from_pretrained(base(family, root))
    untouched = drawn(theirs, spied["prompts"])
    assert (untouched - spied["pictures"]).abs().max() > 1e-3  # it has learnt something that shows
    with safe_open(run / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == out
    theirs.load_lora_weights(run / "adapter")
    _same(theirs, spied)
    theirs.unload_lora_weights()
    torch.testing.assert_close(drawn(theirs, spied["prompts"]), untouched)


def test_pixart_by_peft(root: Path, spied: dict) -> None:
    """Its stock pipelines have no loader of LoRAs."""
    run = trained("pixart alpha", root, "pixart", train={"sample_every": 6}, lora={"rank": 2, "lora_alpha": 3})
    theirs = copy.deepcopy(stock("pixart alpha"))
    theirs.transformer = PeftModel.from_pretrained(theirs.transformer, run / "adapter").merge_and_unload()
    _same(theirs, spied, use_resolution_binning=False)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_pivotal_tuning_and_textual_inversion(family: str, root: Path, spied: dict) -> None:
    """New tokens in the caption of every picture, with a LoRA and alone; the old words stay as they are."""
    prompts = {"prompts": ["a red <toy>", "<toy>"], "num_inference_steps": 4, "guidance_scale": 3.0}
    how = {"new_tokens": [TOY], "data": {"instance_prompt": "a <toy>"}, "sample": prompts, "train": {"sample_every": 6}}
    for name, more in {"pivotal": {"lora": {"rank": 2}}, "words": {"train_denoiser": False}}.items():
        run = trained(family, root, f"{family}_{name}", **how, **more)
        assert (run / "adapter" / "pytorch_lora_weights.safetensors").exists() == (name == "pivotal")
        theirs = DiffusionPipeline.from_pretrained(base(family, root))
        ours = TextToImagePipeline.from_pretrained(base(family, root))
        if name == "pivotal":
            theirs.load_lora_weights(run / "adapter")
            ours.load_lora_weights(run)
        file = run / "adapter" / "learned_embeds.safetensors"
        ours.load_textual_inversion(file)
        if family == "sd":
            theirs.load_textual_inversion(file)
        else:
            state = load_file(file)
            for key, tower, words in (
                ("clip_l", "text_encoder", "tokenizer"),
                ("clip_g", "text_encoder_2", "tokenizer_2"),
            ):
                parts = {"text_encoder": getattr(theirs, tower), "tokenizer": getattr(theirs, words)}
                theirs.load_textual_inversion(state[key], token="<toy>", **parts)
        _same(ours, spied)
        _same(theirs, spied)
        held = load_file(run / "checkpoints/images_000000006/net.safetensors")
        assert not any("token_embedding.weight" in key or "shared.weight" in key for key in held)


def test_training_goes_on_from_a_lora(root: Path, tmp_path: Path) -> None:
    """``start`` takes over ranks, alphas and layers; at a learning rate of nothing the same comes out."""
    first = trained("sd", root, "first", lora={"rank": 2, "lora_alpha": 5}, train_text_encoder=True)
    again = trained(
        "sd", root, "second", lora={"rank": 7, "start": str(first)}, train_text_encoder=True,
        optimizer={"learning_rate": 1e-30, "adam_weight_decay": 0},
    )  # fmt: skip
    one, two = read_lora(first), read_lora(again)
    assert one.components.keys() == two.components.keys() == {"unet", "text_encoder"}
    for part, layers in one.components.items():
        for name, layer in layers.items():
            other = two.components[part][name]
            assert (layer.rank, layer.alpha) == (other.rank, other.alpha) == (2, 5.0)
            assert layer.down.equal(other.down) and layer.up.equal(other.up)
    assert json.loads((again / "done.json").read_text())["inputs"].keys() == {"base", "data", "lora.start"}


def test_another_lora_may_act_meanwhile(root: Path, spied: dict) -> None:
    first = trained("sd", root, "first_of_two", lora={"rank": 2})
    how = {"rank": 2, "adapters": [{"path": str(first), "weight": 0.5}]}
    run = trained("sd", root, "second_of_two", lora=how, train={"sample_every": 6})
    theirs = DiffusionPipeline.from_pretrained(base("sd", root))
    theirs.load_lora_weights(run / "adapter", adapter_name="new")
    theirs.load_lora_weights(first / "adapter", adapter_name="old")
    theirs.set_adapters(["new", "old"], [1.0, 0.5])
    _same(theirs, spied)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantized_base(kind: str, root: Path) -> None:
    run = trained("sd", root, kind, lora={"rank": 2, "quantization": kind})
    theirs = DiffusionPipeline.from_pretrained(base("sd", root))
    theirs.load_lora_weights(run / "adapter")
    assert all(layer.up.any() for layer in read_lora(run).components["unet"].values())
    held = load_file(run / "checkpoints/images_000000006/net.safetensors")
    assert held and all("lora_" in key for key in held)


def test_a_run_that_is_taken_up_is_the_same(root: Path) -> None:
    how = {"lora": {"rank": 2, "lora_dropout": 0.3}, "train_text_encoder": True, "new_tokens": [TOY]}
    straight = trained("sd", root, "straight", **how, train={"images": 12, "checkpoint_every": 6})
    cut = config("sd", root, "cut", **how, train={"images": 12, "checkpoint_every": 6})
    stopped = config("sd", root, "cut", **how, train={"images": 6, "checkpoint_every": 6})
    train_all([stopped])
    out = Path(cut.output_dir)
    (out / "done.json").unlink()
    text = (out / "config.yaml").read_text().replace("images: 6\n", "images: 12\n")
    (out / "config.yaml").write_text(text)
    train_all([cut])
    for name in (
        "adapter/pytorch_lora_weights",
        "adapter/learned_embeds",
        "checkpoints/images_000000012/net_optimizer",
    ):
        one, two = (load_file(run / f"{name}.safetensors") for run in (straight, out))
        assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one), name


def test_a_lora_of_another_model_is_no_start(root: Path) -> None:
    other = trained("sd3", root, "of_sd3", lora={"rank": 2})
    for section in ({"start": str(other)}, {"adapters": [{"path": str(other)}]}):
        with pytest.raises(ConfigError, match=r"lora: .*of_sd3: a LoRA for another model.*a transformer.*has a unet"):
            train_all([config("sd", root, f"started_{len(section)}", lora=section)])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"lora": {"rank": 4000}}, "lora: .*rank 4000"),
        ({"lora": {"target_modules": ["to_quary"]}}, "lora: .*to_quary.*to_q"),
        ({"lora": {"start": "nowhere"}}, "nowhere"),
        ({"lora": {"adapters": [{"path": "nowhere"}]}}, "nowhere"),
        ({"new_tokens": [{"token": "apple"}]}, "new_tokens: .*apple.*knows already"),
        ({"new_tokens": [{"token": "<a>", "initializer_token": "an unknown"}]}, "initializer_token"),
    ],
)
def test_what_does_not_fit_is_refused(sections: dict, said: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        train_all([config("sd", root, f"refused_{abs(hash(said))}", **sections)])
