"""Rounds on the in-process engine: repeatable, exact, and silent about each site."""

from typing import Any

import numpy as np
import pytest
from support.federations import run_small, small_federation, small_specs

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import RoundError
from fedsam_core.federation.engine import InProcessEngine, in_process
from fedsam_core.federation.lanes import layout_of
from fedsam_core.federation.rounds import run_rounds
from fedsam_core.federation.site import FederatedSite
from fedsam_core.learning.learner import Fit, Learner


class Recording:
    """An engine that keeps every reply that the driver receives."""

    def __init__(self, inner: InProcessEngine) -> None:
        self._inner = inner
        self.replies: list[tuple[str, str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def call(self, method: str, args: Any, deadline: float) -> Any:
        replies, lost = self._inner.call(method, args, deadline)
        self.replies += [(method, site, reply) for site, reply in replies.items()]
        return replies, lost


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fit]:
    """What each site's training gave in the last round, taken where the driver cannot look."""
    taken: dict[str, Fit] = {}
    original = Learner.fit

    def fit(self: Learner, *args: Any) -> Fit:
        taken[self.site] = original(self, *args)
        return taken[self.site]

    monkeypatch.setattr(Learner, "fit", fit)
    return taken


def test_two_runs_are_bit_equal_after_every_round(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared)
    first, _, _ = run_small(in_process(specs, FederatedSite), specs[0])
    again, _, _ = run_small(in_process(specs, FederatedSite), specs[0])
    assert [report.state_hash for report in first] == [report.state_hash for report in again]
    assert len({report.state_hash for report in first}) == 2  # and training does something


def test_masked_and_plain_sums_give_the_same_states(prepared: PreparedCohort) -> None:
    masked, plain = small_specs(prepared), small_specs(prepared, secure_sum="plain")
    hashes = [
        [report.state_hash for report in run_small(in_process(specs, FederatedSite), specs[0])[0]]
        for specs in (masked, plain)
    ]
    assert hashes[0] == hashes[1]


def test_the_new_state_is_the_weighted_mean_of_the_updates(prepared: PreparedCohort, fits: dict[str, Fit]) -> None:
    specs = small_specs(prepared)
    federation, state = small_federation(in_process(specs, FederatedSite), specs[0])
    slices = federation.total_slices()
    assert slices == pytest.approx(
        sum(len(prepared.load(case.id).image) for case in prepared.cohort.select(split="train")), abs=0.01
    )
    new, total = federation.train(state, 1, slices)
    weights = np.array([fit.slices for fit in fits.values()], dtype=np.float64)
    updates = np.stack([fit.update.astype(np.float64) for fit in fits.values()])
    expected = (weights[:, None] * updates).sum(axis=0) / weights.sum()
    layout = layout_of("update", 3, federation.manifest.shared_size, 2, specs[0].federation.update_clip)
    bound = layout.error_bound("update", 3)
    flat = federation.manifest.flatten
    assert np.abs(expected).max() > 1000 * bound
    np.testing.assert_allclose(total.lanes["update"], (weights[:, None] / slices * updates).sum(axis=0), atol=bound)
    np.testing.assert_allclose(flat(new) - flat(state).astype(np.float64), expected, atol=2 * bound + 1e-6)
    loss = np.average([fit.loss for fit in fits.values()], weights=weights)
    assert total.lanes["loss"][0] / total.lanes["weight"][0] == pytest.approx(loss, abs=1e-5)


def test_no_message_to_the_driver_shows_a_sites_update_weight_or_loss(
    prepared: PreparedCohort, fits: dict[str, Fit]
) -> None:
    specs = small_specs(prepared)
    engine = Recording(in_process(specs, FederatedSite))
    federation, state = small_federation(engine, specs[0])
    slices = federation.total_slices()
    engine.replies.clear()
    federation.train(state, 1, slices)

    assert {method for method, _, _ in engine.replies} == {"advertise", "share", "fit", "confirm", "unmask"}
    assert all(isinstance(reply, bytes) for _, _, reply in engine.replies)  # no dictionary, number or array beside them
    layout = layout_of("update", 3, federation.manifest.shared_size, 2, specs[0].federation.update_clip)
    scale = layout.levels / layout.lane("update").limit
    vectors: dict[str, np.ndarray] = {}
    for method, site, reply in engine.replies:
        fit = fits[site]
        weighted = fit.update * (fit.slices / slices)
        # Eight bytes and more, because four of them turn up by chance in messages of megabytes.
        numbers = np.array([fit.loss, fit.slices / slices, fit.slices, fit.loss * fit.slices / slices], np.float64)
        patterns = [number.tobytes() for number in numbers] + [
            values[at : at + 2].astype(kind).tobytes()
            for values in (fit.update, weighted)
            for kind in (np.float32, np.float64)
            for at in range(0, 200, 2)
            if values[at : at + 2].all()
        ]
        assert len(patterns) > 100
        for pattern in patterns:
            assert pattern not in reply, f"{method} of {site} shows {pattern.hex()}"
        if method == "fit":
            words = np.frombuffer(reply[len(reply) - len(reply) % 4 - 4 * layout.size :][: 4 * layout.size], np.uint32)
            vectors[site] = words
            quantized = np.round(weighted * scale).astype(np.int64).astype(np.uint32)
            window = words[: quantized.size]
            # A masked vector is uniform: it neither equals the quantized update nor follows it.
            assert (window == quantized).mean() < 0.001
            assert abs(np.corrcoef(window.astype(np.float64), weighted)[0, 1]) < 0.05
            histogram, _ = np.histogram(words, bins=16, range=(0, 2**32))
            assert ((histogram - words.size / 16) ** 2 / (words.size / 16)).sum() < 60  # chi-square, 15 degrees
    assert len(vectors) == 3


def test_ledger_counts_the_serialized_messages(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared)
    engine = Recording(in_process(specs, FederatedSite))
    federation, state = small_federation(engine, specs[0])
    slices = federation.total_slices()
    engine.replies.clear()
    federation.train(state, 1, slices)
    up = sum(len(reply) for _, _, reply in engine.replies)
    assert federation.ledger.total("up", 1) == up
    payload = 3 * federation.manifest.bytes_per_site_round
    assert payload < up < 1.01 * payload + 10_000
    assert federation.ledger.total("down", 1, "update/fit") > payload


def test_the_same_state_is_not_sent_twice(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared)
    federation, state = small_federation(in_process(specs, FederatedSite), specs[0])
    federation.score(state, "val", 0)
    first = federation.ledger.total("down", 0, "scores/score")
    federation.score(state, "test", 0)
    assert federation.ledger.total("down", 0, "scores/score") - first < first / 10


def test_scores_are_the_pooled_mean_of_what_sites_disclose(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared)
    federation, state = small_federation(in_process(specs, FederatedSite), specs[0])
    scores = federation.score(state, "test", 0, pictures=True)
    table = np.array([case.dice for case in scores.cases])
    np.testing.assert_allclose(scores.dice, np.nanmean(table, axis=0), atol=1e-4)
    assert {case.site for case in scores.cases} == set(prepared.cohort.sites)
    assert all(png.startswith(b"\x89PNG") for png in scores.pictures.values())


def test_sites_disclose_nothing_where_they_may_not(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared, share_site_scores=False, share_pictures=False)
    federation, state = small_federation(in_process(specs, FederatedSite), specs[0])
    scores = federation.score(state, "test", 0, pictures=True)
    assert scores.cases == []
    assert scores.pictures == {}
    assert not np.isnan(scores.mean_dice)  # the masked sum is still there


@pytest.mark.parametrize("field", ["config_hash", "run"])
def test_a_site_of_another_run_refuses_by_name(prepared: PreparedCohort, field: str) -> None:
    specs = small_specs(prepared)
    specs[1] = specs[1].model_copy(update={field: "other"})
    federation, _ = small_federation(in_process(specs, FederatedSite), specs[0])
    with pytest.raises(RoundError, match=f"site-b refuses .* its {field} is other"):
        federation.total_slices()


def test_a_site_whose_training_diverges_sends_nothing_and_is_named(
    prepared: PreparedCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = small_specs(prepared)
    federation, state = small_federation(in_process(specs, FederatedSite), specs[0])
    bad = {name: np.full_like(value, np.nan) for name, value in state.items()}
    before = federation.manifest.flatten(state).copy()
    slices = federation.total_slices()
    with pytest.raises(RoundError, match=r"site site-a: the loss is not finite in round 1, step 1.*learning_rate"):
        federation.train(bad, 1, slices)
    np.testing.assert_array_equal(federation.manifest.flatten(state), before)


def test_an_update_over_the_clip_is_refused_not_saturated(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared, update_clip=1e-6)
    federation, state = small_federation(in_process(specs, FederatedSite), specs[0])
    with pytest.raises(RoundError, match=r"lane 'update' holds .* over its clip"):
        run_rounds(federation, state, lambda *_: None)
