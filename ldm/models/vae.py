"""The autoencoder between pictures and latents (Rombach et al. 2022, §3.1): a twin of diffusers' ``AutoencoderKL``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..latents import LatentScale
from .base import Network
from .tiling import Tiled
from .vae_blocks import Act, Level, Middle, ResBlock, Run, SelfAttention, laid_out, layout_of, norm_silu


class Moments(NamedTuple):
    """The encoder's diagonal Gaussian q(z | x) over raw latents.

    Args:
        mean, log_var: (B, C, h, w) each.
    """

    mean: Tensor
    log_var: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std * eps, raw latents (B, C, h, w) (Kingma & Welling 2014, §2.4)."""
        return self.mean + torch.exp(0.5 * self.log_var) * eps

    def kl(self) -> Tensor:
        """KL(q(z | x) || N(0, 1)) of every row, summed over its latents: (B,), in nats."""
        wide = torch.promote_types(self.mean.dtype, torch.float32)  # a sum over a picture overflows half precision
        mean, log_var = self.mean.to(wide), self.log_var.to(wide)
        return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).flatten(1).sum(1)


class VAE(Tiled, Network):
    """Convolutional encoder and decoder with attention at the lowest resolution.

    Args:
        in_channels, out_channels: of the picture.
        block_out_channels: width of each level, from the picture's resolution down; n levels reduce by 2^(n - 1).
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: C of the latents.
        norm_num_groups: groups of every group norm; must divide every width.
        sample_size: resolution it was trained at; a note for pipelines, changes nothing here.
        scaling_factor, shift_factor: see ``latent_scale``; None is a shift of 0.
        force_upcast: a note for pipelines: decode in float32.
        use_quant_conv, use_post_quant_conv: 1x1 convolutions on either side of the latents (SD, SDXL; not SD3, Flux).
        mid_block_add_attention: attention between the two residual blocks of the lowest level.
        down_block_types, up_block_types: the twin's; one plain block per level is all there is.
    Raises:
        ValueError: widths that the groups do not divide, other block types, no level at all.
    """

    stock = "AutoencoderKL"

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | Sequence[int] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        down_block_types: Sequence[str] | None = None,
        up_block_types: Sequence[str] | None = None,
    ):
        widths = list(block_out_channels)
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=widths,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
            down_block_types=_types("down_block_types", down_block_types, "DownEncoderBlock2D", len(widths)),
            up_block_types=_types("up_block_types", up_block_types, "UpDecoderBlock2D", len(widths)),
        )
        _check_widths(widths, norm_num_groups)
        shape = widths, layers_per_block, norm_num_groups, mid_block_add_attention
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shape)
        self.decoder = Decoder(latent_channels, out_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start for training from scratch: weights that keep the variance (LeCun et al. 1998, N(0, 1 / fan in)),
        biases 0, and each residual branch ends in zeros, so that the network is at first the plain chain of its
        shortcuts (Zhang et al. 2019, Fixup)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock | SelfAttention):
                last = module.conv2 if isinstance(module, ResBlock) else module.to_out[0]
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def latent_scale(self) -> LatentScale:
        """What brings raw latents to zero mean and unit variance."""
        return LatentScale(self.config["scaling_factor"], self.config["shift_factor"] or 0.0)

    def set_latent_scale(self, scale: LatentScale) -> None:
        """Store a measured scale, which goes out with the config. The shift is written even where it is 0:
        stock SD3 cannot decode without the number."""
        if not (math.isfinite(scale.scale) and scale.scale > 0 and math.isfinite(scale.shift)):
            raise ValueError(f"latent scale {scale.scale}, shift {scale.shift}: expected finite, scale > 0")
        self.config.update(scaling_factor=float(scale.scale), shift_factor=float(scale.shift))

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, at which a GAN's gradient is weighed (Esser et al. 2021, eq. 7)."""
        return self.decoder.conv_out.weight  # type: ignore[return-value]

    def encode(self, x: Tensor) -> Moments:
        """Picture (B, in_channels, H, W) in [-1, 1] -> moments of the raw latents, (B, C, H/factor, W/factor) each.

        Raises:
            ValueError: ``factor`` does not divide H or W.
        """
        _check_channels("picture", x, "in_channels", self.config["in_channels"])
        f = self.factor
        if bad := [n for n in x.shape[-2:] if n % f or n == 0]:
            fits = tuple(max(f, math.floor(n / f + 0.5) * f) for n in x.shape[-2:])
            raise ValueError(
                f"picture of {x.shape[-2]} by {x.shape[-1]} pixels (height, width): {bad[0]} is not a multiple of the "
                f"autoencoder's factor {f}; the nearest size that fits is {fits[0]} by {fits[1]}"
            )
        mean, log_var = self._by_row(self._encode, x).chunk(2, dim=1)
        return Moments(mean, log_var.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> picture (B, out_channels, h factor, w factor), about [-1, 1], not clamped.

        Raises:
            ValueError: another number of channels than ``latent_channels``.
        """
        _check_channels("latents", z, "latent_channels", self.config["latent_channels"])
        return self._by_row(self._decode, z)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Moments]:
        """Picture and noise (B, C, h, w) -> its reconstruction (B, out_channels, H, W) and the moments."""
        moments = self.encode(x)
        return self.decode(moments.sample(eps)), moments

    def blocks(self) -> list[nn.Module]:
        """What gradient checkpointing recomputes: every residual block and attention layer by itself, since at the
        picture's resolution the blocks of one level already need more memory than all that is left."""
        return [m for m in self.modules() if isinstance(m, ResBlock | SelfAttention)]

    def _encode(self, x: Tensor) -> Tensor:
        encoder, run = self.encoder, self.run_block
        layout = layout_of(x, encoder.conv_in)
        h = encoder.finish(  # no name here keeps what goes in alive
            self._in_tiles(lambda t, *act: encoder.reduce(t, run, *act), x, self.factor, 1, encoder.reach), run
        )
        return (h if self.quant_conv is None else self.quant_conv(h)).contiguous(memory_format=layout)

    def _decode(self, z: Tensor) -> Tensor:
        decoder, run = self.decoder, self.run_block
        layout = layout_of(z, decoder.conv_in)
        h = decoder.start(z if self.post_quant_conv is None else self.post_quant_conv(z), run)
        h = self._in_tiles(lambda t, *act: decoder.enlarge(t, run, *act), h, 1, self.factor, decoder.reach)
        return h.contiguous(memory_format=layout)


class Encoder(nn.Module):
    """Picture (B, in_channels, H, W) -> (B, out_channels, H/factor, W/factor): ``reduce``, then ``finish``."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], layers: int, groups: int, mid_attention: bool
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        before = [widths[0], *widths[:-1]]
        self.down_blocks: Sequence[Level] = nn.ModuleList(  # type: ignore[assignment]
            Level(c_in, c_out, layers, groups, down=i < len(widths) - 1)
            for i, (c_in, c_out) in enumerate(zip(before, widths, strict=True))
        )
        self.mid_block = Middle(widths[-1], groups, mid_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    @property
    def reach(self) -> int:
        """How many positions from a border of ``reduce``'s output know that the picture ends there."""
        n = 1  # conv_in
        for level in self.down_blocks[:-1]:
            n = (n + 2 * len(level.resnets)) // 2 + 1
        return n

    def reduce(self, x: Tensor, run: Run, act: Act = norm_silu) -> Tensor:
        """Everything above the latents' resolution: (B, in_channels, H, W) -> (B, C, H/factor, W/factor)."""
        h = self.conv_in(laid_out(x, self.conv_in))
        for level in self.down_blocks[:-1]:
            h = level(h, run, act)
        return h

    def finish(self, h: Tensor, run: Run) -> Tensor:
        """What is left, all at the latents' resolution: (B, C, h, w) -> (B, out_channels, h, w)."""
        for block in [*self.down_blocks[-1].resnets, *self.mid_block.chain()]:
            h = run(block, h)
        return self.conv_out(norm_silu(self.conv_norm_out, h))


class Decoder(nn.Module):
    """Latents (B, in_channels, h, w) -> picture (B, out_channels, h factor, w factor): ``start``, then ``enlarge``."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], layers: int, groups: int, mid_attention: bool
    ):
        super().__init__()
        widths = list(reversed(widths))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups, mid_attention)
        before = [widths[0], *widths[:-1]]
        self.up_blocks: Sequence[Level] = nn.ModuleList(  # type: ignore[assignment]
            Level(c_in, c_out, layers + 1, groups, up=i < len(widths) - 1)
            for i, (c_in, c_out) in enumerate(zip(before, widths, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    @property
    def reach(self) -> int:
        """How many pixels from a border of ``enlarge``'s output know that its input ends there."""
        n = 0
        for i, level in enumerate(self.up_blocks):
            n += 2 * len(level.resnets) if i else 0  # the first level's are in ``start``
            n = 2 * n + 1 if level.upsamplers else n
        return n + 1  # conv_out

    def start(self, z: Tensor, run: Run) -> Tensor:
        """Everything at the latents' resolution: (B, in_channels, h, w) -> (B, C, h, w)."""
        h = self.conv_in(laid_out(z, self.conv_in))
        for block in [*self.mid_block.chain(), *self.up_blocks[0].resnets]:
            h = run(block, h)
        return h

    def enlarge(self, h: Tensor, run: Run, act: Act = norm_silu) -> Tensor:
        """What is left: (B, C, h, w) -> (B, out_channels, h factor, w factor)."""
        h = self.up_blocks[0].resample(h)
        for level in self.up_blocks[1:]:
            h = level(h, run, act)
        return self.conv_out(act(self.conv_norm_out, h))


def _types(name: str, given: Sequence[str] | None, only: str, levels: int) -> list[str]:
    expected = [only] * levels
    if given is not None and list(given) != expected:
        raise ValueError(f"VAE {name}={list(given)!r}: expected {only!r} once for each of the {levels} levels")
    return expected


def _check_channels(what: str, x: Tensor, name: str, expected: int) -> None:
    if x.ndim != 4 or x.shape[1] != expected:
        raise ValueError(f"{what} of shape {tuple(x.shape)}: expected (B, {name}={expected}, height, width)")


def _check_widths(widths: Sequence[Any], groups: int) -> None:
    if not widths:
        raise ValueError("VAE block_out_channels is empty: give one width per level, for example [32, 64, 64]")
    if bad := [w for w in widths if w % groups]:
        raise ValueError(
            f"VAE block_out_channels={list(widths)}: {bad[0]} is not a multiple of norm_num_groups={groups}; "
            f"every level's width must be"
        )
