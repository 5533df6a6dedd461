"""The diffusion transformer of PixArt-α and PixArt-Σ (Chen et al. 2023, 2024; after DiT, Peebles & Xie 2023)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cond import Cond
from ..reuse import cached_depth, once, seldom
from .adaln import TIME_WIDTH, Attention, FeedForward, check_inputs, checked_width, init_weights, modulate, unpatchify
from .base import Network, is_compiled
from .embeddings import PatchEmbed, TimestepMLP, timestep_embedding
from .linear import Linear

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
        ValueError: widths that do not fit together, or a size that is not above 0.
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
        if caption_channels is None:
            raise ValueError("caption_channels=None: expected the width of the text tokens")
        heads, width = num_attention_heads, checked_width(self, "cross_attention_dim")
        sized = sample_size == MICRO_CONDITIONED if use_additional_conditions is None else use_additional_conditions
        scale = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale
        if sized and width % 3:
            raise ValueError(
                f"use_additional_conditions: the width, {width}, is shared by height, width and aspect ratio; expected "
                f"a multiple of 3, the nearest of 12 is {max(round(width / 12), 1) * 12}"
            )
        self.patch_size, self.sized = patch_size, sized
        self.out_channels = in_channels if out_channels is None else out_channels
        self.pos_embed = PatchEmbed(in_channels, width, patch_size, sample_size, scale=scale)
        self.adaln_single = AdaLNSingle(width, sized)
        self.caption_projection = CaptionProjection(caption_channels, width)
        self.transformer_blocks = nn.ModuleList(Block(width, heads) for _ in range(num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = Linear(width, patch_size**2 * self.out_channels)
        self._init_weights()

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            x: (B, C, H, W) noisy latents, ``in_channels`` of them together with the channels of ``cond.extra``.
            time: (B,) in 0 to 1000, fractions allowed.
            cond: ``tokens`` (B, L, caption_channels); ``bias`` (B, L) is added to the logits of the text keys, -inf
                hides a padded token (a row that hides all gets nothing from it); with ``use_additional_conditions``
                also ``size_ids`` (B, 3): the picture's height and width in pixels, and height / width.
        Returns:
            (B, out_channels, H, W).
        Raises:
            ValueError: a size that the patch does not divide, no size where one must be told, a time or text of another
                shape.
        """
        x = cond.beside(x)
        self._check(x, time, cond)
        compiled = torch.compiler.is_compiling() or is_compiled(self.transformer_blocks[0])  # for one length of text
        if x.device.type == "cpu" and not compiled:  # to look elsewhere makes the host wait
            (cond,) = once(visible, cond)
        height, width = x.shape[-2:]
        x = self.pos_embed(x)  # (B, N, D)
        text = once(self.caption_projection, cond.tokens)  # (B, L, D)
        c, modulations = self.adaln_single(time, cond.size_ids, x.dtype)  # (B, D), (B, 6, D)

        def through(x: Tensor, blocks: nn.ModuleList) -> Tensor:
            for block in blocks:
                x = self.run_block(block, x, text, modulations, cond.bias)
            return x

        blocks, first = self.transformer_blocks, cached_depth()
        if first is None:
            x = through(x, blocks)
        else:
            x = through(x, blocks[: first + 1])
            x = seldom(lambda x: through(x, blocks[first + 1 :]), x, self, cond.tokens, change=True)
        shift, scale = (self.scale_shift_table + c[:, None]).chunk(2, dim=1)  # (B, 1, D)
        x = self.proj_out(modulate(x, shift, scale))  # (B, N, p · p · C)
        return unpatchify(x, height, width, self.patch_size)

    def _check(self, x: Tensor, time: Tensor, cond: Cond) -> None:
        check_inputs(self, x, time, cond, tokens="caption_channels")
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
        init_weights(self)
        for module in self.modules():
            if isinstance(module, CaptionProjection):
                nn.init.normal_(module.linear_1.weight, std=0.02)
                nn.init.normal_(module.linear_2.weight, std=0.02)
            if isinstance(module, Block | DiT):
                nn.init.zeros_(module.scale_shift_table)
            if isinstance(module, Block):
                nn.init.zeros_(module.attn2.to_out[0].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.adaln_single.linear.weight)


def visible(*conds: Cond) -> tuple[Cond, ...]:
    """The same conditioning without the tokens at the end that every row of every one hides: padding costs as much as
    words. One token stays where nothing is seen at all. A bias that adds nothing to the rest is left out: the flash
    kernels take none.

    The host waits for the device once: on a GPU call it before a loop, not in it.

    Args:
        conds: what will be one batch; where one of them has no ``bias``, and so hides nothing, all stay as they are.
    """
    biases = [cond.bias for cond in conds if cond.bias is not None]
    if len(biases) < len(conds):
        return conds
    longest = max(bias.shape[1] for bias in biases)
    columns = [
        F.pad(torch.stack([(bias != -torch.inf).any(0), (bias != 0).any(0)]), (0, longest - bias.shape[1]))
        for bias in biases
    ]
    seen, moved = torch.stack(columns).any(0).tolist()  # of each column: does a row see it, has one a bias there
    length = longest - seen[::-1].index(True) if any(seen) else 1
    plain = not any(moved[:length])
    return tuple(
        replace(c, tokens=c.tokens[:, :length], bias=None if plain or c.bias is None else c.bias[:, :length])
        for c in conds
    )


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
