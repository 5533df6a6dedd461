"""``ldm inspect``: what is inside a data set or a pipeline folder, and what a path looks like."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.outputs import check_output

from .says import say

app = typer.Typer(help="Say what is inside a data set or a pipeline folder, or draw a path.", no_args_is_help=True)
Configs = Annotated[list[str], typer.Argument(help="Config file, and key=value overrides.")]


@app.command("data")
def inspect_data(
    source: Annotated[str, typer.Argument(help="Config file, or a data set: folder, parquet or tar file, hub:name.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(help="key=value overrides of the config, and the config of its autoencoder."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.")] = Path("data.html"),
) -> None:
    """Look at all rows: what was found, what is left out and why, buckets and crops, captions, duplicates.

    Print a summary and write a page. The buckets are those of the run that the config describes.
    """
    from .fit import ConfigError
    from .schema import Data

    say()
    check_output(out, "--out", "file")
    config: Any
    if source.endswith((".yaml", ".yml")):
        from .config import load

        config = load(source, [x for x in more or [] if "=" in x])
        step, note = _bucket_step(config, source, [x for x in more or [] if "=" not in x])
    else:
        if more:
            raise ConfigError(f"{more[0]}: only a config takes overrides, and {source} is a data set")
        config, step = Data(path=source), None
        note = f"no config: buckets of {config.resolution} pixels; a run's own with `ldm inspect data CONFIG`"
    from .inspect_page import inspect, summary, write_data_page

    for place in (config if isinstance(config, Data) else config.data).places:
        elsewhere = place.path.startswith("hub:") or "://" in place.path or "*" in place.path
        if not elsewhere and not Path(place.path).expanduser().exists():
            raise ConfigError(f"{place.path}: no such folder or file (a data set of the hub is written hub:owner/name)")
    found = inspect(config, step=step, note=note)
    print(summary(found))
    print(write_data_page(config, out, found=found))


def _bucket_step(config: Any, source: str, configs: list[str]) -> tuple[int | None, str]:
    """What a bucket's sides must be multiples of in the run, and what is to be known about it.

    An autoencoder that is not trained yet is found by its config: one of ``configs``, or one beside ``source``.

    Raises:
        ConfigError: one of ``configs`` cannot be read.
    """
    from .buckets import default_step
    from .config import load
    from .fit import ConfigError, side_step
    from .schema import DiffusionConfig

    earlier = [load(file) for file in configs]
    data = config.data
    if data.bucket_step or not data.buckets:
        return None, ""
    try:
        return side_step(config, earlier), ""
    except ConfigError as error:
        reason = str(error)
    if isinstance(config, DiffusionConfig):
        for file in sorted(Path(source).parent.glob("*.y*ml")):
            with suppress(ConfigError):
                step = side_step(config, [load(file)])
                return step, f"buckets in steps of {step} pixels, as the autoencoder of {file} needs them"
    step = default_step(data.resolution)
    return None, (
        f"buckets in steps of {step} pixels, which are a guess: the run may have others ({reason}); "
        f"give the autoencoder's config too: `ldm inspect data {source} VAE.yaml`"
        if isinstance(config, DiffusionConfig)
        else f"buckets in steps of {step} pixels, which are a guess: the run may have others ({reason})"
    )


@app.command("model")
def inspect_model(folder: Annotated[str, typer.Argument(help="Pipeline folder.")]) -> None:
    """Show the parts, sizes and schedule of a pipeline folder."""
    say()
    from pipelines.folder import load_parts

    parts = load_parts(folder)
    for name, module in (("denoiser", parts.net), ("autoencoder", parts.vae), ("text encoder", parts.text)):
        count = sum(p.numel() for p in module.parameters())
        print(f"{name}: {type(module).__name__}, {count / 1e6:.2f}M parameters, {next(module.parameters()).dtype}")
    s = parts.schedule
    print(
        f"schedule: {type(s.path).__name__}, {type(s.prediction).__name__}, {s.sampler} on {s.spacing}, shift {s.shift}"
    )
    height, width = parts.size
    scale = parts.vae.latent_scale
    shift = f", shift {scale.shift:.4g}" if scale.shift else ""
    print(f"pictures: {width}x{height}, latents of {parts.channels} channels, scale {scale.scale:.4g}{shift}")


@app.command("path")
def inspect_path(
    configs: Configs,
    picture: Annotated[Path | None, typer.Option(help="Picture to add noise to. Default: a test chart.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Picture file to write.")] = Path("path.png"),
) -> None:
    """Draw a diffusion config's alpha, sigma, log-SNR and beta, and a picture on its way to noise."""
    from .config import load
    from .fit import ConfigError
    from .schema import DiffusionConfig

    check_output(out, "--out", "file")
    files = [c for c in configs if "=" not in c]
    if len(files) != 1:
        raise ConfigError(f"inspect path: expected one config file, got {len(files)}")
    config = load(files[0], [c for c in configs if "=" in c])
    if not isinstance(config, DiffusionConfig):
        raise ConfigError(f"{files[0]}: a {config.task} task has no path from data to noise; a diffusion task has")
    if picture is not None and not picture.is_file():
        raise ConfigError(f"{picture}: no such picture file")
    import torch

    from .evaluate.schedule import chart, draw_path
    from .objective import path_of
    from .pictures import decode

    pixels = chart()
    if picture is not None:
        pixels = torch.from_numpy(decode(picture.read_bytes(), 256)).float() / 127.5 - 1
    print(draw_path(path_of(config.path), pixels, out))
