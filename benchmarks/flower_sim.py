"""Rounds of fedsam's own learner under Flower's Ray simulation: the Flower half of `peers.py`, in Flower's environment.

The argument is a JSON object: `specs` (a `SiteSpec` a site, as JSON), `rounds`, `masked` (SecAgg+ or plain FedAvg),
`folder` (for what comes of it). A client is a `FederatedSite` without its protocol: it opens the same share, builds the
same model and calls the same `Learner.fit`, so that training is the same to the bit. It stays in its actor's memory, as
a site of fedsam does; Flower's simulation may give any client to any actor, so that an actor may come to hold several.
Writes FOLDER/result.json: seconds of each round (from one aggregation to the next), bytes of the messages of the first
round, serialized as Flower's wire has them; and the last global state, FOLDER/state.npz.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read at import

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.serde import message_to_proto
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.simulation import run_simulation

ASKED: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else json.loads(os.environ["FEDSAM_PEERS"])
FOLDER = Path(ASKED["folder"])
_open: dict[str, Any] = {}


def site_of(number: int) -> Any:
    """The open site of that number, in this process."""
    from fedsam_core.federation.site import FederatedSite, SiteSpec

    spec = SiteSpec.model_validate(ASKED["specs"][number])
    if spec.site not in _open:
        site = FederatedSite(spec)
        site.open()
        _open[spec.site] = site
    return _open[spec.site]


class Client(NumPyClient):
    """Trains as a site does."""

    def __init__(self, number: int) -> None:
        self.number = number

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[list[np.ndarray], int, dict]:
        """The new values, and the slices that they are weighed by."""
        site = site_of(self.number)
        opened, spec = site._site, site.spec
        names = [entry.name for entry in opened.manifest.shared]
        state = dict(zip(names, parameters, strict=True))
        fit = opened.learner.fit(state, config["round"], spec.federation.rounds, spec.seed)
        new = opened.manifest.unflatten(opened.manifest.flatten(state) + fit.update)
        return [new[name] for name in names], fit.slices, {}


def client_fn(context: Any) -> Any:
    return Client(int(context.node_config["partition-id"])).to_client()


def counted(message: Any, context: Any, call_next: Any) -> Any:
    """Notes the bytes of a message and its reply, in the first round only: it is not the one that is timed."""
    noted = FOLDER / "bytes"
    counts = not (FOLDER / "first").exists()
    down = len(message_to_proto(message).SerializeToString()) if counts else 0
    reply = call_next(message, context)
    if counts:
        up = len(message_to_proto(reply).SerializeToString())
        (noted / f"{time.time_ns()}-{os.getpid()}").write_text(f"{down} {up}")
    return reply


class Timed(FedAvg):
    """FedAvg that notes when each round is over, and keeps the last state."""

    def __init__(self, start: list[np.ndarray], sites: int) -> None:
        super().__init__(
            fraction_fit=1.0,
            fraction_evaluate=0.0,
            min_fit_clients=sites,
            min_available_clients=sites,
            initial_parameters=ndarrays_to_parameters(start),
            on_fit_config_fn=lambda number: {"round": number},
        )
        self.ends: list[float] = []

    def aggregate_fit(self, server_round: int, results: list, failures: list) -> Any:
        if failures:
            raise SystemExit(f"{len(failures)} clients failed: {failures[0]}")
        found = super().aggregate_fit(server_round, results, failures)
        self.ends.append(time.perf_counter())
        (FOLDER / "first").touch()
        self.last = parameters_to_ndarrays(found[0])
        return found


def main() -> None:
    os.environ["FEDSAM_PEERS"] = json.dumps(ASKED)  # actors import this module anew
    (FOLDER / "bytes").mkdir(parents=True)
    sites, rounds = len(ASKED["specs"]), ASKED["rounds"]
    first = site_of(0)
    names = [entry.name for entry in first._site.manifest.shared]
    state = first._held.tensors
    strategy = Timed([state[name] for name in names], sites)
    _open.clear()
    server = ServerApp()

    @server.main()
    def run(grid: Any, context: Any) -> None:
        legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=rounds), strategy=strategy)
        if ASKED["masked"]:
            workflow = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=2 * sites // 3 + 1)
            DefaultWorkflow(fit_workflow=workflow)(grid, legacy)
        else:
            DefaultWorkflow()(grid, legacy)

    mods = [counted, secaggplus_mod] if ASKED["masked"] else [counted]
    run_simulation(
        server_app=server,
        client_app=ClientApp(client_fn=client_fn, mods=mods),
        num_supernodes=sites,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": sites, "include_dashboard": False},
        },
    )
    moved = [file.read_text().split() for file in (FOLDER / "bytes").iterdir()]
    np.savez(FOLDER / "state.npz", **dict(zip(names, strategy.last, strict=True)))
    result = {
        "seconds": np.diff(strategy.ends).tolist(),
        "bytes_down": sum(int(down) for down, _ in moved),
        "bytes_up": sum(int(up) for _, up in moved),
    }
    (FOLDER / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
