"""The stepper that DeepSpeed drives: ZeRO stage 0 to 3 over the workers of the default process group.

Nothing is compiled: the optimiser is torch's fused AdamW, and on a CPU the shared-memory communication op, which
DeepSpeed would otherwise build with a C++ compiler for a minute at first use, is declared unavailable, so that gloo
serves (`_import`).
"""

from __future__ import annotations

import logging
import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from bert_ray.training.optim import (
    MOMENTS,
    STEPS,
    TaskModel,
    adam_state,
    clip,
    make_optimizer,
    named_state,
    restore_moments,
    restore_scaling,
    scaling_of,
    set_rate,
)
from bert_ray.training.order import micro_batches_of_step

if TYPE_CHECKING:
    from bert_ray.training.job import TrainJob

# Elements that a ZeRO communication bucket holds at most: 64 Mi fp32 elements are 256 MiB. A model like MiniLM
# goes in one; DeepSpeed's own default, 500 M elements, would reserve 2 GB for it.
_BUCKET_ELEMENTS = 64 * 2**20
# What fp16's losses are multiplied by at first: torch's own default.
_FIRST_SCALE = 2.0**16
# After so many steps without an overflow it grows: torch's own default.
_GOOD_STEPS = 2000


def _import(device: torch.device) -> Any:
    """DeepSpeed, imported so that it uses `device` and compiles nothing."""
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # `deepspeed.ops.__compatible_ops__` is computed at first access and then kept in the module, "so edits to it
        # persist" (deepspeed/ops/__init__.py); `build_shm_op` (deepspeed/comm/torch.py) asks it first.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


