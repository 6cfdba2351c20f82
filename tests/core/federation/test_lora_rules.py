"""LoRA rules, weights, ranks, local layers and privacy, each in whole rounds of a small federation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from support.federations import put_back, small_cohort, small_federation, small_specs

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import RoundError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import InProcessEngine, in_process
from fedsam_core.federation.lanes import parts_of, private_step
from fedsam_core.federation.lora_rules import LoraLayer, lora_layers
from fedsam_core.federation.privacy import Accountant
from fedsam_core.federation.products import dense
from fedsam_core.federation.rotation import padded_size
from fedsam_core.federation.rounds import Federation
from fedsam_core.federation.site import FederatedSite
from fedsam_core.learning.learner import Fit
from fedsam_core.selection import LayerSelection, LoraTargets, preset

LORA = preset("lora", 2)


def run(prepared: PreparedCohort, selection: LayerSelection | None = LORA, **federation: Any) -> Federation:
    specs = small_specs(prepared, selection, **{"validate_every": 0, "attempts": 1, **federation})
    return small_federation(in_process(specs, FederatedSite), specs[0])[0]


def sites_of(federation: Federation) -> dict[str, FederatedSite]:
    engine = federation.engine
    assert isinstance(engine, InProcessEngine)
    return engine._sites


def product(layer: LoraLayer, vector: np.ndarray) -> np.ndarray:
    b, a = layer.factors(vector)
    return dense(b, a)


def mean_products(federation: Federation, before: np.ndarray, fits: dict[str, Fit]) -> dict[str, np.ndarray]:
    """The mean of the sites' products by layer, from what only the sites know."""
    total = sum(fit.slices for fit in fits.values())
    return {
        layer.name: sum(
            fit.slices / total * product(layer, before.astype(np.float64) + fit.update) for fit in fits.values()
        )
        for layer in lora_layers(federation.manifest)
    }


@pytest.mark.parametrize(("rule", "bits"), [("ffa", 32), ("rolora", 32), ("ffa", 16), ("rolora", 16)])
def test_with_one_factor_at_rest_the_global_product_is_the_mean_of_the_sites(
    prepared: PreparedCohort, fits: dict[str, Fit], rule: str, bits: int
) -> None:
    federation = run(prepared, rule=rule, bits=bits)
    weight = federation.total_weight()
    for number in (1, 2):
        before = federation.server.state.vector
        step, _ = federation.train(number, weight)
        expected = mean_products(federation, before, fits)
        for layer in lora_layers(federation.manifest):
            after = step.state.vector
            still, moved = ("a", "b") if rule == "ffa" or number == 1 else ("b", "a")
            places = {"a": layer.a_place, "b": layer.b_place}
            assert np.array_equal(after[places[still]], before[places[still]])
            assert not np.array_equal(after[places[moved]], before[places[moved]])
            # A value of the product is off by at most the other factor's row times the quantiser's bound.
            other = layer.factors(before)[0 if still == "b" else 1]
            bound = np.abs(other).sum(axis=1 if still == "b" else 0).max() * (step.precision.bound + 2e-7)
            np.testing.assert_allclose(product(layer, after), expected[layer.name], rtol=0, atol=bound)
        assert step.lora.relative < 1e-3


def test_the_mean_of_factors_is_not_the_mean_of_products_and_the_meter_says_by_how_much(
    prepared: PreparedCohort, fits: dict[str, Fit]
) -> None:
    federation = run(prepared, meter_probes=512)
    weight = federation.total_weight()
    federation.train(1, weight)  # B is zero before the first round
    before = federation.server.state.vector
    step, _ = federation.train(2, weight)
    expected = mean_products(federation, before, fits)
    layers = lora_layers(federation.manifest)
    assert set(step.lora.inexactness) == {layer.name for layer in layers}
    for layer in layers:
        off = np.linalg.norm(expected[layer.name] - product(layer, step.state.vector))
        assert step.lora.inexactness[layer.name] == pytest.approx(off, rel=0.35, abs=1e-6)
    assert 1e-4 < step.lora.relative < 1


