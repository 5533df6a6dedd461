"""The configs that adapt a model: each runs on a tiny base of the family that it names, and stock opens the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tests import tiny
from tests.adapting import base
from training.config import load
from training.run import train_all
from training.schema import AdaptConfig

ROOT = Path(__file__).resolve().parent.parent
FAMILY = {
    "sd15_finetune": "sd", "sd15_lora": "sd", "sdxl_lora": "sdxl", "sd3_lora": "sd3", "pixart_lora": "pixart alpha",
    "dreambooth": "sd", "textual_inversion": "sd", "inpaint": "sd", "openmoji/lora": "sd", "openmoji/dreambooth": "sd",
    "openmoji/textual_inversion": "sd",
}  # fmt: skip
SUBJECTS = ["dreambooth", "textual_inversion", "openmoji/dreambooth", "openmoji/textual_inversion"]
PRIOR = ["prior.num_class_images=2", "prior.num_inference_steps=2"]
MORE = {name: ["lora.rank=4"] for name in FAMILY if name.endswith("lora")} | {  # a tiny matrix has no rank of 16
    "dreambooth": ["lora.rank=4", "lora.text_encoder_rank=2", *PRIOR],
    "openmoji/dreambooth": ["lora.rank=4", *PRIOR],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(scope="module")
def pictures(root: Path) -> Path:
    folder = root / "pictures"
    folder.mkdir()
    rows = []
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": tiny.CAPTIONS[i]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def made_small(name: str, root: Path, pictures: Path) -> AdaptConfig:
    """The config with a tiny base and two steps; all else as it is written."""
    written = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    data, tokens = f"data.path={pictures}", []
    if "sources" in written["data"]:
        sources = [{**source, "path": str(pictures)} for source in written["data"]["sources"][:2]]
        data = f"data.sources={json.dumps(sources)}"
    if "new_tokens" in written:  # a tiny vocabulary knows other words
        unknown = [{**new, "initializer_token": None} for new in written["new_tokens"]]
        tokens = [f"new_tokens={json.dumps(unknown)}"]
    small = [data, *tokens, f"base={base(FAMILY[name], root)}", f"output_dir={root / 'runs' / name.replace('/', '_')}"]
    small += ["data.resolution=16", "train.images=4", "train.batch_size=2", "train.gradient_accumulation_steps=1"]
    small += ["train.num_workers=0", "train.log_every=2", "train.mixed_precision=no", "cache.precision=fp32"]
    small += ["sample.num_inference_steps=2", "train.report_to=none"]
    config = load(ROOT / f"configs/{name}.yaml", [*small, *MORE.get(name, [])])
    assert isinstance(config, AdaptConfig)
    return config


@pytest.mark.parametrize("name", FAMILY)
def test_two_steps_on_a_tiny_base(name: str, root: Path, pictures: Path) -> None:
    config = made_small(name, root, pictures)
    train_all([config])
    run = Path(config.output_dir)
    lines = [json.loads(line) for line in (run / "log/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    pipe: Any = DiffusionPipeline.from_pretrained(run / "pipeline" if config.whole else config.base)
    pipe.set_progress_bar_config(disable=True)
    if name == "inpaint":
        assert type(pipe).__name__ == "StableDiffusionInpaintPipeline" and pipe.unet.config.in_channels == 9
        return
    extra = {"use_resolution_binning": False} if FAMILY[name] == "pixart alpha" else {}
    prompt = "a <toy>" if config.new_tokens else "a red apple"

    def drawn(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16, **extra}
        return pipe(prompt, generator=generator, **call).images

    if config.lora:
        before = drawn(prompt)
        if FAMILY[name] == "pixart alpha":
            from peft import PeftModel

            pipe.transformer = PeftModel.from_pretrained(pipe.transformer, run / "adapter")
        else:
            pipe.load_lora_weights(run / "adapter")
            trained = {"transformer"} if name == "sd3_lora" else {"unet"} | ({"text_encoder"} & _towers(config))
            assert set(pipe.get_list_adapters()) == trained
        assert not torch.equal(drawn(prompt), before)
    if config.new_tokens:
        (embedding,) = load_file(run / "adapter/learned_embeds.safetensors").values()
        assert len(embedding) == config.new_tokens[0].num_vectors
        pipe.load_textual_inversion(run / "adapter/learned_embeds.safetensors")
    assert drawn(prompt).isfinite().all()


def _towers(config: AdaptConfig) -> set[str]:
    return {"text_encoder"} if config.train_text_encoder else set()


def test_the_full_ones_name_a_base_on_the_hub() -> None:
    for name in FAMILY:
        config = load(ROOT / f"configs/{name}.yaml")
        assert isinstance(config, AdaptConfig)
        if not name.startswith("openmoji"):
            owner, model = config.base.split("/")
            assert owner and model and config.data.resolution >= 512
        if name in SUBJECTS:
            said = [config.data.instance_prompt, *(s.instance_prompt for s in config.data.sources)]
            words = [new.token for new in config.new_tokens] or ["sks"]
            assert all(words[0] in text for text in said if text) and any(said)
