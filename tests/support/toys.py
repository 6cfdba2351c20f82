"""Sites that train nothing: everything of a federation is real but the model, so that rounds take milliseconds.

A toy's update is drawn from seed, round and site, and from how many of its updates it knows to be in a sum: what it
keeps is a count of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fedsam_core.data.slices import SliceConfig
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import Engine
from fedsam_core.federation.lanes import Round, SiteUpdate, layout_of, put_update
from fedsam_core.federation.memory import SiteMemory
from fedsam_core.federation.rounds import Federation
from fedsam_core.federation.site import FederatedSite, OpenSite, SiteSpec
from fedsam_core.federation.state import first_state
from fedsam_core.federation.summation import Total
from fedsam_core.federation.tasks import Task
from fedsam_core.hashing import derive_seed
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.learner import Assignment, Fit
from fedsam_core.sam.backbones import ModelConfig
from fedsam_core.secagg.packing import reduce, unpack
from fedsam_core.secagg.quantize import Encoder
from fedsam_core.selection import ManifestEntry, ParameterManifest, preset

SIZE, SEED, FROZEN = 40, 5, "f" * 64
_COUNT = "optimizer/head/count"


def toy_manifest(size: int = SIZE) -> ParameterManifest:
    """One tensor, sent."""
    return ParameterManifest(preset("partial-decoder", 2), (ManifestEntry("head", (size,), size, "whole", "head"),), ())


def toy_specs(count: int, folder: Path, **federation: Any) -> list[SiteSpec]:
    """What each of `count` sites is told; `folder` is where they keep what is theirs."""
    sites = tuple(f"site-{number:03d}" for number in range(count))
    settings = {"rounds": 1000, "validate_every": 0, "meter_probes": 0, "site_dir": folder, **federation}
    return [
        SiteSpec(
            run="toy",
            site=site,
            sites=sites,
            seed=SEED,
            config_hash="c" * 64,
            cohort="none",
            model=ModelConfig(backbone="vit_t", image_size=32),
            selection=toy_manifest().selection,
            slices=SliceConfig(),
            learning=LearningConfig(keep_optimizer=True),
            federation=FederationConfig(**settings),
            inference_batch=1,
        )
        for site in sites
    ]


def slices_of(site: str) -> int:
    """Of a toy's training; what its update is weighed by."""
    return 5 + int(site[-3:]) % 4


def update_of(site: str, round_number: int, counted: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A toy's update, when so many of its updates are in sums already."""
    rng = np.random.default_rng(derive_seed(SEED, "fit", round_number, site))
    return (rng.normal(0, 0.1, SIZE) + 0.001 * counted).astype(np.float32)


class ToyLearner:
    """Stands where a `Learner` does."""

    device, autocast = torch.device("cpu"), False

    def __init__(self, site: str) -> None:
        self.site = site
        self.dataset = range(slices_of(site))

    def load(self, state: Mapping[str, Any], assignment: Assignment) -> None:
        """Nothing to load it into."""

    def fit(self, state: Any, number: int, rounds: int, seed: int, assignment: Assignment) -> Fit:
        """See the module."""
        counted = int(assignment.kept.get(_COUNT, np.zeros(1))[0])
        update = update_of(self.site, number, counted)
        control = update if assignment.control is not None else None
        kept = {_COUNT: np.array([counted + 1.0])}
        return Fit(update, len(self.dataset), 1.0, np.zeros(1), np.zeros(1), control=control, kept=kept)


class ToySite(FederatedSite):
    """A site with a toy in place of scans and model."""

    def open(self) -> dict[str, str]:
        """As the real one's."""
        if self._opened is None:
            roster_hash, manifest = self._identify(), toy_manifest()
            memory = SiteMemory(self._folder if self._keeps else None, manifest.layout_hash)
            cohort: Any = SimpleNamespace(cohort=SimpleNamespace(classes=("toy",)))
            learner: Any = ToyLearner(self.spec.site)
            settings = self.spec.settings_hash(FROZEN, roster_hash)
            self._opened = OpenSite(cohort, manifest, learner, settings, memory, FROZEN, roster_hash)
            self._held = first_state(manifest, {"head": np.zeros(SIZE, np.float32)}, self.spec.federation.scaffold)
        return self._told()

    def _segment_all(self, split: str) -> list[Any]:
        return []

    def disclose(self, picture: bool) -> dict[str, Any]:
        """Nothing to tell."""
        return {"summary": None, "picture": None}

    @property
    def counted(self) -> int:
        """How many of its updates are in sums, as far as it knows."""
        latest = self._site.memory.latest()
        return 0 if latest is None else int(latest[1][_COUNT][0])


def toy_federation(engine: Engine, spec: SiteSpec) -> Federation:
    """With open sites."""
    federation = Federation(engine, spec, toy_manifest(), 1, FROZEN)
    federation.open({"head": np.zeros(SIZE, np.float32)})
    return federation


class Oracle:
    """What sums must be: each contributor's integers, made here, added up as plain integers. Keeps its own books of who
    was in which sum."""

    def __init__(self, specs: list[SiteSpec], weight: float) -> None:
        self.specs = {spec.site: spec for spec in specs}
        self.weight = weight
        self.counted = dict.fromkeys(self.specs, 0)

    def train(self, federation: Federation, round_number: int) -> Total:
        """A round, its sum held against this."""
        _, (total,) = federation.train(round_number, self.weight)
        asked = json.loads(federation.record.lines[total.entry])["task"]
        self.check(total, round_number, asked["clips"])
        return total

    def check(self, total: Total, round_number: int, clips: dict[str, float] | None) -> None:
        """Raises AssertionError where the opened sum is not the contributors', to the bit."""
        spec = next(iter(self.specs.values()))
        about = Round(round_number, SEED, spec.sites, toy_manifest(), 1, spec.federation)
        task = Task(purpose="update", total=self.weight, clips=clips)
        layout = layout_of(task, about)
        assert layout == total.layout
        exact = [0] * layout.size
        plain, weights = np.zeros(SIZE), 0.0
        for site in total.contributors:
            update = update_of(site, round_number, self.counted[site])
            fit = Fit(update, slices_of(site), 1.0, np.zeros(1), np.zeros(1))
            given = SiteUpdate({"head": update}, slices_of(site) / self.weight, np.empty(0))
            encoder = Encoder(layout, derive_seed(SEED, "rounding", layout.hash, round_number, site))
            put_update(encoder, layout, about, task, site, given, fit)
            exact = [a + int(b) for a, b in zip(exact, encoder.vector().view(np.int32), strict=True)]
            plain += update.astype(np.float64) * given.weight
            weights += given.weight
        wrapped = np.array([value % 2**32 for value in exact], np.uint32)
        reduce(layout, wrapped)
        np.testing.assert_array_equal(unpack(layout, total.packed), wrapped)
        bound = layout.error_bound("update/head", len(total.contributors))
        bound += 2.0**-22 * len(total.contributors)  # a site weighs its update in float32
        assert np.abs(total.lanes["update/head"] - plain).max() <= bound
        assert abs(float(total.lanes["weight"][0]) - weights) <= layout.error_bound("weight", len(total.contributors))
        for site in total.contributors:
            self.counted[site] += 1
