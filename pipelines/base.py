"""What all pipelines share: their parts, in and out of folders, and the way from a call to pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ldm.denoiser import Denoised
from ldm.models.attention import check_backend
from ldm.models.base import Network
from ldm.models.text import TextEncoder
from ldm.models.text_files import check_hub_options
from ldm.models.vae import VAE
from ldm.sampling import SAMPLERS

from .call import SAMPLING, More, OnStepEnd, Prompts, check_more, given, sized
from .conditions import start
from .core import Generators, Parts, decode, sample_latents, steps_walked
from .folder import load_parts, save_parts
from .hub import hub_error
from .lora.mixin import LoraMixin
from .schedulers import Schedule
from .stock import from_stock_pipeline

OUTPUTS = ("pil", "np", "pt", "latent")
SHOWN_AT_STEPS = ("latents", "denoised")  # to a callback; what the latents are taken for without their noise


class Call(NamedTuple):
    """The arguments that all pipelines are called with, by the names that they have there."""

    prompts: Prompts
    num_inference_steps: int | None
    guidance_scale: float | None
    num_images_per_prompt: int
    eta: float | None
    generator: Generators | None
    latents: Tensor | None
    output_type: str
    return_dict: bool
    guidance_rescale: float
    callback_on_step_end: OnStepEnd | None
    callback_on_step_end_tensor_inputs: Iterable[str]
    more: More


class LatentPipeline(LoraMixin, DiffusionPipeline):
    """Our networks, called as stock pipelines are; reads and writes folders of the stock form.

    Args:
        net: the denoiser, ``UNet``, ``MMDiT`` or ``DiT``.
        vae: the autoencoder.
        text: the text encoders, of the family that the network was trained with.
        schedule: path, prediction, sampler and grid: the meaning of the folder's scheduler.
    """

    model_cpu_offload_seq = "text->net->vae"
    defaults: ClassVar[Mapping[str, tuple[int, float]]]  # steps and guidance of the stock pipeline of each text family

    def __init__(self, net: Network, vae: VAE, text: TextEncoder, schedule: Schedule):
        super().__init__()
        self.register_modules(net=net, vae=vae, text=text, schedule=schedule)
        self._interrupt = False
        self._guidance_scale = self.defaults[text.family][1]
        self._num_timesteps = 0

    # --- in and out ----------------------------------------------------------------------------------------------

    @classmethod
    def from_parts(cls, parts: Parts) -> Self:
        return cls(parts.net, parts.vae, parts.text, parts.schedule)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        t5: bool | None = True,
        load_in_8bit: bool = False,
        **hub: Any,
    ) -> Self:
        """Open a pipeline folder, or fetch one from the hub by its name. Only safetensors are read, no code is run.

        Args:
            dtype: of all weights, whatever the files have.
            variant: of the files, such as ``fp16``.
            t5: None or False leaves the T5 of an SD3 out.
            load_in_8bit: T5 in 8 bits; needs bitsandbytes.
            hub: for a hub name: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.
        Raises:
            ValueError, OSError: naming the file that is missing, does not open or is not of a kind that is read here.
        """
        check_hub_options(hub)
        folder, name = Path(source).expanduser(), str(source)
        if not folder.exists() and name.count("/") == 1 and not name.startswith((".", "~", "/")):
            try:
                folder = Path(DiffusionPipeline.download(name, use_safetensors=True, variant=variant, **hub))
            except (OSError, ValueError) as error:
                raise ValueError(f"{name}: no such folder, and {hub_error(error)}") from error
        return cls.from_parts(load_parts(folder, dtype, variant=variant, t5=t5, load_in_8bit=load_in_8bit))

    @classmethod
    def from_diffusers(cls, source: DiffusionPipeline | str | Path, **kw: Any) -> Self:
        """Take over a stock pipeline (its weights are shared, not copied), or open a folder as ``from_pretrained``.

        Raises:
            ValueError: a pipeline, network or scheduler that has no counterpart here.
        """
        if isinstance(source, DiffusionPipeline):
            if kw:
                raise ValueError(f"from_diffusers: {', '.join(kw)} is for folders and hub names, not for pipelines")
            return cls.from_parts(from_stock_pipeline(source))
        return cls.from_pretrained(source, **kw)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **parts: Any) -> Self:  # type: ignore[override]
        """A pipeline of this kind around the weights of another, ours or stock's: shared, not copied, and not cast, as
        stock's ``from_pipe`` does to float32.

        Args:
            parts: ``net``, ``vae``, ``text`` or ``schedule`` in the place of the other's.
        Raises:
            ValueError: as ``from_diffusers``; another part.
        """
        given = pipeline.parts if isinstance(pipeline, LatentPipeline) else from_stock_pipeline(pipeline)
        if unknown := parts.keys() - {field.name for field in fields(Parts)}:
            raise ValueError(f"from_pipe: {min(unknown)!r} is no part of a pipeline; net, vae, text and schedule are")
        return cls.from_parts(replace(given, **parts))

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """Write the stock form, which ``DiffusionPipeline.from_pretrained`` opens without this package.

        Raises:
            ValueError: the folder holds anything but a pipeline, the schedule has no stock form, or a LoRA acts that is
                not fused.
        """
        with self._without_lora("save_pretrained"):
            save_parts(save_directory, self.parts)

    @property
    def parts(self) -> Parts:
        return Parts(self.net, self.vae, self.text, self.schedule)

    # --- what users of stock pipelines look for ------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop sampling; what there is will be decoded."""
        return self._interrupt

    def set_attention_backend(self, name: str) -> None:
        """The attention kernel of network and autoencoder: ``auto``, ``xformers``, ``flash``, ``sdpa``, ``plain``.

        Raises:
            ValueError, RuntimeError: one of the two cannot have it, and why. Neither has changed then.
        """
        check_backend(name)
        networks = {"net": self.net, "vae": self.vae}
        for part, network in networks.items():
            try:
                network.check_attention_backend(name)
            except ValueError as error:
                raise ValueError(f"the pipeline's {part}: {error}; pipe.net and pipe.vae can have one each") from error
        for network in networks.values():
            network.set_attention_backend(name)

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable | None = None) -> None:
        if attention_op is not None:
            raise ValueError("attention_op: xFormers chooses the operator by itself here; leave it out")
        self.set_attention_backend("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        self.set_attention_backend("auto")

    def enable_sequential_cpu_offload(self, *args: Any, **kw: Any) -> None:
        """Not here. Raises ValueError."""
        raise ValueError("layers cannot be kept apart from their networks here: call enable_model_cpu_offload()")

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """Stock's, but first shown after a step: what is logged in the first one stands above it, not in it."""
        config = self._progress_bar_config = getattr(self, "_progress_bar_config", {})
        config.setdefault("delay", 1e-9)  # tqdm's own; time is counted from now on all the same
        bar: Any = super().progress_bar  # type: ignore[misc]
        return bar(iterable, total)

    # --- a call --------------------------------------------------------------------------------------------------

    def _draw(
        self,
        call: Call,
        pictures: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        size: tuple[int | None, int | None] = (None, None),
        strength: float = 1.0,
        noise_level: int = 0,
        image_guidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Text -> start latents -> sampler -> decode.

        Args:
            pictures, mask, strength, noise_level: of ``conditions.start``.
            size: height and width where there are no pictures.
        """
        check_more(call.more, self.__call__.__annotations__)
        if call.output_type not in OUTPUTS:
            raise ValueError(f"output_type {call.output_type!r} is not one of {', '.join(OUTPUTS)}")
        wanted = list(call.callback_on_step_end_tensor_inputs or ())
        if not {*wanted} <= {*SHOWN_AT_STEPS}:
            known = " and ".join(SHOWN_AT_STEPS)
            raise ValueError(f"callback_on_step_end_tensor_inputs is {wanted}; {known} can be had")
        each = call.num_images_per_prompt
        if not isinstance(each, int) or each < 1:
            raise ValueError(f"num_images_per_prompt is {each!r}, expected a whole number, 1 or more")
        parts, family = self.parts, self.text.family
        default_steps, default_scale = self.defaults[family]
        steps = default_steps if call.num_inference_steps is None else call.num_inference_steps
        scale = default_scale if call.guidance_scale is None else call.guidance_scale
        walked = steps_walked(steps, strength, family)
        self._interrupt, self._guidance_scale, self._num_timesteps = False, scale, walked

        cond, uncond = call.prompts.told(self.net, self.text, scale > 1, call.more)
        shown = 1 if pictures is None else len(pictures)
        if len(cond) == 1 and shown > 1:
            cond = cond.repeat_interleave(shown)
        if shown not in (1, len(cond), len(cond) * each):
            raise ValueError(f"image: {shown} for {len(cond)} prompts; expected 1, or one for each")
        if uncond is not None and len(uncond) > 1:
            uncond = uncond.repeat_interleave(each)
        cond = cond.repeat_interleave(each)
        begin = start(
            parts, len(cond), size, pictures, mask, strength=strength, noise_level=noise_level,
            generator=call.generator, noise=call.latents, device=self._execution_device,
        )  # fmt: skip
        h, w = (side * self.vae.factor for side in begin.noise.shape[-2:])
        cond, uncond = sized(self.net, cond, uncond, size[0] or h, size[1] or w, call.more)

        sampler = SAMPLERS.get(call.more.get("sampler") or self.schedule.sampler)
        no_eta = sampler is not None and "eta" not in inspect.signature(sampler).parameters
        eta: dict[str, Any] = {} if call.eta is None or (no_eta and call.eta == 0) else {"eta": call.eta}
        with self.progress_bar(total=walked) as bar:

            def on_step(i: int, t: Tensor, x: Tensor, denoised: Denoised) -> Tensor | None:
                bar.update()
                if call.callback_on_step_end is not None:
                    time = self.schedule.time_input(t, self.schedule.path)
                    tensors = {"latents": x, "denoised": denoised.x0}
                    tensors = {name: tensors[name] for name in wanted}
                    x = (call.callback_on_step_end(self, i, time, tensors) or {}).get("latents", x)
                if self._interrupt:
                    raise _Interrupted(x)
                return x

            try:
                x = sample_latents(
                    parts, *begin.told(cond, uncond), begin.noise, steps=steps, guidance_scale=scale,
                    rescale=call.guidance_rescale, image_guidance_scale=image_guidance_scale, source=begin.source,
                    strength=strength, mask=begin.mask, generator=call.generator, on_step=on_step,
                    **given(call.more, *SAMPLING),
                    **eta,
                )  # fmt: skip
            except _Interrupted as stopped:
                x = stopped.latents

        images: Any = x
        if call.output_type != "latent":
            images = decode(self.vae, x, family)
        if call.output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if call.output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if call.return_dict else (images,)


class _Interrupted(Exception):
    def __init__(self, latents: Tensor):
        super().__init__("sampling was interrupted by a callback")
        self.latents = latents
