"""``ldm lora``: merge, extract, resize and convert LoRA files, and say what is in one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from .says import say

app = typer.Typer(help="Merge, extract, resize, convert and describe LoRA files.", no_args_is_help=True)

Source = Annotated[Path, typer.Argument(metavar="LORA", help="LoRA file, folder with a LoRA, or run folder.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The .safetensors file, or the folder, to write.")]
Form = Annotated[str, typer.Option("--format", help="diffusers, kohya (A1111 and ComfyUI) or peft.")]
Family = Annotated[
    str | None, typer.Option("--family", help="sd15, sd21, sdxl, sd3 or pixart, if the file does not say it.")
]
Dtype = Annotated[str | None, typer.Option(help="Precision: fp16, bf16 or fp32. Default: fp32.")]
Rank = Annotated[int | None, typer.Option(help="Highest rank of a layer.")]
Energy = Annotated[float | None, typer.Option(help="Share of each layer's squared norm to keep, for example 0.95.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Words = Annotated[list[str] | None, typer.Option(help="Trigger word, for the metadata. Can be repeated.")]


@app.command()
def merge(
    loras: Annotated[
        list[Path], typer.Argument(metavar="LORA...", help="LoRA files, folders with a LoRA, or run folders.")
    ],
    out: Out,
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of each LoRA, in their order. Default: 1. Can be repeated.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Pipeline folder to merge into; --out is then a pipeline folder too.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Without --base: rank of the result. Default: the sum of the ranks.")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="Without --base: diffusers, kohya or peft. Default: diffusers.")
    ] = None,
    family: Family = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge LoRAs into one LoRA, or into the weights of a model."""
    say()
    _check_out(out, base is not None)
    from pipelines.lora import tools

    if base is None:
        how: dict[str, Any] = dict(format=format or "diffusers", base=family, dtype=dtype, overwrite=overwrite)
        print(tools.merge(loras, out, weights=weight, rank=rank, **how))
        return
    for name, value in (("rank", rank), ("format", format), ("family", family)):
        if value is not None:
            raise ValueError(f"--{name}: with --base a pipeline folder is written, which has none; leave it out")
    print(tools.merge_into(base, loras, out, weights=weight, dtype=dtype, overwrite=overwrite))


@app.command()
def extract(
    original: Annotated[Path, typer.Argument(help="Original model: pipeline folder or single file.")],
    tuned: Annotated[Path, typer.Argument(help="Fine-tuned model of the same architecture.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    component: Annotated[
        list[str] | None, typer.Option(help="unet, transformer, text_encoder … Default: all. Can be repeated.")
    ] = None,
    format: Form = "diffusers",
    family: Family = None,
    dtype: Dtype = None,
    trigger: Words = None,
    overwrite: Overwrite = False,
) -> None:
    """Extract a LoRA from the difference between a fine-tuned model and its original."""
    say()
    _check_out(out)
    from rich.console import Console
    from rich.progress import Progress

    from pipelines.lora import tools

    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("decomposing", total=None)
        made = tools.extract(
            original,
            tuned,
            out,
            rank=rank,
            energy=energy,
            components=component,
            format=format,  # type: ignore[arg-type]
            base=family,
            dtype=dtype,
            trigger=trigger or (),
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _tell(made)


@app.command()
def resize(
    lora: Source,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    format: Annotated[
        str | None, typer.Option("--format", help="diffusers, kohya or peft. Default: that of LORA.")
    ] = None,
    family: Family = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Reduce the rank of a LoRA with the least error."""
    say()
    _check_out(out)
    from pipelines.lora import tools

    how: dict[str, Any] = dict(format=format, base=family, dtype=dtype, overwrite=overwrite)
    _tell(tools.resize(lora, out, rank=rank, energy=energy, **how))


@app.command()
def convert(
    lora: Source,
    out: Out,
    format: Annotated[str, typer.Option("--format", help="diffusers, kohya (A1111 and ComfyUI) or peft.")],
    family: Family = None,
    dtype: Annotated[str | None, typer.Option(help="Precision: fp16, bf16 or fp32. Default: unchanged.")] = None,
    trigger: Words = None,
    same_alpha: Annotated[
        bool,
        typer.Option(
            "--same-alpha",
            help="Write one alpha for all layers: stock diffusers reads kohya files correctly only then.",
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a LoRA in another format, with its ranks, alphas and metadata."""
    say()
    _check_out(out)
    from pipelines.lora import tools

    how: dict[str, Any] = dict(base=family, dtype=dtype, trigger=trigger or (), same_alpha=same_alpha)
    print(tools.convert(lora, out, format, overwrite=overwrite, **how))  # type: ignore[arg-type]


@app.command()
def info(
    lora: Source,
    norms: Annotated[
        bool, typer.Option("--norms", help="Also show the norm of each component's change; reads the whole file.")
    ] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="Also show all metadata of the file.")] = False,
) -> None:
    """Describe a LoRA: format, model, layers, ranks, alphas, trigger words."""
    say()
    from pipelines.lora import info

    found = info.info(lora, norms=norms)
    print(f"form: {found.format}, {' and '.join(found.dtypes)}")
    print(f"model: {found.base or 'not told'}")
    if title := found.metadata.get("modelspec.title"):
        print(f"title: {title}")
    for name, part in found.components.items():
        kind = "DoRA" if part.dora else "LoRA"
        print(f"{name}: {kind} of {part.layers} layers ({part.convolutions} convolutions), {part.parameters:,} numbers")
        print(f"  rank {_counted(part.ranks)}; alpha {_counted(part.alphas)}")
        if part.norm is not None and part.largest is not None:
            print(f"  norm {part.norm:.4g}, the largest {part.largest[1]:.4g} of {part.largest[0]}")
    print(f"trigger words: {', '.join(found.triggers) or 'none told'}")
    for key, value in sorted(found.metadata.items()) if metadata else ():
        print(f"{key}: {value}")


def _check_out(out: Path, folder: bool = False) -> None:
    """Refuse a target that cannot be written: a pipeline folder, a .safetensors file, or a folder for one."""
    from pipelines.outputs import check_output

    check_output(out, "--out", "file" if out.suffix == ".safetensors" and not folder else "folder")


def _counted(numbers: dict[Any, int]) -> str:
    """``16`` or ``8 (40 times), 16 (20)``."""
    if len(numbers) == 1:
        return f"{next(iter(numbers)):g}"
    most: Iterable[tuple[Any, int]] = sorted(numbers.items(), key=lambda item: -item[1])
    told = [f"{number:g} ({count})" for number, count in most]
    return ", ".join(told[:6]) + (f" and {len(told) - 6} more" if len(told) > 6 else "")


def _tell(made: Any) -> None:
    ranks = [rank for rank, _ in made.kept.values()]
    worst, (rank, share) = min(made.kept.items(), key=lambda item: item[1][1])
    print(made.path)
    print(f"{len(ranks)} layers of rank {min(ranks)} to {max(ranks)}, {made.energy:.2%} of the energy kept")
    print(f"least kept: {share:.2%} of {worst} (rank {rank})")
    if made.left_out:
        print(f"left out: {len(made.left_out)} weights that no LoRA holds, the first {made.left_out[0]}")
