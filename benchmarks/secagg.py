"""Secure sum against plain sum of the same vectors, side by side in one process.

    python benchmarks/secagg.py --sites 6 --values 1850000 --lost 1 --json

prints: client_s (one site, all stages, quantising included), server_s (all stages), plain_s (adding the same vectors),
ratio (server_s + client_s over plain_s), bytes_per_value (upload of a site), max_error (against a float64 sum) and its
bound. Medians over `--repeats`.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import TypeVar

import numpy as np

from fedsam_core.secagg import (
    AggregatorSession,
    Attempt,
    Lane,
    SiteSession,
    VectorLayout,
    decode_sum,
    default_threshold,
    development_roster,
    encode,
)

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=6)
    parser.add_argument("--values", type=int, default=1_850_000)
    parser.add_argument("--lost", type=int, default=0, help="sites that share keys but never send their vector")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = [measure(options.sites, options.values, options.lost) for _ in range(options.repeats)]
    result = {"sites": options.sites, "values": options.values, "lost": options.lost}
    result |= {key: median(run[key] for run in runs) for key in runs[0]}
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:>16} {value:.6g}")


def measure(sites: int, values: int, lost: int) -> dict[str, float]:
    """One attempt."""
    names = tuple(f"site-{index:03d}" for index in range(sites))
    rng = np.random.default_rng(0)
    updates = {name: rng.normal(0, 0.01, values).astype(np.float32) for name in names}
    layout = VectorLayout((Lane("update", values, 1.0),), max_sites=sites)
    threshold = min(default_threshold(sites), sites - lost)
    attempt = Attempt("bench", 1, 1, layout.hash, "config", "model", names, threshold)
    roster, identities = development_roster(names)
    client: dict[str, float] = defaultdict(float)
    server = [0.0]
    sent: dict[str, int] = defaultdict(int)

    def at(name: str, work: Callable[[], bytes]) -> bytes:
        start = perf_counter()
        message = work()
        client[name] += perf_counter() - start
        sent[name] += len(message)
        return message

    def centrally(work: Callable[[], T]) -> T:
        start = perf_counter()
        value = work()
        server[0] += perf_counter() - start
        return value

    aggregator = AggregatorSession(attempt, roster, layout.size)
    sessions = {name: SiteSession(attempt, name, identities[name], roster) for name in names}
    for name, session in sessions.items():
        message = at(name, session.advertise)
        centrally(lambda name=name, message=message: aggregator.receive_advertise(name, message))
    advertised = centrally(aggregator.advertised)
    for name, session in sessions.items():
        message = at(name, lambda session=session: session.share(advertised))
        centrally(lambda name=name, message=message: aggregator.receive_share(name, message))
    deliveries = centrally(aggregator.deliveries)
    present = names[lost:]
    for name in present:
        vector = encode_timed(layout, updates[name], client, name)
        message = at(name, lambda name=name, vector=vector: sessions[name].masked_input(deliveries[name], vector))
        centrally(lambda name=name, message=message: aggregator.receive_masked(name, message))
    survivors = centrally(aggregator.survivors)
    for name in present:
        message = at(name, lambda name=name: sessions[name].confirm(survivors))
        centrally(lambda name=name, message=message: aggregator.receive_confirmation(name, message))
    confirmations = centrally(aggregator.confirmations)
    for name in present:
        message = at(name, lambda name=name: sessions[name].unmask(confirmations))
        centrally(lambda name=name, message=message: aggregator.receive_unmask(name, message))
    total, contributors = centrally(aggregator.total)
    decoded = centrally(lambda: decode_sum(layout, total, len(contributors)))["update"]

    start = perf_counter()
    plain = np.zeros(values, np.float32)
    for name in present:
        plain += updates[name]
    plain_s = perf_counter() - start
    exact = np.sum([updates[name].astype(np.float64) for name in present], axis=0)
    client_s = median(client[name] for name in present)
    return {
        "client_s": client_s,
        "server_s": server[0],
        "plain_s": plain_s,
        "ratio": (client_s + server[0]) / plain_s,
        "bytes_per_value": median(sent[name] for name in present) / values,
        "max_error": float(np.abs(decoded - exact).max()),
        "bound": layout.error_bound("update", len(contributors)),
    }


def encode_timed(layout: VectorLayout, update: np.ndarray, client: dict[str, float], name: str) -> np.ndarray:
    """The quantised vector; its time is the client's."""
    start = perf_counter()
    vector = encode(layout, {"update": update}, seed=1)
    client[name] += perf_counter() - start
    return vector


if __name__ == "__main__":
    main()
