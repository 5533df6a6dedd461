"""Faults that are fed to the simulated device on purpose: each of them must be seen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tests.simulated_runs import Cases

# --- runs with a fault in them: what must be told, as an error (a pattern) or as waits in training/gradients.py ------

RUNS: dict[str, str | list[str]] = {
    "fault: a CPU tensor in a batch": r"Expected all tensors to be on the same device",
    "fault: waits in the step": ["D2H copy", "H2D copy", "bool index", "item", "torch.tensor(device=cuda)"],
    "fault: found_inf in bf16": r"found_inf: expected scalar type Float but found torch.bfloat16",
    "fault: a norm that trains in bf16": r"net trains weights in torch.bfloat16: .*norm|float32",
    "fault: a half network with norms in float32": r"native_group_norm.* expected the same dtype",
    "fault: a float32 layer in a half network": r"expected the same dtype",
    "fault: flash outside autocast": r"attention backend 'flash' takes float16 and bfloat16|No available kernel",
    "fault: another end after a resume": r"taken up from the middle, it ends with other weights",
}


def cases(runs: Cases) -> dict[str, Callable[[], None]]:
    """By name; the device's own rules are one case."""
    found: dict[str, Callable[[], None]] = {"rules": check_rules}
    for name in RUNS:
        found[name] = lambda name=name: _faulty(runs, name.removeprefix("fault: "))
    return found


def _faulty(runs: Cases, what: str) -> None:
    from training import optim, optimizers
    from training.tasks import clip, diffusion

    folder = f"fault {what}".replace(" ", "_")
    with _replaced() as replace:
        if what == "a CPU tensor in a batch":
            loss = diffusion.DiffusionTask.loss
            replace(
                diffusion.DiffusionTask, "loss",
                lambda self, batch, images: loss(self, {**batch, "moments": batch["moments"].cpu()}, images),
            )  # fmt: skip
            runs.adapt("sd whole", folder)
        elif what == "found_inf in bf16":
            step = optimizers.Fused.step
            replace(optimizers.Fused, "step", lambda self, divisor, skipped: step(self, divisor, skipped.bfloat16()))
            runs.adapt("sd whole", folder)
        elif what == "a norm that trains in bf16":
            opened = diffusion.opened
            replace(diffusion, "opened", lambda *args: _with_norms(opened(*args), "bfloat16"))
            runs.adapt("sd whole", folder)
        elif what == "waits in the step":
            contrast = clip.ClipTask.loss
            replace(clip.ClipTask, "loss", lambda self, batch, images: _waiting(contrast(self, batch, images)))
            runs.scratch("clip", folder)
        elif what == "another end after a resume":
            replace(optim.Guarded, "load", lambda self, tensors, state: None)
            runs.scratch("clip", folder)
        else:
            _drawn(runs, what)


def _waiting(found: Any) -> Any:
    import torch

    loss = found[0].detach()
    loss.item()
    loss.cpu()
    torch.ones(2).to(loss.device)
    torch.tensor([1.0], device=loss.device)
    loss[None][loss[None] > 0]
    return found


def _with_norms(net: Any, dtype: str) -> Any:
    import torch

    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.to(getattr(torch, dtype))
    return net


def _drawn(runs: Cases, what: str) -> None:
    """Faults of a pipeline."""
    import torch

    from pipelines import TextToImagePipeline
    from tests import adapting

    flash = what == "flash outside autocast"
    folder, dtype = adapting.base("sd", runs.root), torch.float32 if flash else torch.bfloat16
    pipe = TextToImagePipeline.from_pretrained(folder, dtype=dtype).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    if flash:
        pipe.set_attention_backend("flash")
    elif what == "a float32 layer in a half network":
        pipe.net.conv_in.float()
    else:
        _with_norms(pipe.net, "float32")
    pipe("a red box", num_inference_steps=2, output_type="latent")


@contextmanager
def _replaced() -> Iterator[Callable[[Any, str, Any], None]]:
    """Attributes replaced within this context."""
    kept: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        kept.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        yield replace
    finally:
        for owner, name, value in reversed(kept):
            setattr(owner, name, value)


# --- the device's rules, one by one ----------------------------------------------------------------------------------


class Rules(NamedTuple):
    """By name: what is refused and a pattern of its message; what is taken, and holds; and what waits, as what."""

    refused: dict[str, tuple[Callable[[], Any], str]]
    allowed: dict[str, Callable[[], bool]]
    waits: dict[str, tuple[Callable[[], Any], list[str]]]


