"""What a step computes (TaskModel), its optimiser, and the stepper of one plain process.

A stepper owns the module and the optimiser and takes steps; `deepspeed.py` has the other one. Both keep weights and
optimiser state in fp32 and hand them out by parameter name, so that a checkpoint of one is read by the other, at any
ZeRO stage and any number of workers.

Shapes: P pieces of a packed batch.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from bert_ray.errors import JobError
from bert_ray.model.encoder import encode, encoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tasks import Task
    from bert_ray.training.job import TrainJob

# Adam's two moments: what the optimiser remembers of each parameter, besides the number of steps.
MOMENTS = ("exp_avg", "exp_avg_sq")
# That number's name in a checkpoint; it is less than the run's steps where fp16 overflowed.
STEPS = "optimizer/steps"

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TaskModel(nn.Module):
    """A model with its task's loss: packed batch in, scaled loss or outputs out."""

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        l1: float,
        autocast: torch.dtype | None,
        recompute: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            model: with the task's head.
            task: gives head, loss and metrics.
            l1: weight of the L1 penalty on matrices.
            autocast: dtype of matrix products; None: fp32.
            recompute: keep only each layer's input for the backward pass, and compute the rest again there.
        """
        super().__init__()
        self.model = model
        self.task = task
        self.l1 = l1
        self.autocast = autocast
        self.recompute = recompute
        self.penalised = decayed(model) if l1 else []

    def forward(
        self, batch: PackedBatch, targets: torch.Tensor | None = None, scale: float = 1.0, share: float = 1.0
    ) -> Any:
        """One forward pass.

        Args:
            batch: P pieces.
            targets: what the samples of the batch should be; None: only the outputs are wanted.
            scale: factor on the sum of the samples' losses.
            share: this pass's share of the step's L1 penalty.

        Returns:
            outputs, fp32, one entry a piece or a token; with targets instead: the loss to differentiate, the plain
            sum of the samples' losses, detached, and in evaluation mode the outputs (else None).
        """
        device = batch.input_ids.device.type
        with torch.autocast(device, dtype=self.autocast) if self.autocast else nullcontext():
            hidden = encode(self.model, batch, recompute=self.recompute)
            if targets is None:
                return self.task.forward(self.model, hidden, batch).float()
            losses, outputs = self.task.losses(self.model, hidden, batch, targets)
            if self.training:
                outputs = None
            elif outputs is None:
                outputs = self.task.forward(self.model, hidden, batch).float()
        total = losses.float().sum()
        loss = total * scale
        if self.l1:
            loss = loss + (self.l1 * share) * sum(weight.abs().sum() for weight in self.penalised)
        return loss, total.detach(), outputs


class Stepper(Protocol):
    """Takes optimiser steps on a TaskModel."""

    module: TaskModel
    device: torch.device

    def forward(self, *arguments: Any) -> Any:
        """TaskModel.forward."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch of a step."""

    def step(self, rate: float) -> torch.Tensor | None:
        """Clip, update the weights at learning rate `rate`, forget the gradient; gives its norm before, where known."""

    def whole(self) -> AbstractContextManager[Any]:
        """While open, the module's weights are whole on rank 0. All workers enter together."""

    def state(self) -> dict[str, torch.Tensor]:
        """`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` on rank 0, on the CPU; empty elsewhere. Collective.

        Where the stepper knows it, also `STEPS`: how many steps the optimiser took.
        """

    def restore(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """Take over the moments of a `state()` after `steps` steps; the weights were loaded before (`load_weights`)."""

    def scaling(self) -> dict[str, float]:
        """State of fp16's loss scaling, the same for all steppers; empty without.

        `scale`, and `good_steps` since the last one that overflowed.
        """

    def restore_scaling(self, state: dict[str, float]) -> None:
        """Take it over."""


def decayed(model: nn.Module) -> list[nn.Parameter]:
    """The weights that decay: matrices. Biases and layer norms (one dimension) do not, as in BERT's own optimiser."""
    return [weight for weight in model.parameters() if weight.requires_grad and weight.dim() > 1]


def make_optimizer(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, kind: str = "adamw"
) -> torch.optim.Optimizer:
    """The optimiser of a job; `set_rate` before each step."""
    matrices = {id(weight) for weight in decayed(model)}
    factors = layer_factors(model, layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for weight in model.parameters():
        if weight.requires_grad:
            groups.setdefault((factors.get(id(weight), 1.0), id(weight) in matrices), []).append(weight)
    chosen: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay if is_matrix else 0.0, "factor": factor, "adam": not is_matrix}
        for (factor, is_matrix), weights in groups.items()
    ]
    if kind == "lamb":
        try:
            from pytorch_optimizer import Lamb
        except ImportError as error:
            raise JobError("optimizer lamb needs pytorch-optimizer: pip install 'bert-ray[train]'") from error
        # As Google's own code for BERT has it: decay is a part of the step that the trust ratio scales (the library's
        # default shrinks the weights first), what does not decay has a ratio of 1, nothing is corrected for the
        # moments' start (the library's default makes the first steps ten times as long), norms are not clamped.
        optimizer = Lamb(chosen, lr=0.0, betas=(0.9, 0.999), eps=1e-6, weight_decouple=False, adam_debias=True)
        optimizer.clamp = float("inf")
        return optimizer
    # One fused kernel.
    return torch.optim.AdamW(chosen, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def set_rate(optimizer: Any, rate: float) -> None:
    """Set the learning rate of the next step, lower for lower layers where the job says so."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def layer_factors(model: nn.Module, decay: float) -> dict[int, float]:
    """Factor on the learning rate by parameter (its `id`), 1 for those not named.

    Of n layers, number l from 0 has decay^(n - l), the embeddings below have decay^(n + 1), as in ELECTRA and BEiT.
    """
    if decay == 1.0:
        return {}
    blocks = blocks_of(model)
    return {id(weight): decay ** (len(blocks) - place) for place, block in enumerate(blocks) for weight in block}


def freeze(model: nn.Module, layers: int) -> None:
    """Keep the embeddings and the lowest `layers` layers as they are; 0: nothing is frozen."""
    if layers:
        for block in blocks_of(model)[: layers + 1]:
            for weight in block:
                weight.requires_grad_(False)


def blocks_of(model: Any) -> list[list[nn.Parameter]]:
    """The parameters of the embeddings, and of each encoder layer from the lowest."""
    encoder = encoder_of(model)
    bottom = (encoder.words, encoder.positions, encoder.types, encoder.norm)
    blocks = [[weight for module in bottom if module is not None for weight in module.parameters()]]
    for layer in encoder.layers:
        modules = (getattr(layer, item.name) for item in fields(layer))
        blocks.append([weight for module in modules for weight in module.parameters()])
    return blocks


def encoder_weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the embeddings and of all encoder layers."""
    return [weight for block in blocks_of(model) for weight in block]


def load_weights(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put the weights of a `Stepper.state()` into a model that no stepper has yet."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(state[f"weight/{name}"])


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """`Stepper.state()` of a model whose parameters are whole and are the optimiser's own. Copies, on the CPU."""
    state = {}
    for name, weight in model.named_parameters():
        state[f"weight/{name}"] = weight.detach().to("cpu", copy=True)
        for moment in MOMENTS:
            value = optimizer.state.get(weight, {}).get(moment)
            if value is not None:
                state[f"{moment}/{name}"] = value.detach().to("cpu", copy=True)
    # LAMB counts for all parameters at once.
    counts = [*(kept.get("step") for kept in optimizer.state.values()), optimizer.param_groups[0].get("step")]
    if taken := [float(count) for count in counts if count is not None]:
        state[STEPS] = torch.tensor(max(taken), dtype=torch.float64)
    return state


def restore_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor], steps: int
) -> None:
    """The other way of `named_state`."""
    if not isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:  # LAMB counts for all parameters at once.
            group["step"] = steps
    for name, weight in model.named_parameters():
        if f"{MOMENTS[0]}/{name}" in state:
            optimizer.state[weight] = adam_state(
                weight, steps, *(state[f"{moment}/{name}"].to(weight.device, copy=True) for moment in MOMENTS)
            )


