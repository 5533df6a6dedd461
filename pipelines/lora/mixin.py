"""LoRA and learned words in a pipeline, by the names of diffusers' methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ldm.models.base import Network
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet

from ..textual_inversion import load_embeddings
from . import live
from .files import LoraFile, read_lora, write_lora


class LoraMixin:
    """Of a pipeline with a ``net`` and a ``text``. Components are called as in stock folders: ``unet`` or
    ``transformer``, ``text_encoder``, ``text_encoder_2``, ``text_encoder_3``."""

    net: Network
    text: TextEncoder

    @property
    def _loadable(self) -> dict[str, nn.Module]:
        return loadable(self.net, self.text)

    def load_lora_weights(self, source: str | Path | LoraFile, adapter_name: str | None = None) -> str:
        """Load a LoRA. In the networks that it changes it acts alone from now on, as in stock, until ``set_adapters``.

        Args:
            source: a file or folder in diffusers', kohya's or peft's form, or the output_dir of a run.
            adapter_name: ``default_0``, ``default_1`` … if not given.
        Returns:
            Its name.
        Raises:
            ValueError: the name is taken, or the LoRA is one for another model: a part or a layer that is not here, or
                of another size. Nothing has changed then.
        """
        file = source if isinstance(source, LoraFile) else read_lora(source, names=self._names())
        what = "the LoRA" if isinstance(source, LoraFile) else str(source)
        taken = {name for names in self.get_list_adapters().values() for name in names}
        if adapter_name is None:
            adapter_name = next(name for i in range(len(taken) + 1) if (name := f"default_{i}") not in taken)
        if adapter_name in taken:
            raise ValueError(f"adapter name {adapter_name!r} is taken by another LoRA; choose another, or unload it")
        try:
            for component, part in check_components(file, self._loadable).items():
                live.load_lora(part, file.components[component], adapter_name)
                live.set_weights(part, {adapter_name: 1.0})
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        return adapter_name

    def save_lora_weights(
        self,
        target: str | Path,
        adapter_name: str | None = None,
        *,
        format: Literal["diffusers", "kohya", "peft"] = "diffusers",
    ) -> Path:
        """Write one adapter of those in the pipeline, with its true alpha.

        Args:
            adapter_name: the only one, if not given.
        Raises:
            ValueError: none or several are there, or none of this name; or the form cannot hold it.
        """
        known = list(dict.fromkeys(name for names in self.get_list_adapters().values() for name in names))
        if adapter_name is None and len(known) != 1:
            raise ValueError(f"adapter_name: say which LoRA to write; there is {', '.join(known) or 'none'}")
        name = known[0] if adapter_name is None else adapter_name
        if name not in known:
            raise ValueError(f"no adapter {name!r} in the pipeline; there is {', '.join(known) or 'none'}")
        parts = {part: module for part, module in self._loadable.items() if name in live.adapters(module)}
        file = LoraFile({part: live.lora_of(module, name) for part, module in parts.items()})
        base = self.text.family
        if isinstance(self.net, UNet) and base == "sd":
            base = "sd21" if self.net.config["cross_attention_dim"] == 1024 else "sd15"
        return write_lora(target, file, format, base=base, names=self._names())

    def _names(self) -> dict[str, list[str]]:
        return {part: [live.plain(name) for name in live.layers_of(module)] for part, module in self._loadable.items()}

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Of each component that has LoRA, their names."""
        return {part: names for part, module in self._loadable.items() if (names := live.adapters(module))}

    def get_active_adapters(self) -> list[str]:
        return list(dict.fromkeys(n for module in self._loadable.values() for n in live.active_adapters(module)))

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Let these act, and no other.

        Args:
            adapter_weights: what the change of each counts: one number for all, or one for each; 1 if not given.
        Raises:
            ValueError: an unknown name, another number of weights, or a LoRA that is fused.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if isinstance(adapter_weights, dict) or (
            isinstance(adapter_weights, Sequence) and any(isinstance(w, dict) for w in adapter_weights)
        ):
            raise ValueError("adapter_weights: one number for each adapter is taken here, no table of blocks")
        weights = adapter_weights if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(
                f"adapter_weights: {len(weights)} for {len(names)} adapters; expected one for each, or one"
            )
        given = {name: 1.0 if weight is None else float(weight) for name, weight in zip(names, weights, strict=True)}
        known = {name for found in self.get_list_adapters().values() for name in found}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no adapter {unknown[0]!r}; there is {', '.join(sorted(known)) or 'none'}")
        for module in self._loadable.values():
            here = live.adapters(module)
            live.set_weights(module, {name: weight for name, weight in given.items() if name in here})

    def fuse_lora(self, lora_scale: float = 1.0, *, adapter_names: Sequence[str] | None = None) -> None:
        """Add the active LoRA to the weights: the same pictures, as fast as without.

        Args:
            lora_scale: what their changes count, beside their own weights.
            adapter_names: these alone, as ``set_adapters`` would have them act; None: all that do.
        Raises:
            ValueError: unknown names, or fused already, or a quantized model.
        """
        if adapter_names is not None:
            active = {n: w for module in self._loadable.values() for n, w in live.active_adapters(module).items()}
            self.set_adapters(adapter_names, [active.get(name, 1.0) for name in adapter_names])
        for module in self._loadable.values():
            if live.active_adapters(module):
                live.fuse(module, scale=lora_scale)

    def unfuse_lora(self) -> None:
        """Undo ``fuse_lora``, bit for bit."""
        for module in self._loadable.values():
            live.unfuse(module)

    def unload_lora_weights(self) -> None:
        """Take every LoRA out. As in stock, what was fused stays in the weights (``unfuse_lora`` comes before);
        otherwise the pipeline is bit for bit what it was."""
        for module in self._loadable.values():
            live.unload(module, keep_fused=True)

    def disable_lora(self) -> None:
        """Let none act, until ``set_adapters``."""
        self.set_adapters([])

    def load_textual_inversion(self, source: Any, token: str | None = None) -> None:
        """Teach the text encoders the words of a file of embeddings; prompts may use them from now on.

        Args:
            source: a file of Stable Diffusion's or SDXL's form, or the output_dir of a run.
            token: what the word is called in prompts; by default as in the file.
        Raises:
            ValueError: no such file, for other encoders, or a word that the tokenizers know already.
        """
        load_embeddings(self.text, source, token)

    @contextmanager
    def _without_lora(self, what: str) -> Iterator[None]:
        """For the time of saving; refuses where a LoRA acts that is not fused."""
        with ExitStack() as stack:
            for part, module in self._loadable.items():
                stack.enter_context(live.bare(module, f"{what}: {part}"))
            yield


def loadable(net: Network, text: TextEncoder) -> dict[str, nn.Module]:
    """The networks that a LoRA may change, by their stock names."""
    denoiser = "unet" if isinstance(net, UNet) else "transformer"
    return {denoiser: net, **{name: model for name, (_, model) in text.towers().items()}}


def check_components(file: LoraFile, parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The networks that a LoRA changes.

    Raises:
        ValueError: it changes nothing, or what is not here.
    """
    wanted = {name: layers for name, layers in file.components.items() if layers}
    if not wanted:
        raise ValueError("this LoRA holds no layer")
    for name, layers in wanted.items():
        if name not in parts:
            raise ValueError(f"a LoRA for another model? It changes {name}; this one has {', '.join(parts)}")
        try:
            live.check_lora(parts[name], layers)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return {name: parts[name] for name in wanted}