def rules() -> Rules:
    """Of CUDA's, those that the simulated device is checked with; made on the device that is there."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def on(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(*shape, dtype=dtype, device="cuda")

    half, x, one = torch.bfloat16, on(4, 4), torch.ones(())
    mask, image, norm = on(4) > 0, on(1, 4, 8, 8), nn.GroupNorm(2, 4).cuda()
    q = on(1, 2, 8, 8)

    def attend(tensor: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(tensor, tensor, tensor, bias)

    def autocast(f: Callable[[], torch.Tensor]) -> torch.dtype:
        with torch.autocast("cuda", half):
            return f().dtype

    refused: dict[str, tuple[Callable[[], Any], str]] = {
        "add": (lambda: x + torch.ones(4, 4), "same device"),
        "add in place to the CPU's": (lambda: torch.ones(4, 4).add_(x), "same device"),
        "cat": (lambda: torch.cat([x, torch.ones(4, 4)]), "same device"),
        "stack of scalars": (lambda: torch.stack([x.sum(), one]), "same device"),
        "matmul": (lambda: x @ torch.ones(4, 4), "same device"),
        "gather": (lambda: x.gather(0, torch.zeros(1, 4, dtype=torch.long)), "same device"),
        "embedding": (lambda: F.embedding(torch.zeros(2, dtype=torch.long), x), "same device"),
        "add in place to a CPU scalar": (lambda: torch.ones(()).add_(x.sum()), "same device"),
        "index into the CPU's": (lambda: torch.ones(4)[on(2, dtype=torch.long)], "cpu|same device"),
        "numpy": (lambda: x.numpy(), "can't convert cuda"),
        "a CPU generator": (lambda: torch.randn(2, device="cuda", generator=torch.Generator()), "'cuda' device type"),
        "a CPU generator in place": (lambda: x.clone().normal_(generator=torch.Generator()), "'cuda' device type"),
        "mm of two dtypes": (lambda: x @ x.to(half), "dtype"),
        "linear of two dtypes": (lambda: F.linear(x.to(half), x), "dtype"),
        "conv of two dtypes": (lambda: nn.Conv2d(4, 4, 1).cuda()(image.to(half)), "dtype|type"),
        "group norm of two dtypes": (lambda: norm(image.to(half)), "same dtype"),
        "layer norm of two dtypes": (lambda: nn.LayerNorm(4).cuda()(x.to(half)), "same dtype"),
        "mm of whole numbers": (lambda: x.long() @ x.long(), "not implemented"),
        "inverse in half": (lambda: torch.linalg.inv(x.to(half)), "not implemented|Low precision"),
        "flash in float32": (lambda: attend(q), "No available kernel"),
        "flash with a mask": (lambda: attend(q.half(), on(1, 1, 8, 8).half()), "No available kernel"),
        "flash with wide heads": (lambda: attend(on(1, 2, 8, 264).half()), "No available kernel"),
    }
    allowed: dict[str, Callable[[], bool]] = {
        "a CPU scalar in arithmetic": lambda: (x * one + one).is_cuda and torch.where(x > one, x, one).is_cuda,
        "a CPU scalar over a list": lambda: torch._foreach_mul([x], one)[0].is_cuda,
        "flash in half": lambda: attend(q.half()).dtype is torch.float16,
        "autocast's product": lambda: autocast(lambda: x @ x) is half,
        "autocast's norm": lambda: autocast(lambda: norm(image.to(half))) is torch.float32,
        "autocast's layer norm": lambda: autocast(lambda: nn.LayerNorm(4).cuda()(x.to(half))) is torch.float32,
        "autocast's softmax": lambda: autocast(lambda: x.to(half).softmax(-1)) is torch.float32,
        "autocast's gelu": lambda: autocast(lambda: F.gelu(x.to(half))) is half,
        "a parameter stays the object": lambda: (m := nn.Linear(2, 2)).weight is m.cuda().weight and m.weight.is_cuda,
    }
    waits: dict[str, tuple[Callable[[], Any], list[str]]] = {
        "item": (lambda: x.sum().item(), ["item"]),
        "float": (lambda: float(x.sum()), ["item"]),
        "if": (lambda: bool((x > 0).all()), ["item"]),
        "tolist": (lambda: x.tolist(), ["tolist"]),
        "nonzero": (lambda: x.nonzero(), ["nonzero"]),
        "where": (lambda: torch.where(x > 0), ["nonzero"]),
        "masked_select": (lambda: x.masked_select(x > 0), ["masked_select"]),
        "bool index": (lambda: x[0][mask], ["bool index"]),
        "bool index, assigned": (lambda: x.clone()[0].__setitem__(mask, on(4)), ["bool index"]),
        "a number under a mask": (lambda: x.clone()[0].__setitem__(mask, 0.0), []),
        "CPU index": (lambda: x[torch.tensor([0, 1])], ["H2D copy of an index"]),
        "device index": (lambda: x[on(2, dtype=torch.long)], []),
        "equal": (lambda: x.equal(x), ["equal"]),
        "unique": (lambda: x.unique(), ["unique"]),
        "repeat_interleave": (lambda: x.repeat_interleave(on(4, dtype=torch.long), 0), ["repeat_interleave"]),
        "repeat_interleave of known size": (
            lambda: x.repeat_interleave(on(4, dtype=torch.long), 0, output_size=4), []
        ),
        "repeat_interleave by a number": (lambda: x.repeat_interleave(2, 0), []),
        "cpu": (lambda: x.cpu(), ["D2H copy"]),
        "cpu, not blocking": (lambda: x.to("cpu", non_blocking=True), []),
        "cuda": (lambda: torch.ones(2).cuda(), ["H2D copy"]),
        "cuda, not blocking": (lambda: torch.ones(2).to("cuda", non_blocking=True), []),
        "copy_": (lambda: x.clone().copy_(torch.ones(4, 4)), ["H2D copy"]),
        "copy_ to the host": (lambda: torch.ones(4, 4).copy_(x), ["D2H copy"]),
        "torch.tensor": (lambda: torch.tensor([1.0], device="cuda"), ["torch.tensor(device=cuda)"]),
        "made there": (lambda: (torch.zeros(2, device="cuda"), torch.arange(3, device="cuda")), []),
        "synchronize": (lambda: torch.cuda.synchronize(), ["cuda.synchronize"]),
        "event": (lambda: torch.cuda.Event().synchronize(), ["event.synchronize"]),
        "arithmetic": (lambda: (x @ x).softmax(-1).clamp(min=0).sum(), []),
    }  # fmt: skip
    return Rules(refused, allowed, waits)


def check_rules() -> None:
    """What must raise raises, what must not does not, and each wait is noted once, as what it is.

    Raises:
        AssertionError: naming all that is otherwise.
    """
    from tests.simulated_cuda.syncs import watched

    known, wrong = rules(), []
    for name, (f, pattern) in known.refused.items():
        try:
            f()
            wrong.append(f"{name}: was not refused")
        except (RuntimeError, TypeError) as error:
            if not re.search(pattern, str(error)):
                wrong.append(f"{name}: refused with another message: {error}")
    wrong += [f"{name}: is otherwise" for name, f in known.allowed.items() if not f()]
    for name, (f, kinds) in known.waits.items():
        with watched() as found:
            f()
        if [sync.kind for sync in found] != kinds:
            wrong.append(f"{name}: noted {[sync.kind for sync in found]}, expected {kinds}")
    assert not wrong, "\n".join(wrong)


def check_rules_on_a_gpu() -> None:
    """The same of a real device, as far as torch tells: any error for what is refused, and that something waits.

    Raises:
        AssertionError: naming all that is otherwise.
    """
    import torch

    known, wrong = rules(), []
    for name, (f, _) in known.refused.items():
        try:
            f()
            torch.cuda.synchronize()
            wrong.append(f"{name}: was not refused")
        except (RuntimeError, TypeError):
            pass
    wrong += [f"{name}: is otherwise" for name, f in known.allowed.items() if not f()]
    for name, (f, kinds) in known.waits.items():
        if kinds in (["cuda.synchronize"], ["event.synchronize"]):
            continue  # asked for, so torch does not warn of them
        f()  # what is loaded at the first call may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            f()
            waited = False
        except RuntimeError as error:
            waited = "synchroniz" in str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if waited != bool(kinds):
            wrong.append(f"{name}: {'waits' if waited else 'does not wait'}")
    assert not wrong, "\n".join(wrong)
