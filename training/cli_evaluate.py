"""``ldm evaluate``: how good what a pipeline draws is, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_sample import Dtype
from .says import say


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Pipeline folder; or a folder of pictures that were drawn already.")],
    data: Annotated[
        Path, typer.Option(help="What it was trained on: imagefolder, parquet or tar, with its held-out part.")
    ],
    measures: Annotated[
        str | None,
        typer.Option(
            help="Some of fid, kid, precision_recall, nearest, clip_score, loss, bits, throughput, parted by commas; "
            "or all; by default all but bits."
        ),
    ] = None,
    features: Annotated[
        str, typer.Option(help="Network that looks: mobilenetv2, inception:FILE or clip:FOLDER.")
    ] = "mobilenetv2",
    clip: Annotated[str | None, typer.Option(help="CLIP of the CLIP score; by default the model's own.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many pictures to draw.")] = 256,
    retrieval: Annotated[
        bool, typer.Option("--retrieval", help="Draw every caption instead: how often its own concept is the nearest.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="num_inference_steps")] = 20,
    guidance: Annotated[float, typer.Option(min=0, help="guidance_scale")] = 3.0,
    sampler: Annotated[
        str | None, typer.Option(help="By default the one that the folder's scheduler stands for.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn and looked at at a time.")] = 16,
    device: Annotated[str | None, typer.Option(help="By default cuda where there is one.")] = None,
    dtype: Dtype = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side at which pictures are compared; by default the drawings'.")
    ] = None,
    likelihoods: Annotated[int, typer.Option(min=1, help="Held-out pictures whose bits are counted.")] = 8,
    image_column: Annotated[str, typer.Option(help="Of a parquet file or a tar.")] = "image",
    caption_column: Annotated[str, typer.Option(help="Of the data.")] = "text",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a pickled inception:FILE's tensors, and nothing that runs.")
    ] = False,
    run: Annotated[
        list[Path] | None, typer.Option(help="Runs to show in the report, in order; repeat the option.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for measures.json, report.html and the drawings.")] = Path(
        "outputs"
    ),
) -> None:
    """Draw what a data set's captions ask for, and measure the pictures: how near to real ones they are, how much of
    them they cover, whether they are copies, whether they show what was asked for; each figure with its confidence."""
    from rich.progress import Progress

    from .evaluate.report import write_report

    say()
    others = {"measures": measures, "clip": clip, "sampler": sampler, "resolution": resolution}
    others["allow-pickle"] = allow_pickle or None
    if retrieval and (odd := [name for name, value in others.items() if value is not None]):
        raise ValueError(f"--retrieval draws every caption once, in its own way: --{odd[0]} does not go with it")
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
    report = write_report(run or [], title=f"{folder}: what it draws", **about)
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
