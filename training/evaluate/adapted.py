"""What an adaptation has learnt, and what it has kept, in the eyes of a network that had no part in training.

Of a style: how far the judge's features of drawings are from those of held-out pictures of the style, and the share of
drawings whose own concept is among the ten nearest of all concepts. Of a subject: how far drawings of it are from its
held-out pictures, and whether its class and the other concepts are still there. All of it before and after, from the
same seeds, against the same real pictures.

The distance that decides is the kernel distance (KID, Bińkowski et al. 2018): a squared distance as Fréchet's is, whose
expectation is the true one however few the pictures are. Fréchet's (Heusel et al. 2017, eq. 6), told beside it, is far
too large for few pictures in many dimensions: 40 real ink drawings are at 134 from 126 others, where OpenMoji's own
are at 216. So it is also said what the distances are of the style's own pictures, ``style_itself``.

The judge is MobileNetV2 on ImageNet: the distances compare with one another, and not with anybody's FID.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from pipelines.core import decode, encode
from pipelines.lora.late import LateLora
from pipelines.precision import sampling_dtype

from ..openmoji import caption
from ..styles import MARKER
from .features import extract, load_features
from .grids import picture_grid
from .measures import frechet, gaussian, polynomial
from .metrics import retrieval
from .report import write_report

if TYPE_CHECKING:
    from ..schema import AdaptConfig

AMONG = 10  # nearest concepts
SHOWN = 10  # columns of the picture
PER_PROMPT = 16  # drawings of a subject
BEGIN, END = "<!-- judged -->", "<!-- end of judged -->"  # in the run's report: a later call replaces what is between


@dataclass(frozen=True)
class Gallery:
    """Real pictures: (M, 3, H, W) uint8, their concepts and captions."""

    pictures: Tensor
    concepts: list[str]
    captions: list[str]


def read_gallery(folder: str | Path, splits: Sequence[str] = ("train",)) -> Gallery:
    """Pictures of an imagefolder whose metadata.jsonl has the column ``concept``, as ``ldm data`` writes them.

    Raises:
        ValueError: no such folder, or one without that column.
    """
    rows = []
    for split in splits:
        file = Path(folder) / split / "metadata.jsonl"
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; expected a folder as `ldm data openmoji` or `ldm data style` makes it"
            )
        rows += [(file.parent, json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    if not rows or any("concept" not in row for _, row in rows):
        raise ValueError(f"{folder}: its metadata.jsonl has no column concept, which says what each picture shows")
    pictures = _open([place / row["file_name"] for place, row in rows])
    return Gallery(pictures, [row["concept"] for _, row in rows], [row["text"] for _, row in rows])


def _open(files: Sequence[Path]) -> Tensor:
    from ..pictures import decode

    side = Image.open(files[0]).size[0]
    return torch.stack([torch.from_numpy(decode(file.read_bytes(), side)) for file in files])  # (M, 3, H, W)


def mean_distance(x: Tensor, y: Tensor) -> float:
    """Squared distance of the two means, without the part that is due to the samples being few: 0 is expected of two
    samples of one distribution."""
    x, y = x.double(), y.double()
    noise = sum(float(f.var(0).sum()) / len(f) for f in (x, y))
    return float((x.mean(0) - y.mean(0)).square().sum()) - noise


def kernel_distance(x: Tensor, y: Tensor, x_shows: Tensor | None = None, y_shows: Tensor | None = None) -> float:
    """Squared maximum mean discrepancy of features (N, F) and (M, F) under the kernel (x·y / F + 1)³, without bias: KID
    (Bińkowski et al. 2018, eq. 3 and 4). 0 is expected of two samples of one distribution, and less than 0 can be had;
    a sample of which the share p is of the one and the rest of the other is p² of their distance from the other.

    Args:
        x_shows, y_shows: (N,) and (M,) numbers of what the rows show. Pairs that show the same are left out of all
            three means, as a row and itself always are: so equal sets are at 0, and no drawing gains by being of the
            same thing (with one row of each thing it is Gretton et al. 2012, eq. 4).
    """
    x, y = x.double(), y.double()
    shows = torch.arange(len(x) + len(y)) if x_shows is None or y_shows is None else torch.cat([x_shows, y_shows])
    of_x, of_y = shows.split([len(x), len(y)])

    def mean(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> float:
        return float(polynomial(a, b)[of_a[:, None] != of_b].mean())

    return mean(x, x, of_x, of_x) + mean(y, y, of_y, of_y) - 2 * mean(x, y, of_x, of_y)


@dataclass(frozen=True)
class Distances:
    """Of drawings from real pictures: squared distances all of them."""

    kernel: float
    frechet: float
    mean: float


@dataclass(frozen=True)
class Found(Distances):
    """Of one model. ``concepts``: share with the own concept among the ten nearest."""

    concepts: float


@dataclass(frozen=True)
class FoundSubject:
    """Of one model. ``distance``: kernel distance of the drawings of the subject from its held-out pictures;
    ``subject``: share of them that it is the nearest of all concepts to; ``similarity``: their mean cosine to its
    nearest held-out picture; ``class_kept``: share of the drawings of the class with the class among the ten nearest
    and nearer than the subject; ``concepts``: of other prompts."""

    distance: float
    subject: float
    similarity: float
    class_kept: float
    concepts: float


class Painter:
    """A pipeline that draws one picture for each prompt and seed, the same whatever the batch.

    Args:
        run: what it has learnt is added to the base; None: the base alone.
        lora_from: the share of the steps that the base walks without the LoRA, where layouts are decided: ``LateLora``.
        dtype: of the weights, as ``pipelines.precision.sampling_dtype`` takes it.
    """

    def __init__(
        self,
        base: str,
        run: Path | None,
        steps: int,
        guidance_scale: float,
        lora_from: float = 0.0,
        dtype: str | None = None,
    ):
        from pipelines.text_to_image import TextToImagePipeline

        whole = run is not None and (run / "pipeline").is_dir()
        folder = Path(base) / "pipeline" if (Path(base) / "pipeline").is_dir() else base
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind, source = sampling_dtype(device, dtype), run / "pipeline" if whole and run else folder
        self.pipeline: Any = TextToImagePipeline.from_pretrained(source, dtype=kind)
        if run is not None and not whole:
            if (run / "adapter" / "pytorch_lora_weights.safetensors").is_file():
                self.pipeline.load_lora_weights(run)
            for file in sorted((run / "adapter").glob("learned_embeds*.safetensors")):
                self.pipeline.load_textual_inversion(file)
        self.pipeline.to(device).set_progress_bar_config(disable=True)
        self.call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
        self.late = LateLora(self.pipeline, lora_from) if lora_from and run is not None else nullcontext()

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 32) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""
        drawn = []
        for i in range(0, len(prompts), batch_size):
            generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch_size]]
            with self.late as late:
                call = {**self.call, "generator": generators, "callback_on_step_end": late}
                drawn.append(self.pipeline(list(prompts[i : i + batch_size]), **call).images.cpu())
        return torch.cat(drawn)

    @torch.no_grad()
    def given_back(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> what the autoencoder makes of them, in [0, 1]."""
        vae, family = self.pipeline.vae, self.pipeline.text.family
        latents = vae.latent_scale.normalize(encode(vae, pictures.float() / 127.5 - 1, family).mean)
        return decode(vae, latents, family).float().cpu()


