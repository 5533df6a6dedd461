"""What of a model trains: all of its denoiser, its text encoders too, a LoRA of either, or new tokens; and what is made
of that in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from ldm.cond import Cond
from ldm.models.base import Network
from ldm.models.text import TextEncoder

from .base import frozen_dtype
from .encoders import encode_captions
from .fit import ConfigError
from .schema import AdaptConfig
from .tasks.common import tuned

if TYPE_CHECKING:
    from pipelines.lora.live import LoraSettings

    from .base import Base

NAME = "default"  # of the LoRA that trains, inside the networks


@dataclass(frozen=True)
class Captions:
    """What the text encoders are to read, where they train: in place of a Cond.

    Args:
        texts: B captions.
        dropped: (B,) of them become the null prompt.
        policy: of captions that are longer than the encoders read.
        rest: adds to a Cond what is not text.
    """

    texts: Sequence[str]
    dropped: Tensor
    policy: str
    rest: Callable[[Cond], Cond]

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, text: TextEncoder) -> Cond:
        """With gradients; the null prompt too is read anew, since the encoders have changed."""
        return self.rest(encode_captions(text, self.texts, self.policy, text.null(), self.dropped))


class Trained(nn.Module):
    """What is prepared for training in place of the networks: bf16 patches its ``forward``, and samples and export need
    the networks as they are.

    Args:
        text: where the text encoders train.
    """

    def __init__(self, net: Network, text: TextEncoder | None = None):
        super().__init__()
        self.net, self.text = net, text
        self.train()

    def train(self, mode: bool = True) -> Trained:
        """An encoder that does not train keeps still: a T5 has dropout."""
        super().train(mode)
        for _, tower in self.text.towers().values() if self.text is not None else ():
            tower.train(mode and any(p.requires_grad for p in tower.parameters()))
        return self

    def forward(self, x: Tensor, time: Tensor, told: Cond | Captions) -> Tensor:
        if isinstance(told, Captions):
            assert self.text is not None
            told = told.read(self.text)
        return self.net(x, time, told)


def opened(config: AdaptConfig, base: Base, device: torch.device, mixed: str, on_host: bool = False) -> Network:
    """The base's denoiser on ``device``, in float32 where its own weights train; see ``learning``.

    Args:
        on_host: for weights that will be sharded, which brings them to the device and, where they
            train, to float32 one unit after the other. Until then they are mapped from the file.
    """
    dtype = torch.float32
    if config.lora is not None or not config.train_denoiser:
        dtype = frozen_dtype(config, device, mixed)
    elif on_host:
        dtype = base.stored_dtype()
    net = learning(config, tuned(base.open_net(dtype), config.train))
    return net if on_host else net.to(device)


def learning(config: AdaptConfig, net: Network) -> Network:
    """The network with what the config lets train of it, and nothing else, requiring gradients.

    Raises:
        ConfigError: a LoRA does not fit the network, or its targets match nothing.
    """
    net.train()
    if not config.train_denoiser:
        return net.requires_grad_(False)
    if config.conditioning:
        from .conditioning import grown

        grown(config.conditioning, net)
    if config.lora is None:
        return net.requires_grad_(True)
    net.requires_grad_(False)
    with _telling("lora"):
        if config.lora.quantization:
            from pipelines.lora.quantized import quantize

            quantize(net, config.lora.quantization)
        _put(config, net, component_of(net), settings_of(config))
    return net


def reading(config: AdaptConfig, text: TextEncoder) -> TextEncoder:
    """The text encoders with what the config lets train of them, and nothing else, requiring gradients."""
    from ldm.models.new_tokens import add_tokens

    text.train().requires_grad_(False)
    towers = {
        name: model
        for name, (_, model) in text.towers().items()
        if text.family != "sd3" or not isinstance(model, T5EncoderModel)  # nobody trains that one
    }
    with _telling("new_tokens"), _seeded(config.seed):
        tokens = [(new.token, new.initializer_token, new.num_vectors) for new in config.new_tokens]
        vectors = add_tokens(text, tokens) if tokens else []
    if config.train_text_encoder and config.lora is None:
        for tower in towers.values():
            tower.requires_grad_(True)
    elif config.train_text_encoder:
        with _telling("lora"):
            for name, tower in towers.items():
                _put(config, tower, name, settings_of(config, text=True))
    for p in vectors:
        p.requires_grad_(True)
    _freeze_unused(text)
    return text


def check_prompts(config: AdaptConfig, text: TextEncoder) -> None:
    """Raises ConfigError where an instance prompt says nothing to a tokenizer; new tokens are not known yet."""
    from ldm.models.new_tokens import check_words

    prompt = config.data.instance_prompt or ""
    for new in config.new_tokens:
        prompt = prompt.replace(new.token, "")
    with _telling("data.instance_prompt"):
        check_words(text, [prompt] if prompt.strip() else [])


def settings_of(config: AdaptConfig, *, text: bool = False) -> LoraSettings:
    """peft's, of the config's section ``lora``; with ``text`` of the text encoders."""
    from pipelines.lora.live import LoraSettings

    how = config.lora
    assert how is not None
    own = text and (not isinstance(how.target_modules, str) or how.target_modules == "conv")
    targets = "attention" if own else how.target_modules  # patterns are of the denoiser's modules
    return LoraSettings(
        rank=how.text_encoder_rank or how.rank if text else how.rank,
        alpha=how.lora_alpha,
        dropout=how.lora_dropout,
        rslora=how.use_rslora,
        dora=how.use_dora,
        init=how.init_lora_weights,
        targets=targets,
        rank_pattern={} if text else how.rank_pattern,
        alpha_pattern={} if text else how.alpha_pattern,
    )


def component_of(net: Network) -> str:
    """What stock pipelines and LoRA files call it."""
    return "unet" if net.stock.startswith("UNet") else "transformer"


def _put(config: AdaptConfig, module: nn.Module, name: str, settings: LoraSettings) -> None:
    """The LoRA that acts meanwhile, and the one that trains: one that is there, or a new one.

    Args:
        name: of the module, as LoRA files call it.
    """
    from pipelines.lora.live import add_lora, load_lora

    how = config.lora
    assert how is not None
    for i, other in enumerate(how.adapters):
        if (there := _layers(other.path, name)) is not None:
            load_lora(module, there, f"frozen_{i}", weight=other.weight)
    with _seeded(config.seed):
        if how.start and (start := _layers(how.start, name)) is not None:
            load_lora(module, start, NAME, trainable=True, dropout=how.lora_dropout)
        else:
            add_lora(module, settings, NAME)


def _layers(source: str, name: str) -> dict[str, Any] | None:
    """What a LoRA changes in the module that files call ``name``. Raises ValueError where it is another denoiser's."""
    from pipelines.lora.read import read_lora

    found = read_lora(source).components
    other = {"unet": "transformer", "transformer": "unet"}.get(name)
    if other in found:
        raise ValueError(f"{source}: a LoRA for another model? It changes a {other}, the base has a {name}")
    return found.get(name)


