"""The training loop, the same for every engine and task: it knows neither Ray nor DeepSpeed.

A step's rows, their order, the learning rate and the noise of dropout are functions of the job and of the step's
number. So a run that goes on from a checkpoint does the same steps as one that was never disturbed.

Shapes: S samples of one optimiser step, over all workers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bert_ray.errors import JobError, LakeError
from bert_ray.lake.files import sync, sync_tree
from bert_ray.model.bundle import save_bundle
from bert_ray.model.card import CARD_FILE
from bert_ray.model.examples import ranges
from bert_ray.model.flops import dims_of, training_flops, utilisation
from bert_ray.model.memory import keep_freed_memory
from bert_ray.model.packing import on_device, plan
from bert_ray.model.peak import matmul_rate, multiplies_bf16
from bert_ray.model.tasks.base import Outputs
from bert_ray.training.checkpoints import checkpoints_of
from bert_ray.training.loss_spikes import SpikeDetector
from bert_ray.training.notice import stop_asked
from bert_ray.training.optim import PRECISIONS, STEPS, TaskModel, encoder_weights, freeze, load_weights
from bert_ray.training.order import micro_batches_of_step, noise_seed, shares
from bert_ray.training.position import Position
from bert_ray.training.run_directory import BEST
from bert_ray.training.schedule import learning_rate

if TYPE_CHECKING:
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tasks.base import Learning
    from bert_ray.training.data import Data
    from bert_ray.training.job import TrainJob
    from bert_ray.training.optim import Stepper
    from bert_ray.training.peers import Peers
    from bert_ray.training.sources import Source

# Tokens of a packed validation batch: enough to fill the cores, small enough to stay in a CPU's cache. The same on a
# GPU and for any number of workers, since a loss that compares the pairs of a batch depends on it.
_EVALUATION_TOKENS = 4096

# The losses of at most so many steps are looked at together: one collective, and on a GPU one synchronisation. Where
# steps are slow, so many as take about two seconds: soon enough for a notice to stop.
_LOOK_EVERY = 10
_LOOK_EVERY_SEC = 2.0

# After so many steps in a row that overflow in fp16 the scale is the least there is: no further step will do.
_MOST_OVERFLOWS = 50

# A loss so many times the usual one is told of a corpus, unless the job says otherwise: its steps are alike.
_CORPUS_SPIKE = 1.5

# Where the rest of the seed space begins that seeds the head's weights; dropout's seeds are hashes.
_HEAD = -1


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


class _StopAsked(Exception):
    """A stop was asked for behind the last step of a round, whose evaluation has not ended."""


def new_module(
    job: TrainJob,
    base: Bundle,
    card: Card,
    device: torch.device,
    state: dict[str, torch.Tensor] | None,
    learning: Learning | None = None,
) -> TaskModel:
    """The model to train: the base's encoder with a fresh head, or the weights of a checkpoint."""
    torch.manual_seed(noise_seed(job.seed, 0, _HEAD))
    task = base.bind(card, kind=job.task)
    task.learning = learning or task.learning
    model = task.new_model(base, job.dropout, job.attention_dropout)
    freeze(model, job.freeze_layers)
    if state is not None:
        load_weights(model, state)
    precision = PRECISIONS[resolve_precision(job.precision, device)]
    return TaskModel(model, task, job.l1, precision, job.activation_checkpointing)


def resolve_precision(precision: str, device: torch.device) -> str:
    """What `auto` means on a device."""
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device) else "fp32"


