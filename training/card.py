"""The model card: README.md of what a run made, as the hub reads it and as a person does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from pipelines.card_defaults import SCALE, STEPS, front_matter

from .config import dump
from .schema import AdaptConfig, DiffusionConfig, DiTModel
from .schema.tasks import Sample

GRID = "samples.png"
PACKAGES = ("latent-t2i", "torch", "diffusers", "transformers", "peft")
LORA, TOKENS = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
ENCODERS = {"clip_l": "", "clip_g": "_2"}  # of SDXL, in a file of new words
NO_LOADER = ("StableDiffusion3", "PixArt")  # of new words
KNOWN_LICENSES = {  # beginnings of licence texts, as the hub names them
    "apache license": "apache-2.0",
    "mit license": "mit",
    "creativeml open rail++-m": "openrail++",
    "creativeml open rail-m": "creativeml-openrail-m",
    "cc0": "cc0-1.0",
}


def write_card(
    folder: str | Path,
    config: AdaptConfig | DiffusionConfig,
    *,
    data: Mapping[str, Any] | None = None,
    samples: str | Path | None = None,
) -> Path:
    """Write ``folder/README.md`` about what lies there: a pipeline, or a LoRA and new tokens.

    Its front matter says the steps and the guidance scale of the config's ``sample`` section, with
    which `ldm sample` and `ldm app` start (``pipelines.card_defaults``).

    Args:
        folder: RUN/pipeline or RUN/adapter, finished.
        data: of the pictures, as ``data.check_rows`` counts them; captions are not told.
        samples: the run's last grid of pictures, which is copied beside as samples.png.
    Returns:
        the file.
    """
    folder = Path(folder)
    if samples is not None:
        shutil.copyfile(samples, folder / GRID)
    if isinstance(config, DiffusionConfig):
        parts = [*_front_from_scratch(config, folder), "", *_body_from_scratch(config, folder, dict(data or {}))]
    else:
        parts = [*_front(config, folder), "", *_body(config, folder, dict(data or {}))]
    text = "\n".join(parts) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder / "README.md"


def trigger_words(config: AdaptConfig) -> list[str]:
    """What a prompt must hold for the adaptation to show: instance prompts, what a caption template
    adds to every caption, and new tokens."""
    prompts = [config.data.instance_prompt, *(source.instance_prompt for source in config.data.sources)]
    templates = config.data.caption_templates
    added = [templates[0].replace("{}", " ").strip(" ,.;:")] if len(templates) == 1 else []
    tokens = [new.token for new in config.new_tokens]
    return list(dict.fromkeys(word for word in [*prompts, *added, *tokens] if word))


def license_of(base: str | Path) -> tuple[str | None, str | None]:
    """The licence that a base's folder tells: its name on the hub, and where that is read. (None, None): not told."""
    root = Path(base)
    for place in (root, root / "pipeline"):
        readme = place / "README.md"
        if readme.is_file():
            told = front_matter(readme.read_text(encoding="utf-8", errors="replace")).get("license")
            if isinstance(told, str):
                return told, "README.md"
        for file in sorted([*place.glob("LICENSE*"), *place.glob("LICENCE*")]):
            start = " ".join(file.read_text(encoding="utf-8", errors="replace")[:300].lower().split())
            for words, name in KNOWN_LICENSES.items():
                if words in start:
                    return name, file.name
            return "other", file.name
    return None, None


# --- what the hub reads ----------------------------------------------------------------------------------------------


def _front(config: AdaptConfig, folder: Path) -> list[str]:
    tags = ["text-to-image", "diffusers", "diffusers-training"]
    tags += ["lora"] if (folder / LORA).is_file() else []
    tags += ["textual_inversion"] if config.new_tokens else []
    tags += ["dreambooth"] if config.prior else []
    front: dict[str, Any] = {
        "base_model": _named(config.base),
        "library_name": "diffusers",
        "license": license_of(config.base)[0] or "other",
        "pipeline_tag": "text-to-image",
        "tags": tags,
    }
    if not _is_hub_name(config.base):
        front.pop("base_model")  # the hub takes nothing but its own names
    if words := trigger_words(config):
        front["instance_prompt"] = words[0]
    return _yaml(front | _drawing(config.sample, folder))


def _front_from_scratch(config: DiffusionConfig, folder: Path) -> list[str]:
    front = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "diffusers-training"],
    }
    return _yaml(front | _drawing(config.sample, folder))


