"""What is looked at before weights are taken in, so that a wrong file is refused by name and not by a stack trace."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .base import Network

STEM = "diffusion_pytorch_model"  # what diffusers calls a file of weights
# (what is found in one of the keys, whose it is), from the most telling to the least
TELL_TALES = (
    (r"lora_|\.lora\.|\.lokr_|\.hada_", "a LoRA, to be loaded on top of a model"),
    (r"^model\.diffusion_model\.", "a single-file checkpoint: `ldm convert` makes a folder of it"),
    (r"^(first_stage_model|cond_stage_model|conditioner)\.", "a single-file checkpoint: `ldm convert` makes a folder"),
    (r"^(input_blocks|middle_block|joint_blocks|double_blocks)\.", "the original authors' layout, not diffusers'"),
    (r"^(en|de)coder\.(down|up|mid)\.", "the original authors' autoencoder, not diffusers'"),
    (r"^(module|_orig_mod|base_model\.model)\.", "a model saved inside a wrapper (DDP, torch.compile, PEFT)"),
    (r"^(state_dict|model|ema|optimizer)$", "a training checkpoint: take the entry that holds the weights"),
    (r"^controlnet_", "ControlNetModel"),
    (r"^single_transformer_blocks\.", "FluxTransformer2DModel"),
    (r"^adaln_single\.", "PixArtTransformer2DModel"),
    (r"\.attn\.add_q_proj\.", "SD3Transformer2DModel"),
    (r"^(text_model\.|vision_model\.|embeddings\.token_embedding)", "a CLIP model (CLIPTextModel)"),
    (r"\.SelfAttention\.q\.|^shared\.weight$", "T5EncoderModel"),
    (r"^quantize\.", "VQModel"),
    (r"\.time_emb_proj\.", "UNet2DConditionModel"),
    (r"^(en|de)coder\.(conv_in|mid_block)\.", "AutoencoderKL"),
)


def likely_model(keys: Iterable[str]) -> str | None:
    """Whose weights bear these names, as far as we know them."""
    keys = [key for key in keys if isinstance(key, str)]
    return next((name for sign, name in TELL_TALES if any(re.search(sign, key) for key in keys)), None)


def share_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load strictly and by reference: the tensors of ``state`` become those of ``model``.

    Args:
        state: all that ``state_dict`` lists, and of the buffers that it leaves out those that there are.
        what: the two, for the error.
    Raises:
        ValueError: something is missing, left over, of another shape, or has no value to give.
    """
    saved, buffers = model.state_dict(), dict(model.named_buffers())
    unsaved = buffers.keys() - saved.keys()
    given = {name: tensor for name, tensor in state.items() if name not in unsaved}
    check_fit(saved, given, what, getattr(model, "stock", type(model).__name__))
    nn.Module.load_state_dict(model, given, strict=True, assign=True)
    for name in unsaved & state.keys():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, state[name], persistent=False)
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise ValueError(f"{what}: {', '.join(empty[:3])} would stay without a value; load the weights first")


