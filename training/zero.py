"""DeepSpeed's ZeRO under our loop: its engine shares out and steps, and what a run goes on from is read and written by
parameter, in our own checkpoints. DeepSpeed's own, which are pickles, are neither written nor read.

Stage 1 shares out AdamW's state, 2 the gradients too, 3 the weights and their averages as well.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ldm.extras import pip_install

from . import sharded
from .fit import ConfigError
from .optim import Guarded
from .schema.optim import AdamW, AnyOptimizer
from .tensor_files import Stored, read

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each number, beside a count of steps
BUCKET = 50_000_000  # numbers reduced at once: DeepSpeed's own half a billion are 2 GB in float32
SIZES = {
    "reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "contiguous_gradients", "reduce_scatter",
    "round_robin_gradients", "sub_group_size", "stage3_prefetch_bucket_size",
}  # fmt: skip


def asked() -> bool:
    """The launcher asked for DeepSpeed, in accelerate's own way."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def shares_weights(accelerator: Accelerator) -> bool:
    """Stage 3: no process can call the network alone."""
    return asked() and cast(Any, accelerator.state.deepspeed_plugin).zero_stage == 3


def backend() -> dict[str, str]:
    """What the process group is to be told. Without GPUs accelerate chooses none, and DeepSpeed would compile an
    operation of its own first; gloo does without.

    Raises:
        ConfigError: DeepSpeed is not installed, or does not import.
    """
    if not asked():
        return {}
    try:
        import deepspeed.ops
    except Exception as error:  # a broken install raises whatever it likes
        command = pip_install("deepspeed")
        raise ConfigError(f"DeepSpeed was asked for and cannot be imported ({error}): {command}") from error
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+_tensor. is deprecated", FutureWarning)  # at each call
    if torch.cuda.is_available() or "LOCAL_RANK" not in os.environ:
        return {}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {"backend": "gloo"}


