"""What a round costs beside the training that it is for: round wall over the slowest site's pure training, minus 1.

    python benchmarks/round_overhead.py                 # SAM ViT-B, `flap`, rank 32, 6 sites on a local Ray cluster
    python benchmarks/round_overhead.py --demo          # the demo as it is, its training too
    python benchmarks/round_overhead.py --engine in-process --sites 3 6 20 100 --training 0

All of it is what `fedsam federate` runs: actors, keys, masks, sums, strategy, record, checkpoint, tables, MLflow. A
round is timed from one line of the run's log to the next, and every call to the sites by what the slowest of them took.

Unless it is the demo, sites are stand-ins at the paper's size: they hold no scans and no model, wait for `--training`
seconds as whoever waits for a GPU does (the processor stays free, and masks are made meanwhile), and give a random
update of as many values as the selection has (`flap`: 1.85 million). So six sites fit a machine without a GPU, and what
is measured is the protocol's and the driver's. The overhead in seconds hardly depends on how long sites train, the
ratio does: put in what your slowest site trains for in a round. From how many seconds on it is below 3% is told.

In process sites are asked one after the other; a call is counted as the slowest site's, as if they were asked side by
side, and masks are not hidden behind training (`--training 0`). Medians over the rounds after the first, in which no
clip is known yet and all is touched for the first time; validation is timed by itself and not part of the round.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import torch

from cluster.placement import SiteNeeds, cluster_nodes, plan
from cluster.session import ray_session
from cluster.site import create_sites
from fedsam_core.federation.engine import Engine, OnAnswer, in_process
from fedsam_core.federation.memory import SiteMemory
from fedsam_core.federation.preparation import PreparedSites
from fedsam_core.federation.site import FederatedSite, OpenSite, SiteSpec, Trained
from fedsam_core.federation.state import GlobalState, first_state, weights_hash
from fedsam_core.hashing import derive_seed
from fedsam_core.learning.learner import Assignment, Fit
from fedsam_core.sam.backbones import manifest_for
from pipelines.config import Config, load_config
from pipelines.federate import initial_model, run_federation
from pipelines.prepare import prepare_sites
from pipelines.recorder import Event

ROUNDS = 5
LIMIT = 0.03


class TimedSite(FederatedSite):
    """A real site that writes down how long each round's training took."""

    def __init__(self, spec: SiteSpec, notes: Path) -> None:
        super().__init__(spec)
        self._notes = notes

    def _train(self, state: GlobalState) -> Trained:
        begun = time.perf_counter()
        trained = super()._train(state)
        seconds = time.perf_counter() - begun
        (self._notes / f"{self._current().round}-{self.spec.site}").write_text(repr(seconds))
        return trained


class StandInLearner:
    """Stands where a `Learner` does: waits, and gives a random update."""

    device, autocast = torch.device("cpu"), None

    def __init__(self, site: str, size: int, classes: int, seconds: float) -> None:
        self.site, self.size, self.classes, self.seconds = site, size, classes, seconds
        self.dataset = range(100)

    def load(self, state: Mapping[str, Any], assignment: Assignment) -> None:
        """Nothing to load it into."""

    def fit(self, state: Any, number: int, rounds: int, seed: int, assignment: Assignment) -> Fit:
        """An update as large as one of training is."""
        time.sleep(self.seconds)
        rng = np.random.default_rng(derive_seed(seed, "fit", number, self.site))
        update = rng.standard_normal(self.size, np.float32) * np.float32(1e-3)
        return Fit(update, len(self.dataset), 1.0, np.zeros(self.classes), np.zeros(self.classes))


class StandIn(TimedSite):
    """A site without scans or model."""

    def __init__(self, spec: SiteSpec, notes: Path, seconds: float, classes: tuple[str, ...], start: Any, frozen: str):
        super().__init__(spec, notes)
        self._seconds, self._classes, self._start, self._frozen = seconds, classes, start, frozen

    def open(self) -> dict[str, str]:
        """As the real one's."""
        if self._opened is None:
            spec, roster_hash = self.spec, self._identify()
            manifest = manifest_for(spec.model, len(self._classes), spec.selection)
            learner: Any = StandInLearner(spec.site, manifest.shared_size, len(self._classes), self._seconds)
            cohort: Any = SimpleNamespace(cohort=SimpleNamespace(classes=self._classes))
            settings, memory = spec.settings_hash(self._frozen, roster_hash), SiteMemory(None, manifest.layout_hash)
            self._opened = OpenSite(cohort, manifest, learner, settings, memory, self._frozen, roster_hash)
            self._held = first_state(manifest, self._start, spec.federation.scaffold)
        return self._told()

    def _segment_all(self, split: str) -> list[Any]:
        return []

    def disclose(self, picture: bool) -> dict[str, Any]:
        """Nothing to tell."""
        return {"summary": None, "picture": None}


@dataclass
class Clock:
    """What a run's seconds went into.

    Attributes:
        calls: (sum and stage, seconds of the call, seconds of the slowest site) since the last round ended.
        rounds: by round, the same and the seconds in all.
    """

    side_by_side: bool
    calls: list[tuple[str, float, float]] = field(default_factory=list)
    rounds: dict[int, tuple[float, list[tuple[str, float, float]]]] = field(default_factory=dict)
    last: float = 0.0

    def hear(self, event: Event) -> None:
        """Of the end of a round, or of the scores before the first."""
        if event.total:
            now = time.perf_counter()
            self.rounds[event.done] = (now - self.last, self.calls)
            self.calls, self.last = [], now


