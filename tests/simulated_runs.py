"""Runs on the simulated CUDA device, in a process of their own: ``python -m tests.simulated_runs FOLDER [NAME …]``.

Each case leaves a line of JSON in ``FOLDER/results.jsonl``: its name, the error if any, the host's waits in its steady
steps, and its seconds. ``tests/test_simulated_cuda.py`` starts it and judges the lines.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch, for tells it at import that a device is there.
from tests.simulated_cuda import build

STEADY = range(4, 6)  # steps that are watched: past the first ones and the checkpoint, before the last one's report
FAMILIES = {"sd": "sd", "sdxl": "sdxl", "sd3": "sd3", "pixart": "pixart alpha"}
TRAIN: dict[str, Any] = {
    "images": 12, "batch_size": 2, "checkpoint_every": 6, "validate_every": 12, "sample_every": 12, "log_every": 12,
    "report_to": "none",
}  # fmt: skip
VALIDATION = {"rows": 16, "levels": 1}  # one call of the network
SAMPLE = {"prompts": ["a red box"], "num_inference_steps": 2, "guidance_scale": 3.0}
TOY = {"token": "<toy>", "initializer_token": "red"}

BF16, FP16 = {"mixed_precision": "bf16"}, {"mixed_precision": "fp16"}
LORA: dict[str, Any] = {"lora": {"rank": 2}}
DORA: dict[str, Any] = {"lora": {"rank": 2, "use_dora": True}}
TOKEN: dict[str, Any] = {
    "new_tokens": [TOY], "train_denoiser": False, "data": {"instance_prompt": "a <toy>"},
    "sample": {"prompts": ["a <toy>"]},
}  # fmt: skip
TEXT: dict[str, Any] = {"train_text_encoder": True}
INPAINT: dict[str, Any] = {"conditioning": {"name": "inpaint"}}
NO_CACHE: dict[str, Any] = {"cache": {"latents": False, "text": False}}


def kind(name: str, **options: Any) -> dict[str, Any]:
    return {"optimizer": {"name": name, **options}}


SCRATCH = ("clip", "vae", "unet", "mmdit", "dit")  # in this order: the later ones build on the first two
# A covering set: every family with every way to adapt it; over all of them both precisions with every family and way,
# every optimizer that runs without CUDA's own kernels, each attention backend, cache and none, and the loop's options.
# name: family, train, sections; "resume" goes on from the checkpoint in the middle, and compares.
ADAPT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd whole": ("sd", BF16, kind("adamw")),
    "sd lora": ("sd", BF16 | {"resume": True}, LORA),
    "sd dora": ("sd", FP16, DORA | kind("prodigy", learning_rate=1.0)),
    "sd token": ("sd", BF16, TOKEN | NO_CACHE),
    "sd text": ("sd", FP16, LORA | TEXT | NO_CACHE),
    "sd inpaint": ("sd", BF16, INPAINT | kind("adafactor")),
    "sdxl whole": ("sdxl", FP16 | {"gradient_checkpointing": 1}, kind("schedule_free")),
    "sdxl lora": ("sdxl", FP16 | {"resume": True}, LORA),
    "sdxl dora": ("sdxl", BF16 | {"async_checkpoint": True}, DORA),
    "sdxl token": ("sdxl", FP16, TOKEN),
    "sdxl text": ("sdxl", BF16, TEXT | {"ema": {"device": "cpu"}, "ema_decay": 0.9}),
    "sdxl inpaint": ("sdxl", FP16, INPAINT),
    "sd3 whole": ("sd3", BF16, kind("muon")),
    "sd3 lora": ("sd3", BF16 | {"gradient_accumulation_steps": 2, "batch_size": 1}, LORA | NO_CACHE),
    "sd3 dora": ("sd3", FP16, DORA | kind("adafactor")),
    "sd3 token": ("sd3", BF16, TOKEN),
    "sd3 text": ("sd3", FP16 | {"resume": True}, TEXT | LORA),
    "pixart whole": ("pixart", FP16 | {"resume": True}, NO_CACHE),
    "pixart lora": ("pixart", BF16, LORA | kind("schedule_free") | {"ema": {"snapshot_every": 6}}),
    "pixart dora": ("pixart", FP16, DORA),
    "pixart token": ("pixart", FP16, TOKEN),
    "pixart text": ("pixart", BF16, TEXT | LORA),
    "sd flash": ("sd", BF16 | {"attention_backend": "flash"}, {}),
}
# Every family in every way, in both precisions, with every optimizer: minutes, for ``make test-slow``.
_WAYS = {"whole": {}, "lora": LORA, "dora": DORA, "token": TOKEN, "text": TEXT, "inpaint": INPAINT}
_OPTIMIZERS = {"adamw": {}, "adafactor": {}, "prodigy": {"learning_rate": 1.0}, "schedule_free": {}, "muon": {}}
PRODUCT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    f"{family} {way} {half} {optimizer}": (
        family, {"mixed_precision": half}, sections | kind(optimizer, **_OPTIMIZERS[optimizer])
    )
    for family in FAMILIES
    for way, sections in _WAYS.items()
    for half in ("bf16", "fp16")
    for optimizer in _OPTIMIZERS
    if f"{family} {way}" in ADAPT
}  # fmt: skip

SAMPLERS = (
    "ddpm", "ddim", "euler", "heun", "midpoint", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "dpmpp_2s_sde", "dpmpp_3m",
    "dpmpp_3m_sde", "unipc", "lms", "pndm", "euler_maruyama", "predictor_corrector",
)  # fmt: skip
GUIDANCE = ({"guidance": x} for x in ("apg", {"name": "interval", "low": 0.2, "high": 0.8}, "dynamic_thresholding"))
# family, pipeline, dtype, offload, the calls' arguments. The first call of each is decoded to pictures.
DRAW: dict[str, tuple[str, str, str, bool, list[dict[str, Any]]]] = {
    "draw sd": ("sd", "TextToImagePipeline", "float16", False, [{"output_type": "pil"}]),
    "draw sd samplers": ("sd", "TextToImagePipeline", "bfloat16", False, [{"sampler": x} for x in SAMPLERS]),
    "draw sd guidance": ("sd", "TextToImagePipeline", "float32", False, [*GUIDANCE, {"step_cache": 2}]),
    "draw sdxl": ("sdxl", "TextToImagePipeline", "bfloat16", True, [{"output_type": "pt"}]),
    "draw sdxl from a picture": ("sdxl", "ImageToImagePipeline", "float16", True, [{"output_type": "np"}]),
    "draw sd3": ("sd3", "TextToImagePipeline", "float16", True, [{"output_type": "pil"}]),
    "draw sd3 inpaint": ("sd3", "InpaintPipeline", "bfloat16", False, [{"output_type": "pil"}]),
    "draw pixart": ("pixart", "TextToImagePipeline", "bfloat16", True, [{"output_type": "pil"}]),
    "draw pixart fp16": ("pixart", "TextToImagePipeline", "float16", False, [{"output_type": "pil"}]),
    "draw sd inpaint": ("sd", "InpaintPipeline", "float16", True, [{"output_type": "pil"}]),
}  # fmt: skip


def picture(colour: str) -> Any:
    from PIL import Image

    return Image.new("RGB", (16, 16), colour)


# --- runs ------------------------------------------------------------------------------------------------------------


class Cases:
    """What can be run, by name; a folder for all of them."""

    def __init__(self, root: Path):
        self.root = root

    def all(self) -> dict[str, Callable[[], None]]:
        found: dict[str, Callable[[], None]] = {}
        for name in SCRATCH:
            found[name] = lambda name=name: self.scratch(name)
        for name in (*ADAPT, *PRODUCT):
            found[name] = lambda name=name: self.adapt(name)
        for name in DRAW:
            found[name] = lambda name=name: self.draw(name)
        found["command line"] = self.command_line
        from tests import simulated_faults

        return found | simulated_faults.cases(self)

    def adapt(self, name: str, run: str | None = None) -> None:
        """A run that starts from a base, into the folder ``run``, by default one of its name."""
        from tests import adapting

        family, train, sections = (ADAPT | PRODUCT)[name]
        train = dict(train)
        resume = train.pop("resume", False)
        sections = {"sample": {}, "validation": VALIDATION, **sections}
        sections["sample"] = SAMPLE | sections["sample"]
        config = adapting.config(
            FAMILIES[family], self.root, run or name.replace(" ", "_"), **sections, train={**TRAIN, **train}
        )
        self.run(config, resume)

    def scratch(self, name: str, run: str | None = None) -> None:
        """A task from nothing, into the folder ``run``, by default one of its name."""
        from tests import killed
        from training.config import parse

        raw = killed.configs(self.root, self.root)["unet" if name in ("mmdit", "dit") else name]
        precision = FP16 if name in ("unet", "mmdit") else BF16
        raw |= {"train": {**TRAIN, **precision}, "output_dir": str(self.root / (run or name))}
        if name == "vae":
            raw["loss"] |= {"gan_start": 2, "perceptual": f"clip:{self.root / 'clip'}"}
        if name in ("unet", "mmdit", "dit"):
            raw |= {"sample": SAMPLE, "validation": VALIDATION}
        if name in ("mmdit", "dit"):
            raw["model"] = {"name": name, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
        self.run(parse(raw, f"{name}.yaml"), name in ("clip", "vae", "unet"))

    def draw(self, name: str) -> None:
        """By the base as it is, a call for each set of arguments; the waits between the first and the last step."""
        import torch

        import pipelines
        from tests import adapting
        from tests.simulated_cuda.syncs import LOG

        family, kind, dtype, offload, calls = DRAW[name]
        base = adapting.base(FAMILIES[family], self.root)
        pipe = getattr(pipelines, kind).from_pretrained(base, dtype=getattr(torch, dtype))
        pipe.set_progress_bar_config(disable=True)
        if offload:
            pipe.enable_model_cpu_offload()
        else:
            pipe.to("cuda")

        def step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            LOG.watching = 0 <= i < last
            return {}

        for call in calls:
            call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", **call}
            if kind != "TextToImagePipeline":
                call |= {"image": picture("red"), "strength": 0.9}
            if kind == "InpaintPipeline":
                call["mask_image"] = picture("white")
            last = call["num_inference_steps"] - 2
            generator = [torch.Generator().manual_seed(i) for i in range(2)]
            try:
                out = pipe(["a red box", "blue box"], generator=generator, callback_on_step_end=step, **call).images
            except Exception as error:
                raise RuntimeError(f"{name}, call {call}") from error
            finally:
                LOG.watching = False
            assert call["output_type"] != "latent" or out.isfinite().all(), f"{name}, call {call}: not finite"

    def command_line(self) -> None:
        """``ldm train`` with its check of what fits, and ``ldm sample`` of what it made."""
        from tests import adapting
        from training import cli, config

        sections: dict[str, Any] = {**LORA, "sample": SAMPLE, "train": {**TRAIN, "images": 2}}
        sections["validation"] = VALIDATION
        asked = adapting.config(FAMILIES["pixart"], self.root, "command_line", **sections)
        (self.root / "command.yaml").write_text(config.dump(asked))
        drawn = self.root / "drawn.png"
        sample = [asked.base, "a red box", "--lora", asked.output_dir, "--steps", "2", "-n", "2", "-o", str(drawn)]
        for arguments in (["train", str(self.root / "command.yaml")], ["sample", *sample]):
            sys.argv = ["ldm", *arguments]
            try:
                cli.main()
            except SystemExit as leaving:
                assert not leaving.code, f"ldm {' '.join(arguments)}: {leaving.code}"
        assert drawn.is_file()

    def run(self, config: Any, resume: bool) -> None:
        """To the end; with ``resume`` again from the checkpoint in the middle, to the same weights."""
        from training.run import result_of, train_all

        train_all([config])
        if not resume:
            return
        run, result = Path(config.output_dir), result_of(config)
        before = {file.name: file.read_bytes() for file in result.rglob("*.safetensors")}
        (run / "done.json").unlink()
        shutil.rmtree(run / "checkpoints" / "images_000000012")
        train_all([config])
        after = {file.name: file.read_bytes() for file in result.rglob("*.safetensors")}
        assert before and before == after, f"taken up from the middle, it ends with other weights: {result}"


# --- the process -----------------------------------------------------------------------------------------------------


def watch_steady_steps() -> None:
    """From the fourth batch's loading to the sixth's."""
    from tests.simulated_cuda.syncs import LOG
    from training import loop, processes, run

    build_task = run.build

    def checked(*args: Any, **kwargs: Any) -> Any:
        task = build_task(*args, **kwargs)
        for player in task.players:
            names = {name: p.dtype for name, p in player.module.named_parameters() if p.requires_grad}
            half = sorted(name for name, dtype in names.items() if dtype.itemsize < 4)
            assert not half, f"{player.name} trains weights in {names[half[0]]}: {', '.join(half[:3])} …"
        return task

    run.build = checked

    class Watched(processes.Pulse):
        def at(self, what: str) -> None:
            super().at(what)
            self.loads = getattr(self, "loads", 0) + (what == "loading pictures")
            LOG.watching = self.loads in STEADY

    loop.Pulse = Watched  # type: ignore[misc]


def judged(name: str, run: Callable[[], None]) -> dict[str, Any]:
    """One case: what became of it."""
    from tests.simulated_cuda.syncs import LOG

    LOG.found, LOG.watching = [], False
    start, error = time.process_time(), ""
    try:
        run()
    except BaseException:
        error = traceback.format_exc()
    LOG.watching = False
    waits = sorted({tuple(sync) for sync in LOG.found})
    return {"name": name, "error": error, "waits": waits, "seconds": time.process_time() - start}


def main(folder: Path, names: list[str]) -> None:
    build.load()
    import torch

    from tests.simulated_cuda import device, patches

    patches.apply()
    device.register()
    torch.set_num_threads(1)
    from tests import adapting  # with all that is heavy
    from training import arithmetic, conditioning, preflight, sizes  # noqa: F401
    from training.evaluate import report

    # What is no work of the device: the report's page, operations counted and bases checked on the meta device.
    report.write_report = lambda *a, **k: None
    arithmetic.training_flops, sizes.network_of = lambda *a: None, lambda config: ()
    conditioning.check_conditioning = lambda *a: None
    adapting.base("sd", folder)
    gc.freeze()  # a run ends with a full collection, which need not look at all modules
    watch_steady_steps()
    cases = Cases(folder).all()
    with (folder / "results.jsonl").open("a") as results:
        for name in names or [name for name in cases if name not in PRODUCT]:
            results.write(json.dumps(judged(name, cases[name])) + "\n")
            results.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
