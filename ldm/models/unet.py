"""The convolutional denoiser of Stable Diffusion 1, 2 and XL: ADM's UNet with text in its attention.

Dhariwal & Nichol 2021 (the residual UNet), Rombach et al. 2022 §3.3 (cross-attention to text), Podell et al. 2023
(SDXL: deeper transformers, size and crop conditioning). Names and shapes are those of ``UNet2DConditionModel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cond import Cond
from ..reuse import cached_depth, seldom
from .base import Network
from .embeddings import TimestepMLP, timestep_embedding
from .linear import Conv3x3
from .transformer import Transformer2D

T = TypeVar("T", int, bool)


class ResnetBlock(nn.Module):
    """Two convolutions around the time embedding; the input is added back (DDPM, ADM)."""

    def __init__(self, width_in: int, width: int, time_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in)
        self.conv1 = Conv3x3(width_in, width)
        self.time_emb_proj = nn.Linear(time_width, width)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv2 = Conv3x3(width, width)
        self.conv_shortcut = None if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W); emb (B, time_width), the time embedding after its SiLU."""
        h = self.conv1(_silu(self.norm1(x))).add_(self.time_emb_proj(emb)[:, :, None, None])
        h = self.conv2(_silu(self.norm2(h)))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv3x3(width, width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The layers of one resolution. The UNet walks through them, so that it can recompute each one by itself."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[Transformer2D] = (),
        down: Downsample | None = None,
        up: Upsample | None = None,
    ):
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([down] if down else [])
        self.upsamplers = nn.ModuleList([up] if up else [])