@pytest.mark.parametrize("rule", ["product-dense", "product-sketch"])
def test_the_product_rules_take_the_best_factors_of_the_mean_product(
    prepared: PreparedCohort, fits: dict[str, Fit], rule: str
) -> None:
    federation = run(prepared, rule=rule, oversampling=16, power_iterations=1 if rule == "product-sketch" else 0)
    weight = federation.total_weight()
    for number in (1, 2):
        before = federation.server.state.vector
        step, totals = federation.train(number, weight)
        assert len(totals) == (1 if rule == "product-dense" else 4)
        expected = mean_products(federation, before, fits)
        for layer in lora_layers(federation.manifest):
            singular = np.linalg.svd(expected[layer.name], compute_uv=False)
            optimum = np.linalg.norm(singular[layer.rank :])
            off = np.linalg.norm(expected[layer.name] - product(layer, step.state.vector))
            assert off <= 1.02 * optimum + 1e-5
            assert step.lora.truncation[layer.name] == pytest.approx(optimum / np.linalg.norm(singular), abs=2e-3)


@pytest.mark.parametrize("settings", [{"rule": "product-sketch"}, {"rule": "rolora", "bits": 8}, {"scaffold": True}])
def test_masked_and_plain_runs_are_bit_equal_under_every_rule(prepared: PreparedCohort, settings: Any) -> None:
    hashes = []
    for kind in ("masked", "plain"):
        federation = run(prepared, secure_sum=kind, broadcast_bits=12, **settings)
        weight = federation.total_weight()
        hashes.append([federation.train(number, weight)[0].state.hash for number in (1, 2)])
    assert hashes[0] == hashes[1]


class Losing:
    """An engine that loses a site when it is asked for `method`."""

    def __init__(self, inner: InProcessEngine, method: str, site: str) -> None:
        self._inner, self._method, self._site = inner, method, site

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def call(self, method: str, args: Any, deadline: float, *rest: Any) -> Any:
        replies, lost = self._inner.call(method, args, deadline, *rest)
        if method == self._method and replies.pop(self._site, None) is not None:
            lost[self._site] = "the line broke"
        return replies, lost


def test_a_site_lost_between_two_sums_of_a_round_costs_the_lora_step_and_shows_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = small_cohort(tmp_path, sites=4)
    specs = small_specs(prepared, preset("flap", 2), rule="product-sketch", attempts=1, validate_every=0)
    engine = Losing(in_process(specs, FederatedSite), "project", "site-d")
    federation, _ = small_federation(engine, specs[0])
    weight, before = federation.total_weight(), federation.server.state.tensors
    step, totals = federation.train(1, weight)
    assert step.lora.skipped
    assert len(totals) == 1
    assert any("LoRA step was given up" in why for why in federation.failed)
    assert "OpenedBefore: the update/1 sum goes on from the update sum" in caplog.text  # sites refuse, not the driver
    after = step.state.tensors
    assert all(np.array_equal(after[name], before[name]) for name in after if ".lora_" in name)
    assert not all(np.array_equal(after[name], before[name]) for name in after)
    engine._method = "nothing"
    assert not federation.train(2, weight)[0].lora.skipped  # the next round goes on with all


@pytest.mark.parametrize("bits", [12, 32])
def test_a_site_that_is_late_in_every_round_costs_its_own_update_alone(tmp_path: Path, bits: int) -> None:
    """It has trained, and would have something to say to the later sums: but not to the first."""
    prepared = small_cohort(tmp_path, sites=4)
    specs = small_specs(prepared, preset("flap", 2), rule="product-sketch", attempts=1, validate_every=0, bits=bits)
    engine = Losing(in_process(specs, FederatedSite), "fit", "site-d")
    federation, _ = small_federation(engine, specs[0])
    weight = federation.total_weight()
    for number in (1, 2):
        step, totals = federation.train(number, weight)
        assert not step.lora.skipped
        assert all(total.contributors == ("site-a", "site-b", "site-c") for total in totals)
        assert totals[0].lost == {"site-d": "the line broke"}


