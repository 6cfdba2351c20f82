"""Rounds on the in-process engine: repeatable, exact, and silent about each site."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.federations import flat_mean, put_back, run_small, small_cohort, small_federation, small_specs

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import RoundError
from fedsam_core.federation.engine import InProcessEngine, in_process
from fedsam_core.federation.rounds import run_rounds
from fedsam_core.federation.site import FederatedSite
from fedsam_core.learning.learner import Fit
from fedsam_core.secagg.quantize import Encoder


class Recording:
    """An engine that keeps every reply that the driver receives."""

    def __init__(self, inner: InProcessEngine) -> None:
        self._inner = inner
        self.replies: list[tuple[str, str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def call(self, method: str, args: Any, deadline: float, *rest: Any) -> Any:
        replies, lost = self._inner.call(method, args, deadline, *rest)
        self.replies += [(method, site, reply) for site, reply in replies.items()]
        return replies, lost


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
    slices = federation.total_weight()
    assert slices == pytest.approx(
        sum(len(prepared.load(case.id).image) for case in prepared.cohort.select(split="train")), abs=0.01
    )
    step, (total,) = federation.train(1, slices)
    new, update = step.state.tensors, step.update
    mean = flat_mean(federation, update)
    weights = np.array([fit.slices for fit in fits.values()], dtype=np.float64)
    updates = np.stack([fit.update.astype(np.float64) for fit in fits.values()])
    expected = (weights[:, None] * updates).sum(axis=0) / weights.sum()
    bound = update.precision.bound
    assert update.precision.rms < update.precision.largest < bound
    assert update.precision.cut == 0
    flat = federation.manifest.flatten
    assert np.abs(expected).max() > 1000 * bound
    np.testing.assert_allclose(mean, expected, rtol=0, atol=bound * (1 + 1e-6))
    # The error that sites measured themselves is the one that is there.
    assert np.abs(mean - expected).max() <= update.precision.largest * 1.001 + 1e-12
    np.testing.assert_allclose(flat(new) - flat(state).astype(np.float64), expected, atol=2 * bound + 1e-6)
    loss = np.average([fit.loss for fit in fits.values()], weights=weights)
    assert update.loss == pytest.approx(loss, abs=1e-5)
    assert total.contributors == ("site-a", "site-b", "site-c")
    pooled = [sum(one) for one in zip(*[(f.dice_numerator, f.dice_denominator) for f in fits.values()], strict=True)]
    np.testing.assert_allclose(update.dice, pooled[0] / pooled[1], atol=1e-4)


def shows(message: bytes, vector: np.ndarray) -> bool:
    """Whether a part of a quantized vector stands in a message: eight bytes of it, in either byte order.

    Every value of a short vector and of the last lanes (weight, loss) is looked for, of a long one every 500th.
    """
    places = range(vector.size - 1) if vector.size < 1000 else [*range(0, vector.size - 3, 500), vector.size - 2]
    parts = [vector[at : at + 2] for at in places] if vector.size > 1 else [vector]
    return any(part.astype(order).tobytes() in message for part in parts if part.any() for order in ("<u4", ">u4"))


def contributions(prepared: PreparedCohort, monkeypatch: pytest.MonkeyPatch, secure_sum: str) -> list[Any]:
    """All sums of a short run: (method, site, every message of that site in that sum, its vector before masking)."""
    vectors: list[np.ndarray] = []

    filled = Encoder.vector

    def remember(self: Encoder) -> np.ndarray:
        vectors.append(filled(self).copy())
        return vectors[-1].copy()

    monkeypatch.setattr(Encoder, "vector", remember)
    specs = small_specs(prepared, secure_sum=secure_sum)
    engine = Recording(in_process(specs, FederatedSite))
    federation, _state = small_federation(engine, specs[0])
    federation.train(1, federation.total_weight())
    federation.score("test", 1, pictures=True)
    found, messages = [], {site: [] for site in engine.sites}
    for method, site, reply in engine.replies:
        if method == "advertise":
            messages[site] = []  # a new sum begins
        if method in ("open", "enroll", "disclose"):
            continue
        assert isinstance(reply, bytes)  # no dictionary, number or array beside the messages
        messages[site].append(reply)
        if method in ("weigh", "fit", "score"):
            found.append((method, site, messages[site], vectors[len(found)]))
    assert len(found) == len(vectors) == 9  # one a site and sum
    told = [reply for method, _, reply in engine.replies if method == "disclose"]
    assert all(set(reply) == {"summary", "picture"} for reply in told)
    assert not [case.id for case in prepared.cohort.cases if case.id in repr([reply["summary"] for reply in told])]
    return found


def test_no_message_to_the_driver_shows_a_sites_update_weight_or_loss(
    prepared: PreparedCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method, site, messages, vector in contributions(prepared, monkeypatch, "masked"):
        for message in messages:
            assert not shows(message, vector), f"{method} of {site}"
        if method == "fit":
            masked = max(messages, key=len)
            words = np.frombuffer(masked[-64 - 4 * vector.size : -64], "<u4")  # before the signature
            assert (words == vector).mean() < 0.001
            assert abs(np.corrcoef(words.astype(np.float64), vector.view(np.int32))[0, 1]) < 0.02
            histogram, _ = np.histogram(words, bins=16, range=(0, 2**32))
            assert ((histogram - words.size / 16) ** 2 / (words.size / 16)).sum() < 60  # chi-square, 15 degrees


def test_the_plain_sum_shows_them_so_the_test_above_can_fail(
    prepared: PreparedCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method, site, messages, vector in contributions(prepared, monkeypatch, "plain"):
        assert shows(messages[-1], vector), f"{method} of {site}"
        assert shows(messages[-1], vector[-2:])  # weight and loss, or the last class


def test_ledger_counts_the_serialized_messages(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared)
    engine = Recording(in_process(specs, FederatedSite))
    federation, _state = small_federation(engine, specs[0])
    slices = federation.total_weight()
    engine.replies.clear()
    federation.train(1, slices)
    up = sum(len(reply) for _, _, reply in engine.replies)
    assert federation.ledger.total("up", 1) == up
    payload = 3 * federation.manifest.bytes_per_site_round
    assert payload < up < 1.01 * payload + 10_000
    assert federation.ledger.total("down", 1, "update/fit") < 10_000  # sites have drawn the first state themselves
    federation.train(2, slices)
    assert payload < federation.ledger.total("down", 2, "update/fit") < 1.01 * payload + 10_000


def test_the_same_state_is_not_sent_twice(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared)
    federation, state = small_federation(in_process(specs, FederatedSite), specs[0])
    put_back(federation, state)  # as if the sites had not drawn it themselves
    federation.score("val", 0)
    first = federation.ledger.total("down", 0, "scores/score")
    federation.score("test", 0)
    assert federation.ledger.total("down", 0, "scores/score") - first < first / 10


def test_scores_are_the_pooled_mean_of_what_sites_disclose(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared)
    federation, _state = small_federation(in_process(specs, FederatedSite), specs[0])
    scores = federation.score("test", 0, pictures=True)
    assert set(scores.by_site) == set(prepared.cohort.sites)
    assert all(group["cases"] == 1 for group in scores.by_site.values())
    for at, name in enumerate(prepared.cohort.classes):
        told = [group["per_class"][name]["dice"] for group in scores.by_site.values()]
        assert scores.dice[at] == pytest.approx(np.mean([dice for dice in told if dice is not None]), abs=1e-4)
    assert all(png.startswith(b"\x89PNG") for png in scores.pictures.values())


def test_sites_disclose_nothing_where_they_may_not(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared, share_site_scores=False, share_pictures=False)
    federation, _state = small_federation(in_process(specs, FederatedSite), specs[0])
    scores = federation.score("test", 0, pictures=True)
    assert scores.by_site == {}
    assert scores.pictures == {}
    assert not np.isnan(scores.mean_dice)  # the masked sum is still there


@pytest.mark.parametrize("field", ["config_hash", "run"])
def test_a_site_of_another_run_refuses_by_name(prepared: PreparedCohort, field: str) -> None:
    specs = small_specs(prepared)
    specs[1] = specs[1].model_copy(update={field: "other"})
    federation, _ = small_federation(in_process(specs, FederatedSite), specs[0])
    with pytest.raises(RoundError, match=f"site-b refuses .* its {field} is "):
        federation.total_weight()


def test_a_site_whose_training_diverges_sends_nothing_and_is_named(
    prepared: PreparedCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = small_specs(prepared)
    federation, state = small_federation(in_process(specs, FederatedSite), specs[0])
    bad = {name: np.full_like(value, np.nan) for name, value in state.items()}
    before = federation.manifest.flatten(state).copy()
    slices = federation.total_weight()
    put_back(federation, bad)
    with pytest.raises(RoundError, match=r"site site-a: the loss is not finite in round 1, step 1.*learning_rate"):
        federation.train(1, slices)
    np.testing.assert_array_equal(federation.manifest.flatten(state), before)


def test_an_update_over_the_clip_is_refused_not_saturated(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared, update_clip=1e-6)
    federation, _state = small_federation(in_process(specs, FederatedSite), specs[0])
    with pytest.raises(RoundError, match=r"its values do not fit their clips .* federation.update_clip"):
        run_rounds(federation, lambda *_: None)


def test_a_restarted_site_is_back_in_the_next_round(tmp_path: Path) -> None:
    prepared = small_cohort(tmp_path, sites=4)
    specs = small_specs(prepared)
    engine = in_process(specs, FederatedSite)
    federation, _state = small_federation(engine, specs[0])
    slices = federation.total_weight()
    engine._sites["site-b"] = FederatedSite(specs[1])  # its memory is gone, as after a crash
    _, (total,) = federation.train(1, slices)
    assert total.contributors == ("site-a", "site-c", "site-d")
    assert total.lost == {"site-b": "site site-b is not open (it may have been restarted)"}
    _, (total,) = federation.train(2, slices)
    assert total.contributors == ("site-a", "site-b", "site-c", "site-d")


def test_sites_told_different_tasks_refuse_each_other(prepared: PreparedCohort) -> None:
    """A driver that tells the others an absurd total would have one site's update alone in the sum."""
    specs = small_specs(prepared)

    class Lying(Recording):
        def call(self, method: str, args: Any, deadline: float, *rest: Any) -> Any:
            if method == "advertise" and args["site-b"]["task"]["total"]:
                args = {site: dict(own) for site, own in args.items()}
                for site in ("site-b", "site-c"):
                    args[site]["task"] = {**args[site]["task"], "total": 1e15}
            return super().call(method, args, deadline, *rest)

    federation, _state = small_federation(Lying(in_process(specs, FederatedSite)), specs[0])
    slices = federation.total_weight()
    with pytest.raises(RoundError, match="site-b refuses the update sum of round 1: its layout_hash is"):
        federation.train(1, slices)


def test_a_site_with_another_backbone_is_refused(prepared: PreparedCohort) -> None:
    specs = small_specs(prepared)
    specs[2] = specs[2].model_copy(update={"seed": 99})
    with pytest.raises(RoundError, match="site-c adapts another model than the driver"):
        small_federation(in_process(specs, FederatedSite), specs[0])
