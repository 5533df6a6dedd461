"""How long a run is, how often it does what, and what it does when something goes wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import AboveZero, Positive, Section, Share


class Train(Section):
    """How long, and how often what. The clock counts images."""

    images: Positive  # how many pictures are seen in all
    batch_size: Positive = 16  # pictures per process and micro-batch
    gradient_accumulation_steps: Positive = 1
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: bf16 where the hardware has units for it
    attention_backend: Literal["auto", "xformers", "flash", "sdpa", "plain"] = "auto"
    gradient_checkpointing: Share = 0.0  # share of the blocks recomputed in the backward pass; true: all
    compile: bool = False  # torch.compile, block by block
    allow_tf32: bool = True  # float32 products on CUDA by TF32 units: 10 bits of mantissa, several times as fast
    channels_last: Literal["auto"] | bool = "auto"  # memory order of a UNet or an autoencoder; auto: off
    deterministic: bool = False  # the same bits from every run on a GPU too, by slower kernels; a CPU's always are
    num_workers: Annotated[int, Field(ge=0)] = 0
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"  # beside RUN/log/metrics.jsonl
    log_every: Positive = 1_000
    validate_every: Positive = 10_000
    sample_every: Positive = 20_000

    checkpoint_every: Positive = 20_000
    keep_last: Positive = 2
    keep_every: Positive | None = None  # the first checkpoint of every so many images stays for good
    keep_best: bool = False  # save when best_metric is the best so far, and keep that one
    best_metric: str | None = None  # by default held_out_loss, or held_out_psnr where that is what is measured
    async_checkpoint: bool = False  # copy to the host and write while training goes on
    mirror: str | None = None  # a folder of this run's own, as in s3://bucket/run: checkpoints are copied there

    processes: Positive | None = None  # how many a launcher must have started; None: any number
    timeout_minutes: AboveZero = 30  # a process that does nothing for so long ends the job, and is named

    max_skipped_steps: Positive = 20  # this many steps in a row without a finite gradient end the run
    spike_factor: Annotated[float, Field(gt=1)] | None = 5.0  # a loss so many times its running mean is logged
    max_spiked_steps: Positive = 100  # this many in a row end the run
    on_out_of_memory: Literal["stop", "halve"] = "stop"  # halve: the micro-batch, with the same mean loss
