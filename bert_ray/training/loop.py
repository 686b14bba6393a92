"""The training loop, the same for every engine and task: it knows neither Ray nor DeepSpeed.

A step's rows, their order, the learning rate and the noise of dropout are functions of the job and of the step's
number. So a run that goes on from a checkpoint does the same steps as one that was never disturbed.

Shapes: S samples of one optimiser step, over all workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bert_ray.model.bundle import save_bundle
from bert_ray.model.examples import ranges
from bert_ray.model.memory import keep_freed_memory
from bert_ray.model.packing import pack_rows, plan
from bert_ray.model.tasks.base import Outputs
from bert_ray.training.augmentation import Augmentation
from bert_ray.training.checkpoints import Checkpoints
from bert_ray.training.optim import PRECISIONS, TaskModel, freeze, load_weights
from bert_ray.training.order import epoch_order, noise_seed, shares
from bert_ray.training.schedule import learning_rate

if TYPE_CHECKING:
    from bert_ray.model.bundle import Bundle, Card
    from bert_ray.model.examples import Examples
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tasks.base import Learning
    from bert_ray.training.data import TrainingData
    from bert_ray.training.job import TrainJob
    from bert_ray.training.optim import Stepper
    from bert_ray.training.peers import Peers

# Tokens of a packed validation batch: enough to fill the cores, small enough to stay in a CPU's cache.
_EVALUATION_TOKENS = 4096

# The losses of so many steps are looked at together: one collective, and on a GPU one synchronisation.
_LOOK_EVERY = 10

# Where the rest of the seed space begins that seeds the head's weights; dropout's seeds are hashes.
_HEAD_PIECE = -1


@dataclass(kw_only=True, slots=True)
class StepEvent:
    """What a callback is told after each optimiser step.

    Attributes:
        step: optimiser steps done since the run began.
        epoch: the current epoch, from 1.
        rank: the worker that calls.
        directory: the run's directory.
    """

    step: int
    epoch: int
    rank: int
    directory: Path


Callback = Callable[[StepEvent], None]


@dataclass(kw_only=True, slots=True)
class Position:
    """Where a run is: all that a checkpoint holds besides tensors.

    Attributes:
        epoch: epochs done.
        index: steps done in the current epoch.
        loss: sum over the samples of the current epoch so far.
        weight: what these samples count for together.
        seconds: spent training (evaluation and checkpoints left out), over all sessions of the run.
        epoch_seconds: of these, in the current epoch.
        tokens: real tokens trained on.
        epoch_tokens: of these, in the current epoch.
        best: metric of the best epoch so far; None before the first.
        best_epoch: that epoch, from 1; 0 before the first.
        history: one entry per epoch done.
        scaling: fp16's loss scaling.
        diverged: the step whose loss was not finite; None so far.
    """

    epoch: int = 0
    index: int = 0
    loss: float = 0.0
    weight: float = 0.0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    tokens: int = 0
    epoch_tokens: int = 0
    best: float | None = None
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    scaling: dict[str, float] = field(default_factory=dict)
    diverged: int | None = None


def new_module(
    job: TrainJob,
    base: Bundle,
    card: Card,
    device: torch.device,
    state: dict[str, torch.Tensor] | None,
    learning: Learning | None = None,
) -> TaskModel:
    """The model to train: the base's encoder with a fresh head, or the weights of a checkpoint."""
    torch.manual_seed(noise_seed(job.seed, 0, _HEAD_PIECE, 0))
    task = base.bind(card)
    task.learning = learning or task.learning
    model = task.new_model(base, job.dropout, job.attention_dropout)
    freeze(model, job.freeze_layers)
    if state is not None:
        load_weights(model, state)
    return TaskModel(model, task, job.l1, PRECISIONS[resolve_precision(job.precision, device)])


