"""What the autoencoder and its critic are trained with (Esser et al. 2021, VQGAN; Rombach et al. 2022, §3.1)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Radford et al. 2021


def reconstruction(y: Tensor, x: Tensor, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Mean |y - x| or (y - x)² over the values of each picture: (B, C, H, W), (B, C, H, W) -> (B,)."""
    if kind not in ("l1", "l2"):
        raise ValueError(f"loss.reconstruction={kind!r}: expected 'l1' or 'l2'")
    difference = y - x
    return (difference.abs() if kind == "l1" else difference.square()).flatten(1).mean(1)


def hinge_critic(real: Tensor, made: Tensor) -> Tensor:
    """The critic's loss from its logits, any shape: 1/2 (E max(0, 1 - real) + E max(0, 1 + made)), a scalar
    (Lim & Ye 2017; the half is VQGAN's)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def hinge_generator(made: Tensor) -> Tensor:
    """The autoencoder's part in the game, from the critic's logits of what it made: -E made, a scalar."""
    return -made.mean()


def critic_loss(critic: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The critic's move on pictures x and reconstructions y, (B, C, H, W) each; no gradient goes on into y."""
    real, made = critic(torch.cat([x.detach(), y.detach()])).chunk(2)  # one forward, as DDP wants it
    return hinge_critic(real, made)


def generator_loss(critic: nn.Module, y: Tensor) -> Tensor:
    """The autoencoder's move on its reconstructions y (B, C, H, W); no gradient goes into the critic's weights.

    ``critic`` is the bare module, not one wrapped for several processes, whose gradients that wrapper would await.
    """
    with frozen(critic):
        return hinge_generator(critic(y))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """What is computed inside leaves no gradient in the module's weights, which saves computing it."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def adaptive_weight(rec_loss: Tensor, gan_loss: Tensor, last_layer: Tensor, *, largest: float = 1e4) -> Tensor:
    """λ = |∇ rec_loss| / (|∇ gan_loss| + 1e-6) at the decoder's last weight (Esser et al. 2021, eq. 7).

    Args:
        rec_loss: a scalar, reconstruction and perceptual terms together.
        gan_loss: a scalar, ``generator_loss``.
        last_layer: ``vae.last_layer``. Both graphs are kept for the backward pass that follows.
        largest: λ is clamped to [0, largest].
    Returns:
        A scalar without gradient, the mean of all processes', so that they take one and the same step.
    """
    rec, gan = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (rec_loss, gan_loss))
    weight = (rec / (gan + 1e-6)).clamp(0, largest).detach()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(weight)
        weight /= dist.get_world_size()
    return weight


class ClipDistance(nn.Module):
    """Distance of two pictures in the hidden states of a CLIP vision tower, as LPIPS (Zhang et al. 2018, eq. 1)
    but with equal weights: every token's state is brought to unit length, and the squared difference is summed
    over its width and averaged over tokens and layers. 0 for equal pictures, at most 4.

    Args:
        tower: transformers' ``CLIPVisionModel``; frozen here.
        layers: how many hidden states to compare, spread evenly over the depth, the last among them.
        mean, std: of the tower's input, per channel, for pictures in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, layers: int = 4, mean: Any = CLIP_MEAN, std: Any = CLIP_STD):
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        config: Any = tower.config
        depth = config.num_hidden_layers
        self.size = config.image_size
        self.depths = sorted({round(depth * (i + 1) / layers) for i in range(layers)} - {0})
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> ClipDistance:
        super().train(mode)
        self.tower.eval()
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        """Picture (B, 3, H, W) in [-1, 1] -> unit hidden states, (B, N, D) per layer."""
        x = x.to(self.mean.dtype)  # antialiasing knows no half precision everywhere
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        x = ((x + 1) / 2 - self.mean) / self.std
        states = self.tower(pixel_values=x, output_hidden_states=True).hidden_states
        return [F.normalize(states[i].float(), dim=-1) for i in self.depths]

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Reconstruction and picture, (B, 3, H, W) in [-1, 1] -> (B,); the gradient goes to y alone."""
        with torch.no_grad():
            target = self.features(x)
        distances = [(a - b).square().sum(-1).mean(-1) for a, b in zip(self.features(y), target, strict=True)]
        return torch.stack(distances).mean(0)


class LpipsDistance(nn.Module):
    """LPIPS with its learned weights over VGG16 (Zhang et al. 2018), from the package of that name; frozen."""

    def __init__(self):
        super().__init__()
        try:
            import lpips  # type: ignore[import-not-found]
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch: a RuntimeError
            raise ValueError(
                f"loss.perceptual='lpips': the package lpips cannot be imported ({error}); install lpips and a "
                f"torchvision that fits torch {torch.__version__}, or use 'clip:FOLDER' with a CLIP's folder"
            ) from error
        self.net = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LpipsDistance:
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Reconstruction and picture, (B, 3, H, W) in [-1, 1] -> (B,); the gradient goes to y alone."""
        return self.net(y, x.detach()).flatten()


def perceptual(source: str) -> ClipDistance | LpipsDistance:
    """The perceptual distance of a named source: ``lpips``, or ``clip:FOLDER`` for the vision tower in that folder.

    Raises:
        ValueError: another name; lpips cannot be imported; the folder holds no CLIP, or an incomplete one.
    """
    kind, _, folder = source.partition(":")
    if source == "lpips":
        return LpipsDistance()
    if kind == "clip" and folder:
        return _clip(Path(folder))
    raise ValueError(f"loss.perceptual={source!r}: expected 'lpips', or 'clip:FOLDER' with the folder of a CLIP model")


def _clip(folder: Path) -> ClipDistance:
    """From a folder of transformers' ``CLIPModel`` or ``CLIPVisionModel``."""
    from transformers import CLIPModel, CLIPVisionModel

    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"loss.perceptual='clip:{folder}': there is no {file}; give the folder of a trained CLIP")
    kind = json.loads(file.read_text()).get("model_type")
    classes: dict[str, Any] = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModel}
    if kind not in classes:
        raise ValueError(f"{file}: model_type is {kind!r}; expected one of {', '.join(map(repr, classes))}")
    model, told = classes[kind].from_pretrained(
        folder, output_loading_info=True, local_files_only=True, use_safetensors=True
    )
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        raise ValueError(f"{folder}: the CLIP lacks {len(missing)} weights, the first is {missing[0]}")
    preprocessor = folder / "preprocessor_config.json"
    told = json.loads(preprocessor.read_text()) if preprocessor.is_file() else {}
    tower = model.vision_model if kind == "clip" else model
    return ClipDistance(tower, mean=told.get("image_mean", CLIP_MEAN), std=told.get("image_std", CLIP_STD))
