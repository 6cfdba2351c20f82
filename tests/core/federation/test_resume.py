"""A driver that is lost at any call it makes: another goes on from the last checkpoint to the same bits."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from support.federations import small_federation, small_specs

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.federation import site
from fedsam_core.federation.checkpoint import unpack_checkpoint
from fedsam_core.federation.engine import Engine, in_process
from fedsam_core.federation.rounds import Federation, run_rounds
from fedsam_core.federation.site import FederatedSite, SiteSpec
from fedsam_core.learning.config import LearningConfig
from fedsam_core.selection import LayerSelection, LoraTargets, preset

LOCAL = LayerSelection(
    name="own", lora=LoraTargets(encoder=("q", "v"), rank=2), train=("head",), local=("encoder.norms",)
)
KEEPS = LearningConfig(local_steps=2, batch_size=4, precision="fp32", keep_optimizer=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "scaffold, local layers, narrow ring, coded broadcast": {
        "selection": LOCAL, "scaffold": True, "bits": 8, "broadcast_bits": 8,
    },
    "kept optimiser, server's moments": {"learning": KEEPS, "strategy": {"kind": "fedadam"}, "broadcast_bits": 16},
    "product in two sums": {"rule": "product-sketch", "bits": 16, "broadcast_bits": 8},
    "b and a in turn": {"rule": "rolora", "strategy": {"kind": "fedavgm"}},
    "privacy": {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}, "bits": 24, "weights": "equal"},
}  # fmt: skip


class Lost(BaseException):
    """What befalls a driver in these tests."""


class Failing:
    """An engine whose driver is lost at one of its calls, before or after the sites have done what it asks."""

    def __init__(self, engine: Engine, at: int, after: bool) -> None:
        self._engine, self._at, self._after = engine, at, after
        self.calls = 0
        self.sites, self.share, self.close = engine.sites, engine.share, engine.close

    def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float) -> Any:
        self.calls += 1
        if self.calls == self._at and not self._after:
            raise Lost
        replies = self._engine.call(method, args, deadline)
        if self.calls == self._at:
            raise Lost
        return replies


class Course:
    """A run and what its driver has put aside after each round."""

    def __init__(self, specs: Sequence[SiteSpec]) -> None:
        self.specs = specs
        self.saved: list[bytes] = []
        self.lines: list[bytes] = []
        self.sums: dict[int, bytes] = {}

    def drive(self, lost_at: int = 0, after: bool = False) -> Federation:
        """Begins or goes on; raises `Lost` at that call of the engine, if it comes to it."""
        self.engine = Failing(in_process(self.specs, FederatedSite), lost_at, after)
        federation, state = small_federation(self.engine, self.specs[0], opened=False)
        if self.saved:
            saved = unpack_checkpoint(self.saved[-1])
            federation.open(state, saved, self.lines[: saved.facts["record"]["lines"]])
        else:
            federation.open(state)
            federation.score("test", 0)
            self._put_aside(federation)

        def on_round(report: Any, state: Any) -> None:
            self.sums |= {total.entry: total.packed for total in report.totals}
            self._put_aside(federation)

        run_rounds(federation, on_round)
        federation.score("test", federation.done)
        self.lines = list(federation.record.lines)
        return federation

    def _put_aside(self, federation: Federation) -> None:
        self.saved.append(federation.save().pack())
        self.lines = list(federation.record.lines)

    def kept(self) -> dict[str, bytes]:
        """What lies at the sites."""
        root = self.specs[0].federation.site_dir
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.safetensors")}


def course(prepared: PreparedCohort, settings: dict[str, Any], **more: Any) -> Course:
    settings = {**settings, **more}
    learning, selection = settings.pop("learning", None), settings.pop("selection", None)
    specs = small_specs(prepared, selection or preset("flap", 2), rounds=3, share_pictures=False, **settings)
    return Course([spec.model_copy(update={"learning": learning} if learning else {}) for spec in specs])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_lost_driver_loses_no_finished_round(
    prepared: PreparedCohort, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "secret_rng", lambda: np.random.default_rng(7))  # for two runs with equal noise
    whole = course(prepared, SETTINGS[name])
    expected = whole.drive()
    calls = whole.engine.calls
    rng = np.random.default_rng(len(name))
    once = course(prepared, SETTINGS[name])
    for first, last in ((8, calls), (3, 9)):  # the second driver is lost soon after it has gone on
        with pytest.raises(Lost):
            once.drive(int(rng.integers(first, last)), after=bool(rng.integers(2)))
    resumed = once.drive()
    assert resumed.server.state.hash == expected.server.state.hash
    assert resumed.done == 3
    assert once.kept() == whole.kept()
