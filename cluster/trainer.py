"""Ray Train around a plain function: workers that train together, a checkpoint a round, a restart where it stopped.

The function is the same that runs without Ray (`alone`); only a `Place` tells it where it is. Checkpoints are those of
`SiteMemory` (safetensors with their SHA-256); Ray Train carries them to the storage path and back, whole or not at all.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from cluster.placement import Node, SiteNeeds
from fedsam_core.errors import ClusterError, FedsamError
from fedsam_core.federation.engine import describe_failure
from fedsam_core.federation.memory import KEPT, SiteMemory
from fedsam_core.learning.device import pick_device

Arrays = Mapping[str, np.ndarray[Any, Any]]
Emit = Callable[[Any], None]
"""Takes a progress event: any small picklable value."""

RESTARTS = 2  # of all workers from the last checkpoint: a lost machine is worth it, an error that comes again is not
_POLL_SECONDS = 0.2


class Checkpoints(Protocol):
    """What survives of a round."""

    def latest(self) -> tuple[int, dict[str, np.ndarray[Any, Any]]] | None:
        """The last complete round and its arrays; None before the first."""
        ...

    def save(self, number: int, arrays: Arrays) -> None:
        """After each round, in every worker; the first one's arrays are kept."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a function runs.

    Attributes:
        first: this is the worker that scores, writes and tells; there is one.
        device: that it computes on.
        emit: where progress goes.
        checkpoints: of the layout whose hash is given; another layout's are an error.
    """

    first: bool
    device: torch.device
    emit: Emit
    checkpoints: Callable[[str], Checkpoints]


Work = Callable[[Place], Any]
"""Picklable; what it returns in the first worker is the result."""


def alone(work: Work, emit: Emit, folder: Path) -> Any:
    """Runs `work` in this process; checkpoints lie in `folder`."""
    return work(Place(True, pick_device(), emit, partial(SiteMemory, folder / "rounds")))


def together(work: Work, emit: Emit, folder: Path, workers: int, nodes: Sequence[Node], needs: SiteNeeds) -> Any:
    """Runs `work` in `workers` processes of the cluster, with `torch.distributed` between them.

    Workers that are lost are started again from the last checkpoint. Called again with the same `folder`, also after
    this process was killed, it goes on from there.

    Args:
        emit: called in this process, in the order of the events.
        folder: of this run alone, seen by all nodes.
        nodes: of the cluster.
        needs: what each worker books.

    Raises:
        ClusterError: the workers do not fit into the cluster, or were lost too often.
        FedsamError: as `work` raised it.
    """
    told: Any = Queue(actor_options={"num_cpus": 0})
    heard = _Heard(emit)
    trainer = TorchTrainer(
        partial(_work_on, work, told),
        scaling_config=scaling(workers, nodes, needs),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=RESTARTS),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
        ),
    )
    stop = threading.Event()
    listener = threading.Thread(target=_listen, args=(told, heard, stop), daemon=True)
    listener.start()
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        stop.set()
        listener.join()
        if heard.error is not None:
            raise heard.error from None
        raise ClusterError(
            f"the workers did not start, or were lost more than {RESTARTS} times ({describe_failure(error)[:300]}): "
            "see the Ray dashboard, and start the same command again to go on from the last round"
        ) from error
    finally:
        stop.set()
        listener.join()
        told.shutdown()
    return heard.result


def scaling(workers: int, nodes: Sequence[Node], needs: SiteNeeds) -> ScalingConfig:
    """What Ray Train is to book: for each worker what a site books.

    Raises:
        ClusterError: the cluster has not as much; Ray would wait for ever.
    """
    gpus = needs.gpus if needs.gpus is not None else float(any(node.gpus for node in nodes))
    books = {"CPU": needs.cpus, "GPU": gpus}
    room = sum(
        min(
            (int(has / wants + 1e-9) for has, wants in ((node.cpus, needs.cpus), (node.gpus, gpus)) if wants),
            default=workers,
        )
        for node in nodes
    )
    if room < workers:
        raise ClusterError(
            f"engine.workers={workers} with {needs.cpus:g} CPU and {gpus:g} GPU each do not fit into the cluster, "
            f"which has room for {room}: lower engine.workers, engine.site.cpus or engine.site.gpus, or add a node"
        )
    booked = {name: amount for name, amount in books.items() if amount}
    return ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=booked or None)


@dataclass(frozen=True)
class _Result:
    value: Any


@dataclass(frozen=True)
class _Error:
    error: FedsamError


class _Heard:
    """What the workers told: events at once, the result and the last error for later."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.result: Any = None
        self.error: FedsamError | None = None

    def take(self, item: Any) -> None:
        if isinstance(item, _Result):
            self.result = item.value
        elif isinstance(item, _Error):
            self.error = item.error
        else:
            self._emit(item)


def _listen(told: Any, heard: _Heard, stop: threading.Event) -> None:
    while True:
        last = stop.is_set()  # asked before the queue is: what was told before the end is still heard
        try:
            while True:
                heard.take(told.get(timeout=_POLL_SECONDS))
        except Empty:
            if last:
                return
        except ray.exceptions.RayError:
            return  # the session is gone


def _work_on(work: Work, told: Any) -> None:
    """In each worker."""
    first = ray.train.get_context().get_world_rank() == 0
    emit = told.put if first else (lambda _: None)
    try:
        result = work(Place(first, ray.train.torch.get_device(), emit, _RayCheckpoints))
    except FedsamError as error:
        told.put(_Error(error))
        raise
    if first:
        told.put(_Result(result))


class _RayCheckpoints:
    """Rounds that Ray Train keeps; all workers report, the first one brings the file."""

    def __init__(self, layout_hash: str) -> None:
        self._layout_hash = layout_hash

    def latest(self) -> tuple[int, dict[str, np.ndarray[Any, Any]]] | None:
        kept = ray.train.get_checkpoint()
        if kept is None:
            return None
        with kept.as_directory() as folder:
            return SiteMemory(Path(folder), self._layout_hash).latest()

    def save(self, number: int, arrays: Arrays) -> None:
        if ray.train.get_context().get_world_rank() > 0:
            ray.train.report({"round": number})
            return
        with TemporaryDirectory() as folder:
            SiteMemory(Path(folder), self._layout_hash).save(number, arrays)
            ray.train.report({"round": number}, checkpoint=Checkpoint.from_directory(folder))
