"""The autoencoder and the text encoder that a denoiser is trained with: in memory only while somebody needs them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ldm.cond import Cond
from ldm.latents import LatentScale
from ldm.models.long_text import chunks, joined
from ldm.models.text import TextEncoder
from ldm.models.vae import VAE

from .base import base_of, frozen_dtype
from .captions import check_lengths
from .schema import AdaptConfig, DiffusionConfig, MMDiTModel
from .tasks.common import made

FAMILY = {"unet": "sd", "mmdit": "sd3", "dit": "pixart"}
NO_PART_OF_MOMENTS = ("scaling_factor", "shift_factor", "sample_size", "force_upcast")  # of the autoencoder's config


M = TypeVar("M", bound=nn.Module)


class About(NamedTuple):
    """What is known of the encoders when they are gone."""

    vae: str  # hash of all that decides the moments
    text: str  # hash of all that decides an embedding
    family: str
    factor: int
    channels: int
    scale: LatentScale
    width: int
    length: int  # tokens that are read of a prompt
    tokens: int  # at most so many in an embedding
    pooled: int | None


class Encoders:
    """Opened from a config when they are first asked for, frozen, on ``device``; ``free`` forgets them.

    Args:
        mixed: the run's precision, ``no``, ``bf16`` or ``fp16``; a base's text encoders may be in it.
    Raises:
        ConfigError: the base is not there, or does not fit.
        ValueError: (when they are opened) they are not there, or of another kind.
    """

    def __init__(self, config: DiffusionConfig | AdaptConfig, device: torch.device, mixed: str = "no"):
        self.device, self.kept = device, False
        if isinstance(config, AdaptConfig):
            base, trains = base_of(config), config.train_text_encoder and config.lora is None
            dtype = torch.float32 if trains else frozen_dtype(config, device, mixed)
            self._open_vae, self._open_text = partial(base.open_vae, torch.float32), partial(base.open_text, dtype)
        else:
            vae, text, model = made(config.vae.pretrained), made(config.text.pretrained), config.model
            joint = model.joint_attention_dim if isinstance(model, MMDiTModel) else None
            self._open_vae = partial(VAE.from_diffusers, vae)
            self._open_text = partial(text_encoder, text, FAMILY[model.name], joint)
        self._vae: VAE | None = None
        self._text: TextEncoder | None = None

    @property
    def vae(self) -> VAE:
        self._vae = self._vae or self._ready(self._open_vae())
        return self._vae

    @property
    def text(self) -> TextEncoder:
        self._text = self._text or self._ready(self._open_text())
        return self._text

    def keep_text(self) -> TextEncoder:
        """The text encoders stay: they train."""
        self.kept = True
        return self.text

    def _ready(self, module: M) -> M:
        return module.to(self.device).eval().requires_grad_(False)

    def free(self, *, vae: bool = True, text: bool = True) -> None:
        """Give their memory back."""
        if vae:
            self._vae = None
        if text and not self.kept:
            self._text = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def about(self) -> About:
        return About(
            vae_hash(self.vae),
            text_hash(self.text),
            self.text.family,
            self.vae.factor,
            self.vae.config["latent_channels"],
            self.vae.latent_scale,
            self.text.width,
            self.text.max_length,
            self.text.max_length + self.text.max_sequence_length,
            self.text.pooled_width,
        )


def text_encoder(name: str, family: str, joint_width: int | None) -> TextEncoder:
    """SD3's tokens are as wide as both its CLIPs together, or wider."""
    text = TextEncoder.from_pretrained(name, family, joint_width)
    if family == "sd3" and joint_width is None:
        text = TextEncoder(text.tokenizer, text.model, family, text.model.config.hidden_size + 2)
    return text


def pieces(text: TextEncoder, captions: Sequence[str], policy: str) -> list[list[str]]:
    """What is read of each caption: the whole, whose end may be cut; or with the policy ``chunk`` a longer one in
    pieces of as many tokens as the encoder reads (sd3's T5 reads the whole, with the first of them).

    Raises:
        DataError: the policy is ``refuse`` and one is longer.
    """
    if policy == "cut":
        return [[x] for x in captions]
    if policy == "refuse":
        check_lengths(captions, text.count_tokens, text.max_length, "refuse")
        return [[x] for x in captions]
    counts = text.count_tokens(captions)
    return [
        chunks(x, text.count_tokens, text.max_length) if n > text.max_length else [x]
        for x, n in zip(captions, counts, strict=True)
    ]


def encode_captions(text: TextEncoder, captions: Sequence[str], policy: str, null: Cond, dropped: torch.Tensor) -> Cond:
    """A row for each caption, or the null prompt's where ``dropped`` (B,): what the cache would give. Gradients flow;
    callers decide."""
    parts = pieces(text, captions, policy)
    counts = torch.tensor([len(x) for x in parts])
    most = int(counts.max())
    flat = [x for one in parts for x in [*one, *[""] * (most - len(one))]]
    whole = [x for x in captions for _ in range(most)]  # which sd3's T5 reads
    cond = text.encode(flat, None, whole)
    drop = dropped.to(cond.tokens.device)
    found = {}
    for name in ("tokens", "pooled", "bias"):
        if (x := getattr(cond, name)) is not None:
            x = x.unflatten(0, (len(parts), most))  # (B, K, …)
            found[name] = torch.where(drop.view(-1, *[1] * (x.ndim - 1)), getattr(null, name), x)
    counts = counts.to(drop.device, non_blocking=True)  # the host has no need to wait for the device here
    return Cond(**joined(found, counts.where(~drop, 1), text.max_length)).to(torch.float32)


def weights_hash(*modules: nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def vae_hash(vae: VAE) -> str:
    """Of all that decides the moments: the encoder's weights and config. What trains the decoder alone keeps them."""
    parts = [vae.encoder] if vae.quant_conv is None else [vae.encoder, vae.quant_conv]
    config = {k: v for k, v in vae.config.items() if k not in NO_PART_OF_MOMENTS}
    return _hash(weights_hash(*parts), config)


def text_hash(text: TextEncoder) -> str:
    """Of all that decides an embedding: every encoder's weights, config and tokenizer, and how they are read."""
    towers = {}
    for name, (tokenizer, model) in text.towers().items():
        words = json.loads(tokenizer.backend_tokenizer.to_str())
        words |= {"truncation": None, "padding": None}  # of its last call
        config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and "version" not in k}
        towers[name] = [weights_hash(model), config, words, tokenizer.model_max_length, tokenizer.pad_token_id]
    how = [text.family, text.width, text.max_length, text.max_sequence_length, text.zeros_for_empty]
    return _hash(towers, how)


def _hash(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
