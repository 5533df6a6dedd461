"""The commands around adapting a model: `ldm adapt`, `ldm judge`, `ldm data style` and `ldm data subject`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.outputs import check_output

from .cli_sample import Dtype
from .says import say

TOLD = ("before", "after", "ratios", "ratio", "style_itself", "subject_itself", "learnt", "kept")  # of what is judged


def style(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    count: Annotated[int, typer.Option(help="Number of training pictures; the other concepts are held out.")] = 40,
    source: Annotated[
        str, typer.Option(help="Style: ink or poster (drawn here), noto or fluent (fetched with npm).")
    ] = "ink",
) -> None:
    """Draw OpenMoji's concepts in a style that is new to the demo model, as an imagefolder."""
    check_output(out, "--out", "folder")
    from .styles import style_pictures

    print(style_pictures(out, size, count, source))


def subject(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    concept: Annotated[str, typer.Option(help="Name of the OpenMoji drawing that is coloured blue.")] = "lemon",
) -> None:
    """Draw one subject, a thing in an unusual colour: five pictures to train on, eight to judge with."""
    check_output(out, "--out", "folder")
    from .styles import subject_pictures

    print(subject_pictures(out, size, concept))


def adapt(
    base: Annotated[
        str, typer.Option(help="Model to adapt: pipeline folder, run folder, hub name or single .safetensors file.")
    ],
    images: Annotated[Path, typer.Option(help="Folder of pictures, with or without caption files.")],
    trigger: Annotated[
        str, typer.Option(help="Words for the subject in prompts: a rare word and its class, such as 'sks dog'.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value overrides of the config.")] = None,
    method: Annotated[str, typer.Option(help="lora, dreambooth, textual_inversion or finetune.")] = "lora",
    out: Annotated[Path | None, typer.Option(help="Run folder to write. Default: outputs/ and the trigger.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Train without asking for confirmation.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="First forecast time and memory, and rehearse the run.")
    ] = True,
) -> None:
    """Adapt a model to a folder of pictures: choose, show and check a config, then train.

    The same command again continues a run that was stopped, and reports one that has ended.

    The exit code is 1 if you answer no, and 2 if something is wrong or does not fit into the free memory.
    """
    say()
    if out is not None:
        check_output(out, "--out", "folder")
    from .adapt_auto import adapt as run

    if run(base, images, trigger, method, out, yes, overrides or (), check) is None:  # type: ignore[arg-type]  # checked
        raise typer.Exit(1)


def judge(
    run: Annotated[Path, typer.Argument(help="Folder of a finished adapt run.")],
    data: Annotated[Path, typer.Option(help="Training data of the base, as `ldm data openmoji` writes it.")],
    style: Annotated[Path | None, typer.Option(help="Pictures of the style, as `ldm data style` writes them.")] = None,
    subject: Annotated[
        Path | None, typer.Option(help="Pictures of the subject, as `ldm data subject` writes them.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt that draws the subject. Default: that of the run.")] = None,
    concept: Annotated[
        str | None, typer.Option(help="Class of the subject. Default: that of the --subject folder.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(help="Number of held-out concepts of the style to draw. Default: all.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of sampling steps. Default: that of the run.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale. Default: that of the run.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture.")] = 0,
    lora_from: Annotated[float, typer.Option(help="Share of the steps that are drawn without the LoRA.")] = 0.0,
    dtype: Dtype = None,
) -> None:
    """Measure what an adaptation has learnt and kept, with an independent network; writes RUN/report.html."""
    say()
    check_output(run / "report.html", "RUN", "file")
    import json

    from .evaluate.adapted import judge_style, judge_subject

    if (style is None) == (subject is None):
        raise ValueError("judge: give --style or --subject: what the run was to learn")
    how: dict[str, Any] = {"seed": seed, "steps": steps, "guidance_scale": guidance, "lora_from": lora_from}
    how["dtype"] = dtype
    if style is not None:
        found = judge_style(run, style, data, prompts=prompts, **how)
    else:
        assert subject is not None
        found = judge_subject(run, subject, data, prompt=prompt, concept=concept, **how)
    print(json.dumps({key: found[key] for key in TOLD if key in found}, indent=1))
    print(run / "report.html")
