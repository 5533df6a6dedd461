"""``ldm``: every command, each importing what it needs only when called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.outputs import check_output

from . import cli_adapt, cli_app, cli_sample
from .cli_evaluate import evaluate
from .cli_inspect import app as inspect_app
from .cli_lora import app as lora_app
from .says import quiet_libraries, say

app = typer.Typer(
    name="ldm",
    help="Train, adapt and run your own text-to-image model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make a data set.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(inspect_app, name="inspect")
app.add_typer(lora_app, name="lora")

Configs = Annotated[
    list[str],
    typer.Argument(
        help="Config files in the order to run, and overrides: key=value for all, unet.key=value for unet.yaml alone."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the runs; replaces the folder part of output_dir.")]


def main() -> None:
    """Run the command line. What the user got wrong is one message and exit code 2, not a traceback; where another
    process was lost the code is 70."""
    quiet_libraries()
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        print(f"ldm: {error}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 2)) from error


def _is_ours(error: BaseException) -> bool:
    """Raised by a line of this package, to be read; what comes from deeper down keeps its traceback."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    root = Path(__file__).resolve().parent.parent
    file = Path(tb.tb_frame.f_code.co_filename).resolve() if tb else root
    return any(file.is_relative_to(root / name) for name in ("ldm", "pipelines", "training"))


@data_app.command()
def openmoji(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    concepts: Annotated[
        str | None, typer.Option(help="Names of drawings, separated by commas, or a file with a name per line.")
    ] = None,
) -> None:
    """Render OpenMoji (about 1,900 captioned pictures) as an imagefolder."""
    from .openmoji import read_names, render

    check_output(out, "--out", "folder")
    chosen = None if concepts is None else read_names(concepts)
    print(render(out, size, chosen))


data_app.command()(cli_adapt.style)
data_app.command()(cli_adapt.subject)


def _load(configs: list[str], out: Path | None) -> list[Any]:
    """Read, override, relocate and check: all that can be said before torch is imported."""
    from .config import load, overrides_of, relocate
    from .fit import ConfigError, check_together
    from .run import check_folder

    files = [c for c in configs if "=" not in c]
    if not files:
        raise ConfigError("no config file given; `ldm init` lists those that come with the package")
    overrides, names = [c for c in configs if "=" in c], [Path(file).stem for file in files]
    loaded = [load(file, overrides_of(n, overrides, names)) for file, n in zip(files, names, strict=True)]
    if out is not None:
        loaded = relocate(loaded, out)
    check_together(loaded)
    for config in loaded:
        check_folder(config)
    return loaded


@app.command()
def train(
    configs: Configs,
    out: Out = None,
    resume: Annotated[
        str, typer.Option(help="auto (newest checkpoint), never, or a checkpoint folder to resume from.")
    ] = "auto",
    tell: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Run `ldm check` first, and start nothing that does not fit into memory."
        ),
    ] = True,
) -> None:
    """Train the configs in order. Finished runs are reused, interrupted ones resume.

    Nothing is started if one of them does not fit into the free memory (exit code 2).
    """
    loaded = _load(configs, out)
    say()
    from .run import begun, train_all

    opened: dict[str, Any] = {}
    if tell and (ahead := [config for config in loaded if not begun(config)]):
        from .preflight import report

        report(ahead, earlier=[config for config in loaded if config not in ahead], opened=opened)
    train_all(loaded, resume, opened=opened)


app.command()(cli_adapt.adapt)
app.command()(cli_adapt.judge)


@app.command()
def check(configs: Configs, out: Out = None) -> None:
    """Check configs and their data, and estimate sizes, memory and time, without training.

    The exit code is 2 if a config or its data are wrong, or a run does not fit into the free memory.
    """
    loaded = _load(configs, out)
    say()
    from .preflight import report
    from .run import check_mirror

    for config in loaded:
        check_mirror(config)
    report(loaded)


@app.command()
def cache(configs: Configs, out: Out = None) -> None:
    """Encode the pictures and captions of diffusion configs before training; nothing is trained."""
    loaded = _load(configs, out)
    say()
    from .run import cache_all

    cache_all(loaded)


@app.command()
def ema(
    run: Annotated[Path, typer.Argument(help="Run folder with EMA snapshots (ema.snapshot_every).")],
    sigma_rel: Annotated[
        float, typer.Option(help="Width of the average relative to the run's length, for example 0.1.")
    ],
    out: Annotated[Path, typer.Option(help="Pipeline folder to write.")],
    images: Annotated[
        int | None, typer.Option(help="Point of the run, in images seen. Default: the last snapshot.")
    ] = None,
) -> None:
    """Average the weights of a finished run over any width (post-hoc EMA, Karras et al. 2024)."""
    say()
    check_output(out, "--out", "folder")
    from .posthoc import ema_pipeline

    print(ema_pipeline(run, sigma_rel, out, images))


app.command()(cli_sample.sample)


app.command()(evaluate)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Pipeline folder, or a single file of weights.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file, or the folder, to write.")],
    dtype: Annotated[str | None, typer.Option(help="Precision: fp16, bf16 or fp32. Default: unchanged.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a pickled checkpoint; only tensors, no code.")
    ] = False,
    layout: Annotated[str | None, typer.Option(help="sd15, sd21, sdxl or sd3. Default: detected from IN.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Needed for a single file: a pipeline folder of its family, for tokenizers and configs."),
    ] = None,
) -> None:
    """Convert a pipeline folder to a single file for A1111 and ComfyUI, or such a file to a folder."""
    say()
    from pipelines.convert import convert as run

    print(run(source, target, dtype=dtype, allow_pickle=allow_pickle, layout=layout, config=config))


@app.command()
def init(
    name: Annotated[
        str | None, typer.Argument(help="Config to copy, for example openmoji/unet. Without a name: list all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: the config's name, in this folder.")] = None,
) -> None:
    """Copy an example config to your folder."""
    from .fit import ConfigError
    from .shipped import config_files

    files = config_files()
    if name is None:
        print("\n".join(files))
        return
    key = name.removesuffix(".yaml")
    if key not in files:
        raise ConfigError(f"{name}: not one of {', '.join(files)}")
    target = out or Path(files[key].name)
    check_output(target, "--out", "file")
    if target.exists():
        raise ConfigError(f"{target}: is there already; give another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(files[key].read_bytes())
    print(target)


app.command("app")(cli_app.page)


if __name__ == "__main__":
    main()
