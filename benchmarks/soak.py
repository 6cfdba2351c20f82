"""Rounds without end, with sites that are lost at random in every stage: no hang, no leak, every sum right.

    python benchmarks/soak.py                        # 100 sites in one process, for 15 minutes at most
    python benchmarks/soak.py --sites 30 --rounds 200
    python benchmarks/soak.py --ray --sites 5 --rounds 40     # actors on a local cluster, whose processes are killed

Sites are toys (tests/support/toys.py): keys, masks, shares, rounds, records and what sites keep are real, and their
training is a draw of 40 numbers. Each opened sum is held against the contributors' integers, added up one by one, and
against a float64 mean; what sites keep in the end against who was in the sums. What a run writes down as it goes
(record, ledger) is dropped after each round, so that memory which grows is a leak. Prints a row every few rounds.
"""

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.faults import Fault, FaultySite
from support.toys import Oracle, toy_federation, toy_specs

from fedsam_core.federation.engine import Engine, InProcessEngine
from fedsam_core.federation.ledger import Ledger
from fedsam_core.federation.rounds import Federation
from fedsam_core.federation.site import SiteSpec

STAGES = ("advertise", "share", "fit", "confirm", "unmask")
WAYS = ("die before", "die after", "raise", "corrupt", "garbage")


@dataclass
class Soak:
    """What came of it.

    Attributes:
        rounds: that were finished.
        repeated: attempts that came to nothing, as too few sites were left, and were made again.
        faults: that happened, by stage.
        contributors: fewest and most in a sum.
        memory: (round, resident MiB of this process).
        seconds: in all.
    """

    rounds: int = 0
    repeated: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    contributors: tuple[int, int] = (1 << 30, 0)
    memory: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def growth(self) -> float:
        """MiB from a quarter of the way to the end."""
        return self.memory[-1][1] - self.memory[len(self.memory) // 4][1]


def random_faults(specs: list[SiteSpec], rounds: int, share: float, ways: tuple[str, ...], seed: int) -> list[Fault]:
    """In every stage of every round each site fails with the probability `share`."""
    draw = random.Random(seed)
    return [
        Fault(spec.site, number, stage, draw.choice(ways))
        for number in range(1, rounds + 1)
        for stage in STAGES
        for spec in specs
        if draw.random() < share
    ]


def few_a_round(faults: list[Fault], most: int) -> list[Fault]:
    """At most so many in a round."""
    seen: Counter[int | None] = Counter()
    return [fault for fault in faults if not (seen.update([fault.round]) or seen[fault.round] > most)]


def soak(federation: Federation, oracle: Oracle, rounds: int, every: int, end: float, faults: list[Fault]) -> Soak:
    """Trains, and checks every sum."""
    found, process, started = Soak(), psutil.Process(), time.monotonic()
    planned = Counter((fault.round, fault.method) for fault in faults)
    print("| round | s a round | RSS, MiB | contributors | attempts repeated |\n|---|---|---|---|---|")
    for number in range(1, rounds + 1):
        total = oracle.train(federation, number)
        there = len(total.contributors)
        found.contributors = (min(found.contributors[0], there), max(found.contributors[1], there))
        found.repeated += len(federation.failed)
        found.rounds = number
        federation.record.lines[:] = [b""] * len(federation.record.lines)
        federation.ledger = Ledger()
        found.faults.update({stage: planned[number, stage] for stage in STAGES})
        found.seconds = time.monotonic() - started
        over = time.monotonic() > end
        if number % every == 0 or number == rounds or over:
            resident = process.memory_info().rss / 2**20
            found.memory.append((number, resident))
            row = f"| {number} | {found.seconds / number:.2f} | {resident:.1f} "
            print(row + f"| {found.contributors[0]} to {found.contributors[1]} | {found.repeated} |", flush=True)
        if over:
            print(f"stopped after round {number}: the time is over")
            break
    return found


def in_one_process(sites: int, rounds: int, share: float, minutes: float, folder: Path) -> tuple[Soak, bool]:
    """What came of it, and whether every site knows what it has contributed to."""
    specs = toy_specs(sites, folder / "sites", rejoin_wait_s=0, attempts=10, park_after=1000)
    faults = random_faults(specs, rounds, share, WAYS, 0)
    (folder / "marks").mkdir()
    there = {spec.site: FaultySite(spec, faults, folder / "marks", real=False) for spec in specs}
    return _run(
        InProcessEngine(there), specs, rounds, minutes, faults, lambda: {s: o.counted() for s, o in there.items()}
    )


def on_ray(sites: int, rounds: int, share: float, minutes: float, folder: Path) -> tuple[Soak, bool]:
    """The same with actors, as many of which are killed in a round as it can lose."""
    import ray

    from cluster.placement import SiteNeeds, cluster_nodes, plan
    from cluster.site import create_sites

    specs = toy_specs(sites, folder / "sites", deadline_floor_s=30, rejoin_wait_s=60, attempts=10, park_after=1000)
    every = random_faults(specs, rounds, share, ("die before", "die after", "raise", "corrupt"), 0)
    faults = few_a_round(every, sites - (2 * sites // 3 + 1))
    (folder / "marks").mkdir()
    tests = str(Path(__file__).parents[1] / "tests")
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])  # of the actors
    ray.init(
        address="local", num_cpus=sites, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20
    )
    try:
        placed = plan([spec.site for spec in specs], cluster_nodes(), SiteNeeds(cpus=1, pin="never"))
        engine = create_sites(specs, placed, partial(FaultySite, faults=faults, folder=folder / "marks", real=True))

        def counted() -> dict[str, int]:
            replies, _ = engine.call("counted", {spec.site: {} for spec in specs}, 120)
            return replies

        return _run(engine, specs, rounds, minutes, faults, counted)
    finally:
        ray.shutdown()


def _run(
    engine: Engine, specs: list[SiteSpec], rounds: int, minutes: float, faults: list[Fault], counted: Any
) -> tuple[Soak, bool]:
    end = time.monotonic() + 60 * minutes
    federation = toy_federation(engine, specs[0])
    oracle = Oracle(specs, federation.total_weight())
    found = soak(federation, oracle, rounds, max(1, rounds // 20), end, faults)
    federation._rejoin(found.rounds + 1, 60.0)
    for spec in specs:  # what a site is told with the next round
        told = federation.attendance.counted[spec.site]
        engine.call("settle", {spec.site: {"counted": told, "round": found.rounds + 1}}, 60)
    knows = counted() == oracle.counted
    engine.close()
    return found, knows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.05, help="probability that a site is lost in a stage")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    logging.disable()  # of what is done to the sites on purpose
    folder = Path(tempfile.mkdtemp(prefix="fedsam-soak-"))
    try:
        run = on_ray if options.ray else in_one_process
        found, knows = run(options.sites, options.rounds, options.share, options.minutes, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{found.rounds} rounds of {options.sites} sites in {found.seconds:.0f} s, {sum(found.faults.values())} faults "
        f"({', '.join(f'{stage} {count}' for stage, count in sorted(found.faults.items()))}), "
        f"{found.repeated} attempts repeated, every sum right; memory grew by {found.growth:+.1f} MiB after a quarter; "
        f"what sites keep follows the sums: {'yes' if knows else 'NO'}"
    )
    sys.exit(not knows)


if __name__ == "__main__":
    main()
