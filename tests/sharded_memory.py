"""What one of two processes holds on the host at most while FSDP2 shards a network, saves it and goes on from that.

    MALLOC_MMAP_THRESHOLD_=1000000 python -m tests.sharded_memory FOLDER RANK [LAYERS]

With that threshold glibc gives freed tensors back at once, so that what is measured is what lives."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ldm.models.dit import DiT
from training import checkpoint, processes, state
from training.ema import EMA
from training.loop import Player
from training.optim import Guarded
from training.schema import Optimizer


def private_bytes() -> int:
    """Of this process, without the files that are mapped into it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peak:
    """Of ``private_bytes``, looked at every 2 ms, above what there was at first."""

    def __init__(self) -> None:
        self.first, self.most, self.stages = private_bytes(), 0, {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, private_bytes() - self.first)
            time.sleep(0.002)

    def stage(self, name: str) -> None:
        dist.barrier()
        self.stages[name] = {"peak": self.most, "after": private_bytes() - self.first}
        self.most = 0


def main(folder: Path, rank: int, layers: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard_cp",))
    plugin = SimpleNamespace(reshard_after_forward=True, cpu_offload=None)
    accelerator: Any = SimpleNamespace(
        is_fsdp2=True, mixed_precision="no", device=torch.device("cpu"), torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard_cp"]), state=SimpleNamespace(fsdp_plugin=plugin),
    )  # fmt: skip
    sizes = dict(num_attention_heads=16, cross_attention_dim=1152, sample_size=32, caption_channels=768)

    def player() -> Player:
        torch.manual_seed(0)
        net = processes.build_network(accelerator, lambda: DiT(**sizes, num_layers=layers))
        whole = 4 * sum(p.numel() for p in net.parameters())
        unit = 4 * sum(p.numel() for p in net.transformer_blocks[0].parameters())
        peak.stages = {"sizes": {"network": whole, "unit": unit}}
        net = processes.prepare(accelerator, net)
        peak.stage("sharded")
        optimizer = Guarded(net.named_parameters(), Optimizer(), 100)
        return Player(
            "net", net, lambda batch, images: (torch.zeros(()), {}), optimizer, EMA(net.named_parameters(), 0.9)
        )

    peak = Peak()
    made = player()
    for p in made.optimizer.parameters:
        p.grad = torch.ones_like(p)
    made.optimizer.step()
    peak.stage("stepped")
    files = {
        "net": dict(made.module.named_parameters()), "net_optimizer": made.optimizer.tensors(),
        "net_ema": made.ema.tensors(),
    }  # fmt: skip
    told = made.optimizer.state()
    saved = checkpoint.save(folder, 1, files, {}, checkpoint.Keep(1))  # type: ignore[arg-type]
    peak.stage("saved")
    stored, _ = checkpoint.opened(folder / "images_000000001")
    state._fill(made, saved, stored, told)
    peak.stage("resumed")
    (folder / f"{rank}.json").write_text(json.dumps(peak.stages))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["9"])[0]))
