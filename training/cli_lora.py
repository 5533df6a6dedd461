"""``ldm lora``: merge, extract, resize and convert LoRA files, and say what is in one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from .says import say

app = typer.Typer(help="Merge, extract, resize, convert LoRA files; say what is in one.", no_args_is_help=True)

Source = Annotated[Path, typer.Argument(metavar="LORA", help="LoRA file, a folder with one, or a run's folder.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="What to write: a .safetensors file, or a folder.")]
Form = Annotated[str, typer.Option("--format", help="diffusers, kohya (A1111 and ComfyUI) or peft.")]
Family = Annotated[
    str | None, typer.Option("--family", help="sd15, sd21, sdxl, sd3 or pixart, where the file does not tell.")
]
Dtype = Annotated[str | None, typer.Option(help="fp16, bf16 or fp32, the default.")]
Rank = Annotated[int | None, typer.Option(help="Rank of each layer, at most.")]
Energy = Annotated[float | None, typer.Option(help="Share of each layer's squared norm to keep, for example 0.95.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Words = Annotated[list[str] | None, typer.Option(help="Word that calls it up, for the metadata; repeat the option.")]


@app.command()
def merge(
    loras: Annotated[list[Path], typer.Argument(metavar="LORA...", help="LoRA files, folders with one, or runs.")],
    out: Out,
    weight: Annotated[
        list[float] | None, typer.Option(help="What each counts, in their order; 1 by default. Repeat the option.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Pipeline folder to merge into; OUT is one then.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Without a base: rank to come down to; by default their sum.")
    ] = None,
    format: Annotated[str | None, typer.Option("--format", help="Without a base: diffusers, kohya or peft.")] = None,
    family: Family = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge LoRA into a model's weights, or several into one LoRA."""
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
    original: Annotated[Path, typer.Argument(help="Pipeline folder or single file that the other was trained from.")],
    tuned: Annotated[Path, typer.Argument(help="The trained one, of the same architecture.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    component: Annotated[
        list[str] | None, typer.Option(help="unet, transformer, text_encoder …; by default all. Repeat the option.")
    ] = None,
    format: Form = "diffusers",
    family: Family = None,
    dtype: Dtype = None,
    trigger: Words = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a LoRA of what a fine-tuned model has learned."""
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
    format: Annotated[str | None, typer.Option("--format", help="By default that of LORA.")] = None,
    family: Family = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Bring a LoRA to a lower rank, losing as little as can be."""
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
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32; by default each tensor keeps its own.")] = None,
    trigger: Words = None,
    same_alpha: Annotated[
        bool, typer.Option("--same-alpha", help="One alpha for all: stock diffusers reads kohya's form right only so.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a LoRA in another form, with its ranks, alphas and metadata."""
    say()
    _check_out(out)
    from pipelines.lora import tools

    how: dict[str, Any] = dict(base=family, dtype=dtype, trigger=trigger or (), same_alpha=same_alpha)
    print(tools.convert(lora, out, format, overwrite=overwrite, **how))  # type: ignore[arg-type]


@app.command()
def info(
    lora: Source,
    norms: Annotated[bool, typer.Option("--norms", help="Also how much each component changes; reads all.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="Also all of the file's metadata.")] = False,
) -> None:
    """Say what is in a LoRA: form, model, layers, ranks, alphas, trigger words."""
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
