"""Text encoders and tokenizers out of folders: safetensors only, every weight accounted for, no code run."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from ..extras import pip_install

Tower: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection | T5EncoderModel
Tokenizer: TypeAlias = CLIPTokenizer | T5Tokenizer

MODEL_TYPES: dict[type[Tower], tuple[str, ...]] = {
    CLIPTextModel: ("clip", "clip_text_model"),
    CLIPTextModelWithProjection: ("clip", "clip_text_model"),
    T5EncoderModel: ("t5",),
}
SECOND_WIDTH = 2  # SD3 asks for a second CLIP: where a model has one CLIP, it is all zeros and 2 wide
SNAPSHOT = ["*.json", "*.txt", "*.model", "model*.safetensors", "text_encoder*/*", "tokenizer*/*"]
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
NOT_WANTED = ["*.bin", "*.msgpack", "*.h5", "*.onnx*"]


def open_tower(folder: Path, part: str, kinds: tuple[type[Tower], ...], **kw: Any) -> tuple[Tokenizer, Tower]:
    """Tokenizer and model of one part.

    Args:
        folder: of a pipeline, with ``part`` and the tokenizer of the same number as subfolders; or of a model and
            its tokenizer together.
        part: ``text_encoder``, ``text_encoder_2`` or ``text_encoder_3``.
        kinds: the classes that it may be, the first where its config does not tell.
        kw: as ``load_tower`` has it.
    """
    split = (folder / part).is_dir()
    model_at = folder / part if split else folder
    tokenizer_at = folder / part.replace("text_encoder", "tokenizer") if split else folder
    kind = next((kind for kind in kinds if _config(model_at).get("model_type") in MODEL_TYPES[kind]), kinds[0])
    model = load_tower(model_at, kind, **kw)
    return load_tokenizer(tokenizer_at, T5Tokenizer if kind is T5EncoderModel else CLIPTokenizer), model


def load_tokenizer(folder: Path, kind: type[Tokenizer] = CLIPTokenizer) -> Tokenizer:
    """The tokenizer in a folder. Raises ValueError naming the files that are missing."""
    slow = ("spiece.model",) if kind is T5Tokenizer else ("vocab.json", "merges.txt")
    if not (folder / "tokenizer.json").is_file() and not (folder / slow[0]).is_file():
        # transformers would quietly build a tokenizer of three entries
        raise ValueError(f"{folder}: no tokenizer here, expected tokenizer.json, or {' and '.join(slow)}")
    try:
        tokenizer: Any = kind.from_pretrained(str(folder), local_files_only=True)
    except (ImportError, OSError, TypeError, ValueError) as error:
        hint = f"; to read {slow[0]} transformers needs the packages sentencepiece and protobuf, tokenizer.json none"
        needs = "" if (folder / "tokenizer.json").is_file() else hint
        raise ValueError(f"{folder}: does not open as a {kind.__name__} ({error}){needs}") from error
    for name in ("is_local", "local_files_only"):  # of this call, not of the tokenizer, which would save them
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def spelled_out(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Texts in which a new token of several vectors stands as all of them: ``<toy>`` becomes ``<toy> <toy>_1 <toy>_2``.

    So do the stock pipelines of SD and SDXL (``maybe_convert_prompt``); those of SD3 and PixArt leave it to the user.
    A text that spells a token out already is left alone; stock would do it again.
    """
    added = tokenizer.added_tokens_encoder
    several = sorted(token for token in added if f"{token}_1" in added)
    return [_one_spelled_out(tokenizer, added, several, text) for text in texts] if several else list(texts)


def _one_spelled_out(tokenizer: Tokenizer, added: Container[str], several: Sequence[str], text: str) -> str:
    found = [token for token in several if token in text and f"{token}_1" not in text]
    there = set(tokenizer.tokenize(text)) if found else set()  # a token may be a part of a longer one
    for token in found:
        if token in there:
            numbered = itertools.takewhile(added.__contains__, (f"{token}_{i}" for i in itertools.count(1)))
            text = text.replace(token, " ".join([token, *numbered]))
    return text