@pytest.mark.parametrize("bits", [8, 12, 16, 32])
def test_every_site_decodes_the_state_that_the_server_has(prepared: PreparedCohort, bits: int) -> None:
    federation = run(prepared, preset("flap", 2), broadcast_bits=bits)
    weight = federation.total_weight()
    states = [federation.train(number, weight)[0].state for number in (1, 2, 3)[:2]]
    federation.score("val", 2)
    for site in sites_of(federation).values():
        assert site._held is not None
        assert site._held.hash == states[-1].hash
    down = federation.ledger.total("down", 2, "update/fit") / 3 / federation.manifest.shared_size
    assert down < {8: 1.1, 12: 1.6, 16: 2.1, 32: 4.1}[bits]


def test_what_coding_leaves_over_is_added_to_the_next_step(prepared: PreparedCohort) -> None:
    federation = run(prepared, preset("partial-decoder"), broadcast_bits=8)
    weight, start = federation.total_weight(), federation.server.state.vector.astype(np.float64)
    wanted = np.zeros_like(start)
    for number in (1, 2):
        step, _ = federation.train(number, weight)
        wanted += np.concatenate([step.update.means[name] for name in step.update.means])
    got = federation.server.state.vector - start
    assert np.abs(federation.server.residual).max() > 0
    np.testing.assert_allclose(got + federation.server.residual, wanted, atol=1e-6)


def test_weights_by_slices_cases_or_alike(prepared: PreparedCohort, fits: dict[str, Fit]) -> None:
    for kind in ("slices", "cases", "equal"):
        federation = run(prepared, weights=kind)
        step, _ = federation.train(1, federation.total_weight())
        amounts = {
            "slices": [fit.slices for fit in fits.values()],
            "cases": [len(prepared.cohort.select(site, "train")) for site in fits],
            "equal": [1] * len(fits),
        }[kind]
        expected = np.average([fit.update for fit in fits.values()], axis=0, weights=amounts)
        moved = step.state.vector - federation.manifest.flatten(small_start(federation))
        np.testing.assert_allclose(moved, expected, atol=1e-6)


def small_start(federation: Federation) -> Any:
    """The state before the first round, as a site that is opened anew draws it."""
    site = FederatedSite(next(iter(sites_of(federation).values())).spec)
    site.open()
    assert site._held is not None
    return site._held.tensors


def test_steps_are_normalized_where_sites_take_different_numbers(
    prepared: PreparedCohort, fits: dict[str, Fit]
) -> None:
    specs = small_specs(prepared, LORA, normalize_steps=True, validate_every=0)
    epochs = specs[0].learning.model_copy(update={"local_epochs": 0.5, "batch_size": 2})
    specs = [spec.model_copy(update={"learning": epochs}) for spec in specs]
    federation, state = small_federation(in_process(specs, FederatedSite), specs[0])
    step, _ = federation.train(1, federation.total_weight())
    weights = np.array([fit.slices for fit in fits.values()], np.float64)
    weights /= weights.sum()
    steps = np.array([fit.steps for fit in fits.values()])
    expected = (weights * steps).sum() * sum(
        w * fit.update.astype(np.float64) / fit.steps for w, fit in zip(weights, fits.values(), strict=True)
    )
    np.testing.assert_allclose(step.state.vector - federation.manifest.flatten(state), expected, atol=1e-6)


def test_the_meter_counts_steps_as_the_update_does(prepared: PreparedCohort) -> None:
    """`ffa` is exact, so the meter has nothing to show."""
    specs = small_specs(prepared, LORA, normalize_steps=True, rule="ffa", validate_every=0)
    epochs = specs[0].learning.model_copy(update={"local_epochs": 0.5, "batch_size": 2})
    specs = [spec.model_copy(update={"learning": epochs}) for spec in specs]
    federation, _ = small_federation(in_process(specs, FederatedSite), specs[0])
    step, _ = federation.train(1, federation.total_weight())
    assert step.lora.relative < 1e-3


