"""The multimodal diffusion transformer (MMDiT; Esser et al. 2024, §4 and fig. 2) of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cond import Cond
from ..reuse import cached_depth, once, seldom
from .adaln import (
    TIME_WIDTH,
    Attention,
    FeedForward,
    RMSNorm,
    check_inputs,
    checked_width,
    init_weights,
    modulate,
    unpatchify,
)
from .base import Network
from .embeddings import PatchEmbed, TimestepMLP, timestep_embedding
from .linear import Linear


class MMDiT(Network):
    """Twin of diffusers' ``SD3Transformer2DModel``: text and image tokens with weights of their own, joint attention.

    Args:
        sample_size: side of the latents that the network is laid out for; sets the pitch of the positional table.
        patch_size: side of a patch, in latent pixels.
        in_channels, out_channels: of the latents; ``out_channels=None`` takes ``in_channels``.
        num_layers: blocks; the last one drops the text.
        attention_head_dim, num_attention_heads: their product is the width, a multiple of 4.
        joint_attention_dim: width of the text tokens.
        caption_projection_dim: what they are projected to: the network's width.
        pooled_projection_dim: width of the pooled text vector.
        pos_embed_max_size: side of the positional table, in patches.
        dual_attention_layers: blocks in which the image also attends to itself alone (SD 3.5 medium: 0 to 12).
        qk_norm: None, or ``rms_norm`` on queries and keys (SD 3.5).
    Raises:
        ValueError: widths that do not fit together, an unknown ``qk_norm``, no ``pos_embed_max_size``, a size that is
            not above 0.
    """

    stock = "SD3Transformer2DModel"

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: Sequence[int] = (),
        qk_norm: str | None = None,
    ):
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=tuple(dual_attention_layers),
            qk_norm=qk_norm,
        )
        if pos_embed_max_size is None:  # in stock: sinusoids made for each size, which no SD 3 has
            raise ValueError("pos_embed_max_size=None: expected the largest side in patches")
        heads, width = num_attention_heads, checked_width(self, "caption_projection_dim")
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={qk_norm!r}: expected None or 'rms_norm'")
        beyond = [i for i in dual_attention_layers if not 0 <= i < num_layers]
        if beyond:
            raise ValueError(f"dual_attention_layers holds {beyond}: blocks are numbered from 0 to {num_layers - 1}")
        self.patch_size = patch_size
        self.out_channels = in_channels if out_channels is None else out_channels
        self.pos_embed = PatchEmbed(in_channels, width, patch_size, sample_size, max_size=pos_embed_max_size)
        self.time_text_embed = TimeTextEmbed(width, pooled_projection_dim)
        self.context_embedder = Linear(joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, heads, qk_norm is not None, dual=i in dual_attention_layers, last=i == num_layers - 1)
            for i in range(num_layers)
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = Linear(width, patch_size**2 * self.out_channels)
        self._init_weights()

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            x: (B, C, H, W) noisy latents, ``in_channels`` of them together with the channels of ``cond.extra``.
            time: (B,) in 0 to 1000, fractions allowed.
            cond: ``tokens`` (B, L, joint_attention_dim) and ``pooled`` (B, pooled_projection_dim); ``bias`` (B, L)
                is added to the logits of the text keys wherever text takes part in attention, so that a token with
                log n does exactly what n equal tokens do: text bears no position, equal tokens stay equal.
        Returns:
            (B, out_channels, H, W).
        Raises:
            ValueError: a size that does not fit, other channels, a time, text or pooled vector of another shape.
        """
        x = cond.beside(x)
        check_inputs(self, x, time, cond, tokens="joint_attention_dim", pooled="pooled_projection_dim")
        assert cond.pooled is not None
        height, width = x.shape[-2:]
        x = self.pos_embed(x)  # (B, N, D)
        text = once(self.context_embedder, cond.tokens)  # (B, L, D)
        c = F.silu(self.time_text_embed(time, cond.pooled))  # (B, D)
        bias = None if cond.bias is None else F.pad(cond.bias, (x.shape[1], 0))  # (B, N + L): no bias on image keys

        def through(x: Tensor, text: Tensor, blocks: nn.ModuleList) -> tuple[Tensor, Tensor]:
            for block in blocks:
                x, text = self.run_block(block, x, text, c, bias)
            return x, text

        blocks, first = self.transformer_blocks, cached_depth()
        if first is None:
            x, _ = through(x, text, blocks)
        else:
            x, text = through(x, text, blocks[: first + 1])
            x = seldom(lambda x: through(x, text, blocks[first + 1 :])[0], x, self, cond.tokens, change=True)
        scale, shift = self.norm_out(c)
        x = self.proj_out(modulate(x, shift, scale))  # (B, N, p · p · C)
        return unpatchify(x, height, width, self.patch_size)

    def _init_weights(self) -> None:
        """DiT's adaLN-zero (Peebles & Xie 2023, §3.2): every block starts as the identity, the output as zero."""
        init_weights(self)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)