def load_tower(
    folder: Path, kind: type[Tower], *, variant: str | None = None, load_in_8bit: bool = False, **kw: Any
) -> Tower:
    """The text model in a folder, in one file or in shards.

    Args:
        variant: such as ``fp16``, where the folder has such files.
        load_in_8bit: the linear layers in 8 bits, by bitsandbytes.
        kw: what ``from_pretrained`` of transformers takes (``dtype``).
    Raises:
        ValueError: ``config.json`` is missing or not of this kind, no safetensors file, or weights missing in it;
            8 bits without bitsandbytes.
    """
    config = folder / "config.json"
    if not config.is_file():
        what = "a T5" if kind is T5EncoderModel else "a CLIPModel or of its text tower"
        raise ValueError(f"{config}: missing; expected the folder of {what}")
    model_type, expected = _config(folder).get("model_type"), MODEL_TYPES[kind]
    if model_type not in expected:
        raise ValueError(f"{config}: model_type is {model_type!r}, expected {' or '.join(map(repr, expected))}")
    kw = {k: v for k, v in kw.items() if k != "local_files_only"} | {"variant": which_variant(folder, variant)}
    if load_in_8bit:
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                f"{folder}: load_in_8bit needs the package bitsandbytes ({pip_install('bitsandbytes')}); without it "
                "load with a smaller dtype, or leave the T5 out with t5=None"
            )
        from transformers import BitsAndBytesConfig

        kw["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    with quiet_transformers():  # the vision tower's weights that are not wanted would fill a page
        opened: Any = kind.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, local_files_only=True, **kw
        )
    model, info = opened
    missing = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if missing:
        raise ValueError(f"{folder}: the file lacks {len(missing)} weights of {kind.__name__}, such as {missing[0]}")
    return model.eval()


def which_variant(folder: Path, variant: str | None) -> str | None:
    """The variant to ask a loader for: the one given where the folder has it, none where it has plain files.

    Raises:
        ValueError: there are neither; the message names what there is.
    """
    names = [file.name for file in folder.glob("*.safetensors")]
    found = {m[2] for name in names if (m := re.fullmatch(rf"{_STEM}(\.(\w+))?{_SHARD}\.safetensors", name))}
    if not found:
        raise ValueError(
            f"{folder}: no safetensors file (model.safetensors, diffusion_pytorch_model.safetensors, or shards of "
            "them); weights in other formats are not read, save with save_pretrained anew"
        )
    for known in (variant, None):
        if known in found:
            return known
    asked = "without a variant" if variant is None else f"of variant {variant!r}, nor without one"
    raise ValueError(f"{folder}: no weights {asked}; give variant={' or '.join(map(repr, sorted(found)))}")


_STEM, _SHARD = r"(?:model|diffusion_pytorch_model)", r"(?:-\d{5}-of-\d{5})?"


def is_empty(model: Tower) -> bool:
    """Does an SD3 encoder answer with zeros, whatever the text? So a model with one CLIP, or without T5, is written."""
    if isinstance(model, T5EncoderModel):
        return not model.encoder.final_layer_norm.weight.any()
    return model.config.hidden_size == SECOND_WIDTH and not any(p.any() for p in model.parameters())


def is_empty_folder(folder: Path) -> bool:
    """The same of a folder, of which only small files are opened to see it."""
    config, weights = _config(folder), folder / "model.safetensors"
    if not weights.is_file():
        return False
    if config.get("d_ff") == 1:
        return not load_file(weights)["encoder.final_layer_norm.weight"].any()
    return config.get("hidden_size") == SECOND_WIDTH and not any(value.any() for value in load_file(weights).values())


def check_hub_options(options: Iterable[str]) -> None:
    """Raises ValueError naming the first that is none; a folder would take no notice of it."""
    for name in options:
        if name not in HUB_OPTIONS:
            hint = "; did you mean dtype?" if name == "torch_dtype" else ""
            raise ValueError(f"unknown argument {name}{hint}; for a hub name there are {', '.join(HUB_OPTIONS)}")


def from_hub(name: str, **kw: Any) -> Path:
    """The text encoders of a model on the hub, in a local folder. Raises ValueError where it cannot be had."""
    from huggingface_hub import snapshot_download

    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise ValueError(f"{name}: no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=SNAPSHOT, ignore_patterns=NOT_WANTED, **kw))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no such folder, and not opened as a name on the hub ({error})") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars for files of a moment and no lists of unused weights; what matters is checked and raised here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return config