def test_scaffolds_common_variate_is_the_weighted_mean_of_the_sites(
    prepared: PreparedCohort, fits: dict[str, Fit], tmp_path: Path
) -> None:
    federation = run(prepared, scaffold=True, site_dir=tmp_path)
    weight = federation.total_weight()
    total = np.zeros(federation.manifest.shared_size)
    for number in (1, 2):
        step, _ = federation.train(number, weight)
        total += sum(
            fit.slices / weight * fit.control.astype(np.float64) for fit in fits.values() if fit.control is not None
        )
    assert step.state.control is not None
    np.testing.assert_allclose(step.state.control, total, atol=1e-6)
    assert np.abs(total).max() > 1e-4


def test_what_coding_leaves_over_of_the_common_variate_is_added_too(
    prepared: PreparedCohort, fits: dict[str, Fit], tmp_path: Path
) -> None:
    """Else each round's rounding would stay in it, and it would no longer be the sites' mean."""
    federation = run(prepared, scaffold=True, broadcast_bits=8, rounds=4, site_dir=tmp_path)
    weight = federation.total_weight()
    total = np.zeros(federation.manifest.shared_size)
    for number in (1, 2, 3, 4):
        step, _ = federation.train(number, weight)
        total += sum(
            fit.slices / weight * fit.control.astype(np.float64) for fit in fits.values() if fit.control is not None
        )
    assert step.state.control is not None
    left = federation.server.control_residual
    assert np.abs(left).max() > 1e-6
    np.testing.assert_allclose(step.state.control + left, total, atol=1e-5)


# What stays at the site

LOCAL = LayerSelection(
    name="fedbn", lora=LoraTargets(encoder=("q", "v"), rank=2), local=("decoder.norms", "head", "lora.scale")
)


def test_local_layers_differ_by_site_are_never_sent_and_survive_a_restart(
    prepared: PreparedCohort, tmp_path: Path
) -> None:
    def two_rounds(restart: bool, folder: Path) -> tuple[str, dict[str, Any]]:
        federation = run(prepared, LOCAL, site_dir=folder)
        weight, sites = federation.total_weight(), sites_of(federation)
        federation.train(1, weight)
        if restart:
            sites["site-b"] = FederatedSite(sites["site-b"].spec)
            federation.attendance.lose("site-b", "restarted")  # as the engine would have found when it called
        step, _ = federation.train(2, weight)
        kept = {name: site._site.memory.latest() for name, site in sites.items()}
        return step.state.hash, kept

    usual, kept = two_rounds(False, tmp_path / "usual")
    restarted, again = two_rounds(True, tmp_path / "restarted")
    assert usual == restarted
    for site, found in kept.items():
        assert found is not None
        assert again[site] is not None
        assert all(np.array_equal(value, again[site][1][name]) for name, value in found[1].items())
    names = [name for name in kept["site-a"][1] if name.startswith("local/")]
    assert any("norm" in name for name in names)
    assert any("lora_scale" in name for name in names)
    assert any(not np.array_equal(kept["site-a"][1][name], kept["site-b"][1][name]) for name in names)


def test_each_site_fine_tunes_a_model_of_its_own_that_stays_with_it(prepared: PreparedCohort, tmp_path: Path) -> None:
    from fedsam_core.trained import load_trained

    federation = run(prepared, preset("flap", 2), personal_steps=2, site_dir=tmp_path)
    federation.train(1, federation.total_weight())
    before = federation.ledger.total("up")
    scores = federation.score("test", 2, personal=True)
    assert set(scores.by_site) == set(prepared.cohort.sites)
    assert federation.ledger.total("up") - before < 20_000  # Dice, keys and shares
    hashes = set()
    for site in prepared.cohort.sites:
        trained = load_trained(tmp_path / "test-run" / site / "adapter")
        hashes.add(sum(float(value.double().sum()) for value in trained.segmenter.state_dict().values()))
    assert len(hashes) == len(prepared.cohort.sites)


