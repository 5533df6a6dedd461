"""``ldm evaluate``: how good what a pipeline draws is, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.outputs import check_output

from .cli_sample import RULE, Dtype
from .says import say


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Pipeline folder, run folder, or a folder of drawn pictures.")],
    data: Annotated[Path, typer.Option(help="Training data with a held-out split: imagefolder, parquet or tar.")],
    measures: Annotated[
        str | None,
        typer.Option(
            help="Measures, separated by commas: fid, kid, precision_recall, nearest, clip_score, loss, bits, "
            "throughput; or all. Default: all but bits."
        ),
    ] = None,
    features: Annotated[
        str, typer.Option(help="Feature network: mobilenetv2, inception:FILE or clip:FOLDER.")
    ] = "mobilenetv2",
    clip: Annotated[str | None, typer.Option(help="CLIP folder for the CLIP score. Default: the model's own.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of pictures to draw.")] = 256,
    retrieval: Annotated[
        bool,
        typer.Option(
            "--retrieval", help="Only draw every caption once and count how often its own concept is the nearest."
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help=f"Number of sampling steps. Default: {RULE}")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help=f"Guidance scale. Default: {RULE}")] = None,
    sampler: Annotated[str | None, typer.Option(help="Name of the sampler. Default: the model's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn and compared in one batch.")] = 16,
    device: Annotated[str | None, typer.Option(help="Device of torch. Default: cuda if there is one.")] = None,
    dtype: Dtype = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels at which pictures are compared. Default: as drawn.")
    ] = None,
    likelihoods: Annotated[int, typer.Option(min=1, help="Number of held-out pictures for the measure bits.")] = 8,
    image_column: Annotated[str, typer.Option(help="Column of the pictures in parquet or tar files.")] = "image",
    caption_column: Annotated[str, typer.Option(help="Column of the captions.")] = "text",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read inception:FILE from a pickle; only tensors, no code.")
    ] = False,
    run: Annotated[
        list[Path] | None, typer.Option(help="Run to show in the report, in order. Can be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write measures.json, report.html and the pictures to.")] = Path(
        "outputs"
    ),
) -> None:
    """Draw the captions of a data set and measure the pictures.

    The measures say how close the pictures are to real ones, how much of their variety they cover,
    whether they are copies, and whether they show their captions; each with a confidence interval.
    """
    from rich.progress import Progress

    from .evaluate.report import write_report

    say()
    check_output(out, "--out", "folder")
    others = {"measures": measures, "clip": clip, "sampler": sampler, "resolution": resolution}
    others["allow-pickle"] = allow_pickle or None
    if retrieval and (odd := [name for name, value in others.items() if value is not None]):
        raise ValueError(f"--retrieval draws every caption once, in its own way: --{odd[0]} does not go with it")
    name = folder
    folder, steps, guidance = _model(folder, steps, guidance)
    credit = data / "ATTRIBUTION.md"
    about: dict[str, Any] = {
        "out": out / "report.html",
        "attribution": credit.read_text(encoding="utf-8") if credit.is_file() else None,
    }
    with Progress(transient=True) as bar:
        task = bar.add_task("drawing", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        if retrieval:
            from .evaluate.retrieval import evaluate_retrieval

            found = evaluate_retrieval(
                folder, data, num_inference_steps=steps, guidance_scale=guidance, seed=seed, batch_size=batch_size,
                features=features, device=device, dtype=dtype, out=out, image_column=image_column,
                caption_column=caption_column, progress=lambda done, total: progress("drawing", done, total),
            )  # fmt: skip
            about |= {"metrics": found, "pictures": {"Samples": out / "samples.png"}}
        else:
            from .evaluate.evaluation import MEASURES, Asked
            from .evaluate.evaluation import evaluate as measure
            from .evaluate.measures_page import sections

            names = None if measures is None else tuple(x.strip() for x in measures.split(",") if x.strip())
            asked = Asked(
                MEASURES if names == ("all",) else names, features,
                allow_pickle, clip, samples, steps, guidance, sampler, seed, batch_size, likelihoods, device,
                image_column, caption_column, resolution, dtype=dtype,
            )  # fmt: skip
            taken = measure(folder, data, out, asked, progress)
            about["sections"] = sections(taken)
    report = write_report(run or [], title=f"{name}: what it draws", **about)
    if retrieval:
        print(f"right concept nearest: {found['top1']:.0%} of {found['prompts']} prompts, among 5: {found['top5']:.0%}")
        print(f"pictures  {out / 'samples.png'}\npipeline  {folder}\nreport    {report}")
        return
    width = max(map(len, taken.figures), default=0)
    for name, figure in taken.figures.items():
        print(f"{name:{width}}  {figure['value']:.4g}  ({figure['low']:.4g} to {figure['high']:.4g})")
    for note in taken.notes:
        print(note)
    print(f"measures  {out / 'measures.json'}\nreport    {report}")


def _model(source: Path, steps: int | None, guidance: float | None) -> tuple[Path, int, float]:
    """The pipeline folder (or the folder of pictures), the steps and the guidance scale to draw with.

    Raises:
        ValueError: a run that has made an adapter, which is measured by `ldm judge`.
    """
    from .run_folder import INDEX, model_of

    model = model_of(source)
    if model.adapters:
        raise ValueError(f"{source}: is an adapter for {model.folder}; `ldm judge {source}` measures it")
    folder = Path(model.folder)
    if not (folder.expanduser() / INDEX).is_file():
        return folder, steps or 20, 3.0 if guidance is None else guidance  # pictures: nothing is drawn
    from pipelines.card_defaults import sampling_defaults
    from pipelines.folder import read_index
    from pipelines.stock import FORMS
    from pipelines.text_to_image import TextToImagePipeline

    form = FORMS.get(read_index(folder.expanduser()).get("_class_name", ""))
    stock = TextToImagePipeline.defaults[form.family if form else "sd"]
    default_steps, default_guidance = sampling_defaults(folder, stock)
    return folder, steps or default_steps, default_guidance if guidance is None else guidance
