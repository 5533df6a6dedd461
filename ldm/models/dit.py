"""The diffusion transformer of PixArt-α and PixArt-Σ (Chen et al. 2023, 2024; after DiT, Peebles & Xie 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cond import Cond
from .attention import attention
from .base import Network, _assign
from .embeddings import TimestepMLP, timestep_embedding
from .linear import Linear
from .mmdit import FeedForward, modulate

if TYPE_CHECKING:
    from diffusers import ModelMixin

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TIME_WIDTH = 256  # sinusoids that the time, and each number of a size, is turned into
MICRO_CONDITIONED = 128  # the sample_size at which diffusers adds the size embedders if it is not told


class DiT(Network):
    """Twin of diffusers' ``PixArtTransformer2DModel``: self-attention, cross-attention to the text, adaLN-single.

    Args:
        num_attention_heads, attention_head_dim: their product is the width, a multiple of 4.
        in_channels, out_channels: of the latents; ``out_channels=None`` takes ``in_channels``. PixArt's is twice
            ``in_channels``: the second half tells the variance (``Denoiser(…, learned_variance=True)``).
        num_layers: blocks.
        cross_attention_dim: what the text is projected to: the network's width.
        sample_size: side of the latents that the network is laid out for.
        patch_size: side of a patch, in latent pixels.
        interpolation_scale: positions run from 0 to ``sample_size / patch_size / interpolation_scale`` along either
            side, whatever its length (Chen et al. 2024, "PE interpolation"); None takes ``max(sample_size // 64, 1)``.
        use_additional_conditions: tell the network the picture's size and shape, ``Cond.size_ids`` (as in SDXL, Podell
            et al. 2023, §2.2). None, as in diffusers: if ``sample_size`` is 128; PixArt-Σ of 1024 pixels says False.
        caption_channels: width of the text tokens.
    Raises:
        ValueError: widths that do not fit together, or a table without extent.
    """

    stock = "PixArtTransformer2DModel"

    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        cross_attention_dim: int = 1152,
        sample_size: int = 128,
        patch_size: int = 2,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int = 4096,
    ):
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            cross_attention_dim=cross_attention_dim,
            sample_size=sample_size,
            patch_size=patch_size,
            interpolation_scale=interpolation_scale,
            use_additional_conditions=use_additional_conditions,
            caption_channels=caption_channels,
        )
        heads, width = num_attention_heads, num_attention_heads * attention_head_dim
        sized = sample_size == MICRO_CONDITIONED if use_additional_conditions is None else use_additional_conditions
        scale = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale
        if cross_attention_dim != width:
            raise ValueError(
                f"cross_attention_dim={cross_attention_dim}: expected the network's width, {heads} heads × "
                f"{attention_head_dim} = {width}"
            )
        if not caption_channels:
            raise ValueError(f"caption_channels={caption_channels}: expected the width of the text tokens")
        if sized and width % 3:
            raise ValueError(
                f"use_additional_conditions: the width, {width}, is shared by height, width and aspect ratio; expected "
                f"a multiple of 3, the nearest of 12 is {max(round(width / 12), 1) * 12}"
            )
        self.patch_size, self.sized = patch_size, sized
        self.out_channels = in_channels if out_channels is None else out_channels
        self.pos_embed = PatchEmbed(in_channels, width, patch_size, sample_size, scale)
        self.adaln_single = AdaLNSingle(width, sized)
        self.caption_projection = CaptionProjection(caption_channels, width)
        self.transformer_blocks = nn.ModuleList(Block(width, heads) for _ in range(num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = Linear(width, patch_size**2 * self.out_channels)
        self._init_weights()

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            x: (B, C, H, W) noisy latents.
            time: (B,) in 0 to 1000, fractions allowed.
            cond: ``tokens`` (B, L, caption_channels); ``bias`` (B, L) is added to the logits of the text keys, -inf
                hides a padded token (a row that hides all gets nothing from it); with ``use_additional_conditions``
                also ``size_ids`` (B, 3): the picture's height and width in pixels, and height / width.
        Returns:
            (B, out_channels, H, W).
        Raises:
            ValueError: a size that the patch does not divide, no size where one must be told, or text of another width.
        """
        self._check(x, cond)
        p, (height, width) = self.patch_size, x.shape[-2:]
        x = self.pos_embed(x)  # (B, N, D)
        tokens, bias = visible(cond.tokens, cond.bias)
        text = self.caption_projection(tokens)  # (B, L, D)
        c, modulations = self.adaln_single(time, cond.size_ids, x.dtype)  # (B, D), (B, 6, D)
        for block in self.transformer_blocks:
            x = self.run_block(block, x, text, modulations, bias)
        shift, scale = (self.scale_shift_table + c[:, None]).chunk(2, dim=1)  # (B, 1, D)
        x = self.proj_out(modulate(x, shift, scale))  # (B, N, p · p · C)
        x = x.view(-1, height // p, width // p, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)

    def _check(self, x: Tensor, cond: Cond) -> None:
        if x.ndim != 4 or x.shape[1] != self.config["in_channels"]:
            channels = self.config["in_channels"]
            raise ValueError(f"DiT: latents are {tuple(x.shape)}; expected (B, C, H, W) with in_channels={channels}")
        wanted = self.config["caption_channels"]
        if cond.tokens.shape[-1] != wanted:
            raise ValueError(f"DiT: cond.tokens is {cond.tokens.shape[-1]} wide; expected caption_channels={wanted}")
        if cond.bias is not None and cond.bias.shape != cond.tokens.shape[:2]:
            raise ValueError(
                f"DiT: cond.bias is {tuple(cond.bias.shape)}; expected one per token, {tuple(cond.tokens.shape[:2])}"
            )
        if self.sized and (cond.size_ids is None or cond.size_ids.shape != (len(x), 3)):
            given = None if cond.size_ids is None else tuple(cond.size_ids.shape)
            raise ValueError(
                f"DiT: cond.size_ids is {given}; with use_additional_conditions expected ({len(x)}, 3): height and "
                "width in pixels, height / width"
            )

    def _init_weights(self) -> None:
        """DiT's adaLN-zero (Peebles & Xie 2023, §3.2), as adaLN-single says it (Chen et al. 2023, §2.3: the tables
        start where they yield the DiT's own modulation, the cross-attention's output at zero): every block starts as
        the identity, the network's output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: a patch is projected as by a linear layer
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, TimestepMLP | CaptionProjection):
                nn.init.normal_(module.linear_1.weight, std=0.02)
                nn.init.normal_(module.linear_2.weight, std=0.02)
            if isinstance(module, Block | DiT):
                nn.init.zeros_(module.scale_shift_table)
            if isinstance(module, Block):
                nn.init.zeros_(module.attn2.to_out[0].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.adaln_single.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    def to_diffusers(self) -> ModelMixin:
        with torch.device("meta"):
            model: Any = self.stock_class()(**self.stock_config())
        model.pos_embed.pos_embed = self.pos_embed.pos_embed.to(self.device)  # not a weight: in no state dict
        _assign(model, dict(self.named_parameters()), f"{self.stock} from DiT")
        return model.train(self.training)


def visible(tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The text without what every row hides at its end: padding costs as much as words.

    Only on a CPU: elsewhere the host would wait for the device to look.

    Args:
        tokens: (B, L, D).
        bias: (B, L), of ``Cond``.
    Returns:
        The same two, of the same or a smaller length; no bias where it would add nothing.
    """
    if bias is None or bias.device.type != "cpu" or torch.compiler.is_compiling():
        return tokens, bias
    seen = (bias != -torch.inf).any(0).nonzero()  # of the L tokens, those that some row sees
    length = int(seen.max()) + 1 if len(seen) else 1
    return tokens[:, :length], bias[:, :length] if bias[:, :length].any() else None


class PatchEmbed(nn.Module):
    """A picture's p × p patches as tokens, with sinusoids of their positions added, for a picture of any size.

    Args:
        sample_size: side of the picture that the network was laid out for, in pixels of its input.
        scale: positions run from 0 to just under sample_size / patch_size / scale along either side.
    """

    pos_embed: Tensor

    def __init__(self, channels: int, width: int, patch_size: int, sample_size: int, scale: float):
        super().__init__()
        self.patch_size, self.base, self.scale = patch_size, sample_size // patch_size, scale
        if width % 4:
            raise ValueError(f"width {width} of the positional table: expected a multiple of 4")
        if self.base < 1 or scale <= 0:
            raise ValueError(
                f"sample_size={sample_size}, interpolation_scale={scale}: expected a patch and more than 0"
            )
        self.width = width
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        table = self.table(self.base, self.base, torch.device("cpu"))  # of values, where the weights are still meta
        self.register_buffer("pos_embed", table.flatten(0, 1)[None], persistent=False)  # (1, base², D)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), N = H · W / p², row by row.

        Raises:
            ValueError: a size that is no multiple of the patch.
        """
        p, (height, width) = self.patch_size, x.shape[-2:]
        fits = [max(p, (size + p // 2) // p * p) for size in (height, width)]
        if [height, width] != fits:
            raise ValueError(
                f"input of {height} × {width} (height × width): sides must be multiples of the patch, {p}; the nearest "
                f"that fits is {fits[0]} × {fits[1]}"
            )
        y = self.proj(x).permute(0, 2, 3, 1)  # (B, h, w, D)
        h, w = y.shape[1:3]
        if h == w == self.base and self.pos_embed.device == y.device:
            table = self.pos_embed.unflatten(1, (h, w))
        else:
            table = self.table(h, w, y.device)
        return (y + table).to(y.dtype).contiguous().flatten(1, 2)

    def table(self, h: int, w: int, device: torch.device) -> Tensor:
        """(h, w, D) float32: sinusoids of the column (first half) and of the row, sines first."""
        quarter = self.width // 4
        wide = torch.float32 if device.type == "mps" else torch.float64
        rates = 10_000.0 ** -(torch.arange(quarter, dtype=wide, device=device) / quarter)

        def waves(n: int) -> Tensor:  # (n, D / 2)
            position = torch.arange(n, dtype=torch.float32, device=device) / (n / self.base) / self.scale
            angles = torch.outer(position.to(wide), rates)
            return torch.cat([angles.sin(), angles.cos()], dim=-1).float()

        return torch.cat([waves(w)[None].expand(h, -1, -1), waves(h)[:, None].expand(-1, w, -1)], dim=-1)


class TimeSizeEmbed(nn.Module):
    """The time as a vector; where ``sized``, the picture's height, width and aspect ratio fill a third of it each."""

    def __init__(self, width: int, sized: bool):
        super().__init__()
        self.timestep_embedder = TimestepMLP(TIME_WIDTH, width)
        self.resolution_embedder = TimestepMLP(TIME_WIDTH, width // 3) if sized else None
        self.aspect_ratio_embedder = TimestepMLP(TIME_WIDTH, width // 3) if sized else None

    def forward(self, time: Tensor, size_ids: Tensor | None, dtype: torch.dtype) -> Tensor:  # (B,), (B, 3) -> (B, D)
        c = self.timestep_embedder(timestep_embedding(time, TIME_WIDTH).to(dtype))
        if self.resolution_embedder is None or self.aspect_ratio_embedder is None or size_ids is None:
            return c
        waves = timestep_embedding(size_ids.flatten(), TIME_WIDTH).to(dtype).unflatten(0, size_ids.shape)  # (B, 3, T)
        height_width = self.resolution_embedder(waves[:, :2]).flatten(1)  # (B, 2 D / 3)
        return c + torch.cat([height_width, self.aspect_ratio_embedder(waves[:, 2])], dim=-1)


class AdaLNSingle(nn.Module):
    """One modulation for all blocks, to which each adds its own table (adaLN-single, Chen et al. 2023, §2.3)."""

    def __init__(self, width: int, sized: bool):
        super().__init__()
        self.emb = TimeSizeEmbed(width, sized)
        self.linear = Linear(width, 6 * width)

    def forward(self, time: Tensor, size_ids: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The vector (B, D) that the last layer takes, and six from it (B, 6, D) for the blocks."""
        c = self.emb(time, size_ids, dtype)
        return c, self.linear(F.silu(c)).unflatten(1, (6, -1))


class CaptionProjection(nn.Module):
    """Two layers from the text encoder's width to ours; names are those of ``PixArtAlphaTextProjection``."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.linear_1 = Linear(width_in, width)
        self.linear_2 = Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:  # (B, L, D') -> (B, L, D)
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to ``text``; unlike the UNet's, with a bias in every layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.backend = "auto"
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.Sequential(Linear(width, width))

    def forward(self, x: Tensor, text: Tensor | None = None, bias: Tensor | None = None) -> Tensor:  # (B, N, D)
        text = x if text is None else text  # (B, M, D)
        projected = self.to_q(x), self.to_k(text), self.to_v(text)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)  # (B, H, N, d), (B, H, M, d)
        y = attention(q, k, v, bias, backend=self.backend)  # (B, H, N, d)
        return self.to_out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention and feed-forward, modulated and gated; between them cross-attention, with neither and no norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.attn1 = Attention(width, heads)
        self.attn2 = Attention(width, heads)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, text: Tensor, modulations: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, N, D), text (B, L, D), modulations (B, 6, D), bias (B, L) -> (B, N, D)."""
        six = (self.scale_shift_table + modulations).chunk(6, dim=1)  # (B, 1, D) each
        shift, scale, gate, shift_ff, scale_ff, gate_ff = six
        x = torch.addcmul(x, gate, self.attn1(modulate(x, shift, scale)))
        x = x + self.attn2(x, text, bias)
        return torch.addcmul(x, gate_ff, self.ff(modulate(x, shift_ff, scale_ff)))
