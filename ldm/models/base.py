"""What all networks share: the way in from a stock diffusers class and the way back out."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .attention import check_backend

if TYPE_CHECKING:
    from diffusers import ModelMixin

_BLOCKS = re.compile(r"(.*\.)?((down_blocks|up_blocks|resnets|attentions|transformer_blocks)\.\d+|mid_block)")


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
            kw: what ``from_pretrained`` takes: ``subfolder``, ``variant`` (``"fp16"``), ``dtype`` (float32 if not
                given, whatever the file holds) … Only safetensors are read, unless ``use_safetensors=False`` asks for
                a pickle.
        Raises:
            ValueError: another model, a config with an unknown field or an option that ours does not have, or weights
                that do not fit: too few, too many, other shapes.
            OSError: no such folder, no config or weights in it, or none of this variant.
        """
        if isinstance(source, str | Path):
            net, model = cls._open(source, kw)
        elif isinstance(source, cls.stock_class()):
            net, model = cls._twin(dict(source.config)), source
        else:
            likely = likely_model(source) if isinstance(source, Mapping) else None
            hint = f" (its keys look like {likely}; build the network and call load_state_dict)" if likely else ""
            kind = type(source).__name__
            raise ValueError(f"{cls.__name__} takes a {cls.stock}, a folder or a hub name, not a {kind}{hint}")
        net._take(model, f"{cls.__name__} from {source if isinstance(source, str | Path) else cls.stock}")
        return net.train(model.training)

    @classmethod
    def _twin(cls, config: Mapping[str, Any]) -> Self:
        """Our network on the meta device for a stock config, or a ValueError: nothing large has been read yet."""
        fields = {n: p.default for n, p in inspect.signature(cls.stock_class().__init__).parameters.items()}
        ours = set(inspect.signature(cls.__init__).parameters) - {"self"}
        given = {k: v for k, v in config.items() if not k.startswith("_")}
        for name, value in given.items():
            if name not in fields:
                if value in (None, False):  # old configs keep fields that stock has dropped; off, they do no harm
                    continue
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"config field {name}={value!r} is unknown to {cls.stock}{hint}")
            expected = cls.fixed.get(name, fields[name])
            if name not in ours and _plain(value) != _plain(expected):
                raise ValueError(
                    f"{cls.stock} with {name}={value!r} is not supported by {cls.__name__} ({expected!r} is)"
                )
        with torch.device("meta"):
            return cls(**{name: given.get(name, fields[name]) for name in ours})

    @classmethod
    def _open(cls, source: str | Path, kw: dict[str, Any]) -> tuple[Self, ModelMixin]:
        """``from_pretrained``, which only warns of unknown fields, and of missing or left-over weights; we refuse."""
        stock: Any = cls.stock_class()
        kw = {"use_safetensors": True, **kw}
        if not isinstance(dtype := kw.get("dtype", torch.float32), torch.dtype):  # stock takes a name for float32
            raise ValueError(f"dtype={dtype!r}: expected one of torch's, as torch.float16")
        _check_folder(cls, Path(source), kw)
        reach = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
        config: dict[str, Any] = stock.load_config(str(source), **{k: v for k, v in kw.items() if k in reach})
        name = config.get("_class_name", cls.stock)
        if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
            name = "PixArtTransformer2DModel"  # what its first checkpoints call it
        if name != cls.stock:
            ours = f": {twin} takes it" if (twin := OURS.get(name)) else ""
            raise ValueError(f"{source}: the config is one of {name}, {cls.__name__} takes {cls.stock}{ours}")
        try:
            net = cls._twin(config)
            with _quiet():
                model, found = stock.from_pretrained(str(source), output_loading_info=True, **kw)
        except ValueError as error:
            raise ValueError(f"{source}: {str(error).partition('. If you want')[0]}") from error
        missing, left_over = found["missing_keys"], found["unexpected_keys"]
        _refuse(f"{source}: weights of {cls.stock}", list(model.state_dict()), missing, left_over, cls.stock)
        return net, model

    def _take(self, model: nn.Module, what: str) -> None:
        _assign(self, dict(model.named_parameters()) | dict(model.named_buffers()), what)

    def to_diffusers(self) -> ModelMixin:
        """The stock twin around this network's weights (shared, not copied)."""
        with torch.device("meta"):
            model: Any = self.stock_class()(**self.stock_config())
        state = dict(self.named_parameters()) | dict(self.named_buffers())
        _assign(model, state, f"{self.stock} from {type(self).__name__}")
        return model.train(self.training)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's, but weights of another model are refused by name (ValueError) before any is copied."""
        if strict:
            _check_fit(self.state_dict(), state_dict, type(self).__name__, self.stock)
        return super().load_state_dict(state_dict, strict, assign)

    # --- memory ------------------------------------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """What ``forward`` hands to ``run_block``: the outermost modules with a forward of their own under the stock
        classes' names for blocks, in the order in which they were made."""
        found: dict[str, nn.Module] = {}
        for name, module in self.named_modules():
            has_forward = type(module).forward is not nn.Module.forward
            if has_forward and _BLOCKS.fullmatch(name) and not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = module
        return list(found.values())

    def enable_gradient_checkpointing(self, fraction: float = 1.0) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations (Chen et al. 2016).

        Args:
            fraction: share of the blocks that are recomputed, spread evenly over the depth; at least one is.
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

    def set_attention_backend(self, name: str) -> None:
        """Choose the attention kernel of every layer: ``auto``, ``xformers``, ``flash``, ``sdpa`` or ``plain``.

        Raises:
            ValueError: unknown, or it does not take the heads of a layer. Nothing has changed then.
            RuntimeError: it cannot run on this machine, and why.
        """
        layers: list[Any] = [module for module in self.modules() if hasattr(module, "backend")]
        check_backend(name)
        for width in sorted({layer.to_q.out_features // getattr(layer, "heads", 1) for layer in layers}):
            check_backend(name, width)
        for layer in layers:
            layer.backend = name

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable | None = None) -> None:
        if attention_op is not None:
            raise ValueError("attention_op: xFormers chooses the operator by itself here; leave it out")
        self.set_attention_backend("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        self.set_attention_backend("auto")


OURS = {
    "UNet2DConditionModel": "ldm.UNet",
    "AutoencoderKL": "ldm.VAE",
    "SD3Transformer2DModel": "ldm.MMDiT",
    "PixArtTransformer2DModel": "ldm.DiT",
}

# (what is found in one of the keys, whose it is), from the most telling to the least
TELL_TALES = (
    (r"lora_|\.lora\.|\.lokr_|\.hada_", "a LoRA, to be loaded on top of a model"),
    (r"^model\.diffusion_model\.", "a single-file checkpoint: `ldm convert` makes a folder of it"),
    (r"^(first_stage_model|cond_stage_model|conditioner)\.", "a single-file checkpoint: `ldm convert` makes a folder"),
    (r"^(input_blocks|middle_block|joint_blocks|double_blocks)\.", "the original authors' layout, not diffusers'"),
    (r"^(en|de)coder\.(down|up|mid)\.", "the original authors' autoencoder, not diffusers'"),
    (r"^(module|_orig_mod|base_model\.model)\.", "a model saved inside a wrapper (DDP, torch.compile, PEFT)"),
    (r"^controlnet_", "ControlNetModel"),
    (r"^single_transformer_blocks\.", "FluxTransformer2DModel"),
    (r"^adaln_single\.", "PixArtTransformer2DModel"),
    (r"\.attn\.add_q_proj\.", "SD3Transformer2DModel"),
    (r"^(text_model\.|vision_model\.|embeddings\.token_embedding)", "a CLIP model (CLIPTextModel)"),
    (r"\.SelfAttention\.q\.|^shared\.weight$", "T5EncoderModel"),
    (r"^quantize\.", "VQModel"),
    (r"\.time_emb_proj\.", "UNet2DConditionModel"),
    (r"^(en|de)coder\.(conv_in|mid_block)\.", "AutoencoderKL"),
)  # fmt: skip


def likely_model(keys: Iterable[str]) -> str | None:
    """Whose weights bear these names, as far as we know them."""
    keys = [key for key in keys if isinstance(key, str)]
    return next((name for sign, name in TELL_TALES if any(re.search(sign, key) for key in keys)), None)


def _refuse(what: str, wanted: list[str], missing: Iterable[str], left_over: Iterable[str], stock: str) -> None:
    """ValueError where something is missing or left over: the first of them, and whose weights these may be."""
    lacking, extra = set(missing), list(left_over)
    if not lacking and not extra:
        return
    first = [key for key in wanted if key in lacking]
    parts = [f"{len(first)} of {len(wanted)} missing, the first {', '.join(first[:3])}"] if first else []
    parts += [f"{len(extra)} left over, the first {', '.join(extra[:3])}"] if extra else []
    likely = likely_model([*(key for key in wanted if key not in lacking), *extra])
    hint = f"another config of {stock}" if likely == stock else likely
    raise ValueError(f"{what} do not fit: {'; '.join(parts)}" + (f". They look like {hint}" if hint else ""))


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Any], what: str, stock: str) -> None:
    missing, left_over = [key for key in own if key not in state], [key for key in state if key not in own]
    _refuse(f"weights of {what}", list(own), missing, left_over, stock)
    bad = [f"{k}: {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in own.items() if state[k].shape != v.shape]
    if bad:
        raise ValueError(f"weights of {what}: shapes differ, in {len(bad)} of {len(own)}; {'; '.join(bad[:3])}")


def _check_folder(cls: type[Network], root: Path, kw: dict[str, Any]) -> None:
    """OSError that says what a folder lacks; a hub name passes."""
    variant, subfolder = kw.get("variant"), kw.get("subfolder") or ""
    folder = root / subfolder
    if not root.is_dir():
        if root.is_file():
            raise NotADirectoryError(f"{root} is a file; expected a folder (`ldm convert` makes one of a single file)")
        if root.is_absolute() or len(root.parts) != 2 or root.parts[0] in (".", "..", "~"):  # no "owner/name"
            raise FileNotFoundError(f"{root}: no such folder; expected one that holds {cls.stock}, or a hub name")
        return
    if not (folder / "config.json").is_file():
        hint = ""
        if (index := root / "model_index.json").is_file():
            parts: dict[str, Any] = json.loads(index.read_text())
            fit = [k for k, v in parts.items() if isinstance(v, list) and v[1] == cls.stock]
            hint = f"; it is a whole pipeline, whose {cls.stock} is in subfolder={fit[0]!r}" if fit else ""
        raise FileNotFoundError(f"{folder}: no config.json of a {cls.stock} in it{hint}")
    stem = "diffusion_pytorch_model"
    files = sorted(p.name for p in folder.glob(f"{stem}*") if p.suffix != ".json")
    middle = f".{variant}" if variant else ""
    kind = "safetensors" if kw["use_safetensors"] else "bin"
    if not any(re.fullmatch(rf"{stem}{re.escape(middle)}(-\d+-of-\d+)?\.{kind}", name) for name in files):
        variants = {m[1] for name in files if (m := re.match(rf"{stem}\.(\w+)(-\d+-of-\d+)?\.{kind}$", name))}
        hint = f"; there is variant={sorted(variants)[0]!r}" if variants else ""
        if not hint and kw["use_safetensors"] and any(name.endswith(".bin") for name in files):
            hint = "; use_safetensors=False reads the pickle"
        raise FileNotFoundError(f"{folder}: no {stem}{middle}.{kind} in it, but {', '.join(files[:3]) or 'none'}{hint}")


@contextmanager
def _quiet() -> Iterator[None]:
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


def _assign(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load strictly and by reference: the parameters of ``state`` become those of ``model``."""
    own = model.state_dict()
    unsaved = {name for name, _ in model.named_buffers()} - set(own)
    state = {k: v for k, v in state.items() if k not in unsaved}
    _check_fit(own, state, what, getattr(model, "stock", type(model).__name__))
    nn.Module.load_state_dict(model, state, strict=True, assign=True)
    still_meta = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if still_meta:
        raise ValueError(f"{what}: {still_meta[:3]} would stay without a value")
