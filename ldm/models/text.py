"""Prompts -> Cond: one CLIP text tower, read the way the stock pipelines of each family read it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ..cond import Cond

Tower = TypeVar("Tower", bound=CLIPTextModel | CLIPTextModelWithProjection)
FAMILIES: dict[str, type[CLIPTextModel] | type[CLIPTextModelWithProjection]] = {
    "sd": CLIPTextModel,
    "sd3": CLIPTextModelWithProjection,
}
EMPTY_TOKENS = 256  # SD3's third encoder always adds this many; without one they are zeros, and not masked
SECOND_WIDTH = 2  # SD3 asks for a second CLIP: ours is all zeros and 2 wide


class TextEncoder(nn.Module):
    """A tokenizer and a CLIP text tower.

    - ``sd``: the tokens are the last hidden state, after the final norm; padding is not masked.
    - ``sd3``: the last hidden state but one, padded with zeros to ``joint_width``; the pooled vector is the
      projected end token. Stock SD3 adds a second CLIP and 256 tokens of a T5. With all-zero ones in their
      places, the tokens bear no position and stay equal to one another through every block, so one zero token
      whose logits are raised by log 256 is the same function of them.

    Args:
        tokenizer: its ``model_max_length`` is the number of CLIP tokens that every prompt is cut or padded to.
        model: ``CLIPTextModel`` (sd) or ``CLIPTextModelWithProjection`` (sd3).
        family: ``sd`` or ``sd3``.
        joint_width: width of sd3's tokens, the network's ``joint_attention_dim``; the model's own if None.
    Raises:
        ValueError: the parts do not fit together.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        family: str = "sd",
        joint_width: int | None = None,
    ):
        super().__init__()
        check_family(family)
        config: Any = model.config
        if not isinstance(model, FAMILIES[family]):
            raise ValueError(f"text family {family!r} takes a {FAMILIES[family].__name__}, got {type(model).__name__}")
        if getattr(config, "use_attention_mask", False):
            raise ValueError(f"a text encoder with use_attention_mask is not supported in family {family!r}")
        if family == "sd" and joint_width not in (None, config.hidden_size):
            raise ValueError(f"text width is {config.hidden_size}, the network takes {joint_width}: they must be equal")
        if joint_width is not None and joint_width < config.hidden_size:
            raise ValueError(f"text width {config.hidden_size} does not fit into joint_attention_dim {joint_width}")
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} entries, the text model only {config.vocab_size}")
        if tokenizer.model_max_length > 1_000_000:  # what transformers writes for "not stored"
            tokenizer.model_max_length = config.max_position_embeddings
        if tokenizer.model_max_length > config.max_position_embeddings:
            raise ValueError(
                f"the tokenizer's model_max_length is {tokenizer.model_max_length}, "
                f"the text model has positions for {config.max_position_embeddings}"
            )
        if family == "sd3":
            _check_end_token(tokenizer, config.eos_token_id)
        self.tokenizer, self.model, self.family = tokenizer, model, family
        self.width: int = joint_width or config.hidden_size
        self.pooled_width: int | None = config.projection_dim + SECOND_WIDTH if family == "sd3" else None
        self.train(model.training)

    @property
    def max_length(self) -> int:
        """CLIP tokens per prompt, start and end included."""
        return self.tokenizer.model_max_length

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """(B, max_length) ids, cut at the end and padded. Raises ValueError naming a prompt that is no text."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts: expected a list of one or more texts, got {prompts!r}")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {i}: expected text, got {type(prompt).__name__}")
        given = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        return cast(Tensor, given.input_ids)

    def forget_last_call(self) -> None:
        """A tokenizer would save the padding and truncation of its last call, so that equal ones differ as files."""
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt would need, start and end included; above ``max_length`` its end is cut."""
        return [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids]

    def forward(self, ids: Tensor) -> Cond:
        """Token ids (B, max_length) -> Cond on the model's device. Gradients flow; callers decide."""
        ids = ids.to(self.device)
        if self.family == "sd":
            return Cond(tokens=self.model(ids).last_hidden_state)  # (B, L, D)
        out = self.model(ids, output_hidden_states=True)
        tokens = out.hidden_states[-2]  # (B, L, D)
        tokens = F.pad(tokens, (0, self.width - tokens.shape[-1], 0, 1))  # (B, L + 1, J): zeros to the right and below
        bias = F.pad(tokens.new_zeros(tokens.shape[0], tokens.shape[1] - 1), (0, 1), value=math.log(EMPTY_TOKENS))
        return Cond(tokens=tokens, bias=bias, pooled=F.pad(out.text_embeds, (0, SECOND_WIDTH)))  # pooled (B, P + 2)

    def encode(self, prompts: Sequence[str]) -> Cond:
        """A row for each prompt. Raises ValueError for an empty list and for what is not text."""
        return self(self.tokenize(prompts))

    def null(self) -> Cond:
        """One row: the empty prompt, to which training drops captions and from which guidance leads away."""
        return self.encode([""])

    @classmethod
    def from_pretrained(
        cls, source: str | Path, family: str = "sd", joint_width: int | None = None, **kw: Any
    ) -> TextEncoder:
        """Open a text tower.

        Args:
            source: a folder with a ``CLIPModel`` or one of its text towers and its tokenizer; a pipeline folder
                (``text_encoder/``, ``tokenizer/``); or a name on the hub.
            kw: what ``from_pretrained`` of transformers takes (``dtype``, ``revision``, ``local_files_only``).
        Raises:
            ValueError: no such folder, no tokenizer or weights in it, another kind of model, weights missing.
        """
        check_family(family)
        folder = Path(source).expanduser()
        if folder.is_dir():
            split = (folder / "text_encoder").is_dir()
            model_at, tokenizer_at = (folder / "text_encoder", folder / "tokenizer") if split else (folder, folder)
            tokenizer, model = load_tokenizer(tokenizer_at), load_clip(model_at, FAMILIES[family], **kw)
            return cls(tokenizer, model, family, joint_width)
        name = str(source)
        if name.count("/") > 1 or name.startswith((".", "~", "/")):
            raise ValueError(f"{name}: no such folder")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(name, **{k: v for k, v in kw.items() if k != "dtype"})
            model = _load(name, FAMILIES[family], **kw)
        except OSError as error:
            raise ValueError(f"{name}: no such folder, and not opened as a name on the hub ({error})") from error
        return cls(tokenizer, model, family, joint_width)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer in a folder. Raises ValueError naming the files that are missing."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        # transformers would quietly build a tokenizer of three entries
        raise ValueError(f"{folder}: no tokenizer here, expected tokenizer.json, or vocab.json and merges.txt")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    for name in ("is_local", "local_files_only"):  # of this call, not of the tokenizer, which would save them
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def load_clip(folder: Path, kind: type[Tower], **kw: Any) -> Tower:
    """The text tower in a folder, from safetensors, every weight accounted for.

    Raises:
        ValueError: ``config.json`` is missing or not of a CLIP, no safetensors file, or weights missing in it.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{config}: missing; expected the folder of a CLIPModel or of its text tower")
    model_type = json.loads(config.read_text()).get("model_type")
    if model_type not in ("clip", "clip_text_model"):
        raise ValueError(f"{config}: model_type is {model_type!r}, expected 'clip' or 'clip_text_model'")
    if not any(folder.glob("model*.safetensors*")):
        raise ValueError(f"{folder}: no model.safetensors; other formats are not read, save with save_pretrained anew")
    return _load(str(folder), kind, local_files_only=True, **{k: v for k, v in kw.items() if k != "local_files_only"})


def _load(source: str, kind: type[Tower], **kw: Any) -> Tower:
    with quiet_transformers():  # the vision tower's weights that are not wanted would fill a page
        opened: Any = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True, **kw)
    model, info = opened
    missing = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if missing:
        raise ValueError(f"{source}: the file lacks {len(missing)} weights of {kind.__name__}, such as {missing[0]}")
    return model.eval()


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


def check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(f"text family {family!r} is not one of {', '.join(FAMILIES)}")


def _check_end_token(tokenizer: CLIPTokenizer, eos: int) -> None:
    """Pooling looks for the end token by its id; an id that never occurs quietly pools the start token."""
    highest = len(tokenizer) - 1
    fits = tokenizer.eos_token_id == (highest if eos == 2 else eos)  # 2 in old configs means "the highest id"
    if not fits:
        raise ValueError(
            f"the text model's eos_token_id is {eos}, the tokenizer's is {tokenizer.eos_token_id}: "
            "pooling would not find the end of the prompt; set it in the model's config"
        )
