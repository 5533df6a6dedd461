"""The Inception v3 of the Fréchet inception distance (Szegedy et al. 2015, with TensorFlow's weights of 2015-12-05).

Module names are those of the weights that pytorch-fid (``pt_inception-2015-12-05-6726825d.pth``) and torch-fidelity
(``weights-inception-2015-12-05-6726825d.pth``) load. torchvision's weights are of another training of another variant:
they give other distances, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import to_unit

Size = int | tuple[int, int]
CLASSES = 1008  # of TensorFlow's network; torchvision's has 1000


class Convolution(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: Size, stride: int = 1, padding: int | tuple[int, int] = 0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # as TensorFlow does; torchvision counts the padding


def _largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


# A block is a list of branches that are laid side by side; a branch a list of steps: a function, a convolution (name,
# channels in and out, kernel, stride), or a fork, which is such a block again.
Step = Any
Plan = Sequence[Sequence[Step]]


def _a(c: int, pooled: int) -> Plan:
    double = [("branch3x3dbl_1", c, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3)]
    five = [("branch5x5_1", c, 48, 1), ("branch5x5_2", 48, 64, 5)]
    return [[("branch1x1", c, 64, 1)], five, double, [_mean, ("branch_pool", c, pooled, 1)]]


def _b(c: int) -> Plan:
    double = [("branch3x3dbl_1", c, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3, 2)]
    return [[("branch3x3", c, 384, 3, 2)], double, [_halved]]


def _c(c: int, n: int) -> Plan:
    seven = [("branch7x7_1", c, n, 1), ("branch7x7_2", n, n, (1, 7)), ("branch7x7_3", n, 192, (7, 1))]
    double = [("branch7x7dbl_1", c, n, 1), ("branch7x7dbl_2", n, n, (7, 1)), ("branch7x7dbl_3", n, n, (1, 7))]
    double += [("branch7x7dbl_4", n, n, (7, 1)), ("branch7x7dbl_5", n, 192, (1, 7))]
    return [[("branch1x1", c, 192, 1)], seven, double, [_mean, ("branch_pool", c, 192, 1)]]


def _d(c: int) -> Plan:
    seven = [("branch7x7x3_1", c, 192, 1), ("branch7x7x3_2", 192, 192, (1, 7)), ("branch7x7x3_3", 192, 192, (7, 1))]
    seven += [("branch7x7x3_4", 192, 192, 3, 2)]
    return [[("branch3x3_1", c, 192, 1), ("branch3x3_2", 192, 320, 3, 2)], seven, [_halved]]


def _e(c: int, pool: Any) -> Plan:
    def fork(name: str) -> Plan:
        return [[(name + "a", 384, 384, (1, 3))], [(name + "b", 384, 384, (3, 1))]]

    double = [("branch3x3dbl_1", c, 448, 1), ("branch3x3dbl_2", 448, 384, 3), fork("branch3x3dbl_3")]
    single = [("branch3x3_1", c, 384, 1), fork("branch3x3_2")]
    return [[("branch1x1", c, 320, 1)], single, double, [pool, ("branch_pool", c, 192, 1)]]


class Mixed(nn.Module):
    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self._add(plan)

    def _add(self, plan: Plan) -> None:
        for step in (step for branch in plan for step in branch):
            if isinstance(step, list):
                self._add(step)
            elif isinstance(step, tuple):
                name, c_in, c_out, kernel = step[:4]
                stride = step[4] if len(step) > 4 else 1
                wide = (kernel, kernel) if isinstance(kernel, int) else kernel
                padding = (0, 0) if stride == 2 else (wide[0] // 2, wide[1] // 2)
                self.add_module(name, Convolution(c_in, c_out, wide, stride, padding))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self.plan, x)

    def _run(self, plan: Plan, x: Tensor) -> Tensor:
        return torch.cat([self._chain(branch, x) for branch in plan], 1)

    def _chain(self, branch: Sequence[Step], x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, list):
                x = self._run(step, x)
            else:
                x = self.get_submodule(step[0])(x) if isinstance(step, tuple) else step(x)
        return x


class Inception(nn.Module):
    """``forward(pictures)``: (B, 3, H, W), uint8 in 0..255 or float in [0, 1] -> (B, 2048), what FID is made of.

    Pictures are brought to 299 x 299 as TensorFlow 1 did it, bilinear from the upper left corner and without
    antialiasing, and to (x - 128) / 128, as in the network that the published numbers are from.
    """

    size = 299
    width = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed(_a(192, 32)), Mixed(_a(256, 64)), Mixed(_a(288, 64))
        self.Mixed_6a = Mixed(_b(288))
        self.Mixed_6b, self.Mixed_6c = Mixed(_c(768, 128)), Mixed(_c(768, 160))
        self.Mixed_6d, self.Mixed_6e = Mixed(_c(768, 160)), Mixed(_c(768, 192))
        self.Mixed_7a = Mixed(_d(768))
        self.Mixed_7b, self.Mixed_7c = Mixed(_e(1280, _mean)), Mixed(_e(2048, _largest))

    def forward(self, pictures: Tensor) -> Tensor:
        x = resized(to_unit(pictures) * 255, self.size)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halved(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halved(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean((2, 3))

    @classmethod
    def from_weights(cls, tensors: Mapping[str, Tensor], where: str) -> Inception:
        """With the weights of a file. Raises ValueError where they are another network's."""
        net, given = cls(), {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
        head = given.pop("fc.weight", None)
        given.pop("fc.bias", None)
        own = {k: v.shape for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
        wrong = [k for k in own if k not in given or given[k].shape != own[k]] + [k for k in given if k not in own]
        if wrong or (head is not None and len(head) != CLASSES):
            why = f"{wrong[0]} differs" if wrong else f"{len(head) if head is not None else 0} classes, not {CLASSES}"
            raise ValueError(
                f"{where}: not the Inception weights that FID is defined by ({why}); they are the file "
                "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or weights-inception-2015-12-05-6726825d.pth of "
                "torch-fidelity"
            )
        net.load_state_dict({k: v.float() for k, v in given.items()}, strict=False)
        return net


def resized(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size), bilinear as TensorFlow 1: pixel i of the result lies at i · H / size."""
    for dim in (2, 3):
        side = x.shape[dim]
        at = torch.arange(size, dtype=torch.float64, device=x.device) * side / size
        low = at.long()
        share = (at - low).to(x.dtype).view((-1, 1) if dim == 2 else (-1,))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=side - 1)), share)
    return x
