"""Secure sum against plain sum of the same vectors, side by side in one process.

    python benchmarks/secagg.py --sites 6 --values 4000000 --lost 1 --bits 32 --json

prints: client_s (one site, all stages, quantising included), mask_s (the part of it that is done while the site
trains), server_s (all stages), plain_s (adding the same vectors), ratio (server_s + client_s over plain_s),
ns_per_value_and_peer (of a client), bytes_per_value (upload of a site, all messages), max_error (against a float64 sum)
and its bound. Medians over `--repeats`. `--lost` sites share keys and vanish before they send their vector.

    python benchmarks/secagg.py --table

prints a Markdown table over sites, values and lost sites; it takes half an hour and 3 GB.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import TypeVar

import numpy as np

from fedsam_core.errors import SecureSumError
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
from fedsam_core.secagg.layout import RINGS

T = TypeVar("T")
TABLE_SITES, TABLE_VALUES = (3, 6, 20, 100), (300_000, 1_850_000, 5_000_000, 14_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=6)
    parser.add_argument("--values", type=int, default=1_850_000)
    parser.add_argument("--lost", type=int, default=0, help="sites that share keys but never send their vector")
    parser.add_argument("--bits", type=int, default=32, choices=RINGS, help="bits of a value on the wire")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--table", action="store_true", help="all of sites x values x lost")
    options = parser.parse_args()
    if options.table:
        table(options.bits)
        return
    try:
        result = repeated(options.sites, options.values, options.lost, options.bits, options.repeats)
    except SecureSumError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:>22} {value:.6g}")


def table(bits: int) -> None:
    """A row for each combination; one run for each of the large ones."""
    columns = (
        "client_s", "mask_s", "server_s", "plain_s", "ns_per_value_and_peer", "bytes_per_value", "max_error", "bound"
    )  # fmt: skip
    print("| sites | values | lost |", " | ".join(columns), "|")
    print("|---|---|---|", "---|" * len(columns), sep="")
    for sites in TABLE_SITES:
        for values in TABLE_VALUES:
            for lost in sorted({0, 1, sites // 3}):
                if sites - lost < max(3, sites // 2 + 1):
                    print(f"| {sites} | {values} | {lost} | refused: too few sites are left |", flush=True)
                    continue
                row = repeated(sites, values, lost, bits, repeats=3 if sites * values < 5e7 else 1)
                print(f"| {sites} | {values} | {lost} |", " | ".join(f"{row[c]:.3g}" for c in columns), "|", flush=True)


def repeated(sites: int, values: int, lost: int, bits: int, repeats: int) -> dict[str, float]:
    """Medians over repeated attempts."""
    runs = [measure(sites, values, lost, bits) for _ in range(repeats)]
    settings = {"sites": sites, "values": values, "lost": lost, "bits": bits}
    return settings | {key: median(run[key] for run in runs) for key in runs[0]}


def measure(sites: int, values: int, lost: int, bits: int = 32) -> dict[str, float]:
    """One attempt. Sites' vectors are made when they are due and forgotten, so that memory does not grow with sites."""
    names = tuple(f"site-{index:03d}" for index in range(sites))
    layout = VectorLayout((Lane("update", values, 1.0, bits),), max_sites=sites)
    # Three sites need all three; the loss is what is measured, so the threshold makes room for it.
    threshold = max(sites // 2 + 1, min(default_threshold(sites), sites - lost))
    attempt = Attempt("bench", 1, 1, layout.hash, "config", "model", names, threshold)
    roster, identities = development_roster(names)
    client: dict[str, float] = defaultdict(float)
    masks: dict[str, float] = {}
    server = [0.0]
    sent: dict[str, int] = defaultdict(int)

    def at(name: str, work: Callable[[], T]) -> T:
        start = perf_counter()
        result = work()
        client[name] += perf_counter() - start
        sent[name] += len(result) if isinstance(result, bytes) else 0
        return result

    def centrally(work: Callable[[], T]) -> T:
        start = perf_counter()
        value = work()
        server[0] += perf_counter() - start
        return value

    aggregator = AggregatorSession(attempt, roster, layout)
    sessions = {name: SiteSession(attempt, name, identities[name], roster, layout) for name in names}
    for name, session in sessions.items():
        message = at(name, session.advertise)
        centrally(lambda name=name, message=message: aggregator.receive_advertise(name, message))
    advertised = centrally(aggregator.advertised)
    for name, session in sessions.items():
        message = at(name, lambda session=session: session.share(advertised))
        centrally(lambda name=name, message=message: aggregator.receive_share(name, message))
    deliveries = centrally(aggregator.deliveries)
    present = names[lost:]
    plain, exact, plain_s = np.zeros(values, np.float32), np.zeros(values), 0.0
    for name in present:
        update = np.random.default_rng(names.index(name)).normal(0, 0.01, values).astype(np.float32)
        before = client[name]
        at(name, lambda name=name: sessions[name].deliver(deliveries[name]))
        masks[name] = client[name] - before
        vector = at(name, lambda update=update: encode(layout, {"update": update}, seed=1))
        message = at(name, lambda name=name, vector=vector: sessions[name].masked_input(vector))
        centrally(lambda name=name, message=message: aggregator.receive_masked(name, message))
        start = perf_counter()
        plain += update
        plain_s += perf_counter() - start
        exact += update
    survivors = centrally(aggregator.survivors)
    for name in present:
        message = at(name, lambda name=name: sessions[name].confirm(survivors))
        centrally(lambda name=name, message=message: aggregator.receive_confirmation(name, message))
    confirmations = centrally(aggregator.confirmations)
    for name in present:
        message = at(name, lambda name=name: sessions[name].unmask(confirmations))
        centrally(lambda name=name, message=message: aggregator.receive_unmask(name, message))
    total, contributors = centrally(aggregator.total)
    decoded = centrally(lambda: decode_sum(layout, total, contributors))["update"]

    client_s = median(client[name] for name in present)
    return {
        "client_s": client_s,
        "mask_s": median(masks.values()),
        "server_s": server[0],
        "plain_s": plain_s,
        "ratio": (client_s + server[0]) / plain_s,
        "ns_per_value_and_peer": 1e9 * client_s / values / (sites - 1),
        "bytes_per_value": median(sent[name] for name in present) / values,
        "max_error": float(np.abs(decoded - exact).max()),
        "bound": layout.error_bound("update", len(contributors)),
    }


if __name__ == "__main__":
    main()
