"""A federation small enough for a test: a phantom cohort of three sites, vit_t on 32-pixel slices."""

from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np

from fedsam_core.data.cohort import CohortConfig, read_cohort
from fedsam_core.data.preprocess import PreparedCohort, PreprocessConfig, prepare
from fedsam_core.data.slices import SliceConfig
from fedsam_core.data.sources.phantom import PhantomConfig
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import Engine
from fedsam_core.federation.groups import tensor_groups
from fedsam_core.federation.lanes import Update
from fedsam_core.federation.rounds import Federation, RoundReport, Scores, State, run_rounds
from fedsam_core.federation.server import Server
from fedsam_core.federation.site import SiteSpec
from fedsam_core.federation.state import weights_hash
from fedsam_core.hashing import derive_seed
from fedsam_core.learning.config import LearningConfig
from fedsam_core.sam.adapters import adapt, shared_state
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.selection import LayerSelection, preset
from fedsam_core.store import LocalStore

RUN, CONFIG_HASH, SEED = "test-run", "c" * 64, 3


def small_cohort(folder: Path, sites: int = 3) -> PreparedCohort:
    """Three cases a site, one of them for testing and, where there are enough, one for validation."""
    phantom = PhantomConfig(sites=sites, cases_per_site=5, test_per_site=1, shape=(10, 32, 32))
    config = CohortConfig(name="phantom", source="phantom", phantom=phantom)
    return prepare(read_cohort(config, folder), PreprocessConfig(), LocalStore(folder / "prepared"))


def small_specs(prepared: PreparedCohort, selection: LayerSelection | None = None, **federation: Any) -> list[SiteSpec]:
    """What each site is told: two rounds of two steps unless `federation` says otherwise."""
    own = Path(prepared.url).parent / f"sites-{token_hex(4)}"  # no other run's, and not in the home of who tests
    return [
        SiteSpec(
            run=RUN,
            site=site,
            sites=prepared.cohort.sites,
            seed=SEED,
            config_hash=CONFIG_HASH,
            cohort=prepared.url,
            model=ModelConfig(backbone="vit_t", image_size=32),
            selection=selection or preset("flap", 4),
            slices=SliceConfig(),
            learning=LearningConfig(local_steps=2, batch_size=4, precision="fp32"),
            federation=FederationConfig(**{"rounds": 2, "share_pictures": True, "site_dir": own, **federation}),
            inference_batch=16,
        )
        for site in prepared.cohort.sites
    ]


def small_federation(engine: Engine, spec: SiteSpec, classes: int = 2, opened: bool = True) -> tuple[Federation, State]:
    """A federation with open sites, unless `opened` is False, and the state it starts from."""
    segmenter = build_segmenter(spec.model, classes, spec.selection, seed=derive_seed(SEED, "model"))
    manifest = adapt(segmenter, spec.selection)
    frozen = weights_hash(segmenter, manifest)
    federation = Federation(engine, spec, manifest, classes, frozen)
    state = shared_state(segmenter, manifest)
    if opened:
        federation.open(state)
    return federation, state


def run_small(engine: Engine, spec: SiteSpec) -> tuple[list[RoundReport], State, Scores]:
    """All rounds: the reports, the last state, its scores on the test cases."""
    federation, _ = small_federation(engine, spec)
    reports: list[RoundReport] = []
    last = run_rounds(federation, lambda report, _: reports.append(report))
    return reports, last.tensors, federation.score("test", spec.federation.rounds)


def put_back(federation: Federation, state: State) -> None:
    """The driver starts anew from a state, as if no round had been: with no clip, no moment, nothing held by anyone."""
    federation._server = Server(federation._round(1), state)
    federation._held = {}


def flat_mean(federation: Federation, update: Update) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean update of a round in which all shared values are summed one by one, as one vector."""
    mean = np.empty(federation.manifest.shared_size)
    for name, group in tensor_groups(federation.manifest).items():
        mean[group.index] = update.means[name]
    return mean
