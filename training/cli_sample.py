"""`ldm sample`: draw pictures from a prompt, or again what a picture's settings say."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .says import say

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

log = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {"pictures": 1, "seed": 0}
RULE = "what the model's card says, else that of the stock pipeline."
CALL = (  # settings that are keywords of a pipeline's call, by their names
    "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "guidance", "sampler",
    "long_prompt", "weighting", "strength",
)  # fmt: skip
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Precision of the weights: fp32, bf16 or fp16. Default: bf16 on a GPU (fp16 if it has no bf16), "
        "fp32 on a CPU."
    ),
]
LONG_PROMPTS = ("cut", "chunk", "refuse")


def sample(
    folder: Annotated[str | None, typer.Argument(help="Pipeline folder, run folder or hub name.")] = None,
    prompt: Annotated[str | None, typer.Argument(help="Text to draw.")] = None,
    n: Annotated[int | None, typer.Option("-n", min=1, help="Number of pictures. Default: 1.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the first picture; each next picture adds 1. Default: 0.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help=f"Number of sampling steps. Default: {RULE}")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help=f"Guidance scale. Default: {RULE}")] = None,
    guide: Annotated[
        list[str] | None,
        typer.Option(help="Kind of guidance: NAME or NAME:KEY=NUMBER,… (apg:eta=0.5). Can be repeated."),
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(min=0, max=1, help="Strength of the guidance rescale (Lin et al. 2024).")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt: text to lead away from.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Name of the sampler. Default: the model's own.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels. Default: the model's own.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels. Default: the model's own.")] = None,
    long_prompt: Annotated[
        str | None,
        typer.Option(help="A prompt longer than the model reads: cut it (default), read it in chunks, or refuse."),
    ] = None,
    weighting: Annotated[
        bool | None,
        typer.Option("--weighting/--no-weighting", help="Read (word:1.3) as a weighted word. Default: no."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to start from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Mask of --image: white parts are drawn anew.")] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, max=1, help="How much --image changes: 0 nothing, 1 everything.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA file, folder or run: PATH or PATH:WEIGHT. Can be repeated."),
    ] = None,
    lora_from: Annotated[
        float | None,
        typer.Option(help="Draw this share of the steps without the LoRAs, for example 0.3: they decide the layout."),
    ] = None,
    embedding: Annotated[list[Path] | None, typer.Option(help="File of new tokens. Can be repeated.")] = None,
    dtype: Dtype = None,
    again: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Draw again with the settings stored in this picture; options given here replace them."
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", help="A picture file (several pictures become one grid), or a folder for separate files."
        ),
    ] = Path("out.png"),
) -> None:
    """Draw pictures from a prompt.

    PNG, JPEG and WebP files keep the settings, and --from draws them again.
    """
    say()
    _check_out(out)
    given: dict[str, Any] = {
        "model": folder, "prompt": prompt, "pictures": n, "seed": seed, "num_inference_steps": steps,
        "guidance_scale": guidance, "guidance_rescale": guidance_rescale, "negative_prompt": negative,
        "guidance": [_kind(one) for one in guide] if guide else None, "sampler": sampler,
        "height": height, "width": width, "long_prompt": long_prompt, "weighting": weighting,
        "image": None if image is None else str(image), "mask": None if mask is None else str(mask),
        "strength": strength, "dtype": dtype, "loras": dict(_lora(one) for one in lora) if lora else None,
        "lora_from": lora_from, "embeddings": [str(file) for file in embedding] if embedding else None,
    }  # fmt: skip
    given = _with_run({key: value for key, value in given.items() if value is not None})
    settings = DEFAULTS | (given if again is None else _taken_up(again, given))
    _check(settings)
    for key in ("image", "mask"):
        if key in settings and out.resolve() == Path(settings[key]).expanduser().resolve():
            raise ValueError(f"{out}: is --{key}, and would be written over; give another --out")
    for path in draw(settings, out):
        print(path)


def _check_out(out: Path) -> None:
    from PIL import Image

    from pipelines.outputs import check_output
    from pipelines.picture_files import keeps_settings

    if out.is_dir() or not out.suffix:
        check_output(out, "--out", "folder")
        return
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{out}: expected the name of a picture file, for example {out.with_suffix('.png')}")
    check_output(out, "--out", "file")
    if not keeps_settings(out):
        log.warning("%s: this format keeps no settings, so --from cannot draw it again; .png, .jpg and .webp do", out)


def _with_run(given: dict[str, Any]) -> dict[str, Any]:
    """The settings with a run's folder replaced by its pipeline, or by its base, LoRA and new tokens."""
    if "model" not in given:
        return given
    from .run_folder import model_of

    model = model_of(given["model"])
    given["model"] = model.folder
    if model.lora:
        given["loras"] = {model.lora: 1.0} | given.get("loras", {})
    if model.embeddings:
        given["embeddings"] = [*model.embeddings, *given.get("embeddings", [])]
    return given