def judge_style(
    run: str | Path,
    style: str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    prompts: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    lora_from: float = 0.0,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Draw the concepts that the adaptation was not shown, and judge them. Before: the base, from its own captions.

    Writes ``adapted.json`` (what is returned), ``adapted.png`` (rows: held-out pictures of the style, before, after)
    and ``report.html`` into ``out``, and numbers and pictures into the run's own report. ``learnt`` is a kernel
    distance that has fallen by half, ``kept`` a share of concepts that has fallen by 10 points at most.

    Args:
        run: of an adapt task: its config names the base, RUN/adapter or RUN/pipeline is what is judged.
        style: pictures of the style, as ``ldm data style`` makes them.
        data: the pictures that the base was trained on, as ``ldm data openmoji`` makes them.
        out: RUN/judged if not given.
        prompts: so many of the held-out concepts; None: all.
        steps, guidance_scale: of the drawings; None: those of the run's own samples.
        lora_from: the share of the steps after which the LoRA acts; see ``Painter``.
        dtype: of the weights; see ``Painter``.
    Raises:
        ValueError: something is not there, the two data sets have no concept in common, or ``lora_from`` is outside
            [0, 1), or above 0 where the run has no LoRA.
    """
    config, steps, guidance_scale = _settings(run, steps, guidance_scale, lora_from)
    base, features = config.base, load_features()
    own, theirs, known = read_gallery(style, ["test"]), read_gallery(style, ["train"]), read_gallery(data)
    plain = dict(zip(known.concepts, known.captions, strict=True))
    asked = [i for i, concept in enumerate(own.concepts) if concept in plain][:prompts]
    if len(asked) < 2:
        raise ValueError(f"{style}: its held-out split shows fewer than two of the concepts of {data}")
    concepts = [own.concepts[i] for i in asked]
    number = {c: i for i, c in enumerate(dict.fromkeys([*own.concepts, *theirs.concepts, *known.concepts]))}
    goal, learnt_from = extract(features, own.pictures), extract(features, theirs.pictures)
    real = torch.cat([goal, learnt_from, extract(features, known.pictures)])
    shown = torch.tensor([number[c] for c in [*own.concepts, *theirs.concepts, *known.concepts]])
    labels = torch.tensor([number[c] for c in concepts])
    found, drawn = {}, {}
    for when, source, texts in (
        ("before", None, [plain[c] for c in concepts]),
        ("after", Path(run), [own.captions[i] for i in asked]),
    ):
        painter = Painter(base, source, steps, guidance_scale, lora_from, dtype)
        pictures = painter.draw(texts, range(seed, seed + len(texts)))
        seen = extract(features, pictures)
        found[when] = Found(
            kernel=kernel_distance(seen, goal[asked], labels, labels),
            frechet=frechet(gaussian(seen), gaussian(goal)),
            mean=mean_distance(seen, goal),
            concepts=retrieval(seen, real, labels, shown).share(AMONG),
        )
        drawn[when] = pictures
    before, after = found["before"], found["after"]
    itself = Distances(
        kernel_distance(learnt_from, goal),
        frechet(gaussian(learnt_from), gaussian(goal)),
        mean_distance(learnt_from, goal),
    )
    ratios = {name: value / asdict(before)[name] for name, value in asdict(after).items() if name != "concepts"}
    summary = {
        "what": "style",
        "before": asdict(before),
        "after": asdict(after),
        "ratios": ratios,
        "style_itself": asdict(itself),
        "learnt": ratios["kernel"] <= 0.5,
        "kept": after.concepts >= before.concepts - 0.1,
        **{"prompts": len(asked), "steps": steps, "guidance_scale": guidance_scale, "seed": seed},
        **{"lora_from": lora_from, "judge": "mobilenetv2", "run": str(run), "base": base},
    }
    pick = range(0, len(asked), max(1, len(asked) // SHOWN))[:SHOWN]
    originals = own.pictures[asked].float() / 255
    rows = [x[i] for x in (originals, drawn["before"], drawn["after"]) for i in pick]
    names = [f"{word}: {concepts[i]}" for word in ("style", "before", "after") for i in pick]
    return _write(Path(out or Path(run) / "judged"), run, summary, rows, names, len(pick))


def judge_subject(
    run: str | Path,
    subject: str | Path,
    data: str | Path,
    *,
    prompt: str | None = None,
    concept: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    lora_from: float = 0.0,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Draw a subject, its class and other concepts before and after, 16 drawings each, and judge them.

    Before, a word that the base does not know says nothing: there the class is asked for in the subject's place.

    ``learnt`` is a distance that has fallen by half, to drawings half of which the subject is the nearest concept to:
    shapeless drawings in its colours come nearer too. ``subject_itself`` has the distance of its pictures as the
    base's autoencoder gives them back, below which training behind it hardly comes.

    Args:
        run, data, out, steps, guidance_scale, lora_from, dtype: as of ``judge_style``; files are written as there.
        subject: pictures of it, as ``ldm data subject`` makes them: those to train on, and some to judge by.
        prompt: what draws it, as "a sks toy"; None: the run's first ``instance_prompt``.
        concept: its class, one of the concepts of ``data``; None: what ``ldm data subject`` made the pictures of.
    Raises:
        ValueError: something is not there or not told, or the class is none of the concepts.
    """
    config, steps, guidance_scale = _settings(run, steps, guidance_scale, lora_from)
    base, features = config.base, load_features()
    prompt = prompt or _instance_prompt(config, run)
    concept = concept or _subject_of(subject)
    known = read_gallery(data)
    if concept not in known.concepts:
        raise ValueError(f"class {concept!r}: {data} shows no such concept")
    held = [sorted((Path(subject) / split).glob("*.png")) for split in ("train", "test")]
    if not all(held):
        raise ValueError(f"{subject}: expected pictures in train and test, as `ldm data subject` makes them")
    shown_to_it, held_out = map(_open, held)
    seen_by_it, goal = extract(features, shown_to_it), extract(features, held_out)
    number = {c: i for i, c in enumerate(dict.fromkeys(known.concepts))}
    toy, kind = len(number), number[concept]
    shown = torch.tensor([number[c] for c in known.concepts] + [toy] * len(goal))
    real = torch.cat([extract(features, known.pictures), goal])
    centre = real.mean(0)
    others = [c for c in number if c != concept][:: max(1, len(number) // (2 * PER_PROMPT))][: 2 * PER_PROMPT]
    asked = [caption(concept)] * PER_PROMPT + [caption(c) for c in others]
    parts = [PER_PROMPT, PER_PROMPT, len(others)]
    found, drawn = {}, {}
    for when, source, named in (("before", None, caption(concept)), ("after", Path(run), prompt)):
        texts = [named] * PER_PROMPT + asked
        painter = Painter(base, source, steps, guidance_scale, lora_from, dtype)
        pictures = painter.draw(texts, range(seed, seed + len(texts)))
        if source is None:
            given_back = extract(features, painter.given_back(shown_to_it))
        own, same, rest = extract(features, pictures).split(parts)
        of_class = _nearness(same - centre, real - centre, shown)
        ranks = (of_class >= of_class[:, kind : kind + 1]).sum(1)
        found[when] = FoundSubject(
            distance=kernel_distance(own, goal),
            subject=retrieval(own, real, torch.full((len(own),), toy), shown).share(1),
            similarity=float(_nearness(own - centre, goal - centre, torch.zeros(len(goal)).long()).mean()),
            class_kept=float(((ranks <= AMONG) & (of_class[:, kind] > of_class[:, toy])).double().mean()),
            concepts=retrieval(rest, real, torch.tensor([number[c] for c in others]), shown).share(AMONG),
        )
        drawn[when] = pictures.split(parts)
    before, after = found["before"], found["after"]
    ceiling = _nearness(seen_by_it - centre, goal - centre, torch.zeros(len(goal)).long()).mean()
    summary = {
        "what": "subject",
        "before": asdict(before),
        "after": asdict(after),
        "ratio": after.distance / before.distance,
        "subject_itself": {
            "distance": kernel_distance(seen_by_it, goal),
            "through_autoencoder": kernel_distance(given_back, goal),
            "similarity": float(ceiling),
        },
        "learnt": after.distance <= before.distance / 2 and after.subject >= 0.5,
        "kept": after.class_kept >= before.class_kept - 0.1 and after.concepts >= before.concepts - 0.1,
        **{"prompt": prompt, "class": concept, "steps": steps, "guidance_scale": guidance_scale, "seed": seed},
        **{"lora_from": lora_from, "judge": "mobilenetv2", "run": str(run), "base": base},
    }
    columns = min(8, PER_PROMPT)
    train = [*torch.cat([shown_to_it, held_out]).float() / 255]
    rows, names = [*train[:columns]], ["its pictures"] * min(columns, len(train))
    rows += [torch.ones_like(train[0])] * (columns - len(rows))
    names += [""] * (columns - len(names))
    for part, texts in enumerate(((caption(concept), prompt), (caption(concept), caption(concept)))):
        for when, text in zip(("before", "after"), texts, strict=True):
            rows += [*drawn[when][part][:columns]]
            names += [f"{when}: {text}"] * columns
    return _write(Path(out or Path(run) / "judged"), run, summary, rows, names, columns)


def _nearness(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """Cosines of (N, F) and (M, F), of each label the nearest -> (N, labels)."""
    cosine = nn.functional.normalize(x.double(), dim=1) @ nn.functional.normalize(y.double(), dim=1).T
    best = torch.full((len(x), int(labels.max()) + 1), -1.0, dtype=torch.float64)
    return best.scatter_reduce_(1, labels.expand(len(x), -1), cosine, "amax")


def _instance_prompt(config: AdaptConfig, run: str | Path) -> str:
    for prompt in (config.data.instance_prompt, *(source.instance_prompt for source in config.data.sources)):
        if prompt:
            return prompt
    raise ValueError(f"{run}: its config has no instance_prompt: say by --prompt what draws the subject")


def _subject_of(folder: str | Path) -> str:
    marker = Path(folder) / MARKER
    settings = json.loads(marker.read_text(encoding="utf-8"))["settings"] if marker.is_file() else {}
    if "subject" not in settings:
        raise ValueError(f"{folder}: not made by `ldm data subject`: say the subject's class by --concept")
    return settings["subject"]


def _settings(
    run: str | Path, steps: int | None = None, guidance_scale: float | None = None, lora_from: float = 0.0
) -> tuple[AdaptConfig, int, float]:
    """The config of an ended run whose LoRA can set in there, and how the run is drawn: as told, or as it says."""
    from ..config import load
    from ..schema import AdaptConfig

    config = load(Path(run) / "config.yaml")
    if not isinstance(config, AdaptConfig):
        raise ValueError(f"{run}: a run of the {config.task} task has no base to compare with; an adapt run has")
    if not any((Path(run) / name).is_dir() for name in ("adapter", "pipeline")):
        raise ValueError(f"{run}: holds no adapter and no pipeline: it has not ended")
    if not 0 <= lora_from < 1:
        raise ValueError(f"lora_from: expected a share of the steps from 0 to below 1, got {lora_from!r}")
    if lora_from and not (Path(run) / "adapter" / "pytorch_lora_weights.safetensors").is_file():
        raise ValueError(f"lora_from is {lora_from}, but {run} has no LoRA that could set in later: leave it out")
    sample = config.sample
    return (
        config,
        sample.num_inference_steps if steps is None else steps,
        sample.guidance_scale if guidance_scale is None else guidance_scale,
    )


def _write(out: Path, run: str | Path, summary: dict, rows: list[Tensor], names: list[str], columns: int) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    picture_grid(torch.stack(rows).clamp(0, 1), names, columns, cell=96, font_size=10).save(out / "adapted.png")
    _replace(out / "adapted.json", json.dumps(summary, indent=1, ensure_ascii=False))
    run = Path(run)
    about: dict[str, Any] = {"metrics": summary, "pictures": {"Before and after": out / "adapted.png"}}
    judged = write_report(run, title=f"{run.name}: before and after", out=out / "report.html", **about)
    if not (own := run / "report.html").is_file():
        write_report(run, title=run.name, **about)
        return summary
    # The run's own report, which tells more of the data, gets what is above the curves of the other one.
    found = judged.read_text(encoding="utf-8").partition("</h1>\n")[2].partition(f"<h2>{html.escape(run.name)}</h2>")[0]
    page = re.sub(f"{BEGIN}.*?{END}\n", "", own.read_text(encoding="utf-8"), flags=re.DOTALL)
    head, title, rest = page.partition("</h1>\n")
    _replace(own, f"{head}{title}{BEGIN}\n{found}{END}\n{rest}")
    return summary


def _replace(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)
