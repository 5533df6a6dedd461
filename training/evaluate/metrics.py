"""Numbers about pictures: how close a reconstruction is, and whether a drawing is of the thing that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import ClipPictures, to_unit


def psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, 10 log10(1 / MSE), in dB.

    Both (B, 3, H, W), uint8 or float in [0, 1] -> (B,); equal pictures give infinity. Average over pictures, not
    over their errors: the mean of this is what a paper's table means.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio as ratio

    x, y = _pair(pictures, originals)
    return torch.stack([ratio(a, b, data_range=1.0) for a, b in zip(x, y, strict=True)])


def ssim(pictures: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al. 2004, 11 x 11 Gaussian window), at most 1.

    Both (B, 3, H, W) with sides of at least 11 pixels, uint8 or float in [0, 1] -> (B,).
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    x, y = _pair(pictures, originals)
    if min(x.shape[2:]) < 11:
        raise ValueError(f"ssim: pictures of {x.shape[3]} x {x.shape[2]}, expected sides of at least 11 pixels")
    values: Any = similarity(x, y, data_range=1.0, reduction="none")
    return values.view(x.shape[0])


def _pair(pictures: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    if pictures.shape != originals.shape:
        raise ValueError(f"pictures {tuple(pictures.shape)} and originals {tuple(originals.shape)} differ in shape")
    return to_unit(pictures), to_unit(originals)


@dataclass(frozen=True)
class Retrieval:
    """Where the right concept stands among all concepts, for each drawn picture.

    ``ranks`` (N,) int64, 1 = nearest; ``groups`` (N,) int64: the prompt that each picture was drawn for.
    """

    top1: float
    top5: float
    ranks: Tensor
    groups: Tensor

    def share(self, k: int) -> float:
        """The share of pictures whose right concept is among the ``k`` nearest."""
        return (self.ranks <= k).double().mean().item()

    def interval(self, k: int, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Percentile bootstrap of ``share(k)`` (Efron 1979): prompts, not pictures, are drawn with replacement.

        Several pictures of one prompt succeed and fail together; counting them as independent would flatter.
        """
        _, group = self.groups.unique(return_inverse=True)
        count = int(group.max()) + 1
        hits = torch.zeros(count, dtype=torch.float64).index_add_(0, group, (self.ranks <= k).double())
        sizes = torch.bincount(group, minlength=count).double()
        draws = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
        shares = hits[draws].sum(1) / sizes[draws].sum(1)  # (resamples,)
        tail = (1 - level) / 2
        low, high = torch.quantile(shares, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return low, high


def retrieval(fake: Tensor, real: Tensor, labels: Tensor, real_labels: Tensor | None = None) -> Retrieval:
    """How often a drawn picture is nearer to a real picture of its own concept than to all other concepts.

    Features are centred on the real pictures' mean, nearness is the cosine; a concept with several real pictures
    is as near as its nearest one. A tie counts against the drawing, so that equal features (blank pictures) are
    not taken for hits. Chance level is k / (number of concepts).

    Args:
        fake: (N, F) features of the drawn pictures.
        real: (M, F) features of the real pictures.
        labels: (N,) integers: the right concept of each drawn picture.
        real_labels: (M,) integers from 0 to C - 1: the concept of each real picture; left out, each real picture
            is a concept of its own, and ``labels`` are row numbers of ``real``.
    Raises:
        ValueError: shapes that do not fit, a label without a real picture, features that are not finite.
    """
    if fake.ndim != 2 or real.ndim != 2 or fake.shape[1] != real.shape[1] or not len(fake) or not len(real):
        raise ValueError(f"fake {tuple(fake.shape)}, real {tuple(real.shape)}: expected (N, F) and (M, F), not empty")
    concept = torch.arange(len(real)) if real_labels is None else real_labels.cpu().long()
    labels = labels.cpu().long()
    if labels.shape != (len(fake),) or concept.shape != (len(real),):
        raise ValueError(f"{labels.numel()} labels for {len(fake)} fake, {concept.numel()} for {len(real)} real rows")
    known = concept.unique()
    if not torch.isin(labels, known).all():
        raise ValueError(f"label {labels[~torch.isin(labels, known)][0].item()} has no real picture")
    if not (fake.isfinite().all() and real.isfinite().all()):
        raise ValueError("features are not finite: the pictures hold NaN or infinity")
    fake, real = fake.double().cpu(), real.double().cpu()
    centre = real.mean(0)
    cosine = F.normalize(fake - centre, dim=1) @ F.normalize(real - centre, dim=1).T  # (N, M)
    column = torch.searchsorted(known, concept).expand(len(fake), -1)
    nearness = torch.full((len(fake), len(known)), -2.0, dtype=torch.float64)
    nearness.scatter_reduce_(1, column, cosine, "amax")  # (N, C)
    own = nearness.gather(1, torch.searchsorted(known, labels)[:, None])
    ranks = (nearness >= own).sum(1)  # own included: 1 = nearest
    return Retrieval((ranks <= 1).double().mean().item(), (ranks <= 5).double().mean().item(), ranks, labels)


def cosine_score(pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIP score of embeddings (N, D) and (N, D): 100 max(cosine, 0) -> (N,) (Hessel et al. 2021 with w = 100)."""
    return 100 * F.cosine_similarity(pictures, texts, dim=1).clamp(min=0)


class ClipScore:
    """CLIP score by the CLIP in ``folder`` (a CLIPModel and its tokenizer, as ``save_pretrained`` writes them).

    Of a CLIP whose text tower also conditions the model, this says how well the prompt is followed in its eyes;
    it is no independent judge.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        from transformers import CLIPTokenizer

        self.eye = ClipPictures(folder).to(device).eval()
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(str(folder))
        self.max_length: int = self.eye.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str], batch_size: int = 32) -> Tensor:
        """Pictures (N, 3, H, W), uint8 or float in [0, 1], and N prompts -> (N,) float32, 0 to 100."""
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures for {len(prompts)} prompts: expected one each")
        scores = []
        for start in range(0, len(prompts), batch_size):
            tokens = self.tokenizer(
                prompts[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            device = self.eye.model.device
            x = self.eye.pixels(pictures[start : start + batch_size].to(device))
            seen = self.eye.model(pixel_values=x, **tokens.to(device))
            scores.append(cosine_score(seen.image_embeds, seen.text_embeds).float().cpu())
        return torch.cat(scores)


def clip_score(pictures: Tensor, prompts: list[str], folder: str | Path, batch_size: int = 32) -> Tensor:
    """``ClipScore(folder)(pictures, prompts)`` for one call: (N,) float32, 0 to 100."""
    return ClipScore(folder)(pictures, prompts, batch_size)
