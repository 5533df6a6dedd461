"""What a network is built to fit: sizes of the autoencoder and the text encoder, from wherever they can be told; and
the networks themselves, for counting."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .fit import ConfigError, part
from .schema import AdaptConfig, AutoencoderConfig, ClipConfig, Config, DiffusionConfig, LatentRun, MMDiTModel


@dataclass(frozen=True)
class Sizes:
    """The autoencoder's and the text encoder's sizes."""

    factor: int
    latent_channels: int
    text_width: int
    text_length: int
    pooled_width: int | None = None


def sizes(config: LatentRun, earlier: Sequence[Config] = ()) -> Sizes:
    """Of a diffusion config, from the configs that make its parts, or their folders' or hub names' config.json; of one
    that starts from a base, the base's.

    Raises:
        ConfigError: a part is a hub name whose config.json cannot be had, or is of another kind of model.
    """
    if isinstance(config, AdaptConfig):
        from .base import base_of

        return base_of(config).sizes()
    assert isinstance(config, DiffusionConfig)
    made = {Path(c.output_dir).resolve(): c for c in earlier}
    vae = part(config.vae.pretrained, AutoencoderConfig, made, "vae.pretrained")
    text = part(config.text.pretrained, ClipConfig, made, "text.pretrained")
    vae = vae or hub_config(config.vae.pretrained, "vae.pretrained", "AutoencoderKL")
    text = text or hub_config(config.text.pretrained, "text.pretrained", "clip")
    if isinstance(vae, AutoencoderConfig):
        factor, channels = vae.model.factor, vae.model.latent_channels
    else:
        factor, channels = 2 ** (len(vae["block_out_channels"]) - 1), vae.get("latent_channels", 4)
    if isinstance(text, ClipConfig):
        width, length, pooled = text.model.text.hidden_size, text.model.tokenizer.max_length, text.model.projection_dim
    else:
        inner = text.get("text_config") or text
        width, length = inner.get("hidden_size", 512), inner.get("max_position_embeddings", 77)
        pooled = text.get("projection_dim", 512)
    if not isinstance(config.model, MMDiTModel):
        return Sizes(factor, channels, width, length)
    return Sizes(factor, channels, config.model.joint_attention_dim or width + 2, length + 1, pooled + 2)


def hub_config(name: str, key: str, kind: str) -> dict[str, Any]:
    """The config.json of a model on the hub: a few kilobytes, kept in the hub's cache.

    Args:
        key: of the config, for messages.
        kind: what the model's class or type begins with.
    Raises:
        ConfigError: it cannot be had, or is of another kind.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ConfigError(
            f"{key}: {name} is no local folder, and its config.json cannot be had from the hub ({reason}); check the "
            "name and the connection, or give a local folder"
        ) from error
    told = str(found.get("_class_name") or found.get("model_type"))
    if not told.startswith(kind):
        raise ConfigError(f"{key}: {name} is of another kind of model ({told}) than is needed here")
    return found


# --- networks --------------------------------------------------------------------------------------------------------

Build = Callable[[], nn.Module]
Forward = Callable[[nn.Module, int], Tensor]  # (network, rows in the batch) -> its output, on random numbers


def network_of(config: Config, earlier: Sequence[Config] = ()) -> tuple[Build, Forward]:
    """How the network that trains is built, and its forward pass on random numbers of the right shapes.

    Kernels are torch's own: what other fused ones compute and hold is the same, and they need the device. ``plain``
    attention stays, which holds its logits.
    """
    backend = "plain" if config.train.attention_backend == "plain" else "auto"
    ours = config.train.model_copy(update={"attention_backend": backend, "compile": False})
    config = config.model_copy(update={"train": ours})
    if isinstance(config, AdaptConfig):
        return _adapted_of(config)
    if isinstance(config, DiffusionConfig):
        return denoiser_of(config, sizes(config, earlier))
    return _clip_of(config) if isinstance(config, ClipConfig) else _vae_of(config)


def denoiser_of(config: DiffusionConfig, s: Sizes) -> tuple[Build, Forward]:
    """Of a diffusion config, for parts of these sizes."""
    from ldm.cond import Cond

    from .tasks.diffusion import network

    side = config.data.resolution // s.factor

    def denoise(net: nn.Module, rows: int) -> Tensor:
        pooled = torch.randn(rows, s.pooled_width) if s.pooled_width else None
        cond = Cond(torch.randn(rows, s.text_length, s.text_width), pooled=pooled)
        return net(torch.randn(rows, s.latent_channels, side, side), torch.rand(rows) * 1000, cond)

    return lambda: network(config, s), denoise