class TimedEngine:
    """Notes how long each call takes, and its slowest site."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine, self._clock = engine, clock
        self._sum = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def call(
        self,
        method: str,
        args: Mapping[str, Mapping[str, Any]],
        deadline: float,
        on_answer: OnAnswer | None = None,
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """As the engine's."""
        took: list[float] = []

        def noted(site: str, seconds: float) -> float:
            took.append(seconds)
            return float("inf") if on_answer is None else on_answer(site, seconds)

        for told in args.values():
            self._sum = told["task"]["purpose"] if "task" in told else self._sum
        begun = time.perf_counter()
        result = self._engine.call(method, args, deadline, noted)
        seconds = time.perf_counter() - begun
        self._clock.calls.append(
            (f"{self._sum}/{method}", seconds, max(took, default=0.0) if self._clock.side_by_side else seconds)
        )
        return result


def measure(config: Config, about: PreparedSites, stand_in: bool, seconds: float) -> dict[str, Any]:
    """A run of `ROUNDS` rounds and what its rounds took. Keys: see `summarize`."""
    clock = Clock(config.engine.kind == "in-process")
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder)
        factory: Callable[[Any], Any] = partial(TimedSite, notes=notes)
        if stand_in:
            classes = about.described.classes
            segmenter, manifest, start = initial_model(config, len(classes))
            frozen = weights_hash(segmenter, manifest)
            factory = partial(StandIn, notes=notes, seconds=seconds, classes=classes, start=start, frozen=frozen)

        def engine(specs: Sequence[SiteSpec]) -> Any:
            if clock.side_by_side:
                return TimedEngine(in_process(specs, factory), clock)
            placed = plan([spec.site for spec in specs], cluster_nodes(), SiteNeeds(cpus=0, pin="never"))
            return TimedEngine(create_sites(specs, placed, factory), clock)

        clock.last = time.perf_counter()
        run_federation(config, about, engine, clock.hear)
        trained = defaultdict(float)
        for note in notes.iterdir():
            number = int(note.name.partition("-")[0])
            trained[number] = max(trained[number], float(note.read_text()))
    shared = manifest_for(config.model, len(about.described.classes), config.layers).shared_size
    return {"sites": len(about.sites), "engine": config.engine.kind, "values": shared, **summarize(clock, trained)}


def summarize(clock: Clock, trained: Mapping[int, float]) -> dict[str, Any]:
    """Medians over the rounds after the first.

    Returns:
        "training_s" of the slowest site, "overhead_s" and "overhead" (over the training), "by_phase" seconds of the
        overhead, "validation_s", "enough_s": how long training must take for an overhead of `LIMIT`.
    """
    rows = []
    for number, (wall, calls) in clock.rounds.items():
        if number < 2:
            continue
        phases: dict[str, float] = defaultdict(float)
        validation, in_calls = 0.0, 0.0
        for name, seconds, slowest in calls:
            in_calls += seconds
            if name.startswith("scores/"):
                validation += slowest
            else:
                phases[name] += slowest
        phases["update/fit"] -= trained[number]  # what is left: the state's way, encoding, masking, the vector's way
        phases["driver"] = wall - in_calls
        overhead = sum(phases.values())
        rows.append({"training_s": trained[number], "overhead_s": overhead, "validation_s": validation, **phases})
    middle = {key: median(row.get(key, 0.0) for row in rows) for key in dict.fromkeys(k for row in rows for k in row)}
    told = {key: middle.pop(key) for key in ("training_s", "overhead_s", "validation_s")}
    ratios = [row["overhead_s"] / row["training_s"] for row in rows if row["training_s"] > 0.01]
    return {
        **told,
        "overhead": median(ratios) if ratios else None,
        "spread": [min(ratios), max(ratios)] if ratios else None,
        "enough_s": told["overhead_s"] / LIMIT,
        "by_phase": dict(sorted(middle.items(), key=lambda phase: -phase[1])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[6])
    parser.add_argument("--engine", choices=("ray", "in-process"), default="ray")
    parser.add_argument("--training", type=float, default=30.0, help="seconds that a stand-in trains for")
    parser.add_argument("--demo", action="store_true", help="the demo's sites, size and training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run")
    options = parser.parse_intermixed_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, ray_session() if options.engine == "ray" else nullcontext():
        for count in [3] if options.demo else options.sites:
            config = load_config(
                "demo" if options.demo else None,
                [
                    f"work_dir={folder}",
                    f"engine.kind={options.engine}",
                    f"federation.rounds={ROUNDS}",
                    *([] if options.demo else ["name=overhead", *PAPER]),
                    *options.overrides,
                ],
            )
            about = prepare_sites(config)
            if not options.demo:
                share = next(iter(about.shares.values()))
                about = replace(about, shares={f"site-{number:03d}": share for number in range(count)})
            rows.append(measure(config, about, not options.demo, options.training))
            print(table(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


PAPER = [
    "cohort.name=phantom",
    "cohort.source=phantom",
    "cohort.phantom.cases_per_site=2",
    "cohort.phantom.test_per_site=1",
    "cohort.phantom.shape=[8,16,16]",
    "model.backbone=vit_b",
    "model.image_size=224",
    "selection=flap",
    "rank=32",
]


def table(row: Mapping[str, Any]) -> str:
    """Markdown."""
    low, high = row["spread"] or (0, 0)
    ratio = "" if row["overhead"] is None else f", {row['overhead']:.1%} ({low:.1%} to {high:.1%})"
    lines = [
        f"{row['sites']} sites, {row['values']:,} values, {row['engine']}: slowest training {row['training_s']:.2f} s, "
        f"overhead {row['overhead_s']:.2f} s{ratio}; below {LIMIT:.0%} from {row['enough_s']:.0f} s on; "
        f"validation {row['validation_s']:.2f} s",
        "",
        "| phase | s | share of the overhead |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {s:.3f} | {s / row['overhead_s']:.0%} |" for name, s in row["by_phase"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
