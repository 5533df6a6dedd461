"""How torch chooses its kernels while a run trains: TF32, cuDNN's search, deterministic algorithms."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config as inductor

from .fit import ConfigError
from .schema import Config, Train

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")  # with which cuBLAS promises the same bits (its manual, "Results reproducibility")


def prepare(configs: Sequence[Config]) -> None:
    """What must be set before CUDA starts, for ``train.deterministic``.

    Raises:
        ConfigError: the environment holds a workspace of cuBLAS with which it promises nothing.
    """
    if not any(config.train.deterministic for config in configs):
        return
    value = os.environ.setdefault(CUBLAS, REPEATABLE[0])
    if value not in REPEATABLE:
        raise ConfigError(
            f"train.deterministic: {CUBLAS}={value} is set, with which cuBLAS is not deterministic; unset it, or set "
            f"it to {' or '.join(REPEATABLE)}"
        )


@contextmanager
def kernels(train: Train, sizes: int) -> Iterator[None]:
    """Within this context torch takes the kernels that the config asks for; after it, those that it took before.

    TF32 is set by the older flags (``allow_tf32``): torch 2.9 and later keep the newer ones
    (``fp32_precision``) in step with them, and not the other way round, where reading an older flag,
    as libraries and torch's own compiler do, raises RuntimeError.

    Args:
        sizes: how many sizes of pictures the batches have. Of one, cuDNN tries its algorithms at the
            first step and takes the fastest; with several it would try again at each.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn  # a module whose flags are properties
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark, inductor.deterministic
    tf32 = matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"  # to read allow_tf32 may raise
    try:
        if torch.cuda.is_available():
            matmul.allow_tf32 = cudnn.allow_tf32 = train.allow_tf32
        cudnn.benchmark = sizes == 1 and not train.deterministic
        if train.deterministic:
            torch.use_deterministic_algorithms(True)
            cudnn.deterministic = inductor.deterministic = True  # the latter: no kernel is chosen by its time
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark, inductor.deterministic = flags
        if torch.cuda.is_available():
            matmul.allow_tf32, cudnn.allow_tf32 = tf32
