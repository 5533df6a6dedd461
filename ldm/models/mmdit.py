"""The multimodal diffusion transformer (MMDiT; Esser et al. 2024, §4 and fig. 2) of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cond import Cond
from .attention import attention
from .base import Network
from .embeddings import PatchEmbed, TimestepMLP, timestep_embedding
from .linear import Linear

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TIME_WIDTH = 256  # sinusoids that the time is turned into


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
        ValueError: widths that do not fit together, an unknown ``qk_norm``, no ``pos_embed_max_size``, a size below 1.
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
        counts = {k: v for k, v in self.config.items() if isinstance(v, int) and v < 1}
        if counts:
            raise ValueError(f"MMDiT with {', '.join(f'{k}={v}' for k, v in counts.items())}: expected at least 1")
        if sample_size < patch_size:
            raise ValueError(f"sample_size={sample_size} holds no patch of patch_size={patch_size}")
        heads, width = num_attention_heads, num_attention_heads * attention_head_dim
        if caption_projection_dim != width:
            raise ValueError(
                f"caption_projection_dim={caption_projection_dim}: expected the network's width, {heads} heads × "
                f"{attention_head_dim} = {width}"
            )
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={qk_norm!r}: expected None or 'rms_norm'")
        if pos_embed_max_size is None:  # in stock: sinusoids made for each size, which no SD 3 has
            raise ValueError("pos_embed_max_size=None: expected the largest side in patches")
        beyond = [i for i in dual_attention_layers if not 0 <= i < num_layers]
        if beyond:
            raise ValueError(f"dual_attention_layers holds {beyond}: blocks are numbered from 0 to {num_layers - 1}")
        self.patch_size = patch_size
        self.out_channels = in_channels if out_channels is None else out_channels
        self.pos_embed = PatchEmbed(in_channels, width, patch_size, sample_size, pos_embed_max_size)
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
            x: (B, C, H, W) noisy latents.
            time: (B,) in 0 to 1000, fractions allowed.
            cond: ``tokens`` (B, L, joint_attention_dim) and ``pooled`` (B, pooled_projection_dim); ``bias`` (B, L)
                is added to the logits of the text keys wherever text takes part in attention, so that a token with
                log n does exactly what n equal tokens do: text bears no position, equal tokens stay equal.
        Returns:
            (B, out_channels, H, W).
        Raises:
            ValueError: a size that does not fit, other channels, no pooled vector, text of another width or batch.
        """
        self._check(x, cond)
        assert cond.pooled is not None
        p, (height, width) = self.patch_size, x.shape[-2:]
        x = self.pos_embed(x)  # (B, N, D)
        text = self.context_embedder(cond.tokens)  # (B, L, D)
        c = F.silu(self.time_text_embed(time, cond.pooled))  # (B, D)
        bias = None if cond.bias is None else F.pad(cond.bias, (x.shape[1], 0))  # (B, N + L): no bias on image keys
        for block in self.transformer_blocks:
            x, text = self.run_block(block, x, text, c, bias)
        scale, shift = self.norm_out(c)
        x = self.proj_out(modulate(x, shift, scale))  # (B, N, p · p · C)
        x = x.view(-1, height // p, width // p, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)

    def _check(self, x: Tensor, cond: Cond) -> None:
        if x.ndim != 4 or x.shape[1] != self.config["in_channels"]:
            raise ValueError(f"MMDiT: x is {tuple(x.shape)}; expected (B, {self.config['in_channels']}, H, W)")
        if cond.extra is not None:
            raise ValueError("MMDiT: cond.extra is given; this network takes no channels beside the latents")
        if cond.pooled is None:
            raise ValueError("MMDiT: cond.pooled is missing; expected (B, pooled_projection_dim)")
        for name, value, field in (
            ("tokens", cond.tokens, "joint_attention_dim"),
            ("pooled", cond.pooled, "pooled_projection_dim"),
        ):
            if value.shape[-1] != self.config[field]:
                raise ValueError(f"MMDiT: cond.{name} is {value.shape[-1]} wide; expected {field}={self.config[field]}")
            if len(value) != len(x):
                raise ValueError(f"MMDiT: cond.{name} is for {len(value)} pictures; x holds {len(x)}")
        if cond.bias is not None and cond.bias.shape != cond.tokens.shape[:2]:
            raise ValueError(
                f"MMDiT: cond.bias is {tuple(cond.bias.shape)}; expected one per token, {tuple(cond.tokens.shape[:2])}"
            )

    def _init_weights(self) -> None:
        """DiT's adaLN-zero (Peebles & Xie 2023, §3.2): every block starts as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: a patch is projected as by a linear layer
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for module in self.time_text_embed.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.proj_out.weight)


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


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A normalised copy of x (B, N, D), scaled by 1 + scale and shifted."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


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
        self.attn2 = SelfAttention(width, heads, qk_norm) if dual else None
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


class SelfAttention(nn.Module):
    """Multi-head attention of the image to itself."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.backend = "auto"
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.Sequential(Linear(width, width))
        self.norm_q = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        q, k, v = self.norm_q(self.split(self.to_q(x))), self.norm_k(self.split(self.to_k(x))), self.split(self.to_v(x))
        return self.to_out(self.attend(q, k, v, None))

    def split(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, H, d)
        return x.unflatten(-1, (self.heads, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:  # (B, N, H, d) -> (B, N, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, bias, backend=self.backend).transpose(1, 2).flatten(2)


class JointAttention(SelfAttention):
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


class RMSNorm(nn.Module):
    """x / rms(x), scaled (Zhang & Sennrich 2019); the mean square is taken in float32, as in diffusers' class."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (y.to(self.weight.dtype) * self.weight).to(x.dtype)


class FeedForward(nn.Module):
    """Two layers, four times as wide in between; names are those of diffusers' ``FeedForward``."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GELU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        return self.net(x)


class GELU(nn.Module):
    """A linear layer and GELU in its tanh form (Hendrycks & Gimpel 2016)."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.proj = Linear(width_in, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return F.gelu(x, approximate="tanh")
        return torch.ops.aten.gelu_(x, approximate="tanh")  # the widest tensor of all: not two of them