class Loop:
    """One run on one worker. All workers make one with the same arguments and call `run` together."""

    def __init__(
        self,
        *,
        job: TrainJob,
        base: Bundle,
        card: Card,
        data: Data,
        directory: Path,
        peers: Peers,
        device: torch.device,
        make_stepper: Callable[[TaskModel], Stepper],
        tell: Callable[[dict[str, Any]], None],
        callbacks: Sequence[Callback] = (),
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up, from the newest checkpoint in `directory` where there is one.

        Args:
            job: what to do.
            base: the bundle to start from.
            card: of the bundle to come; its metrics and provenance are filled in as the run goes.
            data: gives the samples.
            directory: the run's directory: checkpoints/ and best/.
            peers: the workers of the run.
            device: where this worker computes.
            make_stepper: PlainStepper or DeepSpeedStepper.
            tell: called on rank 0 with progress: at most every two seconds, and at the end of each epoch.
            callbacks: called after each optimiser step, on each worker.
            beat: called whenever something has got done.
        """
        if device.type == "cpu":
            keep_freed_memory()
        self.job, self.base, self.card = job, base, card
        self.directory, self.peers, self.device = directory, peers, device
        self.tell, self.callbacks, self.beat = tell, callbacks, beat
        self._best = directory / BEST
        self.checkpoints = checkpoints_of(job, directory)
        self.train, self.validation = data.sources(job, base, card, device)
        self.micro_batches, self.micro_batches_each = micro_batches_of_step(job, peers.world)
        self._dims = dims_of(base.config)
        # Model FLOPs since the start of this session, and what the device could do; measured when it is first told.
        self._flops, self._peak = 0.0, 0.0
        found = self.checkpoints.latest()
        self.position = Position(**found.position) if found else Position()
        places = peers.gather((self.position.epoch, self.position.index))
        if len(set(places)) > 1:
            raise LakeError(
                f"the workers see different checkpoints in {self.checkpoints.where} (epoch and step {places}): it must "
                "be storage that all of them share"
            )
        self.position.stopped = False  # Asked of the session that wrote the checkpoint, not of this one.
        state = found.state() if found else None
        module = new_module(job, base, card, device, state, data.learning)
        # The encoder's weights as the base has them, where some of them are to be kept.
        self._base_weights: list[torch.Tensor] = []
        if job.keep_base:
            start = module if state is None else new_module(job, base, card, device, None, data.learning)
            self._base_weights = [weight.detach().to(device, copy=True) for weight in encoder_weights(start.model)]
        self.stepper = make_stepper(module)
        self.module = self.stepper.module
        spike = _CORPUS_SPIKE if self.module.task.reads_corpus else 0.0
        self.spikes = SpikeDetector(spike if job.loss_spike is None else job.loss_spike)
        if state is not None and found is not None:
            # Steps that fp16 overflowed in are done, but the optimiser took none.
            self.stepper.restore(state, int(state[STEPS]) if STEPS in state else self.done)
            self.stepper.restore_scaling(self.position.scaling)
            _restore_rng(state, peers)
            self._tell("resumed", skipped=found.skipped, workers=self.peers.world)
        elif damaged := self.checkpoints.damaged:
            what = "no checkpoint is whole: training starts anew, at step 0"
            self._tell("note", text="\n".join([*damaged.values(), what]))
        if self.position.best_epoch and peers.gather(self._kept_epoch())[0] != self.position.best_epoch:
            # Checkpoints on a store outlive the machine that the run's directory was on; and after a kill between the
            # keeping of a better model and the checkpoint that says so, a later epoch's model stands there.
            epoch, self.position.best, self.position.best_epoch = self.position.best_epoch, None, 0
            self._tell("note", text=f"{self._best}, the model of epoch {epoch}, is gone: the best from here on counts")
        # Of each step that was not looked at yet: its number, its weight, this worker's loss, the gradient's norm.
        self._unseen: list[tuple[int, float, torch.Tensor, torch.Tensor | None]] = []
        self._look_every = 1
        self._told = self._looked = time.monotonic()
        self._overflows = 0  # in a row
        self._recent = (time.monotonic(), self.position.tokens, 0.0)

    def _kept_epoch(self) -> int:
        """The epoch whose model is kept as the best; 0 where there is none."""
        try:
            return int(json.loads((self._best / CARD_FILE).read_text("utf-8"))["provenance"]["best_epoch"])
        except FileNotFoundError:
            return 0

    @property
    def done(self) -> int:
        """Optimiser steps done."""
        return self.position.epoch * self.train.round_steps + self.position.index

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.train.steps

    def run(self) -> Position:
        """Train to the end, or until the metric no longer rises, the loss is not finite, or a stop is asked for."""
        begun = self.done
        try:
            return self._run()
        except _StopAsked:  # Behind a round's last step; the session that goes on begins with its evaluation.
            self.position.stopped = True
            self._save()
            return self.position
        except torch.OutOfMemoryError as error:
            # One that comes when the run has gone well may pass, on Ray's workers who are tried again.
            if self.job.engine == "ray" and self.done > begun:
                raise
            raise JobError(self._without_memory(error)) from error

    def _without_memory(self, error: torch.OutOfMemoryError) -> str:
        """What to do where what a GPU has to hold at a time does not fit."""
        job, first = self.job, str(error).partition(" Tried")[2].partition(". ")[0]
        ways = [] if job.activation_checkpointing else ["activation_checkpointing=true"]
        if job.engine == "ray" and job.zero_stage < 3:
            ways.append(f"zero_stage={job.zero_stage + 1}")
        instead = " for gradient_accumulation" if job.gradient_accumulation > 1 else ""
        return (
            f"the GPU has no memory for what follows step {self.done}{f' (it tried{first})' if first else ''}: give "
            f"{' or '.join([*ways, 'a smaller model'])}, or delete {self.directory} and begin anew in smaller "
            f"micro-batches, with micro_batches={2 * self.micro_batches}{instead}; bert-ray plan says what a job needs"
        )

    def _spend(self, since: float) -> None:
        """Count the time since then as training's."""
        spent = time.perf_counter() - since
        self.position.seconds += spent
        self.position.epoch_seconds += spent

    def _run(self) -> Position:
        position, job = self.position, self.job
        # A round whose steps are all done may still have to be evaluated: it was stopped just then.
        while position.index or (self.done < self.steps and not self._satisfied()):
            last = min(self.train.round_steps, self.steps - position.epoch * self.train.round_steps)
            self.module.train()
            while position.index < last:
                start = time.perf_counter()
                self._step()
                self.beat()
                position.index += 1
                self._spend(start)
                if len(self._unseen) >= self._look_every:
                    self._look()
                for callback in self.callbacks:
                    callback(
                        StepEvent(
                            step=self.done, epoch=position.epoch + 1, rank=self.peers.rank, directory=self.directory
                        )
                    )
                every = job.checkpoint.every_steps
                if position.stopped or (every and self.done % every == 0 and position.index < last):
                    self._look()
                    if position.diverged is None:
                        self._save()
                if position.diverged is not None or position.stopped:
                    return position
            self._look()
            if position.diverged is not None:
                return position
            if position.stopped:
                raise _StopAsked
            self._end_epoch()
            self._save()
        if position.epoch and not position.best_epoch:  # It is gone, and no epoch came after it.
            with self._with_base():
                metrics = self.evaluate(self.validation)[1] if len(self.validation) else {}
                position.best_epoch = position.epoch
                self._keep_best(metrics)
        return position

    def _step(self) -> None:
        """One optimiser step."""
        job, position, peers, step = self.job, self.position, self.peers, self.done
        samples = self.train.select(step)
        tokens = self.train.lengths_of(samples)
        parts = shares(samples, tokens, self.micro_batches)
        weight = max(1e-9, self.train.weigh(samples))
        total: torch.Tensor | float = 0.0
        read, seen = 0, 0
        for turn in range(self.micro_batches_each):
            number = turn * peers.world + peers.rank
            mine = parts[number] if number < self.micro_batches else samples[:0]
            # DeepSpeed averages gradients over the workers; times their number, over all weights, is the mean.
            scale = peers.world / weight
            if len(mine) == 0:  # Nothing to compute, but the other workers wait in the same collectives.
                mine, scale = samples[:1], 0.0
            torch.manual_seed(noise_seed(job.seed, step, number))
            batch, targets = self._batch(self.train, mine, step)
            seen += len(batch.input_ids)
            read += len(batch.input_ids if batch.read is None else batch.read)
            loss, losses, _ = self.stepper.forward(batch, targets, scale, 1.0 / self.micro_batches_each)
            self.stepper.backward(loss)
            total = total + (losses if scale else losses * 0.0)
        rate = learning_rate(step, self.steps, job.learning_rate, job.warmup, job.schedule, job.cooldown)
        norm = self.stepper.step(rate)
        assert isinstance(total, torch.Tensor)
        self._unseen.append((step, weight, total, norm))
        asked = weight if self.module.task.reads_corpus else 0.0
        squares, count = float(self.train.squares_of(samples).sum()), int(tokens.sum())
        # The other workers' batches are not seen here; as large a share of their tokens is read.
        self._flops += training_flops(self._dims, count, squares, asked, job.freeze_layers, count * read / seen)
        position.tokens += count
        position.epoch_tokens += count

    def _batch(self, source: Source, samples: np.ndarray, step: int | None) -> tuple[PackedBatch, torch.Tensor]:
        batch, targets = source.batch(samples, step)
        return self.module.task.narrowed(batch, targets).to(self.device), on_device(targets, self.device)

    def _look(self) -> None:
        """Add up the losses of the last steps over all workers; see whether they are finite, and who asks to stop."""
        if not self._unseen:
            return
        start = time.perf_counter()  # A GPU may have steps to do still, for which this waits.
        position, peers = self.position, self.peers
        asked = float(stop_asked(self.directory))
        now = time.monotonic()
        mine = [*(total.double() for _, _, total, _ in self._unseen)]
        more = torch.tensor([asked, now - self._looked], dtype=torch.float64, device=mine[0].device)
        *sums, stops, seconds = peers.sum(torch.cat((torch.stack(mine), more))).tolist()
        # The same number on every worker, since the sum is.
        each = seconds / peers.world / len(sums)
        self._look_every = max(1, min(_LOOK_EVERY, int(_LOOK_EVERY_SEC / max(1e-9, each))))
        self._looked = now
        losses, norms = [], []
        for (step, weight, _, norm), value in zip(self._unseen, sums, strict=True):
            size = None if norm is None else float(norm)
            if size is not None and self.stepper.scaling() and not np.isfinite(size):
                size = None  # fp16 overflowed: the optimiser took no step, and the scale is smaller now.
                self._overflows += 1
            else:
                self._overflows = 0
            finite = np.isfinite(value) and (size is None or np.isfinite(size))
            if not finite or self._overflows >= _MOST_OVERFLOWS:
                position.diverged, position.overflowed = step + 1, bool(finite)
                self._tell("note", text=f"step {step + 1}: {self.train.where(self.train.select(step))}")
                break
            position.loss += value
            position.weight += weight
            losses.append(value / weight)
            norms.append(size)
            if note := self.spikes(step + 1, value / weight, size):
                self._tell("note", text=f"{note}; {self.train.where(self.train.select(step))}")
        if losses:
            position.draw(self.done, losses, norms)
        position.stopped = stops > 0
        self._unseen.clear()
        if now - self._told >= 2.0:
            self._tell("progress")
        self._spend(start)

    def _end_epoch(self) -> None:
        """Evaluate, note the epoch, keep the model where it is the best so far."""
        position, job = self.position, self.job
        rate = learning_rate(self.done - 1, self.steps, job.learning_rate, job.warmup, job.schedule, job.cooldown)
        entry = {
            "epoch": position.epoch + 1,
            "step": self.done,
            "train_loss": position.loss / max(1e-9, position.weight),
            "learning_rate": rate,
            "tokens_per_second": position.epoch_tokens / max(1e-9, position.epoch_seconds),
        }
        metrics: dict[str, float] = {}
        with self._with_base():
            if len(self.validation):
                loss, metrics = self.evaluate(self.validation)
                entry |= {"validation_loss": loss, **metrics}
            value = metrics.get(self.module.task.metric)
            if value is not None and not np.isfinite(value):  # Of outputs that overflowed: any other is better.
                value = -np.inf
            position.history.append(entry)
            position.epoch += 1
            position.index = position.epoch_tokens = 0
            position.loss = position.weight = position.epoch_seconds = 0.0
            # Without validation rows the last epoch is the one to keep.
            if value is None or position.best is None or value > position.best:
                position.best, position.best_epoch = value, position.epoch
                self._keep_best(metrics)
        self._tell("epoch", **entry)

    @contextmanager
    def _with_base(self) -> Iterator[None]:
        """While open, the encoder's weights are the mean of the base's and the trained ones, as `keep_base` says."""
        if not self._base_weights:
            yield
            return
        weights = encoder_weights(self.module.model)
        trained = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, base in zip(weights, self._base_weights, strict=True):
                weight.lerp_(base, self.job.keep_base)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, trained, strict=True):
                    weight.copy_(value)

    def evaluate(self, source: Source) -> tuple[float, dict[str, float]]:
        """Mean loss and the task's metrics over all samples of `source`, the same on every worker.

        Raises:
            _StopAsked: somebody asks the run to stop; on every worker.
        """
        self.module.eval()
        everything = np.arange(len(source))
        batches = plan(source.lengths_of(everything), _EVALUATION_TOKENS)
        found: list[tuple[np.ndarray, np.ndarray, float]] = []
        world, rank = self.peers.world, self.peers.rank
        with torch.no_grad():
            for index in range(rank, -(-len(batches) // world) * world, world):
                # Every worker makes as many passes: under ZeRO 3 each gathers weights from all.
                batch, targets = self._batch(source, batches[index] if index < len(batches) else batches[0][:1], None)
                _, total, outputs = self.stepper.forward(batch, targets)
                self.beat()
                asked = torch.tensor([float(stop_asked(self.directory))], device=self.device)
                if float(self.peers.sum(asked)) > 0:
                    raise _StopAsked
                if index < len(batches):
                    found.append((batch.rows, outputs.cpu().numpy(), float(total)))
        everyone = [item for items in self.peers.gather(found) for item in items]
        self.beat()
        outputs = self._in_order(source, everyone)
        loss = sum(item[2] for item in everyone) / max(1e-9, source.weigh(everything))
        task, examples = self.module.task, source.examples
        if chosen := task.tune(outputs, examples):
            # Decided by all validation rows, so the same on every worker.
            self.card.options |= chosen
            task.options = replace(task.options, **chosen)
        metrics = task.validate(outputs, examples)
        self.beat()
        return loss, metrics

    def _in_order(self, source: Source, found: list[tuple[np.ndarray, np.ndarray, float]]) -> Outputs:
        """Outputs of all batches, in the order of the pieces."""
        order, values = np.concatenate([item[0] for item in found]), np.concatenate([item[1] for item in found])
        offsets = None
        if self.module.task.level == "token" and source.examples is not None:
            offsets = source.examples.pieces.tokens.offsets
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
                try:
                    save_bundle(self._best, self.module.model, tokenizer, self.card, task=task)
                    sync_tree(self._best)  # The checkpoint that comes next says that it is there.
                    sync(self.directory)
                except (JobError, OSError) as error:
                    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
                    raise self.checkpoints.failed(f"the best model to {self._best}", cause) from error
        self.peers.wait()
        self.beat()

    def _save(self) -> None:
        """Write a checkpoint. All workers take part; rank 0 writes."""
        state = self.stepper.state()
        noise = self.peers.gather(_rng(self.device))
        self.beat()  # Each of these may take long, an upload most of all: what is watched is one at a time.
        self.position.scaling = self.stepper.scaling()
        if self.peers.rank == 0:
            state |= {
                f"rng/{rank}/{name}": value for rank, states in enumerate(noise) for name, value in states.items()
            }
            self.checkpoints.save(self.done, state, asdict(self.position))
        self.peers.wait()
        self.beat()

    def _satisfied(self) -> bool:
        patience, position = self.job.early_stopping, self.position
        return bool(patience and position.best_epoch) and position.epoch - position.best_epoch >= patience

    def _tell(self, what: str, **more: Any) -> None:
        if self.peers.rank:
            return
        position = self.position
        now = time.monotonic()
        if what == "progress" and not self._peak:
            self._peak = self.peers.world * matmul_rate(self.device, self.module.autocast or torch.float32)
            measuring = time.monotonic() - now  # Comes in the midst of a step, whose time is added later.
            position.seconds -= measuring
            position.epoch_seconds -= measuring
        if what == "progress":
            since, tokens, flops = self._recent
            seconds = max(1e-9, now - since)
            left = max(0, self.train.tokens - position.tokens)
            more |= {
                "loss": position.loss / max(1e-9, position.weight),
                "tokens_per_second": (position.tokens - tokens) / seconds,
                "seconds_left": left * seconds / max(1, position.tokens - tokens),
            }
            if not self.module.task.generates:  # A decoder's products are not counted.
                more["utilisation"] = utilisation(self._flops - flops, seconds, self._peak)
        now = time.monotonic()
        self._told, self._recent = now, (now, position.tokens, self._flops)
        rounds = -(-self.steps // self.train.round_steps)
        epoch = position.epoch + (what == "progress")
        self.tell({"what": what, "step": self.done, "steps": self.steps, "epochs": rounds, "epoch": epoch} | more)


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
