"""What a single file says of itself beside its weights: modelspec metadata, and the yaml that CompVis's readers want.

The metadata follows Stability-AI/ModelSpec 1.0.0. One entry of our own, ``latent_t2i.configs``, carries the stock
configs, so that a model of any size and schedule comes back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from .convert_configs import Config, Layout, prediction

CONFIGS = "latent_t2i.configs"
HASH = "modelspec.hash_sha256"
_SAID = {"v_prediction": "v", "flow_prediction": "flow"}


def modelspec(layout: Layout, title: str, configs: Mapping[str, Config], scheduler: Config) -> dict[str, str]:
    """Metadata of a file with these parts; its hash is filled in by whoever writes it."""
    net = configs[layout.parts[0].name]
    side, halvings = net.get("sample_size") or layout.resolution // 8, len(configs["vae"]["block_out_channels"]) - 1
    height, width = (side, side) if isinstance(side, int) else side
    kind = prediction(scheduler)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture(layout, net, kind),
        "modelspec.implementation": "sgm",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "modelspec.resolution": f"{width * 2**halvings}x{height * 2**halvings}",
        "modelspec.prediction_type": _SAID.get(kind, kind),
    }


def architecture(layout: Layout, net: Config, kind: str) -> str:
    if layout.name == "sd15":
        return "stable-diffusion-v1-inpainting" if net["in_channels"] == 9 else "stable-diffusion-v1"
    if layout.name == "sd21":
        return "stable-diffusion-v2-768-v" if kind == "v_prediction" else "stable-diffusion-v2-512"
    if layout.name == "sdxl":
        return "stable-diffusion-xl-v1-base"
    if net.get("dual_attention_layers"):
        return "stable-diffusion-3.5-medium"
    return "stable-diffusion-3.5-large" if net.get("qk_norm") else "stable-diffusion-3-medium"


def told_prediction(file: Path, metadata: Mapping[str, str], markers: set[str]) -> str | None:
    """``epsilon`` or ``v_prediction``, where the file, its metadata or the yaml beside it says so."""
    if "v_pred" in markers:
        return "v_prediction"
    said = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")
    if said in ("v", "v_prediction"):
        return "v_prediction"
    if said == "epsilon":
        return said
    beside = file.with_suffix(".yaml")
    if beside.is_file():
        try:
            params = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]["params"]
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{beside}: not a CompVis config (expected model.params): {error}") from error
        return "v_prediction" if params.get("parameterization") == "v" else "epsilon"
    return None


def told_configs(file: Path, metadata: Mapping[str, str]) -> dict[str, Config]:
    """The configs that ``latent_t2i.configs`` carries; none if it is not there."""
    try:
        found = json.loads(metadata.get(CONFIGS, "{}"))
    except ValueError as error:
        raise ValueError(f"{file}: its metadata {CONFIGS} is not JSON ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(x, dict) for x in found.values()):
        raise ValueError(f"{file}: its metadata {CONFIGS} is not an object of objects")
    return found


def compvis_yaml(layout: Layout, configs: Mapping[str, Config], scheduler: Config) -> str:
    """The config by which CompVis's own classes (and A1111) build a Stable Diffusion 1 or 2 of these sizes."""
    net, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    widths, heads = net["block_out_channels"], net["attention_head_dim"]
    if net.get("num_attention_heads") is not None:
        heads = net["num_attention_heads"]
    attends = [1 if "CrossAttn" in kind else 0 for kind in net["down_block_types"]]
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    unet: dict[str, Any] = {
        "image_size": 32, "use_checkpoint": True, "legacy": False, "use_spatial_transformer": True,
        "in_channels": net["in_channels"], "out_channels": net["out_channels"], "model_channels": widths[0],
        "channel_mult": [w // widths[0] for w in widths], "num_res_blocks": net["layers_per_block"],
        "attention_resolutions": [2**i for i, there in enumerate(attends) if there][::-1],
        "transformer_depth": 1, "context_dim": net["cross_attention_dim"],
        "use_linear_in_transformer": bool(net.get("use_linear_projection")),
    }  # fmt: skip
    if len(set(heads)) == 1:
        unet["num_heads"] = heads[0]
    else:
        unet["num_head_channels"] = widths[0] // heads[0]
    layers = {
        "double_z": True, "z_channels": vae["latent_channels"], "resolution": 256, "attn_resolutions": [],
        "in_channels": vae["in_channels"], "out_ch": vae["out_channels"], "ch": vae["block_out_channels"][0],
        "ch_mult": [w // vae["block_out_channels"][0] for w in vae["block_out_channels"]],
        "num_res_blocks": vae["layers_per_block"], "dropout": 0.0,
    }  # fmt: skip
    encoder = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    if layout.name == "sd21":
        params = {"freeze": True, "layer": "penultimate" if text["num_hidden_layers"] == 23 else "last"}
        encoder = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": params}
    params = {
        "linear_start": scheduler.get("beta_start", 0.00085), "linear_end": scheduler.get("beta_end", 0.012),
        "timesteps": scheduler.get("num_train_timesteps", 1000), "num_timesteps_cond": 1, "log_every_t": 200,
        "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": net.get("sample_size") or 64,
        "channels": vae["latent_channels"], "cond_stage_trainable": False, "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema", "scale_factor": vae["scaling_factor"], "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": vae["latent_channels"],
                "monitor": "val/rec_loss",
                "ddconfig": layers,
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": encoder,
    }  # fmt: skip
    if prediction(scheduler) == "v_prediction":
        params = {"parameterization": "v", **params}
    model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    return yaml.safe_dump({"model": {"base_learning_rate": 1.0e-4, **model}}, sort_keys=False)
