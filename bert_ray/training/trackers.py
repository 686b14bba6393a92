"""A run's figures for TensorBoard and MLflow, written by the process that the user started."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_ray.errors import JobError
from bert_ray.training.job import digest

if TYPE_CHECKING:
    from bert_ray.training.job import TrainJob

Tell = Callable[[dict[str, Any]], None]

# MLflow's tag that says which training a run is of.
_TAG = "bert_ray.training"

# A tracker that failed is left alone for so long: each attempt may wait for its server.
_PAUSE_SEC = 300.0

# What an event has besides figures.
_NO_FIGURES = ("what", "text", "skipped", "step", "steps", "epoch", "epochs", "seconds_left")


@contextlib.contextmanager
def tracked(job: TrainJob, tell: Tell) -> Iterator[Tell]:
    """A `tell` that passes events on and writes their figures where `job.trackers` says.

    TensorBoard's files lie in `<output>.tensorboard`; MLflow goes where its own settings (MLFLOW_TRACKING_URI) say, in
    one run named after the output, in which a training that was cut off goes on. A tracker that fails under way is told
    of and tried again five minutes later: the training is worth more than its figures.

    Raises:
        JobError: a tracker is not installed, its server does not answer, or MLflow has another run under way here.
    """
    if not job.trackers:
        yield tell
        return
    with contextlib.ExitStack() as stack:
        writers = {name: _OPENERS[name](job, stack) for name in job.trackers}
        paused: dict[str, float] = {}

        def both(event: dict[str, Any]) -> None:
            tell(event)
            figures = {
                f"{'train' if event['what'] == 'progress' else 'round'}/{name}": float(value)
                for name, value in event.items()
                if name not in _NO_FIGURES and isinstance(value, int | float)
            }
            for name, write in writers.items():
                if not figures or time.monotonic() < paused.get(name, 0.0):
                    continue
                try:
                    write(figures, int(event["step"]))
                except Exception as error:  # Whatever a server, a disk or a library may say.
                    if name not in paused:
                        tell({"what": "note", "text": f"trackers: {name} misses figures: {error}"})
                    paused[name] = time.monotonic() + _PAUSE_SEC

        yield both


Write = Callable[[dict[str, float], int], None]


def _tensorboard(job: TrainJob, stack: contextlib.ExitStack) -> Write:
    # Not its SummaryWriter: that writes in a thread, and waits for ever where a full disk has ended the thread.
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
    except ImportError as error:
        raise JobError("trackers: tensorboard needs tensorboardX: pip install 'bert-ray[train]'") from error
    place, numbers = Path(f"{job.output}.tensorboard"), itertools.count()
    files: list[Any] = []
    stack.callback(lambda: [file.close() for file in files])

    def write(figures: dict[str, float], step: int) -> None:
        try:
            if not files:
                place.mkdir(parents=True, exist_ok=True)
                files.append(EventsWriter(str(place / "events"), f".{os.getpid()}.{next(numbers)}"))
            values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
            files[0].write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            files[0].flush()
        except OSError:
            files.clear()  # What comes after a half-written event is not read: the next one begins another file.
            raise

    return write


def _mlflow(job: TrainJob, stack: contextlib.ExitStack) -> Write:
    try:
        import mlflow
    except ImportError as error:
        raise JobError("trackers: mlflow is not installed: pip install 'bert-ray[mlflow]'") from error
    if active := mlflow.active_run():
        raise JobError(f"trackers: mlflow has run {active.info.run_id} under way in this process: end it first")
    # Names the training for the session that goes on with it.
    settings = job.identity()
    name = digest(settings | {"output": job.output})
    try:
        cut_off = mlflow.search_runs(
            filter_string=f"tags.`{_TAG}` = '{name}' and attributes.status != 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
            output_format="list",
        )
        if cut_off:
            run = mlflow.start_run(run_id=cut_off[0].info.run_id)
        else:
            run = mlflow.start_run(run_name=job.output, tags={_TAG: name})
        stack.push(_ended(run, mlflow))
        # MLflow takes values of up to 6,000 characters.
        mlflow.log_params({key: str(value)[:6000] for key, value in settings.items()})
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise JobError(
            f"trackers: mlflow at {mlflow.get_tracking_uri()} cannot be used: {error}; set MLFLOW_TRACKING_URI, or "
            "leave it out"
        ) from error

    def write(figures: dict[str, float], step: int) -> None:
        mlflow.log_metrics(figures, step=step)

    return write


def _ended(run: Any, mlflow: Any) -> Callable[..., None]:
    """What ends MLflow's run as finished or failed; where its server is gone, the training has ended all the same."""

    def leave(*error: Any) -> None:
        with contextlib.suppress(mlflow.exceptions.MlflowException, OSError):
            run.__exit__(*error)

    return leave


_OPENERS: dict[str, Callable[[TrainJob, contextlib.ExitStack], Write]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
}
