"""What a LoRA file says of itself: kohya's ``ss_…`` entries, modelspec's, and the words that call it up.

Stability-AI/ModelSpec 1.0.0; the names of the other entries as kohya-ss/sd-scripts writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple


class Family(NamedTuple):
    architecture: str
    version: str  # ss_base_model_version
    implementation: str
    resolution: int


FAMILY = {
    "sd15": Family("stable-diffusion-v1", "sd_v1", "diffusers", 512),
    "sd21": Family("stable-diffusion-v2-768-v", "sd_v2", "diffusers", 768),
    "sdxl": Family("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "sgm", 1024),  # named as that code names it
    "sd3": Family("stable-diffusion-3-medium", "sd3", "diffusers", 1024),
    "pixart": Family("pixart", "pixart", "diffusers", 1024),
}
CUSTOM = "latent-t2i-sd"  # Stable Diffusion's layers in other sizes than the published models'
_ARCHITECTURES = {
    CUSTOM: "sd15", "stable-diffusion-v1": "sd15", "stable-diffusion-v2": "sd21", "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3": "sd3", "pixart": "pixart",
}  # fmt: skip
_VERSIONS = {"sd_v1": "sd15", "sd_1": "sd15", "sd_v2": "sd21", "sd_2": "sd21", "sdxl": "sdxl", "sd3": "sd3"}


def told_family(metadata: Mapping[str, str]) -> str | None:
    """The family that a file says it is for."""
    for key, table in (("modelspec.architecture", _ARCHITECTURES), ("ss_base_model_version", _VERSIONS)):
        said = metadata.get(key, "").lower()
        if found := next((family for start, family in table.items() if said.startswith(start)), None):
            return found
    return "sd21" if metadata.get("ss_v2") == "True" else None


def notes(
    base: str | None,
    layers: Iterable[tuple[int, float]],
    *,
    title: str,
    trigger: Sequence[str] = (),
    resolution: tuple[int, int] | None = None,
    told: Mapping[str, str] | None = None,
    custom: bool = False,
) -> dict[str, str]:
    """The metadata of a file; its hash is filled in by whoever writes it.

    Args:
        layers: (rank, alpha) of each.
        trigger: words that the LoRA was trained to answer to.
        resolution: width and height of the pictures that it is for.
        told: what the file that this one was made of said; kept where nothing newer is known.
        custom: for a model of the family's layers in sizes of its own: it is not labelled as the
            published one, whose users could not load it.
    """
    told, layers = dict(told or {}), list(layers)
    ranks, alphas = {rank for rank, _ in layers}, {alpha for _, alpha in layers}
    found = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.date": told.get("modelspec.date", datetime.now(UTC).strftime("%Y-%m-%d")),
    }
    if custom:
        found["modelspec.architecture"] = f"{CUSTOM}/lora"
        found["modelspec.implementation"] = "diffusers"
    elif base is not None:
        family = FAMILY[base]
        said = told if told_family(told) == base else {}  # its own words, such as 3.5, where they are of this family
        found["ss_base_model_version"] = said.get("ss_base_model_version", family.version)
        found["ss_v2"] = str(base == "sd21")
        found["modelspec.architecture"] = said.get("modelspec.architecture", f"{family.architecture}/lora")
        found["modelspec.implementation"] = family.implementation
        side = f"{family.resolution}x{family.resolution}"
        found["modelspec.resolution"] = said.get("modelspec.resolution", side)
    if base is not None and resolution is not None:
        found["modelspec.resolution"] = f"{resolution[0]}x{resolution[1]}"
    if trigger:
        found["modelspec.trigger_phrase"] = ", ".join(trigger)
        found["ss_tag_frequency"] = json.dumps({"latent_t2i": {word: 1 for word in trigger}})
    told.pop("modelspec.hash_sha256", None)  # of other tensors
    return told | found


def triggers(metadata: Mapping[str, str], most: int = 20) -> list[str]:
    """The words that a file says it answers to; else the tags that its training pictures had most often."""
    if said := metadata.get("modelspec.trigger_phrase"):
        return [word.strip() for word in said.split(",")]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: dict[str, int] = {}
        for tags in folders.values():
            for tag, count in tags.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, TypeError, AttributeError):  # a foreign file's note is no reason to fail
        return []
    return sorted(counts, key=lambda tag: (-counts[tag], tag))[:most]