def check_config(net: type[Network], config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``net`` in a config of its twin.

    Raises:
        ValueError: a field that the twin does not have, or a value that only the twin takes.
    """
    fields = {n: p.default for n, p in inspect.signature(net.stock_class().__init__).parameters.items()}
    ours = set(inspect.signature(net.__init__).parameters) - {"self"}
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    for name, value in given.items():
        if name not in fields:
            if value in (None, False):  # old configs keep fields that stock has dropped; off, they do no harm
                continue
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else "take it out if the weights do without it"
            raise ValueError(f"config field {name}={value!r} is unknown to {net.stock}; {hint}")
        expected = net.fixed.get(name, fields[name])
        if name not in ours and _plain(value) != _plain(expected):
            raise ValueError(f"{net.stock} with {name}={value!r} is not supported by {net.__name__} ({expected!r} is)")
    return {name: given.get(name, fields[name]) for name in ours}


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Any], what: str, stock: str) -> None:
    """Raises ValueError where the weights of ``state`` are not those of ``own`` by name and shape."""
    missing, left_over = [key for key in own if key not in state], [key for key in state if key not in own]
    check_names(f"weights of {what}", list(own), missing, left_over, stock)
    bad = [
        f"{key}: {tuple(state[key].shape) if isinstance(state[key], Tensor) else type(state[key]).__name__} for "
        f"{tuple(value.shape)}"
        for key, value in own.items()
        if not isinstance(state[key], Tensor) or state[key].shape != value.shape
    ]
    if bad:
        differ = f"shapes differ, in {len(bad)} of {len(own)}; {'; '.join(bad[:3])}"
        raise ValueError(f"weights of {what}: {differ}. They look like another config of {stock}")


def check_names(what: str, wanted: list[str], missing: Iterable[str], left_over: Iterable[str], stock: str) -> None:
    """Raises ValueError where something is missing or left over: the first of them, and whose weights these may be."""
    lacking, extra = set(missing), list(left_over)
    if not lacking and not extra:
        return
    first = [key for key in wanted if key in lacking]
    parts = [f"{len(first)} of {len(wanted)} missing, the first {', '.join(first[:3])}"] if first else []
    parts += [f"{len(extra)} left over, the first {', '.join(extra[:3])}"] if extra else []
    likely = likely_model([*(key for key in wanted if key not in lacking), *extra])
    hint = f"another config of {stock}" if likely == stock else likely
    raise ValueError(f"{what} do not fit: {'; '.join(parts)}" + (f". They look like {hint}" if hint else ""))


def check_folder(root: Path, stock: str, subfolder: str | None, variant: str | None, safetensors: bool) -> None:
    """Raises OSError that says what a folder lacks of a model of class ``stock``; a hub name passes."""
    if not root.is_dir():
        if root.is_file():
            raise NotADirectoryError(f"{root} is a file; expected a folder (`ldm convert` makes one of a single file)")
        if root.is_absolute() or len(root.parts) != 2 or root.parts[0] in (".", ".."):  # no "owner/name"
            raise FileNotFoundError(f"{root}: no such folder; expected one that holds {stock}, or a hub name")
        return
    folder = root / (subfolder or "")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json of a {stock} in it{_in_a_pipeline(root, stock)}")
    names = sorted(entry.name for entry in folder.glob(f"{STEM}*"))
    kind, middle = "safetensors" if safetensors else "bin", f".{variant}" if variant else ""
    if any(_variant(name, kind) == (variant or "") for name in names):
        return
    others = sorted({found for name in names if (found := _variant(name, kind)) is not None})
    if others:
        hint = f"there is variant={others[-1]!r}" if others[-1] else "leave the variant out"
    elif safetensors and any(name.endswith(".bin") for name in names):
        hint = "use_safetensors=False reads the pickle"
    elif any(re.search(r"-\d+-of-\d+", name) for name in names):
        hint = f"shards need {STEM}.{kind}.index{middle}.json beside them"
    else:
        hint = "fetch the weights too"
    there = f", but {', '.join(names[:3])}" if names else ""
    raise FileNotFoundError(f"{folder}: no {STEM}{middle}.{kind} in it{there}; {hint}")


def _variant(name: str, kind: str) -> str | None:
    """Of which variant ("" for none) a file is the whole or the list of shards; None where it is neither."""
    listed = (
        rf"\.{kind}(?:\.(\w+))?\.index(?:\.(\w+))?\.json"  # the variant was in the first place, and is in the second
    )
    found = re.fullmatch(rf"{STEM}(?:(?:\.(\w+))?\.{kind}|{listed})", name)
    return found and next(filter(None, found.groups()), "")


def _in_a_pipeline(root: Path, stock: str) -> str:
    """Where in a pipeline's folder the model is."""
    try:
        parts = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
        place = next(name for name, value in parts.items() if isinstance(value, list) and value[1:] == [stock])
    except (OSError, ValueError, AttributeError, StopIteration):  # no pipeline, or none that has such a model
        return ""
    return f"; it is a whole pipeline, whose {stock} is in subfolder={place!r}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the names of all weights that stock did not find: the first of them will be in an error."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
