"""What all networks share: the way in from a stock diffusers class and back out, memory, the attention switch."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .attention import check_backend
from .loading import check_config, check_fit, check_folder, check_names, likely_model, quiet, share_weights

if TYPE_CHECKING:
    from diffusers import ModelMixin

TWINS = {
    "UNet2DConditionModel": "ldm.UNet",
    "AutoencoderKL": "ldm.VAE",
    "SD3Transformer2DModel": "ldm.MMDiT",
    "PixArtTransformer2DModel": "ldm.DiT",
}
BLOCKS = re.compile(r"(.*\.)?((down_blocks|up_blocks|resnets|attentions|transformer_blocks)\.\d+|mid_block)")
REACH = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
READ = ("dtype", "variant", "use_safetensors", "low_cpu_mem_usage", "disable_mmap")


class Network(nn.Module):
    """A network whose parameters and config fields bear the names of its stock twin.

    A subclass names the twin in ``stock`` and takes its config as keyword arguments of ``__init__``, which
    hands them all to ``super().__init__``. Options of the twin that the subclass does not take must have the
    twin's default value, or those listed in ``fixed``; everything else is refused.
    """

    stock: ClassVar[str]  # name of the class in diffusers
    fixed: ClassVar[dict[str, Any]] = {}  # the twin's other fields, where ours is not the twin's default

    def __init__(self, **config: Any):
        super().__init__()
        self.config: dict[str, Any] = config
        self.gradient_checkpointing = False

    @classmethod
    def stock_class(cls) -> type[ModelMixin]:
        import diffusers

        return getattr(diffusers, cls.stock)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # --- from stock and back ---------------------------------------------------------------------------------------

    def stock_config(self) -> dict[str, Any]:
        """The arguments that build the twin of this network."""
        return {**self.fixed, **self.config}

    @classmethod
    def from_diffusers(cls, source: ModelMixin | str | Path, **kw: Any) -> Self:
        """Our network around a stock one's weights (shared, not copied).

        Args:
            source: a stock model, a folder that holds one (in one file or in shards), or a hub name.
            kw: for a folder or a hub name, as ``from_pretrained`` has them: ``subfolder``, ``variant`` (``"fp16"``),
                ``dtype`` (float32 if not given, whatever the file holds), ``revision``, ``cache_dir``, ``token``,
                ``local_files_only`` … Only safetensors are read, unless ``use_safetensors=False`` asks for a pickle.
        Raises:
            ValueError: another model, a config with an unknown field or an option that ours does not have, or weights
                that do not fit: too few, too many, other shapes.
            OSError: no such folder, no config or weights in it, or none of this variant; a hub that is out of reach.
        """
        name, stock = cls.__name__, cls.stock
        if isinstance(source, str | Path):
            net, model = cls._open(os.path.expanduser(source), kw)
        elif isinstance(source, cls.stock_class()):
            if kw:
                raise ValueError(f"{name}.from_diffusers: {', '.join(kw)} is for folders and hub names, not for models")
            net, model = cls._twin(source.config), source
        else:
            likely = likely_model(source) if isinstance(source, Mapping) else None
            hint = f" (its keys look like {likely}; build the network and call load_state_dict)" if likely else ""
            raise ValueError(f"{name} takes a {stock}, a folder or a hub name, not a {type(source).__name__}{hint}")
        share_weights(net, _tensors(model), f"{name} from {source if isinstance(source, str | Path) else stock}")
        return net.train(model.training)

    @classmethod
    def _twin(cls, config: Mapping[str, Any]) -> Self:
        """Our network on the meta device for a stock config, or a ValueError: nothing large has been read yet."""
        with torch.device("meta"):
            return cls(**check_config(cls, config))

    @classmethod
    def _open(cls, source: str | Path, kw: dict[str, Any]) -> tuple[Self, ModelMixin]:
        """``from_pretrained``, which only warns of unknown fields, and of missing or left-over weights; we refuse."""
        stock: Any = cls.stock_class()
        kw = {"use_safetensors": True, **kw}
        for name in kw.keys() - {*READ, *REACH}:
            near = difflib.get_close_matches(name, READ + REACH, n=1)
            raise ValueError(f"unknown argument {name}: expected {near[0] if near else ', '.join(READ + REACH)}")
        if not isinstance(dtype := kw.get("dtype", torch.float32), torch.dtype):  # stock takes a name for float32
            raise ValueError(f"dtype={dtype!r}: expected one of torch's, as torch.float16")
        root = Path(source)
        check_folder(root, cls.stock, kw.get("subfolder"), kw.get("variant"), bool(kw["use_safetensors"]))
        try:
            config: Any = stock.load_config(str(source), **{k: v for k, v in kw.items() if k in REACH})
        except OSError as error:
            what = (
                "the config does not open" if root.is_dir() else "no such folder, and not opened as a name on the hub"
            )
            raise OSError(f"{source}: {what}: {_reason(error)}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{source}: config.json holds a {type(config).__name__}; expected a JSON object")
        name = config.get("_class_name", cls.stock)
        if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
            name = "PixArtTransformer2DModel"  # what its first checkpoints call it
        if name != cls.stock:
            ours = f": {twin} takes it" if (twin := TWINS.get(name)) else ""
            raise ValueError(f"{source}: the config is one of {name}, {cls.__name__} takes {cls.stock}{ours}")
        try:
            net = cls._twin(config)
            with quiet():
                model, found = stock.from_pretrained(str(source), output_loading_info=True, **kw)
        except ValueError as error:
            raise ValueError(f"{source}: {str(error).partition('. If you want')[0]}") from error
        except OSError as error:
            raise OSError(f"{source}: the weights do not open; fetch them anew. {_reason(error)}") from error
        missing, left_over = found["missing_keys"], found["unexpected_keys"]
        check_names(f"{source}: weights of {cls.stock}", list(model.state_dict()), missing, left_over, cls.stock)
        return net, model

    def to_diffusers(self) -> ModelMixin:
        """The stock twin around this network's weights (shared, not copied); of one with LoRA that is fused, with it.

        Raises:
            ValueError: a LoRA acts in it that is not fused, or its weights are quantized.
        """
        tensors, trains = _plain(self), [(p, p.requires_grad) for p in self.parameters()]
        with torch.device("meta"):
            model: Any = self.stock_class()(**self.stock_config())
        share_weights(model, tensors, f"{self.stock} from {type(self).__name__}")
        for parameter, needed in trains:  # torch makes all of them ask for gradients
            parameter.requires_grad_(needed)
        return model.train(self.training)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's, but weights of another model are refused by name (ValueError) before any is copied."""
        if strict:
            check_fit(self.state_dict(), state_dict, type(self).__name__, self.stock)
        return super().load_state_dict(state_dict, strict, assign)

    # --- memory ------------------------------------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """What ``forward`` hands to ``run_block``: the outermost modules with a forward of their own under the stock
        classes' names for blocks, in the order in which they were made."""
        found: dict[str, nn.Module] = {}
        for name, module in self.named_modules():
            has_forward = type(module).forward is not nn.Module.forward
            if has_forward and BLOCKS.fullmatch(name) and not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = module
        return list(found.values())

    def enable_gradient_checkpointing(self, fraction: float = 1.0) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations (Chen et al. 2016).

        Args:
            fraction: share of the blocks that are recomputed, spread evenly over the depth; at least one is.
        Raises:
            ValueError: no number above 0 and at most 1.
        """
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(f"gradient checkpointing of {fraction!r} of the blocks: expected above 0 and at most 1")
        blocks = self.blocks()
        n = max(1, round(fraction * len(blocks)))
        for i, block in enumerate(blocks):  # n of them, as Bresenham's line spreads its steps
            block.recompute = (i + 1) * n // len(blocks) > i * n // len(blocks)  # type: ignore[assignment]
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """``block(*args)``, recomputed in the backward pass where gradient checkpointing says so."""
        if self.gradient_checkpointing and torch.is_grad_enabled() and getattr(block, "recompute", False):
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    # --- attention ---------------------------------------------------------------------------------------------------

    def check_attention_backend(self, name: str, dtype: torch.dtype | None = None) -> None:
        """Raises what ``set_attention_backend`` would, and changes nothing.

        Args:
            dtype: in which attention will run; what the backend does not take is refused too.
        """
        check_backend(name)
        for width in sorted({layer.to_q.out_features // getattr(layer, "heads", 1) for layer in self._attentions()}):
            check_backend(name, width, dtype)

    def set_attention_backend(self, name: str) -> None:
        """Choose the attention kernel of every layer: ``auto``, ``xformers``, ``flash``, ``sdpa`` or ``plain``.

        Raises:
            ValueError: unknown, or it does not take the heads of a layer. Nothing has changed then.
            RuntimeError: it cannot run on this machine, and why.
        """
        self.check_attention_backend(name)
        for layer in self._attentions():
            layer.backend = name

    @contextmanager
    def default_attention(self) -> Iterator[None]:
        """Within this context every layer has the attention backend that a network is opened with, ``auto``."""
        before = [(layer, layer.backend) for layer in self._attentions()]
        self.set_attention_backend("auto")
        try:
            yield
        finally:
            for layer, backend in before:
                layer.backend = backend

    def _attentions(self) -> list[Any]:
        return [module for module in self.modules() if hasattr(module, "backend")]

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable | None = None) -> None:
        if attention_op is not None:
            raise ValueError("attention_op: xFormers chooses the operator by itself here; leave it out")
        self.set_attention_backend("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        self.set_attention_backend("auto")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that the model holds: what it saves, and the buffers that it makes anew each time."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def acts(layer: Any) -> bool:
    """Whether peft's layer changes what the one inside it does, and the weight does not hold it."""
    return not layer.merged and any(adapter in layer.lora_A for adapter in layer.active_adapters)


def _plain(net: Network) -> dict[str, Tensor]:
    """All that the network holds, without what peft has put around its layers."""
    tensors, name = _tensors(net), type(net).__name__
    for place, layer in net.named_modules():
        if not hasattr(layer, "merged_adapters"):
            continue
        if acts(layer):
            raise ValueError(
                f"{name}.to_diffusers: a LoRA acts in {place} that its weight does not hold; fuse it, or unload it and "
                "write it as a file of its own"
            )
        inside, own = f"{place}.base_layer.", f"{place}."
        tensors = {
            key.replace(inside, own, 1) if key.startswith(inside) else key: value
            for key, value in tensors.items()
            if key.startswith(inside) or not key.startswith(own)
        }
    for key, value in net.named_parameters():
        if not value.is_floating_point():
            raise ValueError(f"{name}.to_diffusers: {key} is quantized; export the network that it was made from")
    return tensors


def _reason(error: BaseException) -> str:
    """What stock says, and what that came from, which it leaves to the stack trace."""
    said, root = " ".join(str(error).split()), error
    while cause := root.__cause__ or root.__context__:
        root = cause
    return said if root is error else f"{said} ({root})"
