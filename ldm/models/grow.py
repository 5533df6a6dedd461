"""More input channels for a network that has learned with fewer: it begins as the function that it was."""

from __future__ import annotations

import torch
from torch import nn

from .base import Network
from .dit import DiT
from .mmdit import MMDiT
from .unet import UNet


@torch.no_grad()
def grow_input(net: Network, channels: int) -> None:
    """Give a UNet, MMDiT or DiT so many input channels, the new ones (``Cond.extra``) after those of the latents.

    The weights of the old channels stay; those of the new ones are zero, so that the network answers as before
    whatever the new channels hold, and gradients reach them (Brooks et al. 2023, section 3.2.1). A network that has so
    many channels is left as it is. The layer's parameters are new ones: grow before an optimizer is made.

    Raises:
        ValueError: another kind of network; one that takes extra channels, but not so many; fewer than the latents'.
    """
    if not isinstance(net, UNet | MMDiT | DiT):
        raise ValueError(f"{type(net).__name__} has no input to grow; expected a UNet, an MMDiT or a DiT")
    own, latents = net.config["in_channels"], latent_channels(net)
    if own == channels:
        return
    if own != latents:
        raise ValueError(
            f"the network takes {own} channels, {latents} latent ones and {own - latents} more; {channels} are asked "
            f"for: choose the conditioning that it was made for, or a base that takes {latents}"
        )
    if channels < own:
        raise ValueError(f"the network takes {own} latent channels; expected as many or more, not {channels}")
    holder, name = (net, "conv_in") if isinstance(net, UNet) else (net.pos_embed, "proj")
    old: nn.Conv2d = getattr(holder, name)
    size, stride, padding = (pair[0] for pair in (old.kernel_size, old.stride, old.padding))  # squares, all of them
    with torch.device("meta"):
        new = type(old)(channels, old.out_channels, size, stride, padding)  # type: ignore[arg-type]
    weight = old.weight.new_zeros(new.weight.shape)
    weight[:, :own] = old.weight
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    new.bias = old.bias
    setattr(holder, name, new.train(old.training))
    net.config.update(in_channels=channels, out_channels=net.config["out_channels"] or own)


@torch.no_grad()
def grow_labels(net: UNet, labels: int) -> None:
    """Let a UNet be told ``Cond.class_labels``, numbers below ``labels``, by embeddings that are zero at first.

    Raises:
        ValueError: it has labels of another kind or number.
    """
    kind, own = net.config["class_embed_type"], net.config["num_class_embeds"]
    if kind is None and own == labels:
        return
    if kind is not None or own is not None:
        raise ValueError(f"the network has class_embed_type {kind!r} and {own} labels; expected None and {labels}")
    like = net.time_embedding.linear_2.weight
    table = nn.Parameter(like.new_zeros(labels, like.shape[0]), requires_grad=like.requires_grad)
    net.class_embedding = nn.Embedding(labels, like.shape[0], _weight=table).train(net.training)
    net.config.update(num_class_embeds=labels)


def latent_channels(net: Network) -> int:
    """How many of a denoiser's input channels are the latents': as many as it gives, or half as many where it tells a
    variance too. (One that tells a variance and takes twice the latents cannot be told from one of twice the latents
    without either, and is taken for that.)"""
    own, out = net.config["in_channels"], net.config["out_channels"]
    if out is None or own in (out, out / 2):
        return own
    half = out // 2
    with_variance = own in (half + 3, 2 * half + 1) and own - out not in (3, out, out + 1)
    return half if with_variance else out