def _adapted_of(config: AdaptConfig) -> tuple[Build, Forward]:
    """Of a run from a base: the denoiser with what trains in it, and the text encoders where they do; but for PixArt's,
    whose mask transformers looks into."""
    from transformers import T5EncoderModel

    from ldm.cond import Cond
    from ldm.models.new_tokens import place
    from pipelines.core import with_sizes

    from .adapt import Trained, learning, reading
    from .base import base_of
    from .tasks.common import tuned

    base = base_of(config)
    s, side = base.sizes(), config.data.resolution // base.factor
    plain = {"init_lora_weights": "default", "start": None, "adapters": (), "quantization": None}
    lora = config.lora and config.lora.model_copy(update=plain)
    counted = config.model_copy(update={"lora": lora, "new_tokens": ()})

    def build() -> nn.Module:
        with unset_fake_temporarily(), torch.device("meta"):  # peft moves its layers, which fake tensors do not let it
            net = learning(counted, tuned(base.blank(), config.train))
            reads = config.reads_prompts and base.family != "pixart"
            text = reading(counted, base.blank_text()) if reads else None
            if text is not None and config.new_tokens:
                rows = {new.token: new.num_vectors for new in config.new_tokens}
                towers: dict[str, Any] = {name: model for name, (_, model) in text.towers().items()}
                width = {name: model.get_input_embeddings().weight.shape[1] for name, model in towers.items()}
                new = {name: {token: torch.empty(n, w) for token, n in rows.items()} for name, w in width.items()}
                place(text, new, trainable=True)
            module = Trained(net, text)
        return _anew(module)

    def denoise(module: nn.Module, rows: int) -> Tensor:
        inside: Any = module
        more = inside.net.config["in_channels"] - s.latent_channels
        if inside.text is None:
            pooled = torch.randn(rows, s.pooled_width) if s.pooled_width else None
            told = torch.randn(rows, s.text_length, s.text_width, requires_grad=config.reads_prompts)
            cond = Cond(told, pooled=pooled)
        else:
            lengths = [
                inside.text.max_sequence_length if isinstance(model, T5EncoderModel) else tokenizer.model_max_length
                for tokenizer, model in inside.text.towers().values()
            ]
            cond = inside.text(*(torch.zeros(rows, n, dtype=torch.int64) for n in lengths))
        cond = replace(
            with_sizes(inside.net, cond, config.data.resolution, config.data.resolution),
            extra=torch.randn(rows, more, side, side) if more else None,
            class_labels=torch.zeros(rows, dtype=torch.int64) if inside.net.config.get("num_class_embeds") else None,
        )
        x = torch.randn(rows, s.latent_channels, side, side)
        return module(x, torch.rand(rows) * 1000, cond)

    return build, denoise


def _anew(net: nn.Module) -> nn.Module:
    """With parameters and buffers of the same shapes where tensors are made now."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
    return net


def _vae_of(config: AutoencoderConfig) -> tuple[Build, Forward]:
    from ldm.models.vae import VAE

    from .tasks.common import tuned

    model, side = config.model, config.data.random_crop or config.data.resolution

    def reconstruct(vae: nn.Module, rows: int) -> Tensor:
        eps = torch.randn(rows, model.latent_channels, side // model.factor, side // model.factor)
        return vae(torch.randn(rows, 3, side, side), eps)[0]

    return lambda: tuned(VAE(**model.model_dump(), sample_size=config.data.resolution), config.train), reconstruct


def _clip_of(config: ClipConfig) -> tuple[Build, Forward]:
    from transformers import CLIPModel

    from .tasks.clip import Contrast, clip_config

    words, side = config.model.tokenizer, config.data.resolution

    def contrast(clip: nn.Module, rows: int) -> Tensor:
        ids = torch.ones(rows, words.max_length, dtype=torch.int64)
        texts, pictures, scale = clip(ids, torch.randn(rows, 3, side, side))
        return scale * texts @ pictures.T

    return lambda: Contrast(CLIPModel(clip_config(config, words.vocab_size, words.max_length, 0, 1))), contrast
