"""Picture and caption towers trained against each other (CLIP, Radford et al. 2021), from a random start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ldm.models.bpe import train_tokenizer

from ..batches import PictureBatches
from ..checkpoint import replace_folder
from ..data import Rows
from ..loop import Batch
from ..schema import ClipConfig
from .common import player


class Contrast(nn.Module):
    """Both towers in one forward pass, so that a data-parallel wrapper sees it."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip

    def forward(self, ids: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L) ids, (B, 3, H, W) in [-1, 1] -> unit vectors of texts and pictures (B, P), inverse temperature."""
        out = self.clip(input_ids=ids, pixel_values=pictures)
        return out.text_embeds, out.image_embeds, self.clip.logit_scale.clamp(max=4.6052).exp()  # at most 100, §2.5


def contrastive_loss(texts: Tensor, pictures: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross entropy over all pairs (CLIP, fig. 3), a scalar.

    Args:
        texts, pictures: (B, P) unit vectors.
        same: (B, B) true where two rows have the same caption: they are no negatives of each other.
    """
    logits = scale * texts @ pictures.T  # (B, B)
    target = same / same.sum(-1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class ClipTask:
    """Builds tokenizer and towers for the captions that are there."""

    def __init__(self, config: ClipConfig, train: Rows, held_out: Rows, run: Path, accelerator: Accelerator):
        self.run, self.accelerator = run, accelerator
        self.tokenizer: CLIPTokenizer = train_tokenizer(
            train.captions, config.model.tokenizer.vocab_size, config.model.tokenizer.max_length
        )
        words = self.tokenizer
        start, end = cast(int, words.bos_token_id), cast(int, words.eos_token_id)
        self.clip = CLIPModel(clip_config(config, len(words), words.model_max_length, start, end))
        self.rows = PictureBatches(train, config.seed, ids=self._ids(train), flip=config.data.random_flip)
        self.test = PictureBatches(held_out, config.seed, ids=self._ids(held_out))
        self.players = [player("clip", Contrast(self.clip), self.loss, config, accelerator)]

    def _ids(self, rows: Rows) -> Tensor:
        length = self.tokenizer.model_max_length
        given = self.tokenizer(
            list(rows.captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return cast(Tensor, given.input_ids)

    def loss(self, batch: Batch, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        texts, pictures, scale = self.players[0].module(batch["ids"], batch["pictures"])
        ids = batch["ids"]
        if self.accelerator.num_processes > 1:  # negatives from all processes, with gradient
            from torch.distributed.nn.functional import all_gather

            texts, pictures = torch.cat(all_gather(texts)), torch.cat(all_gather(pictures))
            ids = self.accelerator.gather(ids)
        same = (ids[:, None] == ids[None]).all(-1).float()
        loss = contrastive_loss(texts.float(), pictures.float(), scale.float(), same)
        return loss, {"loss": loss}

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Loss, and how often a held-out picture's own caption is the nearest of all held-out captions."""
        with self.players[0].averaged():
            batch = self.test.__getitems__([(i, i) for i in range(min(len(self.test), 256))])
            batch = {k: v.to(self.accelerator.device) for k, v in batch.items()}
            texts, pictures, scale = self.players[0].module(batch["ids"], batch["pictures"])
        same = (batch["ids"][:, None] == batch["ids"][None]).all(-1)
        right = same[torch.arange(len(same)), (pictures @ texts.T).argmax(-1)]
        loss = contrastive_loss(texts.float(), pictures.float(), scale.float(), same.float())
        return {"held_out_loss": loss.item(), "held_out_accuracy": right.float().mean().item()}

    def sample(self, file: Path) -> None:
        """A CLIP draws nothing."""

    def export(self) -> None:
        """``RUN/pipeline`` opens as CLIPModel, CLIPTextModel, CLIPTextModelWithProjection and CLIPTokenizer."""
        partial = self.run / "pipeline.partial"
        with self.players[0].averaged():
            self.clip.save_pretrained(partial)
        self.tokenizer.backend_tokenizer.no_truncation()  # it would save the last call's cut and padding
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.save_pretrained(partial)
        (partial / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
        replace_folder(partial, self.run / "pipeline")


def clip_config(config: ClipConfig, vocab_size: int, length: int, start: int, end: int) -> CLIPConfig:
    """transformers' config for these towers; ``start``, ``end``: the tokenizer's ids; pooling looks for the end."""
    model = config.model
    text = {**model.text.model_dump(), "vocab_size": vocab_size, "max_position_embeddings": length}
    text |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end, "projection_dim": model.projection_dim}
    vision = {**model.vision.model_dump(), "image_size": config.data.resolution, "projection_dim": model.projection_dim}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=model.projection_dim)