def _drawing(sample: Sample, folder: Path) -> dict[str, Any]:
    """The keys of the front matter by which the hub, and this package, draw."""
    parameters = {STEPS: sample.num_inference_steps, SCALE: sample.guidance_scale}
    picture = {"output": {"url": GRID}} if (folder / GRID).is_file() else {}
    widget = [{"text": prompt, **picture} for prompt in sample.prompts[:4]]
    return {"inference": {"parameters": parameters}} | ({"widget": widget} if widget else {})


def _yaml(front: Mapping[str, Any]) -> list[str]:
    return ["---", *yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True).splitlines(), "---"]


def _is_hub_name(base: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists()


def _named(base: str) -> str:
    """A hub name, or a folder's last name: paths of somebody's machine stay there."""
    if _is_hub_name(base):
        return base
    path = Path(base)
    return path.parent.name if path.name == "pipeline" and path.parent.name else path.name


# --- what a person reads ---------------------------------------------------------------------------------------------


def _body(config: AdaptConfig, folder: Path, data: dict[str, Any]) -> list[str]:
    words, kind = trigger_words(config), _kind(config, folder)
    lines = [f"# {Path(config.output_dir).name}", "", f"{kind} of `{_named(config.base)}`."]
    if words:
        lines += ["", f"Prompts need {' or '.join(f'`{word}`' for word in words)}."]
    lines += ["", "## Use", "", "```python", *_code(config, folder), "```"]
    if (folder / GRID).is_file():
        lines += ["", "## Samples", "", f"![Pictures drawn from the prompts of the config]({GRID})"]
    lines += ["", "## Licence", "", _licence(config.base)]
    lines += ["", "## Training", "", *_training(config, data)]
    shown = config.model_copy(update={"base": _named(config.base), "output_dir": Path(config.output_dir).name})
    lines += ["", "<details><summary>Config</summary>", "", "```yaml", dump(_private(shown)).rstrip(), "```", ""]
    return [*lines, "</details>", "", "Made with " + ", ".join(_versions()) + "."]


def _body_from_scratch(config: DiffusionConfig, folder: Path, data: dict[str, Any]) -> list[str]:
    prompt = next(iter(config.sample.prompts), "a photo")
    call = f"num_inference_steps={config.sample.num_inference_steps}, guidance_scale={config.sample.guidance_scale}"
    kind, package = "DiffusionPipeline", "diffusers"
    if isinstance(config.model, DiTModel):  # stock's PixArt would have to be told the length of CLIP's texts
        kind, package = "TextToImagePipeline", "pipelines"
    code = [
        "import torch", f"from {package} import {kind}", "",
        f'pipe = {kind}.from_pretrained(".")  # this folder',
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")', "",
        f"image = pipe({prompt!r}, {call}).images[0]", 'image.save("picture.png")',
    ]  # fmt: skip
    lines = [f"# {Path(config.output_dir).name}", "", "A text-to-image model, trained from scratch."]
    lines += ["", "## Use", "", "```python", *code, "```"]
    if (folder / GRID).is_file():
        lines += ["", "## Samples", "", f"![Pictures drawn from the prompts of the config]({GRID})"]
    lines += ["", "## Licence", "", "The pictures that it was trained on have terms of their own."]
    lines += ["", "## Training", "", *_listed(_facts(config, data), config.seed)]
    return [*lines, "", "Made with " + ", ".join(_versions()) + "."]


def _kind(config: AdaptConfig, folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return "A fine-tune (all weights of the denoiser)"
    parts = ["a LoRA"] if config.lora else []
    parts += ["new words for the text encoders (textual inversion)"] if config.new_tokens else []
    text = " and ".join(parts) or "an adaptation"
    return text[0].upper() + text[1:] + (", trained with prior preservation," if config.prior else "")


def _code(config: AdaptConfig, folder: Path) -> list[str]:
    """Runs with the working directory beside the README, and where ``base`` is what the config says."""
    words = trigger_words(config)
    prompt = next(iter(config.sample.prompts), None) or next(iter(words), "a photo")
    whole = (folder / "model_index.json").is_file()
    words_in = sorted(folder.glob("learned_embeds*.safetensors"))
    lines = ["import torch", "from diffusers import DiffusionPipeline", ""]
    if whole:
        lines += ['pipe = DiffusionPipeline.from_pretrained(".")  # this folder']
    elif words_in and _kind_of_base(config).startswith(NO_LOADER):  # stock's have none for words
        lines[1] = "from pipelines import TextToImagePipeline  # of this package: stock diffusers has no loader here"
        lines += [f"base = {_base(config)!r}", "pipe = TextToImagePipeline.from_pretrained(base)"]
        lines += ['pipe.load_lora_weights(".")'] * bool(config.lora)
        lines += [f'pipe.load_textual_inversion("{file.name}")' for file in words_in]
    else:
        lines += [f"base = {_base(config)!r}", "pipe = DiffusionPipeline.from_pretrained(base)"]
        if (folder / "adapter_config.json").is_file():  # PixArt's pipelines have no loader of LoRAs
            lines.insert(2, "from peft import PeftModel")
            lines += ['pipe.transformer = PeftModel.from_pretrained(pipe.transformer, ".").merge_and_unload()']
        elif (folder / LORA).is_file():
            lines += ['pipe.load_lora_weights(".")']
        for file in words_in:
            lines += _loading(file)
    lines += ['pipe.to("cuda" if torch.cuda.is_available() else "cpu")', ""]
    how = f"num_inference_steps={config.sample.num_inference_steps}, guidance_scale={config.sample.guidance_scale}"
    return [*lines, f"image = pipe({prompt!r}, {how}).images[0]", 'image.save("picture.png")']


def _loading(file: Path) -> list[str]:
    """Stock's way to new words: one call, or one for each of SDXL's encoders."""
    with safe_open(file, "pt") as opened:
        keys, token = set(opened.keys()), (opened.metadata() or {}).get("token")
    if keys.isdisjoint(ENCODERS):
        return [f'pipe.load_textual_inversion("{file.name}")']
    calls = [
        f'pipe.load_textual_inversion(words["{key}"], token={token!r}, text_encoder=pipe.text_encoder{end}, '
        f"tokenizer=pipe.tokenizer{end})"
        for key, end in ENCODERS.items()
        if key in keys
    ]
    return ["from safetensors.torch import load_file", f'words = load_file("{file.name}")', *calls]


def _kind_of_base(config: AdaptConfig) -> str:
    """Its pipeline's class, where that can be told."""
    index = Path(_base(config)) / "model_index.json"
    return str(json.loads(index.read_text()).get("_class_name")) if index.is_file() else ""


def _base(config: AdaptConfig) -> str:
    folder = Path(config.base)
    if _is_hub_name(config.base):
        return config.base
    return str(folder / "pipeline" if (folder / "pipeline").is_dir() else folder)


def _licence(base: str) -> str:
    name, file = license_of(base)
    if name is None:
        told = "on its page on the hub" if _is_hub_name(base) else "nowhere in its folder"
        return (
            f"Unknown: the licence of the base is told {told}, and what is made from it is bound by it. "
            "Look it up before you pass this on; the pictures that it was trained on have terms of their own."
        )
    return f"`{name}`, as the base's {file} says. The pictures that it was trained on have terms of their own."


def _training(config: AdaptConfig, data: dict[str, Any]) -> list[str]:
    facts = _facts(config, data) | {
        "LoRA rank": config.lora.rank if config.lora else None,
        "new words": ", ".join(f"`{new.token}` ({new.num_vectors})" for new in config.new_tokens) or None,
        "class pictures": f"{config.prior.num_class_images}, {config.prior.class_prompt!r}" if config.prior else None,
        "text encoders": "trained too" if config.train_text_encoder else None,
    }
    return _listed(facts, config.seed)


def _facts(config: AdaptConfig | DiffusionConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of every run."""
    train = config.train
    return {
        "pictures": data.get("rows"),
        "images seen": f"{train.images:,}",
        "batch": train.batch_size * train.gradient_accumulation_steps,
        "resolution": config.data.resolution,
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
    }


def _listed(facts: Mapping[str, Any], seed: int) -> list[str]:
    return [f"- {name}: {value}" for name, value in {**facts, "seed": seed}.items() if value is not None]


def _private(config: AdaptConfig) -> AdaptConfig:
    """Without the folders of the machine that it was made on."""
    data = config.data
    sources = tuple(source.model_copy(update={"path": _last(source.path)}) for source in data.sources)
    data = data.model_copy(update={"path": data.path and _last(data.path), "sources": sources})
    prior = config.prior and config.prior.model_copy(
        update={"class_data_dir": config.prior.class_data_dir and _last(config.prior.class_data_dir)}
    )
    cache = config.cache.model_copy(update={"dir": config.cache.dir and _last(config.cache.dir)})
    return config.model_copy(update={"data": data, "prior": prior, "cache": cache})


def _last(path: str) -> str:
    return path if path.startswith("hub:") else Path(path).name


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found