def _freeze_unused(text: TextEncoder) -> None:
    """What no embedding depends on (the last layer, where the one before it is read) has no gradient, which processes
    that share their gradients would wait for."""
    with torch.enable_grad():
        cond = text.encode([""])
        told = cond.tokens.float().square().sum() + (0 if cond.pooled is None else cond.pooled.float().square().sum())
        trained = [p for p in text.parameters() if p.requires_grad]
        found = torch.autograd.grad(told, trained, allow_unused=True) if trained else ()
    for p, gradient in zip(trained, found, strict=True):
        p.requires_grad_(gradient is not None)


# --- what is made of it ----------------------------------------------------------------------------------------------


def write_adapter(config: AdaptConfig, folder: Path, net: Network, text: TextEncoder | None, base: Base) -> None:
    """``RUN/adapter``: the LoRA and the new tokens, in the files that stock diffusers loads.

    Args:
        text: where the text encoders train.
    """
    from pipelines.lora.layer import LoraFile
    from pipelines.lora.live import lora_of
    from pipelines.lora.write import write_lora
    from pipelines.textual_inversion import save_embeddings

    from .card import trigger_words

    folder.mkdir(parents=True, exist_ok=True)
    if config.lora is not None:
        components = {component_of(net): lora_of(net, NAME)} if config.train_denoiser else {}
        if text is not None and config.train_text_encoder:
            components |= {name: lora_of(tower, NAME) for name, (_, tower) in text.towers().items() if has_lora(tower)}
        form = "peft" if base.family == "pixart" else "diffusers"  # PixArt's pipelines have no loader of LoRAs
        side = config.data.resolution
        write_lora(
            folder, LoraFile(components, {}), form, base=base.family, overwrite=True,
            title=Path(config.output_dir).name, trigger=trigger_words(config), resolution=(side, side),
        )  # fmt: skip
    if config.new_tokens and text is not None:
        save_embeddings(folder / "learned_embeds.safetensors", text)


def has_lora(module: nn.Module) -> bool:
    return any(name.endswith(f".{NAME}.weight") and "lora_" in name for name, _ in module.named_parameters())


@contextmanager
def _telling(key: str) -> Iterator[None]:
    """What does not fit is a fault of the config's key."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The same first weights in every process and whatever was drawn before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
