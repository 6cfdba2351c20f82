"""Flower's SecAgg+ on the payload of `flower_secagg.py`; runs in Flower's own environment, which has no fedsam.

    .venv/flower-env/bin/python benchmarks/flower_side.py '[{"sites": 6, "values": 100000, "threshold": 5}]'

The argument is a JSON list of runs, the output a JSON list of what each gave. Keys of a run: `sites`, `values`,
`threshold`; `lost` (0): how many sites fall silent; `lost_at` ("collect_masked_vectors"): the stage from which on they
do not answer; `parameters` ({}): keyword arguments of `SecAggPlusWorkflow` (clipping_range, quantization_range,
modulus_range), Flower's defaults where absent.

Both ends are Flower's own: `flwr.client.mod.secaggplus_mod` at each site, `flwr.server.workflow.SecAggPlusWorkflow` at
the server. Only the road between them is ours: `Wire` hands each message over in this process, as the bytes that
`flwr.common.serde` makes of it. `num_shares` is 1.0, which is all sites: every site shares with and masks against every
other, as in our protocol. Weights are equal and `max_weight`, so that Flower's weighted mean times the survivors is
their sum and no accuracy goes to a weight below one.

What is timed. A site: parse the message, the mod (keys, shares, quantise, mask, unmask), serialise the reply. The
server: the whole workflow less the sites' time, so with serialising, parsing and `ndarrays_to_parameters` of the sum.
Not timed, all to Flower's favour: the random vectors and their `Parameters`, the model sent down (it is empty), FedAvg
(the strategy takes the workflow's result as it is), the SHA-256 object ids and the state that a deployed Flower writes
out between the messages, and any network. `client_s` is the median over the sites that answered to the end.
"""

import json
import logging
import os
import sys
from collections import defaultdict
from statistics import median
from time import perf_counter
from types import SimpleNamespace

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read at import

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, bytes_to_ndarray
from flwr.common import ndarrays_to_parameters as to_parameters
from flwr.common.constant import ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.compat.common.recorddict_compat import fitres_to_recorddict, parameters_to_arrayrecord
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.supercore.task_identity import TaskIdentity

WEIGHT = 1000
NOTHING = Parameters(tensors=[], tensor_type="numpy.ndarray")


def main() -> None:
    # A message made by the server takes its sender from here; Flower's server process sets it at its start.
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    json.dump([measure(**run) for run in json.loads(sys.argv[1])], sys.stdout)


def measure(
    sites: int,
    values: int,
    threshold: int,
    lost: int = 0,
    lost_at: str = Stage.COLLECT_MASKED_VECTORS,
    parameters: dict[str, float] | None = None,
) -> dict[str, object]:
    """One secure sum; a run that Flower does not finish is a result too, with `survived` false and its `errors`."""
    rng = np.random.default_rng(0)
    updates = [rng.normal(0, 0.01, values).astype(np.float32) for _ in range(sites)]
    # Flower's ids are random 64-bit numbers; small ones would make its messages smaller than they are.
    nodes = [int(node) for node in rng.integers(2**61, 2**62, sites)]
    wire = Wire(dict(zip(nodes, updates, strict=True)), set(nodes[:lost]), lost_at)
    workflow = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=threshold, **(parameters or {}))
    strategy = TakeResult(nodes)
    errors = logged_errors()
    start = perf_counter()
    try:
        workflow(wire, context_of(strategy))
    except Exception as error:
        errors.append(f"the server raised {error!r}")
    server_s = perf_counter() - start - sum(wire.client_s.values())
    present = nodes[lost:]
    summed = updates if lost_at == Stage.UNMASK else updates[lost:]  # who is lost later has sent its vector
    result = {
        "client_s": median(wire.client_s[node] for node in present),
        "server_s": server_s,
        "bytes_up": median(wire.sent[node] for node in present),
        "bytes_per_value": median(wire.sent[node] for node in present) / values,
        "clipping_range": workflow.clipping_range,
        "quantization_range": workflow.quantization_range,
        "modulus_range": workflow.modulus_range,
        "threshold": threshold,
        "bound": error_bound(workflow, len(summed)),
        "survived": False,
        "errors": list(dict.fromkeys(wire.errors + errors)),
    }
    if strategy.mean is not None:
        exact = np.sum([update.astype(np.float64) for update in summed], axis=0)
        result["max_error"] = float(np.abs(strategy.mean * len(summed) - exact).max())
        result["survived"] = result["max_error"] <= result["bound"]
    return result | wire.seen()


