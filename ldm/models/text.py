"""Prompts -> Cond: one to three text encoders, read the way the stock pipelines of each family read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from ..cond import Cond
from .text_files import (
    SECOND_WIDTH,
    Tokenizer,
    Tower,
    check_hub_options,
    from_hub,
    is_empty_folder,
    open_tower,
    spelled_out,
)

# of each family, the encoders by the names of their folders, and the classes that each may be
FAMILIES: dict[str, dict[str, tuple[type[Tower], ...]]] = {
    "sd": {"text_encoder": (CLIPTextModel,)},
    "sdxl": {"text_encoder": (CLIPTextModel,), "text_encoder_2": (CLIPTextModelWithProjection,)},
    "sd3": {
        "text_encoder": (CLIPTextModelWithProjection,),
        "text_encoder_2": (CLIPTextModelWithProjection,),
        "text_encoder_3": (T5EncoderModel,),
    },
    "pixart": {"text_encoder": (T5EncoderModel, CLIPTextModel)},
}
T5_TOKENS = {"sd3": 256, "pixart": 120}  # the stock pipelines' max_sequence_length; PixArt-Sigma's is 300
EMPTY_TOKENS = T5_TOKENS["sd3"]  # without a T5, SD3 is given this many zeros, and they are not masked


class TextEncoder(nn.Module):
    """Tokenizers and text encoders of one model family (D and P are the encoders' hidden and projected widths).

    - ``sd`` (CLIP-L or OpenCLIP-H): the last hidden state, after the final norm. Padding is not masked.
    - ``sdxl`` (CLIP-L and OpenCLIP-G, or the second alone; Podell et al. 2023, section 2.1): the last hidden states
      but one side by side, (B, L, D1 + D2); ``pooled`` (B, P2) is the second's projected end token. Padding is not
      masked. A negative prompt that is left out is zeros, and so is what training drops to.
    - ``sd3`` (CLIP-L, OpenCLIP-G and T5; Esser et al. 2024, figure 2a): the CLIPs as in SDXL, padded with zeros to
      the network's ``joint_attention_dim``, then T5's tokens; ``pooled`` (B, P1 + P2). No padding is masked, neither
      for T5 nor for the network. Without T5 stock appends 256 zeros. They bear no position and stay equal to one
      another through every block, so one zero token whose logits are raised by log 256 is the same function of them.
      With one CLIP alone, an all-zero one, 2 wide, stands for the second.
    - ``pixart`` (T5, or a CLIP; Chen et al. 2024): the last hidden state of the prompt in lower case; padding is
      masked both for T5 and, with a bias of -inf, for the network.

    Args:
        tokenizer, model: the first encoder; of SDXL's refiner the only one, a ``CLIPTextModelWithProjection``. A CLIP
            tokenizer's ``model_max_length`` is the number of tokens that every prompt is cut or padded to.
        family: one of the above.
        joint_width: of sd3, the network's ``joint_attention_dim``; T5's width, or the CLIPs' together, if None.
        second: tokenizer and model of the second CLIP.
        t5: tokenizer and model of sd3's T5.
        max_sequence_length: T5's tokens; the stock pipeline's number if None (256 in sd3, 120 in pixart).
        zeros_for_empty: of sdxl, whether the null prompt is zeros (stock's ``force_zeros_for_empty_prompt``).
    Raises:
        ValueError: the parts do not fit together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: Tower,
        family: str = "sd",
        joint_width: int | None = None,
        *,
        second: tuple[Tokenizer, Tower] | None = None,
        t5: tuple[Tokenizer, Tower] | None = None,
        max_sequence_length: int | None = None,
        zeros_for_empty: bool = True,
    ):
        super().__init__()
        check_family(family)
        self.tokenizer, self.model, self.family = tokenizer, model, family
        self.tokenizer_2, self.model_2 = second or (None, None)
        self.tokenizer_3, self.model_3 = t5 or (None, None)
        self.zeros_for_empty = zeros_for_empty
        self.max_sequence_length: int = max_sequence_length or T5_TOKENS.get(family, 0)
        self._check()
        widths = [_width(tower) for _, tower in self._clips()]
        if family == "sd3":
            self.width: int = joint_width or (sum(widths) if self.model_3 is None else _width(self.model_3))
            self._check_joint_width(widths)
        else:
            self.width = sum(widths) or _width(model)
            if joint_width not in (None, self.width):
                raise ValueError(f"text width is {self.width}, the network takes {joint_width}: they must be equal")
        projected = [tower.config.projection_dim for _, tower in self._clips() if _projects(tower)]
        self.pooled_width: int | None = None
        if family in ("sdxl", "sd3"):
            self.pooled_width = sum(projected) + (SECOND_WIDTH if family == "sd3" and second is None else 0)
        self.train(model.training)

    # --- what there is -----------------------------------------------------------------------------------------------

    def towers(self) -> dict[str, tuple[Tokenizer, Tower]]:
        """Tokenizer and model of each encoder, by the name that stock pipelines have for it."""
        first = "text_encoder_2" if self.family == "sdxl" and self.model_2 is None else "text_encoder"
        found: dict[str, tuple[Any, Any]] = {first: (self.tokenizer, self.model)}
        if self.model_2 is not None:
            found["text_encoder_2"] = (self.tokenizer_2, self.model_2)
        if self.model_3 is not None:
            found["text_encoder_3"] = (self.tokenizer_3, self.model_3)
        return found

    def set_tokenizer(self, name: str, tokenizer: Tokenizer) -> None:
        """Another one for the encoder of this name."""
        first = next(iter(self.towers()))
        setattr(self, "tokenizer" if name == first else f"tokenizer{name[-2:]}", tokenizer)

    def _clips(self) -> list[tuple[Tokenizer, Any]]:
        return [(t, m) for t, m in self.towers().values() if not isinstance(m, T5EncoderModel)]

    @property
    def max_length(self) -> int:
        """Tokens per prompt, start and end included, that the first encoder reads."""
        if isinstance(self.model, T5EncoderModel):
            return self.max_sequence_length
        return self.tokenizer.model_max_length

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # --- prompts -> ids ----------------------------------------------------------------------------------------------

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """(B, max_length) ids, cut at the end and padded. Raises ValueError naming a prompt that is no text."""
        return self._tokens(self.tokenizer, prompts, self.max_length)[0]

    def _tokens(self, tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask, (B, length) each."""
        check_prompts(prompts)
        texts = self.as_read(tokenizer, prompts)
        given = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return given.input_ids, given.attention_mask

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt would need, start and end included; above ``max_length`` its end is cut."""
        texts = self.as_read(self.tokenizer, prompts)
        return [len(ids) for ids in self.tokenizer(texts, verbose=False).input_ids]

    def as_read(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
        """The texts that one of the tokenizers is given: pixart's in lower case, new tokens with all their vectors."""
        texts = [prompt.lower().strip() for prompt in prompts] if self.family == "pixart" else list(prompts)
        return spelled_out(tokenizer, texts)

    def forget_last_call(self) -> None:
        """A tokenizer would save the padding and truncation of its last call, so that equal ones differ as files."""
        for tokenizer, _ in self.towers().values():
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()

    # --- ids -> Cond -------------------------------------------------------------------------------------------------

    def encode(
        self,
        prompts: Sequence[str],
        prompts_2: Sequence[str] | None = None,
        prompts_3: Sequence[str] | None = None,
        *,
        max_sequence_length: int | None = None,
    ) -> Cond:
        """A row for each prompt.

        Args:
            prompts_2, prompts_3: what the second CLIP and T5 read, where it is not the same.
            max_sequence_length: T5's tokens (or, without T5, the zeros in their place), in sd3 and pixart.
        Raises:
            ValueError: an empty list, what is not text, lists of different lengths.
        """
        given, asked = (prompts, prompts_2 or prompts, prompts_3 or prompts), max_sequence_length
        check_prompts(*given)
        ids, mask = [], None
        for i, (name, (tokenizer, model)) in enumerate(self.towers().items()):
            is_t5 = isinstance(model, T5EncoderModel)
            length = (asked or self.max_sequence_length) if is_t5 else self.tokenizer.model_max_length
            texts = given[int(name[-1]) - 1] if i else prompts  # the only encoder of a refiner is its first
            tokens, mask = self._tokens(tokenizer, texts, length)
            ids.append(tokens)
        return self(*ids, mask=mask, empty_tokens=asked or self.max_sequence_length)

    def null(self, max_sequence_length: int | None = None) -> Cond:
        """One row: the empty prompt, to which training drops captions and from which guidance leads away."""
        cond = self.encode([""], max_sequence_length=max_sequence_length)
        return cond.map(torch.zeros_like) if self.family == "sdxl" and self.zeros_for_empty else cond

    def forward(self, *ids: Tensor, mask: Tensor | None = None, empty_tokens: int = EMPTY_TOKENS) -> Cond:
        """Token ids (B, L), of each encoder in turn -> Cond on the model's device. Gradients flow; callers decide.

        Args:
            mask: (B, L) of pixart's tokens, 0 at the padding.
            empty_tokens: the zeros of sd3 without T5.
        """
        towers = self.towers().values()
        # Without waiting for what the device still has to do: a text encoder may run in each step of a training.
        ids = tuple(x.to(model.device, non_blocking=True) for x, (_, model) in zip(ids, towers, strict=True))
        if self.family == "sd":
            return Cond(tokens=self.model(ids[0]).last_hidden_state)  # (B, L, D)
        if self.family == "pixart":
            seen = torch.ones_like(ids[0]) if mask is None else mask.to(ids[0].device, non_blocking=True)
            tokens = self.model(ids[0], attention_mask=seen).last_hidden_state  # (B, L, D)
            return Cond(tokens=tokens, bias=tokens.new_zeros(seen.shape).masked_fill(seen == 0, -math.inf))

        clips = self._clips()
        outs = [model(x, output_hidden_states=True) for x, (_, model) in zip(ids, clips, strict=False)]
        tokens = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)  # (B, L, D1 + D2)
        pooled = torch.cat([o.text_embeds for o, (_, m) in zip(outs, clips, strict=True) if _projects(m)], dim=-1)
        if self.family == "sdxl":
            return Cond(tokens=tokens, pooled=pooled)  # pooled (B, P2)
        if self.model_2 is None:
            pooled = F.pad(pooled, (0, SECOND_WIDTH))  # (B, P1 + 2)
        tokens = F.pad(tokens, (0, self.width - tokens.shape[-1]))  # (B, L, J): zeros to the right
        if self.model_3 is not None:
            long = self.model_3(ids[-1]).last_hidden_state  # (B, M, J)
            return Cond(tokens=torch.cat([tokens, long], dim=1), pooled=pooled)
        tokens = F.pad(tokens, (0, 0, 0, 1))  # (B, L + 1, J): and one token of zeros
        bias = F.pad(tokens.new_zeros(tokens.shape[0], tokens.shape[1] - 1), (0, 1), value=math.log(empty_tokens))
        return Cond(tokens=tokens, bias=bias, pooled=pooled)

    # --- checks --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        kinds, family = FAMILIES[self.family], self.family
        for name, (_, model) in self.towers().items():
            if not isinstance(model, kinds.get(name, ())):
                expected = " or ".join(kind.__name__ for kind in kinds.get(name, ())) or f"no {name}"
                raise ValueError(f"text family {family!r} takes a {expected}, got {type(model).__name__}")
        if (family == "sdxl" and self.model_3 is not None) or (family in ("sd", "pixart") and len(self.towers()) > 1):
            raise ValueError(f"text family {family!r} takes {len(kinds)} encoders at most, got {len(self.towers())}")
        clips = self._clips()
        for tokenizer, model in self.towers().values():
            if len(tokenizer) > model.config.vocab_size:
                raise ValueError(
                    f"the tokenizer has {len(tokenizer)} entries, the text model only {model.config.vocab_size}"
                )
        for tokenizer, model in clips:
            config = model.config
            if getattr(config, "use_attention_mask", False):
                raise ValueError(f"a text encoder with use_attention_mask is not supported in family {family!r}")
            if tokenizer.model_max_length > 1_000_000:  # what transformers writes for "not stored"
                tokenizer.model_max_length = config.max_position_embeddings
            if tokenizer.model_max_length > config.max_position_embeddings:
                raise ValueError(
                    f"the tokenizer's model_max_length is {tokenizer.model_max_length}, "
                    f"the text model has positions for {config.max_position_embeddings}"
                )
            if _projects(model):
                _check_end_token(tokenizer, config.eos_token_id)
        if len({tokenizer.model_max_length for tokenizer, _ in clips}) > 1:
            lengths = " and ".join(str(tokenizer.model_max_length) for tokenizer, _ in clips)
            raise ValueError(f"the CLIP tokenizers' model_max_length are {lengths}: they must be equal")

    def _check_joint_width(self, widths: Sequence[int]) -> None:
        if sum(widths) > self.width:
            together = " + ".join(map(str, widths))
            raise ValueError(f"text width {together} does not fit into joint_attention_dim {self.width}")
        if self.model_3 is not None and _width(self.model_3) != self.width:
            t5 = _width(self.model_3)
            raise ValueError(f"T5's width is {t5}, the network's joint_attention_dim {self.width}: they must be equal")

    # --- in ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_towers(cls, towers: Mapping[str, tuple[Any, Any]], family: str, *args: Any, **kw: Any) -> TextEncoder:
        """From the encoders by their stock names, as ``towers()`` gives them; ``kw`` goes to the class."""
        check_family(family)
        left = dict(towers)
        first = "text_encoder_2" if family == "sdxl" and "text_encoder" not in left else "text_encoder"
        if first not in left:
            raise ValueError(f"text family {family!r} needs a {first}, got {', '.join(left) or 'none'}")
        one = left.pop(first)
        second, t5 = left.pop("text_encoder_2", None), left.pop("text_encoder_3", None)
        return cls(*one, family, *args, second=second, t5=t5, **kw)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        family: str = "sd",
        joint_width: int | None = None,
        *,
        t5: bool | None = True,
        load_in_8bit: bool = False,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        max_sequence_length: int | None = None,
        zeros_for_empty: bool = True,
        **hub: Any,
    ) -> TextEncoder:
        """Open the text encoders of a model.

        Args:
            source: a folder with a ``CLIPModel``, one of its text towers or a T5, and its tokenizer; a pipeline folder
                (``text_encoder/``, ``tokenizer/``, ``text_encoder_2/`` …); or a name on the hub of either.
            t5: False or None leaves sd3's T5 out.
            load_in_8bit: T5 in 8 bits, which needs bitsandbytes.
            variant: of the files, such as ``fp16``, where there are such.
            hub: for a hub name: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.
        Raises:
            ValueError: no such folder, no tokenizer or weights in it, another kind of model, weights missing.
        """
        check_family(family)
        check_hub_options(hub)
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = from_hub(str(source), **hub)
        first = "text_encoder"
        if family == "sdxl" and not (folder / first).is_dir():  # a refiner, or a CLIP's own folder
            first = "text_encoder_2"
        found: dict[str, Any] = {}
        for name, kinds in FAMILIES[family].items():
            is_t5, place = T5EncoderModel in kinds, folder / name
            if name < first or (is_t5 and not t5):
                continue
            if name > first and (not place.is_dir() or (family == "sd3" and is_empty_folder(place))):
                continue
            eight = load_in_8bit and is_t5
            found[name] = open_tower(folder, name, kinds, dtype=dtype, variant=variant, load_in_8bit=eight)
        more = dict(max_sequence_length=max_sequence_length, zeros_for_empty=zeros_for_empty)
        return cls.from_towers(found, family, joint_width, **more)


def check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(f"text family {family!r} is not one of {', '.join(FAMILIES)}")


def check_prompts(*lists: Sequence[str]) -> None:
    """Raises ValueError where one is no list of texts, or not as long as the others."""
    for prompts in lists:
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts: expected a list of one or more texts, got {prompts!r}")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {i}: expected text, got {type(prompt).__name__}")
    if len({len(prompts) for prompts in lists}) > 1:
        raise ValueError(f"prompts of {', '.join(str(len(x)) for x in lists)} rows; expected as many of each")


def _projects(model: Tower) -> bool:
    return isinstance(model, CLIPTextModelWithProjection)


def _width(model: Any) -> int:
    return model.config.d_model if isinstance(model, T5EncoderModel) else model.config.hidden_size


def _check_end_token(tokenizer: Tokenizer, eos: int) -> None:
    """Pooling looks for the end token by its id; an id that never occurs quietly pools the start token."""
    highest, added = len(tokenizer) - 1, tokenizer.added_tokens_decoder
    while highest in added and not added[highest].special:  # new tokens come after it
        highest -= 1
    fits = tokenizer.eos_token_id == (highest if eos == 2 else eos)  # 2 in old configs means "the highest id"
    if not fits:
        raise ValueError(
            f"the text model's eos_token_id is {eos}, the tokenizer's is {tokenizer.eos_token_id}: "
            "pooling would not find the end of the prompt; set it in the model's config"
        )