def _check(settings: Mapping[str, Any]) -> None:
    """What can be said before anything is opened."""
    for key, name in (("model", "FOLDER"), ("prompt", "PROMPT")):
        if key not in settings:
            raise ValueError(f"sample: {name} is missing; give a pipeline folder and a prompt, or --from a picture")
    prompt = settings["prompt"]
    if not prompt.strip():
        log.warning("the prompt is empty: the picture shows what the model draws without one")
    elif _there(prompt) and Path(prompt).expanduser().is_file():
        raise ValueError(
            f"PROMPT {prompt}: is the name of a file here, and a prompt is the text itself; give the text "
            f'("$(cat {prompt})"), or add a word to draw the name'
        )
    if settings.get("long_prompt", "cut") not in LONG_PROMPTS:
        raise ValueError(f"--long-prompt {settings['long_prompt']}: expected {', '.join(LONG_PROMPTS)}")
    for key in ("mask", "strength"):
        if key in settings and "image" not in settings:
            raise ValueError(f"--{key} goes with --image, the picture to start from, which is missing")
    for key in ("image", "mask"):
        if key in settings and not _there(settings[key]):
            raise ValueError(f"--{key} {settings[key]}: no such picture file")
    if settings["seed"] + settings["pictures"] > 2**64:
        raise ValueError(f"--seed {settings['seed']}: expected less than 2^64")


def _kind(told: str) -> str | dict[str, Any]:
    """``apg:eta=0.5,norm_threshold=2`` as ``guiding.guide`` takes it."""
    name, colon, options = told.partition(":")
    found: dict[str, Any] = {"name": name}
    for one in options.split(",") if colon else []:
        key, equals, value = one.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--guide {told}: expected NAME or NAME:KEY=NUMBER,KEY=NUMBER, got {one!r}")
        try:
            found[key.strip()] = float(value)
        except ValueError:
            found[key.strip()] = value.strip()  # of autoguidance: weak=FOLDER
    return found if colon else name


def _lora(told: str) -> tuple[str, float]:
    place, _, weight = told.rpartition(":") if not _there(told) else (told, "", "1")
    try:
        return place, float(weight)
    except ValueError as error:
        raise ValueError(f"--lora {told}: no such file or folder (with a weight it is PATH:WEIGHT)") from error


# --- again -----------------------------------------------------------------------------------------------------------