def resolve_precision(precision: str, device: torch.device) -> str:
    """What `auto` means on a device."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


class Loop:
    """One run on one worker. All workers make one with the same arguments and call `run` together."""

    def __init__(
        self,
        *,
        job: TrainJob,
        base: Bundle,
        card: Card,
        data: TrainingData,
        directory: Path,
        peers: Peers,
        device: torch.device,
        make_stepper: Callable[[TaskModel], Stepper],
        tell: Callable[[dict[str, Any]], None],
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Set up, from the newest checkpoint in `directory` where there is one.

        Args:
            job: what to do.
            base: the bundle to start from.
            card: of the bundle to come; its metrics and provenance are filled in as the run goes.
            data: tokenised samples.
            directory: the run's directory: checkpoints/ and best/.
            peers: the workers of the run.
            device: where this worker computes.
            make_stepper: PlainStepper or DeepSpeedStepper.
            tell: called on rank 0 with progress: at most every two seconds, and at the end of each epoch.
            callbacks: called after each optimiser step, on each worker.
        """
        if device.type == "cpu":
            keep_freed_memory()
        self.job, self.base, self.card, self.data = job, base, card, data
        self.directory, self.peers, self.device = directory, peers, device
        self.tell, self.callbacks = tell, callbacks
        self.checkpoints = Checkpoints(directory / "checkpoints", job.checkpoint.keep)
        self.lengths = data.train.lengths
        self.augmentation = None
        if job.augmentation.any:
            self.augmentation = Augmentation(job.augmentation, base.tokenizer(), card.max_length, job.seed, device)
        self.epoch_steps = -(-len(data.train) // job.batch_size)
        self.steps = self.epoch_steps * job.epochs
        found = self.checkpoints.latest()
        self.position = Position(**found.position) if found else Position()
        state = found.state() if found else None
        self.stepper = make_stepper(new_module(job, base, card, device, state, data.learning))
        self.module = self.stepper.module
        if state is not None and found is not None:
            self.stepper.restore(state, self.done)
            self.stepper.restore_scaling(self.position.scaling)
            _restore_rng(state, peers)
            self._tell("resumed", skipped=found.skipped)
        self._unseen: list[tuple[int, float, torch.Tensor]] = []
        self._told = time.monotonic()
        self._recent = (time.monotonic(), self.position.tokens)

    @property
    def done(self) -> int:
        """Optimiser steps done."""
        return self.position.epoch * self.epoch_steps + self.position.index

    def run(self) -> Position:
        """Train to the end, or until the metric no longer rises, or until the loss is not finite."""
        position, job = self.position, self.job
        while position.epoch < job.epochs and not self._stopping():
            order = epoch_order(len(self.data.train), job.seed, position.epoch)
            self.module.train()
            while position.index < self.epoch_steps:
                start = time.perf_counter()
                self._step(order[position.index * job.batch_size : (position.index + 1) * job.batch_size])
                position.index += 1
                if len(self._unseen) >= _LOOK_EVERY:
                    self._look()
                spent = time.perf_counter() - start
                position.seconds += spent
                position.epoch_seconds += spent
                for callback in self.callbacks:
                    callback(
                        StepEvent(
                            step=self.done, epoch=position.epoch + 1, rank=self.peers.rank, directory=self.directory
                        )
                    )
                every = job.checkpoint.every_steps
                if every and self.done % every == 0 and position.index < self.epoch_steps:
                    self._look()
                    if position.diverged is None:
                        self._save()
                if position.diverged is not None:
                    return position
            self._look()
            if position.diverged is not None:
                return position
            self._end_epoch()
            self._save()
        return position

    def _step(self, samples: np.ndarray) -> None:
        """One optimiser step over `samples` (S,)."""
        job, position, peers, step = self.job, self.position, self.peers, self.done
        pieces = job.gradient_accumulation
        parts = shares(samples, self.lengths, peers.world * pieces)
        weight = max(1e-9, self.data.train.weigh(samples))
        total: torch.Tensor | float = 0.0
        for piece in range(pieces):
            mine = parts[peers.rank * pieces + piece]
            # DeepSpeed averages gradients over the workers; times their number, over all weights, is the mean.
            scale = peers.world / weight
            if len(mine) == 0:  # Nothing to compute, but the other workers wait in the same collectives.
                mine, scale = samples[:1], 0.0
            torch.manual_seed(noise_seed(job.seed, step, piece, peers.rank))
            batch, targets = self._batch(self.data.train, mine, distorted=True)
            loss, losses, _ = self.stepper.forward(batch, targets, scale, 1.0 / pieces)
            self.stepper.backward(loss)
            total = total + (losses if scale else losses * 0.0)
        self.stepper.step(learning_rate(step, self.steps, job.learning_rate, job.warmup, job.schedule))
        assert isinstance(total, torch.Tensor)
        self._unseen.append((step + 1, weight, total))
        tokens = int(self.lengths[samples].sum())
        position.tokens += tokens
        position.epoch_tokens += tokens

    def _batch(
        self, examples: Examples, samples: np.ndarray, distorted: bool = False
    ) -> tuple[PackedBatch, torch.Tensor]:
        pieces, owners = examples.pieces_of(samples)
        if distorted and self.augmentation is not None:
            tokens = self.augmentation(examples.pieces.tokens, pieces, self.position.epoch)
            batch = pack_rows(tokens, np.arange(len(pieces)))
            batch.rows = pieces
        else:
            batch = pack_rows(examples.pieces.tokens, pieces)
        batch.samples = None if owners is None else torch.from_numpy(owners)
        targets = torch.from_numpy(examples.targets.take(samples))
        return batch.to(self.device), targets.to(self.device, non_blocking=True)

    def _look(self) -> None:
        """Add up the losses of the last steps over all workers, and see whether they are finite."""
        if not self._unseen:
            return
        sums = self.peers.sum(torch.stack([total.double() for _, _, total in self._unseen])).tolist()
        for (step, weight, _), value in zip(self._unseen, sums, strict=True):
            if not np.isfinite(value):
                self.position.diverged = step
                break
            self.position.loss += value
            self.position.weight += weight
        self._unseen.clear()
        now = time.monotonic()
        if now - self._told >= 2.0:
            self._tell("progress")

    def _end_epoch(self) -> None:
        """Evaluate, note the epoch, keep the model where it is the best so far."""
        position = self.position
        rate = learning_rate(self.done - 1, self.steps, self.job.learning_rate, self.job.warmup, self.job.schedule)
        entry = {
            "epoch": position.epoch + 1,
            "step": self.done,
            "train_loss": position.loss / max(1e-9, position.weight),
            "learning_rate": rate,
            "tokens_per_second": position.epoch_tokens / max(1e-9, position.epoch_seconds),
        }
        metrics: dict[str, float] = {}
        if len(self.data.validation):
            loss, metrics = self.evaluate(self.data.validation)
            entry |= {"validation_loss": loss, **metrics}
        value = metrics.get(self.module.task.metric)
        position.history.append(entry)
        position.epoch += 1
        position.index = position.epoch_tokens = 0
        position.loss = position.weight = position.epoch_seconds = 0.0
        # Without validation rows the last epoch is the one to keep.
        if value is None or position.best is None or value > position.best:
            position.best, position.best_epoch = value, position.epoch
            self._keep_best(metrics)
        self._tell("epoch", **entry)

    def evaluate(self, examples: Examples) -> tuple[float, dict[str, float]]:
        """Mean loss and the task's metrics over `examples`, the same on every worker."""
        self.module.eval()
        batches = plan(examples.lengths, _EVALUATION_TOKENS)
        found: list[tuple[np.ndarray, np.ndarray, float]] = []
        world, rank = self.peers.world, self.peers.rank
        with torch.no_grad():
            for index in range(rank, -(-len(batches) // world) * world, world):
                # Every worker makes as many passes: under ZeRO 3 each gathers weights from all.
                batch, targets = self._batch(examples, batches[index] if index < len(batches) else batches[0][:1])
                _, total, outputs = self.stepper.forward(batch, targets)
                if index < len(batches):
                    found.append((batch.rows, outputs.cpu().numpy(), float(total)))
        everyone = [item for items in self.peers.gather(found) for item in items]
        outputs = self._in_order(examples, everyone)
        loss = sum(item[2] for item in everyone) / examples.weigh(np.arange(len(examples)))
        task = self.module.task
        if chosen := task.tune(outputs, examples):
            # Decided by all validation rows, so the same on every worker.
            self.card.options |= chosen
            task.options = replace(task.options, **chosen)
        return loss, task.validate(outputs, examples)

    def _in_order(self, examples: Examples, found: list[tuple[np.ndarray, np.ndarray, float]]) -> Outputs:
        """Outputs of all batches, in the order of the pieces."""
        order, values = np.concatenate([item[0] for item in found]), np.concatenate([item[1] for item in found])
        offsets = None
        if self.module.task.level == "token":
            offsets = examples.pieces.tokens.offsets
            order = ranges(offsets[order], offsets[order + 1])
        ordered = np.empty_like(values)
        ordered[order] = values
        return Outputs(values=ordered, offsets=offsets)

    def _keep_best(self, metrics: dict[str, float]) -> None:
        with self.stepper.whole():
            if self.peers.rank == 0:
                self.card.metrics = metrics
                self.card.provenance |= {"history": self.position.history, "best_epoch": self.position.best_epoch}
                tokenizer, task = self.base.tokenizer(), self.module.task
                save_bundle(self.directory / "best", self.module.model, tokenizer, self.card, task=task)
        self.peers.wait()

    def _save(self) -> None:
        """Write a checkpoint. All workers take part; rank 0 writes."""
        state = self.stepper.state()
        noise = self.peers.gather(_rng(self.device))
        self.position.scaling = self.stepper.scaling()
        if self.peers.rank == 0:
            state |= {
                f"rng/{rank}/{name}": value for rank, states in enumerate(noise) for name, value in states.items()
            }
            self.checkpoints.save(self.done, state, asdict(self.position))
        self.peers.wait()

    def _stopping(self) -> bool:
        patience, position = self.job.early_stopping, self.position
        return bool(patience) and position.epoch - position.best_epoch >= patience and position.epoch > 0

    def _tell(self, what: str, **more: Any) -> None:
        if self.peers.rank:
            return
        now, position = time.monotonic(), self.position
        if what == "progress":
            since, tokens = self._recent
            speed = (position.tokens - tokens) / max(1e-9, now - since)
            remaining = (self.steps - self.done) * (now - since)
            left = remaining * position.tokens / max(1, self.done) / max(1, position.tokens - tokens)
            more |= {
                "loss": position.loss / max(1e-9, position.weight),
                "tokens_per_second": speed,
                "seconds_left": left,
            }
        self._told, self._recent = now, (now, position.tokens)
        epoch = position.epoch + (what == "progress")
        self.tell(
            {"what": what, "step": self.done, "steps": self.steps, "epochs": self.job.epochs, "epoch": epoch} | more
        )


def _rng(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_rng(state: dict[str, torch.Tensor], peers: Peers) -> None:
    """Take over this rank's RNG states, where the checkpoint has a worker of this rank."""
    if (cpu := state.get(f"rng/{peers.rank}/cpu")) is not None:
        torch.set_rng_state(cpu)
    if (cuda := state.get(f"rng/{peers.rank}/cuda")) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
