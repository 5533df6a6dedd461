"""LoRAs that set in late: the first steps, in which the layout is decided, are the base's alone."""

from __future__ import annotations

from typing import Any

from .live import active_adapters, set_weights


class LateLora:
    """A ``callback_on_step_end`` by which a denoiser's LoRAs act after a share of the steps only.

    with LateLora(pipe, 0.3) as late:
        pipe("a rocket", callback_on_step_end=late)

    For one call; at the end the weights are what they were. A LoRA of the text encoders acts on the prompt as ever.

    Args:
        pipe: one of this package's, with the LoRAs and weights that are to act.
        share: of the steps; at least the first is the base's.
    Raises:
        ValueError: share is outside (0, 1), or no LoRA acts on the denoiser; on entering, one is fused.
    """

    def __init__(self, pipe: Any, share: float):
        if not 0 < share < 1:
            raise ValueError(f"lora_from: expected a share of the steps above 0 and below 1, got {share!r}")
        self.net, self.share = pipe.parts.net, share
        self.weights = active_adapters(self.net)
        if not self.weights:
            raise ValueError(f"lora_from is {share}, but no LoRA acts on the denoiser: load one, or leave it out")

    def __enter__(self) -> LateLora:
        set_weights(self.net, dict.fromkeys(self.weights, 0.0))
        return self

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step + 1 == max(1, round(self.share * pipe.num_timesteps)):
            set_weights(self.net, self.weights)
        return {}

    def __exit__(self, *_: object) -> None:
        set_weights(self.net, self.weights)