def test_a_site_s_own_model_is_closed_to_others_whatever_else_it_keeps(
    prepared: PreparedCohort, tmp_path: Path
) -> None:
    federation = run(prepared, preset("flap", 2), personal_steps=1, site_dir=tmp_path)
    federation.score("test", 0, personal=True)
    for site in prepared.cohort.sites:
        assert (tmp_path / "test-run" / site).stat().st_mode & 0o777 == 0o700


# Ranks


def test_sites_of_a_lower_rank_have_no_part_in_what_they_lack(tmp_path: Path, fits: dict[str, Fit]) -> None:
    prepared = small_cohort(tmp_path, sites=4)
    federation = run(prepared, preset("lora", 4), site_ranks={"site-a": 2}, weights="equal")
    before = federation.server.state.vector.astype(np.float64)
    step, (total,) = federation.train(1, federation.total_weight())
    lanes = {lane.name: lane for lane in total.layout.lanes}
    assert lanes["update/lora.encoder.A[2:4]"].sites == ("site-b", "site-c", "site-d")
    assert lanes["update/lora.encoder.A[0:2]"].sites is None
    for layer in lora_layers(federation.manifest):
        for kind, place in (("a", layer.a_place), ("b", layer.b_place)):
            shape = getattr(layer, kind).shape
            moved = (step.state.vector.astype(np.float64) - before)[place].reshape(shape)
            updates = {site: fit.update[place].reshape(shape) for site, fit in fits.items()}
            low, high = (np.s_[:2], np.s_[2:]) if kind == "a" else (np.s_[:, :2], np.s_[:, 2:])
            assert not updates["site-a"][high].any()
            for part, who in ((low, list(fits)), (high, ["site-b", "site-c", "site-d"])):
                mean = np.mean([updates[site][part] for site in who], axis=0)
                np.testing.assert_allclose(moved[part], mean, atol=1e-6)


def test_ranks_that_too_few_sites_have_are_refused(prepared: PreparedCohort) -> None:
    federation = run(prepared, preset("lora", 4), site_ranks={"site-a": 2}, weights="equal")
    with pytest.raises(RoundError, match=r"would be the sum of 2 sites, fewer than 3"):
        federation.train(1, federation.total_weight())


def test_products_of_any_rank_are_summed_alike(prepared: PreparedCohort) -> None:
    federation = run(prepared, preset("lora", 4), rule="product-sketch", site_ranks={"site-a": 2})
    step, totals = federation.train(1, federation.total_weight())
    assert totals[-1].contributors == prepared.cohort.sites
    assert step.lora.relative < 0.5


@pytest.mark.parametrize("weights", ["slices", "cases"])
def test_ranks_by_site_are_refused_where_two_sums_of_weights_would_show_a_site_s(weights: str) -> None:
    with pytest.raises(ValidationError, match="weights=equal"):
        FederationConfig(site_ranks={"site-a": 2}, weights=weights)
    FederationConfig(site_ranks={"site-a": 2}, weights=weights, rule="product-dense")


# Privacy


def private(prepared: PreparedCohort, folder: Path, **settings: Any) -> Federation:
    privacy = {"clip": 0.05, "noise_multiplier": settings.pop("noise_multiplier", 0.01)}
    return run(prepared, **{"weights": "equal", "bits": 24, "privacy": privacy, "site_dir": folder, **settings})


def test_a_private_sum_holds_the_noisy_update_and_nothing_else(
    prepared: PreparedCohort, fits: dict[str, Fit], tmp_path: Path
) -> None:
    federation = private(prepared, tmp_path)
    before = federation.server.state.vector
    step, (total,) = federation.train(1, federation.total_weight())
    assert [lane.name for lane in total.layout.lanes] == ["update/all"]
    clipped = [fit.update * min(1, 0.05 / np.linalg.norm(fit.update)) for fit in fits.values()]
    assert max(np.linalg.norm(fit.update) for fit in fits.values()) > 0.05
    noise = (step.state.vector - before.astype(np.float64) - np.mean(clipped, axis=0)) * 3
    assert noise.std() == pytest.approx(0.01 * 0.05, rel=0.05)
    assert abs(noise.mean()) < 0.01 * 0.05 / np.sqrt(noise.size) * 4
    assert step.epsilon is not None
    assert federation.train(2, 3.0)[0].epsilon > step.epsilon


