"""What an adaptation has learnt, and what it has kept, in the eyes of a network that had no part in training.

Of a style: the Fréchet distance (Heusel et al. 2017, eq. 6) between the judge's features of drawings and of held-out
pictures of the style, and the share of drawings whose own concept is among the ten nearest of all concepts. Of a
subject: the share of drawings to which it is the nearest, the class that it belongs to, and the other concepts. All of
it before and after, from the same seeds, against the same real pictures.

The judge is MobileNetV2 on ImageNet: the distances compare with one another, and not with anybody's FID.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..openmoji import caption
from .features import extract, load_features
from .grids import picture_grid
from .metrics import retrieval
from .report import write_report

AMONG = 10  # nearest concepts
SHOWN = 10  # columns of the picture
PER_PROMPT = 16  # drawings of a subject


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


def frechet(x: Tensor, y: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features (N, F) and (M, F), with the unbiased covariances.

    tr √(Σx Σy) is the sum of the singular values of Xᵀ's and Yᵀ's product, centred and scaled: exact, and an N × M
    matrix in place of an F × F one.
    """
    x, y = x.double(), y.double()
    a, b = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def mean_distance(x: Tensor, y: Tensor) -> float:
    """Squared distance of the two means, without the part that is due to the samples being few: 0 is expected of two
    samples of one distribution."""
    x, y = x.double(), y.double()
    noise = sum(float(f.var(0).sum()) / len(f) for f in (x, y))
    return float((x.mean(0) - y.mean(0)).square().sum()) - noise


@dataclass(frozen=True)
class Found:
    """Of one model: see the module's text. ``concepts``: share with the own concept among the ten nearest."""

    distance: float
    mean_distance: float
    concepts: float


@dataclass(frozen=True)
class FoundSubject:
    """Of one model. ``subject``: share of the drawings of the subject that it is the nearest of all concepts to;
    ``similarity``: their mean cosine to its nearest held-out picture; ``class_kept``: share of the drawings of the
    class with the class among the ten nearest and nearer than the subject; ``concepts``: of other prompts."""

    subject: float
    similarity: float
    class_kept: float
    concepts: float


class Painter:
    """A pipeline that draws one picture for each prompt and seed, the same whatever the batch."""

    def __init__(self, base: str, run: Path | None, steps: int, guidance_scale: float):
        from pipelines.text_to_image import TextToImagePipeline

        whole = run is not None and (run / "pipeline").is_dir()
        folder = Path(base) / "pipeline" if (Path(base) / "pipeline").is_dir() else base
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline: Any = TextToImagePipeline.from_pretrained(run / "pipeline" if whole and run else folder)
        if run is not None and not whole:
            if (run / "adapter" / "pytorch_lora_weights.safetensors").is_file():
                self.pipeline.load_lora_weights(run)
            for file in sorted((run / "adapter").glob("learned_embeds*.safetensors")):
                self.pipeline.load_textual_inversion(file)
        self.pipeline.to(device).set_progress_bar_config(disable=True)
        self.call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 32) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""
        drawn = []
        for i in range(0, len(prompts), batch_size):
            generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch_size]]
            drawn.append(
                self.pipeline(list(prompts[i : i + batch_size]), generator=generators, **self.call).images.cpu()
            )
        return torch.cat(drawn)