def adam_state(weight: torch.Tensor, steps: int, first: torch.Tensor, second: torch.Tensor) -> dict[str, torch.Tensor]:
    """What torch's fused AdamW keeps for one parameter."""
    step = torch.tensor(float(steps), dtype=torch.float32, device=weight.device)
    return {"step": step, MOMENTS[0]: first, MOMENTS[1]: second}


class PlainStepper:
    """Steps of one process with torch alone."""

    def __init__(self, module: TaskModel, job: TrainJob, device: torch.device) -> None:
        self.module = module.to(device)
        self.device = device
        self._clip = job.clip or math.inf
        self._weights = [weight for weight in module.parameters() if weight.requires_grad]
        self._optimizer = make_optimizer(module.model, job.weight_decay, job.layer_decay, job.optimizer)
        # fp16's gradients would underflow; bf16 has fp32's range and needs no scaling.
        self._scaler = torch.amp.GradScaler(device.type, enabled=module.autocast is torch.float16)

    def forward(self, *arguments: Any) -> Any:
        """See Stepper."""
        return self.module(*arguments)

    def backward(self, loss: torch.Tensor) -> None:
        """See Stepper."""
        self._scaler.scale(loss).backward()

    def step(self, rate: float) -> torch.Tensor | None:
        """See Stepper."""
        set_rate(self._optimizer, rate)
        self._scaler.unscale_(self._optimizer)
        norm = clip(self._weights, self._clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def whole(self) -> AbstractContextManager[Any]:
        """See Stepper."""
        return nullcontext()

    def state(self) -> dict[str, torch.Tensor]:
        """See Stepper."""
        return named_state(self.module.model, self._optimizer)

    def restore(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """See Stepper."""
        restore_moments(self.module.model, self._optimizer, state, steps)

    def scaling(self) -> dict[str, float]:
        """See Stepper."""
        return scaling_of(self._scaler)

    def restore_scaling(self, state: dict[str, float]) -> None:
        """See Stepper."""
        restore_scaling(self._scaler, state)


def scaling_of(scaler: torch.amp.GradScaler) -> dict[str, float]:
    """What a checkpoint keeps of torch's scaler; nothing where it is disabled. See Stepper.scaling."""
    state = scaler.state_dict()
    return {"scale": state["scale"], "good_steps": state["_growth_tracker"]} if state else {}


def restore_scaling(scaler: torch.amp.GradScaler, state: dict[str, float]) -> None:
    """Take over `scaling_of`, of this stepper or of another."""
    if "scale" in state and (own := scaler.state_dict()):
        good = int(state.get("good_steps", 0)) % own["growth_interval"]
        scaler.load_state_dict(own | {"scale": state["scale"], "_growth_tracker": good})


def clip(weights: list[nn.Parameter], largest: float) -> torch.Tensor:
    """Scale all gradients so that their joint norm is at most `largest`, inf: as they are; gives what it was.

    No synchronisation with the device.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if largest == math.inf:
        return norm
    torch.nn.utils.clip_grads_with_norm_(
        [weight for weight in weights if weight.grad is not None], largest, norm, foreach=True
    )
    return norm
