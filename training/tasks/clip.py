"""Picture and caption towers trained against each other (CLIP, Radford et al. 2021), from a random start."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from ldm.models.bpe import train_tokenizer

from ..batches import PictureBatches
from ..checkpoint import replace_folder
from ..data import Rows
from ..loop import Batch
from ..processes import check_whole, gathered_rows
from ..schema import ClipConfig
from .common import compile_modules, player

MEASURED, AT_ONCE = 256, 64  # held-out pictures, and how many of them go through the towers together


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


def same_captions(ids: Tensor) -> Tensor:
    """(B, L) token ids -> (B, B), true where two rows have the same."""
    return (ids[:, None] == ids[None]).all(-1)


class ClipTask:
    """Builds tokenizer and towers for the captions that are there."""

    def __init__(self, config: ClipConfig, train: Rows, held_out: Rows, run: Path, accelerator: Accelerator):
        check_whole(accelerator, "clip")
        self.run, self.accelerator = run, accelerator
        self.tokenizer: CLIPTokenizer = train_tokenizer(
            train.captions, config.model.tokenizer.vocab_size, config.model.tokenizer.max_length
        )
        words = self.tokenizer
        start, end = cast(int, words.bos_token_id), cast(int, words.eos_token_id)
        self.clip = CLIPModel(clip_config(config, len(words), words.model_max_length, start, end))
        if config.train.compile:
            compile_modules([part for part in self.clip.modules() if isinstance(part, CLIPEncoderLayer)])
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
        both, ids = torch.stack([texts, pictures], 1), batch["ids"]  # (B, 2, P)
        if self.accelerator.num_processes > 1:  # the others' rows are negatives too, and learn from it
            both, ids = gathered_rows(both), cast(Tensor, self.accelerator.gather(ids))
        texts, pictures = both.float().unbind(1)
        loss = contrastive_loss(texts, pictures, scale.float(), same_captions(ids).float())
        return loss, {"loss": loss}

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Loss, and how often a held-out picture's own caption is the nearest of all held-out captions. Each process
        computes its part of the vectors; all pairs of them are compared."""
        n, rank, world = min(len(self.test), MEASURED), self.accelerator.process_index, self.accelerator.num_processes
        mine = torch.arange(rank, rank + world * math.ceil(n / world), world).clamp(max=n - 1)  # as many in each
        vectors, scale = [], torch.ones(())
        with self.players[0].averaged():
            for chunk in mine.split(AT_ONCE):
                found = self.test.__getitems__([(i, i) for i in chunk.tolist()])
                batch = {k: v.to(self.accelerator.device) for k, v in found.items()}
                texts, pictures, scale = self.players[0].module(batch["ids"], batch["pictures"])
                vectors.append(torch.stack([texts, pictures], 1).float())  # (B, 2, P)
        both = cast(Tensor, self.accelerator.gather(torch.cat(vectors)))  # process after process
        both = both.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:n]  # row after row
        texts, pictures = both.unbind(1)
        same = same_captions(cast(Tensor, self.test.ids)[:n].to(both.device))
        right = same[torch.arange(n), (pictures @ texts.T).argmax(-1)]
        loss = contrastive_loss(texts, pictures, scale.float(), same.float())
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