def check(accelerator: Accelerator) -> None:
    """Raises ConfigError where accelerate's config asks for what is not to be had with ZeRO here."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED or "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "DeepSpeed was asked for, and accelerate left it out; on a CPU start without ACCELERATE_USE_CPU=true (and "
            "without --cpu), else with a launcher that starts processes: accelerate launch, or torchrun"
        )
    from transformers.integrations import unset_hf_deepspeed_config

    plugin: Any = accelerator.state.deepspeed_plugin
    given = plugin.deepspeed_config["zero_optimization"]
    if (stage := given.get("stage", 0)) not in (1, 2, 3):
        raise ConfigError(f"deepspeed zero_stage {stage}: 1, 2 and 3 share something out; else use DDP")
    for name in ("offload_optimizer", "offload_param"):
        if (given.get(name) or {}).get("device", "none") != "none":
            raise ConfigError(f"deepspeed {name}_device: offloading is not supported; set it to none, or use FSDP2")
    known = {"stage", "offload_optimizer", "offload_param", "stage3_gather_16bit_weights_on_model_save", *SIZES}
    if odd := sorted(given.keys() - known):
        raise ConfigError(f"deepspeed zero_optimization.{odd[0]}: is not used here; take it out of the config")
    unset_hf_deepspeed_config()  # else transformers shares out the encoders too, which one process may open alone


def check_kind(config: AnyOptimizer) -> None:
    """Raises ConfigError for all but AdamW: the others cannot work on what ZeRO hands them."""
    if not isinstance(config, AdamW):
        raise ConfigError(
            f"optimizer.name: {config.name} is not to be had with DeepSpeed, which hands an optimizer flat pieces of "
            "many parameters together; adamw is, and configs/accelerate/fsdp2.yaml shares out with other kinds"
        )


class Zero(Guarded):
    """AdamW with the same groups, schedule, clipping and guard as without ZeRO, stepped by DeepSpeed's engine.

    The engine's norm is over all processes, so that all skip a step together. It reads the norm on the host.

    Args:
        module: on its device; afterwards ``engine`` is what is called in its place.
        config: of AdamW.
        batch: pictures of one micro-batch, which the engine wants to know.
    Raises:
        ConfigError: another optimizer than AdamW.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        config: AnyOptimizer,
        images: int,
        *,
        batch: int,
        per_step: int,
        fp16: bool = False,
    ):
        import deepspeed

        check_kind(config)
        super().__init__(module.named_parameters(), config, images, per_step=per_step, fp16=fp16)
        plugin: Any = accelerator.state.deepspeed_plugin
        given = plugin.deepspeed_config["zero_optimization"]
        if shares_weights(accelerator):
            sharded.remember(module)
        zero = {"stage": given["stage"], "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        zero |= {k: v for k, v in given.items() if k in SIZES and v != "auto"}
        # No weight stays whole after its use: the averages are put in the place of the parts.
        zero |= {
            f"stage3_{what}": 0 for what in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        }
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.steppers[0].optimizer,
            config={
                "train_micro_batch_size_per_gpu": batch,
                "gradient_accumulation_steps": 1,  # the loop tells which micro-batch is the last
                "gradient_clipping": config.max_grad_norm,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**60,
            },
        )
        self.inner: Any = self.engine.optimizer
        self._tell_scale()

    def _tell_scale(self) -> None:
        if self._scale is not None:
            self.inner.override_loss_scale(self._scale.item())

    def backward(self, accelerator: Accelerator, loss: Tensor, last: bool) -> None:
        """The engine scales the loss, by what it was told."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        self.engine.step()
        device = self.engine.device
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        skipped = torch.tensor(float(not self.engine.was_step_applied()), device=device)
        if self._scale is not None:
            self._update_scale(self._scale, skipped)
            self._tell_scale()
        self.steps += 1
        self.images += self.per_step
        self._set_rates()
        return norm, skipped

    # --- going on ----------------------------------------------------------------------------------------------------

    def _flat(self) -> list[Tensor]:
        """This process's pieces of the weights in float32, each of many parameters: what the optimizer steps."""
        stage3 = hasattr(self.inner, "fp32_partitioned_groups_flat")
        return self.inner.fp32_partitioned_groups_flat if stage3 else self.inner.single_partition_of_fp32_groups

    def _link(self) -> None:
        """Stages 1 and 2: let parameters find their place in the state. DeepSpeed does so after the first group's first
        step, when the other groups have no state yet."""
        if hasattr(self.inner, "_hp_optimizer_states_linked"):
            self.inner._hp_optimizer_states_linked = False
            self.inner._lazy_init_hp_params_optimizer_state()

    def tensors(self) -> dict[str, Tensor]:
        """As without ZeRO, whole; on the main process alone. All processes call this."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [self.inner.optimizer.state[flat] for flat in self._flat() if flat in self.inner.optimizer.state]
        flat = {} if self._scale is None else {"loss_scale": self._scale, "good_steps": self._good_steps}
        if states:
            self._link()
        for i, p in enumerate(self.parameters if states else ()):
            for name in MOMENTS:
                whole: Any = safe_get_full_optimizer_state(p, name)
                if sharded.is_main():
                    flat[f"{i}.{name}"] = whole.cpu()
            flat[f"{i}.step"] = states[0]["step"].clone()
        return flat

    def load(self, tensors: Stored, state: Mapping[str, Any]) -> None:
        """As without ZeRO; the weights are in the module already.

        Raises:
            ValueError: they are another optimizer's, or the parameters have not made as many steps each.
        """
        self.inner.refresh_fp32_params()
        groups = [len(stepper.optimizer.param_groups) for stepper in self.steppers]
        numbers = {int(i) for i in (name.partition(".")[0] for name in tensors) if i.isdecimal()}
        if any(i >= len(self.parameters) for i in numbers) or [len(x) for x in state["groups"]] != groups:
            raise ValueError("the optimizer's state is that of other parameters or of another kind")
        if self._scale is not None and "loss_scale" in tensors:
            self._scale.copy_(tensors["loss_scale"])
            self._good_steps.copy_(tensors["good_steps"])
            self._tell_scale()
        self._put(tensors, _steps(tensors[f"{i}.step"] for i in numbers))
        self.steps, self.images = state["steps"], state["images"]
        self._set_rates()

    def _put(self, tensors: Stored, steps: Tensor | None) -> None:
        """AdamW's state, in the pieces; what has none begins with zeros."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.inner.optimizer.state.clear()
        if steps is None:
            return
        for flat in self._flat():
            moments = {name: torch.zeros_like(flat) for name in MOMENTS}
            self.inner.optimizer.state[flat] = {"step": steps.to(flat.device, copy=True), **moments}
        self._link()
        for i, p in enumerate(self.parameters):
            for name in MOMENTS:
                if (whole := tensors.get(f"{i}.{name}")) is None:
                    continue
                if sharded.is_part(p):
                    safe_set_local_optimizer_state(p, sharded.like(whole, p), name)
                else:
                    safe_set_full_optimizer_state(p, read(whole).to(p.device), name)


def _steps(counts: Iterable[Tensor]) -> Tensor | None:
    """The one count of steps that all have; None before the first."""
    found = list(counts)
    if any(not x.equal(found[0]) for x in found):
        raise ValueError("the parameters made different numbers of steps, and with ZeRO they have one; go on without")
    return found[0] if found else None
