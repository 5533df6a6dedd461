"""What all networks share: the way in from a stock diffusers class and the way back out."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.utils.checkpoint
from torch import nn

if TYPE_CHECKING:
    from diffusers import ModelMixin


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

    def stock_config(self) -> dict[str, Any]:
        """The arguments that build the twin of this network."""
        return {**self.fixed, **self.config}

    @classmethod
    def from_diffusers(cls, source: ModelMixin | str | Path, **kw: Any) -> Self:
        """Our network around a stock one's weights (shared, not copied).

        Args:
            source: a stock model, a folder that holds one, or a hub name.
            kw: what ``from_pretrained`` takes (``subfolder``, ``dtype``, ``variant``). Only safetensors are read,
                unless ``use_safetensors=False`` asks for a pickle.
        Raises:
            ValueError: the stock config uses an option that ours does not have, or the weights do not fit.
            OSError: no such folder, or no safetensors in it.
        """
        model: Any = source
        if isinstance(source, str | Path):
            model = cls.stock_class().from_pretrained(str(source), **{"use_safetensors": True, **kw})
        meta = [name for name, p in model.named_parameters() if p.is_meta]
        if meta:
            raise ValueError(f"{source}: the file lacks {len(meta)} weights of {cls.stock}, the first is {meta[0]}")
        given = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
        ours = set(inspect.signature(cls.__init__).parameters) - {"self"}
        defaults = {n: p.default for n, p in inspect.signature(type(model).__init__).parameters.items()}
        for name, value in given.items():
            expected = cls.fixed.get(name, defaults.get(name))
            if name not in ours and name in defaults and _plain(value) != _plain(expected):
                raise ValueError(
                    f"{cls.stock} with {name}={value!r} is not supported by {cls.__name__} ({expected!r} is)"
                )
        with torch.device("meta"):
            net = cls(**{k: v for k, v in given.items() if k in ours})
        net._take(model, f"{cls.__name__} from {source if isinstance(source, str | Path) else cls.stock}")
        return net.train(model.training)

    def to_diffusers(self) -> ModelMixin:
        """The stock twin around this network's weights (shared, not copied)."""
        with torch.device("meta"):
            model: Any = self.stock_class()(**self.stock_config())
        state = dict(self.named_parameters()) | dict(self.named_buffers())
        _assign(model, state, f"{self.stock} from {type(self).__name__}")
        return model.train(self.training)

    def _take(self, model: nn.Module, what: str) -> None:
        _assign(self, dict(model.named_parameters()) | dict(model.named_buffers()), what)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def set_attention_backend(self, name: str) -> None:
        """Choose the attention kernel of every layer: ``auto``, ``xformers``, ``flash``, ``sdpa`` or ``plain``."""
        from .attention import check_backend

        check_backend(name)
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = name  # type: ignore[assignment]

    def enable_xformers_memory_efficient_attention(self) -> None:
        self.set_attention_backend("xformers")

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """``block(*args)``, recomputed in the backward pass where gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
        return block(*args)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _assign(model: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load strictly and by reference: the parameters of ``state`` become those of ``model``."""
    wanted = set(model.state_dict())
    state = {k: v for k, v in state.items() if k in wanted or k not in dict(model.named_buffers())}
    missing, left_over = sorted(wanted - set(state)), sorted(set(state) - wanted)
    if missing or left_over:
        raise ValueError(f"{what}: weights do not fit; missing {missing[:3]}, left over {left_over[:3]}")
    own = model.state_dict()
    bad = [f"{k}: {tuple(v.shape)} for {tuple(own[k].shape)}" for k, v in state.items() if v.shape != own[k].shape]
    if bad:
        raise ValueError(f"{what}: shapes differ; {'; '.join(bad[:3])}")
    model.load_state_dict(state, strict=True, assign=True)
    still_meta = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if still_meta:
        raise ValueError(f"{what}: {still_meta[:3]} would stay without a value")