def error_bound(workflow: SecAggPlusWorkflow, contributors: int) -> float:
    """Largest error of the sum: a step of each contributor, and as much as float32 loses of the value that Flower
    quantises, which lies in [0, 2 * clipping_range] and is scaled in the vector's own type."""
    width = 2 * workflow.clipping_range
    return contributors * width * (1 / workflow.quantization_range + 2.0**-23)


class Wire:
    """Stands where Flower's grid stands. Sites answer one after the other; `silent` ones not from `lost_at` on."""

    def __init__(self, updates: dict[int, np.ndarray], silent: set[int], lost_at: str) -> None:
        self.parameters = {node: to_parameters([update]) for node, update in updates.items()}
        self.contexts = {node: new_context(node) for node in updates}
        self.silent, self.lost_at, self.lost = silent, lost_at, False
        self.client_s: dict[int, float] = defaultdict(float)
        self.sent: dict[int, int] = defaultdict(int)
        self.errors: list[str] = []
        self.masked: RecordDict | None = None

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies of the sites that answer; as when the timeout has passed, nothing comes from the others."""
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            stage = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]
            self.lost = self.lost or stage == self.lost_at
            down = message_to_proto(message).SerializeToString()
            if self.lost and node in self.silent:
                continue
            start = perf_counter()
            up = self.answer(node, down)
            self.client_s[node] += perf_counter() - start
            self.sent[node] += len(up)
            reply = message_from_proto(ProtoMessage.FromString(up))
            if stage == Stage.COLLECT_MASKED_VECTORS and reply.has_content():
                self.masked = reply.content
            replies.append(reply)
        return replies

    def answer(self, node: int, down: bytes) -> bytes:
        """What the site sends back; an exception in its mod becomes an error reply, as in Flower's client app."""
        message = message_from_proto(ProtoMessage.FromString(down))
        try:
            reply = secaggplus_mod(message, self.contexts[node], self.fit)
        except Exception as error:
            self.errors.append(f"a site raised {type(error).__name__}: {str(error)[:100]}")
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)
        return message_to_proto(reply).SerializeToString()

    def fit(self, message: Message, context: Context) -> Message:
        """The training that the mod wraps: here the vector lies ready."""
        result = FitRes(Status(Code.OK, ""), self.parameters[context.node_id], WEIGHT, {})
        return Message(fitres_to_recorddict(result, keep_input=True), reply_to=message)

    def seen(self) -> dict[str, object]:
        """What the server could read in one site's masked reply: the type of a masked value, and the weight if it is
        there in clear."""
        if self.masked is None:
            return {}
        vector = bytes_to_ndarray(self.masked.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS][-1])
        weight = self.masked.metric_records.get("fitres.num_examples", {}).get("num_examples")
        return {"masked_type": str(vector.dtype), "weight_in_clear": weight}


class TakeResult(FedAvg):
    """Asks all nodes, and keeps the mean the workflow found; FedAvg would only average equal copies of it."""

    def __init__(self, nodes: list[int]) -> None:
        super().__init__()
        self.nodes = nodes
        self.mean: np.ndarray | None = None

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: object) -> list:
        return [(SimpleNamespace(node_id=node), FitIns(NOTHING, {})) for node in self.nodes]

    def aggregate_fit(self, server_round: int, results: list, failures: list) -> tuple[Parameters, dict]:
        parameters = results[0][1].parameters
        self.mean = bytes_to_ndarray(parameters.tensors[0])
        return parameters, {}


def new_context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


def context_of(strategy: TakeResult) -> LegacyContext:
    """What Flower's DefaultWorkflow prepares before it calls the SecAgg+ one."""
    context = LegacyContext(new_context(0), strategy=strategy)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(NOTHING, keep_input=True)
    return context


def logged_errors() -> list[str]:
    """A list that gets what Flower logs as an error from now on; its own handlers are off, stdout is the result's."""
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(f"the server logged: {record.getMessage()}")
    logger = logging.getLogger("flwr")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.ERROR)
    return errors


if __name__ == "__main__":
    main()