def _taken_up(picture: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The picture's settings with what is given in their place.

    Raises:
        ValueError: there are none, or they need a file that is not here or is another one than it was.
    """
    from pipelines.picture_files import Settings, read_settings

    found = read_settings(picture)
    digests, versions = found.pop("digests", {}), found.pop("versions", {})
    found.pop("mode", None)
    found.setdefault("dtype", "fp32")  # pictures from before it was written down
    for key in [key for key in found if key not in Settings.model_fields]:
        log.warning("%s: its setting %s is not known here, and not taken up: %.100r", picture, key, found.pop(key))
    if "index" in found and ("pictures" in given or "seed" in given):  # another one, and no longer one of a batch
        found["seed"] = found.get("seed", 0) + found.pop("index")
        found["pictures"] = 1
    if "model" in found and "model" not in given and not _there(found["model"]):
        raise ValueError(
            f"{picture}: was drawn by {found['model']:.200}, which is no folder here; give the pipeline's folder, or "
            "its name on the hub: a picture's word alone fetches nothing"
        )
    settings = found | dict(given)
    if "image" in given and "mask" not in given:
        settings.pop("mask", None)
    _check_digests(picture, digests, settings, given)
    for name, version in _versions().items():
        if versions.get(name, version) != version:
            log.warning("%s: was drawn with %s %s, this is %s: it may differ in a few shades", picture, name,
                        versions[name], version)  # fmt: skip
    return settings


def _files(settings: Mapping[str, Any]) -> dict[str, str]:
    """All that a picture is drawn from, by the name under which its digest is kept."""
    named = [*settings.get("loras", {}), *settings.get("embeddings", [])]
    named += [settings[key] for key in ("image", "mask") if key in settings]
    kinds = settings.get("guidance", [])
    named += [one["weak"] for one in kinds if isinstance(one, dict) and isinstance(one.get("weak"), str)]
    model = {"model": settings["model"]} if "model" in settings else {}
    return model | {file: file for file in named}


def _there(file: str) -> bool:
    try:
        return Path(file).expanduser().exists()
    except (OSError, RuntimeError):  # no name that a file could have
        return False


def _check_digests(
    picture: Path, digests: Mapping[str, str], settings: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """What the picture names has to be what it was; what is given instead is the user's own choice."""
    from pipelines.picture_files import digest

    for name, file in _files(settings).items():
        chosen = name in _files(given)
        if not _there(file):
            if not chosen:
                raise ValueError(f"{picture}: was drawn with {file:.200}, which is not here; give what takes its place")
        elif name in digests and digest(file) != digests[name]:
            if not chosen:
                raise ValueError(
                    f"{picture}: was drawn with {file} as it no longer is: its files have changed; name it on the "
                    "command line to draw with what it is now"
                )
            log.warning("%s: was drawn with other files than those of %s", picture, file)


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {"ldm": metadata.version("latent-t2i"), "torch": metadata.version("torch")}


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(settings: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw as the settings say, and write a file, or several into a folder; returns their names.

    The pictures are drawn as one batch, picture i from the seed + i alone. The rounding of a network's products depends
    on the batch, so that a picture drawn by itself may differ by one of 255 shades; ``index`` of ``pictures`` in its
    settings gives each, bit for bit, out of its batch.

    Raises:
        ValueError: naming what does not open, and what the pipelines refuse.
    """
    import torch

    from ldm.sampling import SAMPLERS
    from pipelines.card_defaults import sampling_defaults
    from pipelines.guiding import listed
    from pipelines.lora.late import LateLora
    from pipelines.picture_files import digest
    from pipelines.precision import dtype_name, sampling_dtype

    from .evaluate.grids import picture_grid, to_pil

    if settings.get("sampler") is not None and settings["sampler"] not in SAMPLERS:
        raise ValueError(f"sampler {settings['sampler']!r} is not one of {', '.join(SAMPLERS)}")
    listed(settings.get("guidance", "classifier_free"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = sampling_dtype(device, settings.get("dtype"))
    pipe, more = _opened(settings, dtype)
    adapters = [*settings.get("loras", {}), *settings.get("embeddings", [])]
    steps, scale = sampling_defaults(settings["model"], pipe.defaults[pipe.text.family], adapters)
    settings = {"num_inference_steps": steps, "guidance_scale": scale} | dict(settings)
    loras = {f"lora_{i}": one for i, one in enumerate(settings.get("loras", {}).items())}
    for name, (place, _) in loras.items():
        pipe.load_lora_weights(place, name)
    if loras:
        pipe.set_adapters(list(loras), [weight for _, weight in loras.values()])
    for file in settings.get("embeddings", []):
        pipe.load_textual_inversion(file)
    pipe.to(device)
    n, seed, index = settings["pictures"], settings["seed"], settings.get("index")
    if index is not None and index >= n:
        raise ValueError(f"index is {index} of {n} pictures; expected less")
    call = {key: settings[key] for key in CALL if key in settings}
    with LateLora(pipe, settings["lora_from"]) if settings.get("lora_from") else nullcontext() as late:
        (pictures,) = pipe(
            **call | more | {"prompt": [settings["prompt"]] * n},
            generator=[torch.Generator().manual_seed(seed + i) for i in range(n)],
            callback_on_step_end=late,
            output_type="pt",
            return_dict=False,
        )
    drawn = to_pil(torch.as_tensor(pictures).float().cpu())
    files = {name: file for name, file in _files(settings).items() if _there(file)}
    told = {
        **settings,
        "sampler": settings.get("sampler", pipe.schedule.sampler),
        "dtype": dtype_name(dtype),
        "height": drawn[0].height,
        "width": drawn[0].width,
        "digests": {name: digest(file) for name, file in files.items()},
        "versions": _versions(),
    }
    if out.is_dir() or not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        each = range(n) if index is None else [index]
        return [_save(drawn[i], _free(out, seed + i), told | ({"index": i} if n > 1 else {})) for i in each]
    out.parent.mkdir(parents=True, exist_ok=True)
    if n == 1 or index is not None:
        return [_save(drawn[index or 0], out, told)]
    return [_save(picture_grid(drawn, cell=drawn[0].width), out, told)]


def _opened(settings: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The pipeline for what is given, and what of it the call takes."""
    model, more = settings["model"], {key: settings[key] for key in ("height", "width") if key in settings}
    if "image" not in settings:
        from pipelines.text_to_image import TextToImagePipeline

        return TextToImagePipeline.from_pretrained(model, dtype=dtype), more
    more["image"] = _picture(settings["image"], "RGB")
    if "mask" not in settings:
        from pipelines.image_to_image import ImageToImagePipeline

        return ImageToImagePipeline.from_pretrained(model, dtype=dtype), more
    from pipelines.inpaint import InpaintPipeline

    more["mask_image"] = _picture(settings["mask"], "L")
    if more["mask_image"].size != more["image"].size:
        raise ValueError(
            f"--mask {settings['mask']} is of {more['mask_image'].size}, --image {settings['image']} of "
            f"{more['image'].size}: they must be of one size"
        )
    return InpaintPipeline.from_pretrained(model, dtype=dtype), more


def _picture(file: str, mode: str) -> Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(Path(file).expanduser()) as opened:
            return ImageOps.exif_transpose(opened).convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: does not open as a picture ({error})") from error


def _save(picture: Image, path: Path, settings: Mapping[str, Any]) -> Path:
    from pipelines.outputs import write_or_keep
    from pipelines.picture_files import save_picture

    return write_or_keep(path, lambda file: save_picture(picture, file, settings), suffix=".png")


def _free(folder: Path, seed: int) -> Path:
    """A name that nothing has yet."""
    names = (folder / f"{seed}{f'-{i}' if i > 1 else ''}.png" for i in count(1))
    return next(name for name in names if not name.exists())