def test_the_noise_of_a_round_is_drawn_once_even_by_a_site_that_restarts(
    prepared: PreparedCohort, tmp_path: Path
) -> None:
    federation = private(prepared, tmp_path / "one")
    first = federation.train(1, 3.0)[0].state.hash
    sites = sites_of(federation)
    specs = {site: one.spec for site, one in sites.items()}
    engine = in_process(list(specs.values()), FederatedSite)  # all restarted: nothing but their memory is left
    again, _ = small_federation(engine, next(iter(specs.values())))
    assert again.train(1, 3.0)[0].state.hash == first
    assert private(prepared, tmp_path / "other").train(1, 3.0)[0].state.hash != first


def test_a_site_gives_one_noisy_update_a_round(prepared: PreparedCohort, tmp_path: Path) -> None:
    """A driver that asks for a round from a second state would else get a second sum, and tell one sum's epsilon."""
    federation = private(prepared, tmp_path, noise_multiplier=0.1, attempts=1)
    state = federation.server.state.tensors
    hashes = [federation.train(1, 3.0)[0].state.hash]
    put_back(federation, {name: value + np.float32(1e-3) for name, value in state.items()})
    with pytest.raises(RoundError, match="refuses round 1: it has given an update of it with its noise"):
        federation.train(1, 3.0)
    put_back(federation, state)
    hashes.append(federation.train(1, 3.0)[0].state.hash)  # the same again is no second one
    assert hashes[0] == hashes[1]
    for site in sites_of(federation).values():
        site._fit = None  # it was restarted
        for number in range(1, 5):  # and the secret of round 1 is forgotten
            site._site.memory.save(number, {})
    put_back(federation, state)
    with pytest.raises(RoundError, match="refuses round 1"):
        federation.train(1, 3.0)


def test_epsilon_is_of_the_round_with_most_values(prepared: PreparedCohort, tmp_path: Path) -> None:
    """RoLoRA's two kinds of rounds have A's values or B's, of which the decoder has fewer."""
    federation = private(prepared, tmp_path, noise_multiplier=8.0, rule="rolora", bits=20)
    server = federation.server
    sizes = {number: parts_of(server.begin(number, 3.0).about, 0)["all"].size for number in (1, 2)}
    assert sizes[1] < sizes[2]
    assert server.accountant is not None
    by_round = []
    for number in (1, 2):
        about = server.begin(number, 3.0).about
        size, step = padded_size(sizes[number]), private_step(about)
        one = Accountant(about.config.privacy, about.minimum, size, step)  # type: ignore[arg-type]
        one.spend(3)
        by_round.append(one.epsilon)
    server.accountant.spend(3)
    assert by_round[0] < by_round[1] == server.accountant.epsilon


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rule": "product-sketch"}, "has no bound"),
        ({"weights": "slices"}, "weights=equal"),
        ({"scaffold": True}, "scaffold"),
        ({"normalize_steps": True}, "normalize_steps"),
        ({"site_ranks": {"a": 1}}, "site_ranks"),
        ({"bits": 32}, "bits=24"),
        ({"secure_sum": "plain"}, "secure_sum=masked"),
    ],
)
def test_privacy_is_refused_with_what_has_no_bound(settings: Any, why: str) -> None:
    good = {"weights": "equal", "bits": 24, "privacy": {"clip": 1.0, "noise_multiplier": 1.0}}
    FederationConfig.model_validate(good)
    with pytest.raises(ValidationError, match=why):
        FederationConfig.model_validate(good | settings)