class UNet(Network):
    """The twin of diffusers' ``UNet2DConditionModel``; its config fields, with its defaults.

    Args:
        sample_size: height and width of the latents that the model is meant for; any other size runs too.
        in_channels, out_channels: of the latents; ``in_channels`` counts those of ``Cond.extra``.
        flip_sin_to_cos, freq_shift: of the sinusoids of time (``timestep_embedding``).
        down_block_types: per level, first the widest map: ``DownBlock2D`` or ``CrossAttnDownBlock2D``.
        up_block_types: per level, last the widest map: ``UpBlock2D`` or ``CrossAttnUpBlock2D``.
        block_out_channels: channels per level. The resolution is halved between levels.
        layers_per_block: residual blocks per level on the way down (one more on the way up).
        norm_num_groups: of every group norm.
        cross_attention_dim: width of ``Cond.tokens``.
        transformer_layers_per_block: depth of each transformer; one number, or one per level.
        attention_head_dim: the NUMBER of heads, whatever its name says; one number, or one per level.
        use_linear_projection: transformers enter and leave by a linear layer (SD 2, SDXL), not a 1x1 convolution.
        upcast_attention: kept for the stock config (SD 2.1 sets it). Fused kernels sum in float32 without it, here
            as there.
        only_cross_attention: the first attention of a level's blocks goes to the text too (the x4 upscaler); one
            truth value, or one per level. The block in the middle never does.
        class_embed_type: what ``Cond.class_labels`` are: None with ``num_class_embeds`` for numbers below it (the x4
            upscaler's noise level), ``projection`` for vectors (unCLIP).
        num_class_embeds: how many labels there are.
        time_cond_proj_dim: sinusoids of ``Cond.guidance``, for networks distilled with guidance (LCM).
        addition_embed_type: ``text_time`` adds ``Cond.pooled`` and ``Cond.size_ids`` to the time embedding (SDXL).
        addition_time_embed_dim: sinusoids per number in ``size_ids``.
        projection_class_embeddings_input_dim: width of ``pooled`` + 6 * ``addition_time_embed_dim``; or, for
            ``projection``, of ``Cond.class_labels``.
    Raises:
        ValueError: fields that contradict each other.
    """

    stock = "UNet2DConditionModel"

    def __init__(
        self,
        *,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
        down_block_types: Sequence[str] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types: Sequence[str] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        norm_num_groups: int = 32,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: int | Sequence[int] = 1,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        upcast_attention: bool | None = False,
        only_cross_attention: bool | Sequence[bool] = False,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        time_cond_proj_dim: int | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        projection_class_embeddings_input_dim: int | None = None,
    ):
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            flip_sin_to_cos=flip_sin_to_cos,
            freq_shift=freq_shift,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            cross_attention_dim=cross_attention_dim,
            transformer_layers_per_block=transformer_layers_per_block,
            attention_head_dim=attention_head_dim,
            use_linear_projection=use_linear_projection,
            upcast_attention=upcast_attention,
            only_cross_attention=only_cross_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            time_cond_proj_dim=time_cond_proj_dim,
            addition_embed_type=addition_embed_type,
            addition_time_embed_dim=addition_time_embed_dim,
            projection_class_embeddings_input_dim=projection_class_embeddings_input_dim,
        )
        widths, groups, text = list(block_out_channels), norm_num_groups, cross_attention_dim
        levels = len(widths)
        layers = _per_level("layers_per_block", layers_per_block, levels)
        depths = _per_level("transformer_layers_per_block", transformer_layers_per_block, levels)
        heads = _per_level("attention_head_dim", attention_head_dim, levels)
        only_cross = _per_level("only_cross_attention", only_cross_attention, levels, bool)
        text_down = _with_text("down_block_types", down_block_types, "Down", levels)
        text_up = _with_text("up_block_types", up_block_types, "Up", levels)[::-1]
        if not isinstance(text, int):
            raise ValueError(f"cross_attention_dim: {text!r}; expected one number, the width of the text tokens")
        for i, width in enumerate(widths):
            if width % groups:
                raise ValueError(f"block_out_channels[{i}] = {width} is no multiple of norm_num_groups = {groups}")
            if (text_down[i] or text_up[i] or i == levels - 1) and width % heads[i]:
                raise ValueError(
                    f"block_out_channels[{i}] = {width} is no multiple of its {heads[i]} heads; "
                    "attention_head_dim is the number of heads"
                )
        time_width = 4 * widths[0]

        def resnet(width_in: int, width: int) -> ResnetBlock:
            return ResnetBlock(width_in, width, time_width, groups)

        def transformer(i: int, only_cross: bool) -> Transformer2D:
            return Transformer2D(widths[i], heads[i], depths[i], text, groups, use_linear_projection, only_cross)

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], time_width, time_cond_proj_dim)
        self.class_embedding = None
        if class_embed_type is None and (num_class_embeds is None or num_class_embeds > 0):
            if num_class_embeds is not None:
                self.class_embedding = nn.Embedding(num_class_embeds, time_width)
        elif class_embed_type == "projection" and projection_class_embeddings_input_dim and num_class_embeds is None:
            self.class_embedding = TimestepMLP(projection_class_embeddings_input_dim, time_width)
        else:
            raise ValueError(
                f"class_embed_type {class_embed_type!r} with num_class_embeds = {num_class_embeds}; expected None with "
                "a number of labels or none, or 'projection' with projection_class_embeddings_input_dim, the width of "
                "Cond.class_labels, and no num_class_embeds"
            )
        self.add_embedding = None
        if addition_embed_type == "text_time":
            self.size_width, added = addition_time_embed_dim or 0, projection_class_embeddings_input_dim or 0
            self.pooled_width = added - 6 * self.size_width
            if self.size_width < 1 or self.pooled_width < 1:
                raise ValueError(
                    "addition_embed_type 'text_time' needs addition_time_embed_dim and "
                    "projection_class_embeddings_input_dim = 6 * addition_time_embed_dim + the width of Cond.pooled; "
                    f"they are {addition_time_embed_dim} and {projection_class_embeddings_input_dim}"
                )
            self.add_embedding = TimestepMLP(added, time_width)
        elif addition_embed_type is not None:
            raise ValueError(f"addition_embed_type: {addition_embed_type!r}; expected None or 'text_time'")

        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        skips, x = [widths[0]], widths[0]  # channels of the maps kept for the way up, and of the current one
        for i, width in enumerate(widths):
            resnets = [resnet(x if j == 0 else width, width) for j in range(layers[i])]
            attentions = [transformer(i, only_cross[i]) for _ in resnets] if text_down[i] else []
            down = Downsample(width) if i < levels - 1 else None
            self.down_blocks.append(Level(resnets, attentions, down=down))
            skips += [width] * (layers[i] + (down is not None))
            x = width
        self.mid_block = Level([resnet(x, x), resnet(x, x)], [transformer(levels - 1, False)])
        for i in reversed(range(levels)):
            resnets = []
            for _ in range(layers[i] + 1):
                resnets.append(resnet(x + skips.pop(), widths[i]))
                x = widths[i]
            attentions = [transformer(i, only_cross[i]) for _ in resnets] if text_up[i] else []
            self.up_blocks.append(Level(resnets, attentions, up=Upsample(x) if i > 0 else None))
        self.conv_norm_out = nn.GroupNorm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        self.init()

    @torch.no_grad()
    def init(self) -> None:
        """torch's own start, but the convolutional branches and the output begin at zero (DDPM, ADM): the network
        predicts 0. Attention does not: the text is heard from the first step, and short runs learn it sooner."""
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                _zero(module.conv2)
        _zero(self.conv_out)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The network's output for noisy latents.

        Args:
            x: (B, in_channels, H, W), together with the channels of ``cond.extra``.
            time: (B,) in the network's own units (0 to 1000).
            cond: ``tokens`` (B, L, cross_attention_dim), and optionally ``bias`` (B, L); for SDXL ``pooled``
                and ``size_ids`` too; ``class_labels`` and, optionally, ``guidance`` as the config says.
        Returns:
            (B, out_channels, H, W).
        Raises:
            ValueError: H or W cannot be halved at every level, or ``cond`` does not fit the model.
        """
        x = cond.beside(x)
        self._check(x, cond)
        emb = F.silu(self._embed(x, time, cond))  # (B, 4 * widths[0]); its SiLU is the same in every block
        down = [
            (level, j)
            for level in _levels(self.down_blocks)
            for j in range(len(level.resnets) + len(level.downsamplers))
        ]
        up = [(level, j) for level in _levels(self.up_blocks) for j in range(len(level.resnets))]
        cached = cached_depth()

        def around(x: Tensor, i: int) -> Tensor:
            """What lies below the i-th map of the way down, and the layer of the way up that takes both."""
            below = seldom(lambda x: inside(x, i), x, self, cond.tokens) if i == cached else inside(x, i)
            level, j = up[-1 - i]
            x = torch.cat([below, x], dim=1)
            del below
            x = self._layer(level, j, x, emb, cond)
            return level.upsamplers[0](x) if level.upsamplers and j == len(level.resnets) - 1 else x

        def inside(x: Tensor, i: int) -> Tensor:
            if i == len(down):
                return self._layer(self.mid_block, 1, self._layer(self.mid_block, 0, x, emb, cond), emb, cond)
            return around(self._layer(*down[i], x, emb, cond), i + 1)

        return self.conv_out(_silu(self.conv_norm_out(around(self.conv_in(x), 0))))

    def _layer(self, level: Level, j: int, x: Tensor, emb: Tensor, cond: Cond) -> Tensor:
        if j == len(level.resnets):
            return level.downsamplers[0](x)
        x = self.run_block(level.resnets[j], x, emb)
        if j < len(level.attentions):
            x = self.run_block(level.attentions[j], x, cond.tokens, cond.bias)
        return x

    def _embed(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        flip, shift = self.config["flip_sin_to_cos"], self.config["freq_shift"]
        waves = timestep_embedding(time, self.config["block_out_channels"][0], flip_sin_to_cos=flip, freq_shift=shift)
        guidance = None
        if cond.guidance is not None:  # Luo et al. 2023 (LCM), §4.2: ω = scale - 1
            width, omega = self.config["time_cond_proj_dim"], 1000 * (cond.guidance.float() - 1)
            guidance = timestep_embedding(omega, width, flip_sin_to_cos=False, freq_shift=1).to(x.dtype)
        emb = self.time_embedding(waves.to(x.dtype), guidance)
        if cond.class_labels is not None and self.class_embedding is not None:
            whole = isinstance(self.class_embedding, nn.Embedding)
            emb = emb + self.class_embedding(cond.class_labels if whole else cond.class_labels.to(x.dtype))
        if self.add_embedding is None:
            return emb
        pooled, size_ids = cast("tuple[Tensor, Tensor]", (cond.pooled, cond.size_ids))
        sizes = timestep_embedding(size_ids.flatten(), self.size_width, flip_sin_to_cos=flip, freq_shift=shift)
        both = torch.cat([pooled, sizes.view(len(x), -1).to(x.dtype)], dim=-1)
        return emb + self.add_embedding(both)

    def _check(self, x: Tensor, cond: Cond) -> None:
        channels, width = self.config["in_channels"], self.config["cross_attention_dim"]
        if x.shape[1] != channels:
            raise ValueError(f"x: {x.shape[1]} channels with those of Cond.extra; the UNet takes {channels}")
        if cond.tokens.ndim != 3 or cond.tokens.shape[0] != len(x) or cond.tokens.shape[2] != width:
            got, expected = tuple(cond.tokens.shape), f"({len(x)}, L, {width})"
            raise ValueError(f"Cond.tokens: shape {got}, expected {expected}: one row per picture, text width {width}")
        self._check_vectors(len(x), cond)
        factor = 2 ** (len(self.down_blocks) - 1)
        h, w = x.shape[-2:]
        if h % factor or w % factor:
            fit = [max(factor, int(n / factor + 0.5) * factor) for n in (h, w)]
            raise ValueError(
                f"latents of {h} x {w}: the UNet halves them {len(self.down_blocks) - 1} times, so both sides must be "
                f"multiples of {factor}; the nearest that fits is {fit[0]} x {fit[1]}"
            )

    def _check_vectors(self, batch: int, cond: Cond) -> None:
        wanted: dict[str, tuple[int, ...]] = {}
        if self.add_embedding is not None:
            wanted |= {"pooled": (batch, self.pooled_width), "size_ids": (batch, 6)}
        if isinstance(self.class_embedding, TimestepMLP):
            wanted["class_labels"] = (batch, self.class_embedding.linear_1.in_features)
        elif self.class_embedding is not None:
            wanted["class_labels"] = (batch,)
        if self.time_embedding.cond_proj is not None and cond.guidance is not None:  # without it: as if not distilled
            wanted["guidance"] = (batch,)
        for name, shape in wanted.items():
            got = getattr(cond, name)
            if got is None or got.shape != shape:
                what = "missing" if got is None else f"shape {tuple(got.shape)}"
                raise ValueError(f"Cond.{name}: {what}, expected {shape} by this UNet's config")
        for name in ("class_labels", "guidance"):
            if getattr(cond, name) is not None and name not in wanted:
                raise ValueError(f"Cond.{name}: this UNet's config has no layer that takes it; leave it out")
        if isinstance(self.class_embedding, nn.Embedding) and (labels := cond.class_labels) is not None:
            below = self.class_embedding.num_embeddings
            # on a GPU the values would have to be waited for; the lookup refuses them there
            known = (
                labels.device.type != "cpu"
                or type(labels) is not Tensor
                or bool(((labels >= 0) & (labels < below)).all())
            )
            if labels.is_floating_point() or not known:
                raise ValueError(f"Cond.class_labels: {labels.tolist()}; expected whole numbers from 0 to {below - 1}")


def _per_level(name: str, value: T | Sequence[T], levels: int, kind: type[T] = int) -> list[T]:
    values = list(value) if isinstance(value, Sequence) else [value] * levels
    if len(values) != levels or not all(type(v) is kind and (kind is bool or v > 0) for v in values):
        what = "truth value" if kind is bool else "positive number"
        raise ValueError(f"{name}: {value!r}; expected one {what}, or one for each of the {levels} levels")
    return values


def _with_text(name: str, types: Sequence[str], way: str, levels: int) -> list[bool]:
    known = {f"{way}Block2D": False, f"CrossAttn{way}Block2D": True}
    if len(types) != levels or not set(types) <= set(known):
        raise ValueError(f"{name}: {list(types)}; expected {levels} (as in block_out_channels) of {', '.join(known)}")
    return [known[t] for t in types]


def _levels(blocks: nn.ModuleList) -> list[Level]:
    return cast("list[Level]", [*blocks])


def _silu(x: Tensor) -> Tensor:  # of a map that nobody else holds: in place where no gradient needs it
    return F.silu(x, inplace=not (torch.is_grad_enabled() and x.requires_grad))


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