def judge_style(
    run: str | Path,
    style: str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    prompts: int | None = None,
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 3.0,
) -> dict[str, Any]:
    """Draw the concepts that the adaptation was not shown, and judge them. Before: the base, from its own captions.

    Writes ``adapted.json`` (what is returned), ``adapted.png`` (rows: held-out pictures of the style, before, after)
    and ``report.html`` into ``out``.

    Args:
        run: of an adapt task: its config names the base, RUN/adapter or RUN/pipeline is what is judged.
        style: pictures of the style, as ``ldm data style`` makes them.
        data: the pictures that the base was trained on, as ``ldm data openmoji`` makes them.
        out: RUN/judged if not given.
        prompts: so many of the held-out concepts; None: all.
    Raises:
        ValueError: something is not there, or the two data sets have no concept in common.
    """
    base, features = _base(run), load_features()
    own, theirs, known = read_gallery(style, ["test"]), read_gallery(style, ["train"]), read_gallery(data)
    plain = dict(zip(known.concepts, known.captions, strict=True))
    asked = [i for i, concept in enumerate(own.concepts) if concept in plain][:prompts]
    if len(asked) < 2:
        raise ValueError(f"{style}: its held-out split shows fewer than two of the concepts of {data}")
    concepts = [own.concepts[i] for i in asked]
    number = {c: i for i, c in enumerate(dict.fromkeys([*own.concepts, *theirs.concepts, *known.concepts]))}
    goal = extract(features, own.pictures)
    real = torch.cat([goal, extract(features, theirs.pictures), extract(features, known.pictures)])
    shown = torch.tensor([number[c] for c in [*own.concepts, *theirs.concepts, *known.concepts]])
    labels = torch.tensor([number[c] for c in concepts])
    found, drawn = {}, {}
    for when, source, texts in (
        ("before", None, [plain[c] for c in concepts]),
        ("after", Path(run), [own.captions[i] for i in asked]),
    ):
        pictures = Painter(base, source, steps, guidance_scale).draw(texts, range(seed, seed + len(texts)))
        seen = extract(features, pictures)
        kept = retrieval(seen, real, labels, shown).share(AMONG)
        found[when], drawn[when] = Found(frechet(seen, goal), mean_distance(seen, goal), kept), pictures
    before, after = found["before"], found["after"]
    summary = {
        "what": "style",
        "before": asdict(before),
        "after": asdict(after),
        "distance_ratio": after.distance / before.distance,
        "mean_distance_ratio": after.mean_distance / before.mean_distance,
        "concepts_change": after.concepts - before.concepts,
        "learnt": after.distance <= before.distance / 2 and after.concepts >= before.concepts - 0.1,
        **{"prompts": len(asked), "steps": steps, "guidance_scale": guidance_scale, "seed": seed},
        **{"judge": "mobilenetv2", "run": str(run), "base": base},
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
    prompt: str,
    concept: str,
    out: str | Path | None = None,
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 3.0,
) -> dict[str, Any]:
    """Draw a subject, its class and other concepts before and after, 16 drawings each, and judge them.

    Args:
        run, data, out: as of ``judge_style``; files are written as there.
        subject: pictures of it, as ``ldm data subject`` makes them: those to train on, and some to judge by.
        prompt: what draws it, as "a sks teddy bear".
        concept: its class, one of the concepts of ``data``.
    Raises:
        ValueError: something is not there, or the class is none of the concepts.
    """
    base, features = _base(run), load_features()
    known = read_gallery(data)
    if concept not in known.concepts:
        raise ValueError(f"class {concept!r}: {data} shows no such concept")
    held = [sorted((Path(subject) / split).glob("*.png")) for split in ("train", "test")]
    if not all(held):
        raise ValueError(f"{subject}: expected pictures in train and test, as `ldm data subject` makes them")
    seen_by_it, goal = (extract(features, _open(files)) for files in held)
    number = {c: i for i, c in enumerate(dict.fromkeys(known.concepts))}
    toy, kind = len(number), number[concept]
    shown = torch.tensor([number[c] for c in known.concepts] + [toy] * len(goal))
    real = torch.cat([extract(features, known.pictures), goal])
    centre = real.mean(0)
    others = [c for c in number if c != concept][:: max(1, len(number) // (2 * PER_PROMPT))][: 2 * PER_PROMPT]
    asked = [prompt] * PER_PROMPT + [caption(concept)] * PER_PROMPT + [caption(c) for c in others]
    parts = [PER_PROMPT, PER_PROMPT, len(others)]
    found, drawn = {}, {}
    for when, source in (("before", None), ("after", Path(run))):
        pictures = Painter(base, source, steps, guidance_scale).draw(asked, range(seed, seed + len(asked)))
        own, same, rest = extract(features, pictures).split(parts)
        of_class = _nearness(same - centre, real - centre, shown)
        ranks = (of_class >= of_class[:, kind : kind + 1]).sum(1)
        found[when] = FoundSubject(
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
        "similarity_of_training_pictures": float(ceiling),
        "learnt": after.subject >= 0.5 and after.similarity > before.similarity,
        "kept": after.class_kept >= before.class_kept - 0.1 and after.concepts >= before.concepts - 0.1,
        **{"prompt": prompt, "class": concept, "steps": steps, "guidance_scale": guidance_scale, "seed": seed},
        **{"judge": "mobilenetv2", "run": str(run), "base": base},
    }
    columns = min(8, PER_PROMPT)
    train = [*_open([*held[0], *held[1]]).float() / 255]
    rows, names = [*train[:columns]], ["its pictures"] * min(columns, len(train))
    rows += [torch.ones_like(train[0])] * (columns - len(rows))
    names += [""] * (columns - len(names))
    for part, text in enumerate((prompt, caption(concept))):
        for when in ("before", "after"):
            rows += [*drawn[when][part][:columns]]
            names += [f"{when}: {text}"] * columns
    return _write(Path(out or Path(run) / "judged"), run, summary, rows, names, columns)


def _nearness(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """Cosines of (N, F) and (M, F), of each label the nearest -> (N, labels)."""
    cosine = nn.functional.normalize(x.double(), dim=1) @ nn.functional.normalize(y.double(), dim=1).T
    best = torch.full((len(x), int(labels.max()) + 1), -1.0, dtype=torch.float64)
    return best.scatter_reduce_(1, labels.expand(len(x), -1), cosine, "amax")


def _base(run: str | Path) -> str:
    from ..config import load
    from ..schema import AdaptConfig

    config = load(Path(run) / "config.yaml")
    if not isinstance(config, AdaptConfig):
        raise ValueError(f"{run}: a run of the {config.task} task has no base to compare with; an adapt run has")
    if not any((Path(run) / name).is_dir() for name in ("adapter", "pipeline")):
        raise ValueError(f"{run}: holds no adapter and no pipeline: it has not ended")
    return config.base


def _write(out: Path, run: str | Path, summary: dict, rows: list[Tensor], names: list[str], columns: int) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    picture_grid(torch.stack(rows).clamp(0, 1), names, columns, cell=96, font_size=10).save(out / "adapted.png")
    beside = out / f".adapted.json.{os.getpid()}"
    beside.write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(beside, out / "adapted.json")
    write_report(
        run,
        title=f"{Path(run).name}: before and after",
        out=out / "report.html",
        metrics=summary,
        pictures={"Before and after": out / "adapted.png"},
    )
    return summary
