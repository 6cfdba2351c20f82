"""What a study's time on a cluster goes into: short trials on four simulated nodes, and the share of it that is work.

    python benchmarks/scheduling.py            # 30 trials of 3 sites, 2 rounds each: some minutes
    python benchmarks/scheduling.py --json

Capacity is what the trials' places stand for: places for whole trials that the cluster has, times the wall time of the
study. A trial's share of it is divided by its own clock: rounds (training, sums, validation), scoring (before the first
and after the last round, with pictures and files), opening (models and scans at the sites, MLflow's run, the end), and
what is left over between trials, which is Ray Tune's and, once a place, the start of processes. All nodes are this one
machine: with fewer cores than sites that train at once, rounds take longer, and the shares of the rest are too small.
"""

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.cluster_utils import Cluster

from cluster.placement import cluster_nodes
from cluster.trials import Ended, Placed, Tell, run_trials
from pipelines.prepare import prepare_sites
from pipelines.study import Study, trials
from pipelines.trials import Task, bundles, run_trial

NODES, SITES = 4, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps a round and site")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.trials, options.steps)
    print(json.dumps(found, indent=1) if options.json else table(found))


def measure(folder: Path, count: int, steps: int) -> dict[str, Any]:
    """Seconds by what they went into, over all places, and the shares of them."""
    study = Study.model_validate(
        {
            "name": "scheduling",
            "selections": ["flap"],
            "seeds": tuple(range(count)),
            "overrides": {
                "work_dir": str(folder),
                "cohort.name": "phantom",
                "cohort.source": "phantom",
                "cohort.phantom": {"sites": SITES, "cases_per_site": 5, "test_per_site": 1, "shape": [12, 32, 32]},
                "model.backbone": "vit_t",
                "model.image_size": 32,
                "rank": 4,
                "federation.rounds": 2,
                "learning.local_steps": steps,
            },
        }
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(NODES - 1):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        nodes = cluster_nodes()
        planned = trials(study)
        prepared = prepare_sites(planned[0].config)
        tasks = [Task(trial, prepared, study.name, None) for trial in planned]
        needs = [bundles(task, nodes) for task in tasks]
        booked = sum(bundle["CPU"] for bundle in needs[0])
        places = int(sum(node.cpus for node in nodes) / booked)
        ended: list[Ended] = []
        started = time.monotonic()
        run_trials(
            [Placed(task.id, task, need) for task, need in zip(tasks, needs, strict=True)],
            timed,
            lambda trial, number, numbers: None,
            ended.append,
            folder / "tune",
            rounds=2,
        )
        wall = time.monotonic() - started
    finally:
        ray.shutdown()
        cluster.shutdown()
    failed = [end.error for end in ended if end.error]
    if failed:
        raise SystemExit(f"{len(failed)} trials failed: {failed[0]}")
    return {"trials": count, "places": places, "wall_s": wall, **shares([end.result for end in ended], places * wall)}


def timed(task: Task, tell: Tell, kept: dict[str, Any]) -> dict[str, float]:
    """A trial, and what its seconds went into."""
    started = time.monotonic()
    result = run_trial(task, tell, kept)
    whole = time.monotonic() - started
    with (task.trial.config.work_dir / "runs" / result.run / "rounds.csv").open() as rows:
        rounds = sum(
            float(row["round/seconds_train"]) + float(row["round/seconds_validate"]) for row in csv.DictReader(rows)
        )
    at_work = result.minutes * 60
    return {"rounds": rounds, "scoring": at_work - rounds, "opening": whole - at_work}


def shares(found: list[Mapping[str, float]], capacity: float) -> dict[str, Any]:
    seconds = {part: sum(one[part] for one in found) for part in ("rounds", "scoring", "opening")}
    seconds["between"] = capacity - sum(seconds.values())
    return {"seconds": seconds, "share": {part: value / capacity for part, value in seconds.items()}}


def table(found: Mapping[str, Any]) -> str:
    """Markdown."""
    trials, places, wall = found["trials"], found["places"], found["wall_s"]
    lines = [
        f"{trials} trials of {SITES} sites, {places} at once on {NODES} nodes: {wall:.0f} s",
        "",
        "| went into | place-seconds | share |",
        "|---|---|---|",
    ]
    lines += [f"| {part} | {s:.0f} | {found['share'][part]:.1%} |" for part, s in found["seconds"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