class TimeTextEmbed(nn.Module):
    """Time and pooled text as one vector."""

    def __init__(self, width: int, pooled_width: int):
        super().__init__()
        self.timestep_embedder = TimestepMLP(TIME_WIDTH, width)
        self.text_embedder = TimestepMLP(pooled_width, width)

    def forward(self, time: Tensor, pooled: Tensor) -> Tensor:  # (B,), (B, P) -> (B, D)
        waves = timestep_embedding(time, TIME_WIDTH).to(pooled.dtype)
        return self.timestep_embedder(waves) + self.text_embedder(pooled)


class Modulation(nn.Module):
    """n vectors that shift, scale and gate a stream's tokens (adaLN; Perez et al. 2018, Peebles & Xie 2023)."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.n = n
        self.linear = Linear(width, n * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:  # (B, D) -> n times (B, 1, D)
        return self.linear(c)[:, None].chunk(self.n, dim=-1)


class JointBlock(nn.Module):
    """One layer: text and image attend to both, each with its own weights (Esser et al. 2024, fig. 2b).

    ``dual`` adds a second attention, of the image to itself (SD 3.5 medium). The ``last`` block reads the text
    but does not update it, since nothing follows that would see it.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, *, dual: bool, last: bool):
        super().__init__()
        self.norm1 = Modulation(width, 9 if dual else 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = JointAttention(width, heads, qk_norm, last=last)
        self.attn2 = Attention(width, heads, qk_norm) if dual else None
        self.ff = FeedForward(width)
        self.ff_context = None if last else FeedForward(width)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *dual = self.norm1(c)
        if self.ff_context is None:  # the order of adaLN's two vectors differs where there is no gate
            scale_t, shift_t = self.norm1_context(c)
        else:
            shift_t, scale_t, gate_t, shift_ff_t, scale_ff_t, gate_ff_t = self.norm1_context(c)
        y, y_t = self.attn(modulate(x, shift, scale), modulate(text, shift_t, scale_t), bias)

        if self.attn2 is None:
            x = torch.addcmul(x, gate, y)
        else:  # both attentions read the same tokens
            shift2, scale2, gate2 = dual
            y2 = self.attn2(modulate(x, shift2, scale2))
            x = torch.addcmul(torch.addcmul(x, gate, y), gate2, y2)
        x = torch.addcmul(x, gate_ff, self.ff(modulate(x, shift_ff, scale_ff)))

        if self.ff_context is None:
            return x, None
        text = torch.addcmul(text, gate_t, y_t)
        return x, torch.addcmul(text, gate_ff_t, self.ff_context(modulate(text, shift_ff_t, scale_ff_t)))


class JointAttention(Attention):
    """Multi-head attention of image and text to both, each projected by weights of its own."""

    def __init__(self, width: int, heads: int, qk_norm: bool, *, last: bool):
        super().__init__(width, heads, qk_norm)
        self.add_q_proj = Linear(width, width)
        self.add_k_proj = Linear(width, width)
        self.add_v_proj = Linear(width, width)
        self.to_add_out = None if last else Linear(width, width)
        self.norm_added_q = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.norm_added_k = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, text: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, N, D), text (B, L, D), bias (B, N + L) -> what is to be added to either."""
        # Nobody reads what the last block's text would find: it asks nothing. Zero tokens, not no call, so that the
        # weights have a gradient of zero, as in the stock class: DDP waits for every parameter's.
        asking = text if self.to_add_out is not None else text[:, :0]
        q, q_t = self.norm_q(self.split(self.to_q(x))), self.norm_added_q(self.split(self.add_q_proj(asking)))
        q = torch.cat([q, q_t], dim=1)  # (B, N + L, H, d); one after the other, so that few are alive at once
        k, k_t = self.norm_k(self.split(self.to_k(x))), self.norm_added_k(self.split(self.add_k_proj(text)))
        k = torch.cat([k, k_t], dim=1)
        v = torch.cat([self.split(self.to_v(x)), self.split(self.add_v_proj(text))], dim=1)
        del q_t, k_t
        y, y_t = self.attend(q, k, v, bias).split([x.shape[1], asking.shape[1]], dim=1)
        return self.to_out(y), None if self.to_add_out is None else self.to_add_out(y_t)