class DeepSpeedStepper:
    """Steps of one worker among several."""

    def __init__(self, module: TaskModel, job: TrainJob, device: torch.device, world: int) -> None:
        deepspeed = _import(device)
        self.device = device
        self.module = module.to(device)
        self._clip = job.clip or math.inf
        self._stage = job.zero_stage
        self._deepspeed = deepspeed
        elements = sum(weight.numel() for weight in module.parameters())
        bucket = min(_BUCKET_ELEMENTS, elements)
        _, micro_batches = micro_batches_of_step(job, world)
        config: dict[str, Any] = {
            "train_batch_size": world * micro_batches,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": micro_batches,
            # ZeRO clips its shares itself; at stage 0 the gradient is whole and `clip` is faster.
            "gradient_clipping": job.clip if self._stage else 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            "zero_optimization": {
                "stage": self._stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "overlap_comm": device.type != "cpu",
                "contiguous_gradients": device.type != "cpu",
                "stage3_param_persistence_threshold": 0,
            },
        }
        if job.offload != "none":
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type != "cpu"}
            # torch's fused AdamW serves on the CPU too; DeepSpeed's own would be compiled at first use.
            config["zero_force_ds_cpu_optimizer"] = False
        if job.offload == "parameters":
            config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": device.type != "cpu"}
        # Nothing is said of half precision: the module enters it by itself (`TaskModel.forward`); weights, gradients
        # and what is communicated of them stay fp32.
        optimizer = make_optimizer(module.model, job.weight_decay, job.layer_decay, job.optimizer)
        self.engine, self._wrapped, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        if self._stage == 3:
            # The packed forward reads weights past the modules that own them (queries, keys and values in one
            # product), so all are declared to belong to the whole model too: they are gathered when it is entered,
            # forward and backward, and between steps each worker keeps its share alone.
            for weight in module.model.parameters():
                deepspeed.zero.register_external_parameter(module, weight)
        self._optimizer = optimizer
        self._named = dict(module.model.named_parameters())
        self._trained = {name: weight for name, weight in self._named.items() if weight.requires_grad}
        self._make_moments(0)
        self._scaler = self._make_scaler(device) if module.autocast is torch.float16 else None

    def _make_scaler(self, device: torch.device) -> Any:
        """Scale fp16's losses, as PlainStepper does: by torch's scaler, or by that of ZeRO, which unscales its shares.

        DeepSpeed's own way with torch's autocast clips before it unscales, and with ZeRO never lowers the scale.
        """
        if not self._stage:
            scaler = torch.amp.GradScaler(device.type, init_scale=_FIRST_SCALE, growth_interval=_GOOD_STEPS)
            self.engine.torch_autocast_z0_gradscaler = scaler
            return scaler
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        class LateGrowth(DynamicLossScaler):  # type: ignore[misc]
            """DeepSpeed has the scale grow before it divides by it gradients that came of the smaller one."""

            cur_scale: float

            def update_scale(self, overflow: bool) -> None:
                """The scale falls at once, but grows in `grow`."""
                before = self.cur_scale
                super().update_scale(overflow)
                self.next_scale = self.cur_scale
                self.cur_scale = min(before, self.next_scale)

            def grow(self) -> None:
                """After the step."""
                self.cur_scale = self.next_scale

        self._wrapped.loss_scaler = LateGrowth(
            init_scale=_FIRST_SCALE,
            scale_window=_GOOD_STEPS,
            min_scale=1.0,
            delayed_shift=1,
            consecutive_hysteresis=False,
            raise_error_at_min_scale=False,
        )
        self._wrapped.dynamic_loss_scale = True
        return self._wrapped.loss_scaler

    def forward(self, *arguments: Any) -> Any:
        """See Stepper."""
        return self.engine(*arguments)

    def backward(self, loss: torch.Tensor) -> None:
        """See Stepper. DeepSpeed averages over the workers; micro-batches of a step are added up, not averaged."""
        # A clone, because the hook by which `backward` tells the engine's forward hook not to divide by the number of
        # micro-batches must run first, and hooks of one tensor run in the order in which they were registered.
        self.engine.backward(loss.clone(), scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, rate: float) -> torch.Tensor | None:
        """See Stepper."""
        set_rate(self._wrapped, rate)
        if self._stage:
            self.engine.step()
            if self._scaler is not None:
                self._scaler.grow()
            norm = self.engine.get_global_grad_norm()
            return None if norm is None else torch.as_tensor(norm)
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        norm = clip(list(self._trained.values()), self._clip)
        self.engine.step()
        return norm

    def whole(self) -> AbstractContextManager[Any]:
        """See Stepper."""
        if self._stage < 3:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(self._named.values()))

    def state(self) -> dict[str, torch.Tensor]:
        """See Stepper."""
        first = torch.distributed.get_rank() == 0
        if not self._stage:
            return named_state(self.module.model, self._optimizer) if first else {}
        state = {}
        with self.whole():
            for name, weight in self._named.items():
                if first:
                    state[f"weight/{name}"] = weight.detach().to("cpu", copy=True)
        for name, weight in self._trained.items():
            for moment in MOMENTS:
                value = self._deepspeed.utils.safe_get_full_optimizer_state(weight, moment)
                if first and value is not None:
                    state[f"{moment}/{name}"] = value.view(weight_shape(weight)).to("cpu", copy=True)
        if first:
            taken = self._wrapped.optimizer.state[self._shares()[0]]["step"]
            state[STEPS] = torch.tensor(float(taken), dtype=torch.float64)
        return state

    def restore(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """See Stepper."""
        if not self._stage:
            restore_moments(self.module.model, self._optimizer, state, steps)
            return
        self._make_moments(steps)
        for name, weight in self._trained.items():
            for moment in MOMENTS:
                value = state.get(f"{moment}/{name}")
                if value is not None:
                    self._deepspeed.utils.safe_set_full_optimizer_state(weight, value.to(self.device), moment)

    def _make_moments(self, steps: int) -> None:
        """Give ZeRO's optimiser, which works on flat shares of the weights, its state now instead of at its first step.

        DeepSpeed links the flat state to the parameters once, after the first step of the first parameter group, when
        the second group has none yet; `safe_get_full_optimizer_state` then fails for that group.
        """
        if not self._stage:
            return
        for share in self._shares():
            zeros = torch.zeros_like(share), torch.zeros_like(share)
            self._wrapped.optimizer.state[share] = adam_state(share, steps, *zeros)
        if self._stage < 3:
            self._wrapped._hp_optimizer_states_linked = False
            self._wrapped._lazy_init_hp_params_optimizer_state()

    def _shares(self) -> list[torch.Tensor]:
        """This worker's flat shares of the weights, one a parameter group."""
        flat = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self._wrapped, flat))

    def scaling(self) -> dict[str, float]:
        """See Stepper."""
        if self._scaler is None:
            return {}
        if not self._stage:
            return scaling_of(self._scaler)
        good = self._scaler.cur_iter - self._scaler.last_overflow_iter - 1
        return {"scale": self._scaler.cur_scale, "good_steps": good}

    def restore_scaling(self, state: dict[str, float]) -> None:
        """See Stepper."""
        if self._scaler is None or "scale" not in state:
            return
        if not self._stage:
            restore_scaling(self._scaler, state)
        else:
            self._scaler.cur_scale = state["scale"]
            self._scaler.cur_iter, self._scaler.last_overflow_iter = int(state.get("good_steps", 0)), -1


def weight_shape(weight: torch.Tensor) -> torch.Size:
    """The whole shape of a parameter that ZeRO 3 may have cut to a share."""
    return getattr(weight, "ds_shape", weight.shape)
