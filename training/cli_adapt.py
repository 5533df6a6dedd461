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
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    count: Annotated[int, typer.Option(help="Pictures to train on; the other concepts are held out.")] = 40,
    source: Annotated[str, typer.Option(help="ink or poster, drawn here; noto or fluent, fetched by npm.")] = "ink",
) -> None:
    """Draw OpenMoji's concepts in a style that the demo's model never saw, as an imagefolder."""
    check_output(out, "--out", "folder")
    from .styles import style_pictures

    print(style_pictures(out, size, count, source))


def subject(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    concept: Annotated[str, typer.Option(help="One of OpenMoji's drawings, to be made blue.")] = "lemon",
) -> None:
    """Draw five pictures of one subject, a thing in a colour that it never has, and eight to judge by."""
    check_output(out, "--out", "folder")
    from .styles import subject_pictures

    print(subject_pictures(out, size, concept))


def adapt(
    base: Annotated[str, typer.Option(help="Pipeline folder, run, hub name or single .safetensors file.")],
    images: Annotated[Path, typer.Option(help="Folder of pictures; captions from .txt files or metadata, if any.")],
    trigger: Annotated[str, typer.Option(help="What prompts are to say: a rare word and its class, as 'sks dog'.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value overrides of the config.")] = None,
    method: Annotated[str, typer.Option(help="lora, dreambooth, textual_inversion or finetune.")] = "lora",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default outputs/ and the trigger.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Train without asking.")] = False,
) -> None:
    """Adapt a model to a folder of pictures: a config is chosen, written, shown, checked and run.

    Exit code 1 where the answer is no; 2 where something is wrong, or the run does not fit into the free memory.
    """
    say()
    if out is not None:
        check_output(out, "--out", "folder")
    from .adapt_auto import adapt as run

    if run(base, images, trigger, method, out, yes, overrides or ()) is None:  # type: ignore[arg-type]  # it is checked
        raise typer.Exit(1)


def judge(
    run: Annotated[Path, typer.Argument(help="Folder of an adapt run that has ended.")],
    data: Annotated[Path, typer.Option(help="What the base was trained on, as `ldm data openmoji` makes it.")],
    style: Annotated[Path | None, typer.Option(help="Pictures of the style, as `ldm data style` makes them.")] = None,
    subject: Annotated[Path | None, typer.Option(help="Of the subject, as `ldm data subject` makes them.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What draws the subject; by default the run's own.")] = None,
    concept: Annotated[str | None, typer.Option(help="The subject's class; by default as SUBJECT tells it.")] = None,
    prompts: Annotated[int | None, typer.Option(help="So many of the style's held-out concepts; else all.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="num_inference_steps; by default the run's own.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="guidance_scale; by default the run's own.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    lora_from: Annotated[float, typer.Option(help="The share of the steps after which the LoRA acts.")] = 0.0,
    dtype: Dtype = None,
) -> None:
    """Say what an adaptation has learnt and kept, by a network that had no part in training, in RUN/report.html."""
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
