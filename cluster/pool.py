"""`map` over the CPUs of the node that calls: work on one scan is a Ray task beside the site's actor."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsam_core.errors import ClusterError, FedsamError

_AHEAD = 2  # tasks in flight for each CPU of the node: enough that none waits, few enough that no memory fills up

_TASK_CPUS = 0.99  # of a node's only CPU its site's actor holds a sliver: a task that wants it all would wait for ever


def each_on_node(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """The results of `work` in the order of the items. Both must be picklable.

    Tasks stay on the calling node: what a site reads does not leave its machine.

    Raises:
        FedsamError: as `work` raised it.
        ClusterError: a task's process died.
    """
    here = ray.get_runtime_context().get_node_id()
    pinned = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
    apply: Any = ray.remote(_apply)
    shared = ray.put(work)
    ahead = _AHEAD * _cpus(here)
    waiting: deque[ray.ObjectRef[Any]] = deque()
    try:
        for item in items:
            if len(waiting) >= ahead:
                yield _result(waiting.popleft())
            waiting.append(apply.options(num_cpus=_TASK_CPUS, scheduling_strategy=pinned).remote(shared, item))
        while waiting:
            yield _result(waiting.popleft())
    finally:
        for left in waiting:  # the caller stopped, or a case failed
            ray.cancel(left, force=True)


def _apply(work: Callable[[Any], Any], item: Any) -> Any:
    return work(item)


def _result(ref: "ray.ObjectRef[Any]") -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FedsamError):
            raise error.cause from None
        raise
    except ray.exceptions.TaskUnschedulableError as error:
        raise ClusterError(
            "preparation needs a CPU that Ray may book on the site's node: start it with --num-cpus"
        ) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a task of preparation died ({type(error).__name__}), probably for want of memory: give its node more, or "
            "fewer CPUs to Ray"
        ) from error


def _cpus(node_id: str) -> int:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return max(1, int(next(node["Resources"].get("CPU", 1) for node in nodes if node["NodeID"] == node_id)))
