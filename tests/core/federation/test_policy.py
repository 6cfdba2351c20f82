"""What a site insists on, whatever a driver asks, and what its refusals tell."""

from pathlib import Path

import pytest
from support.federations import small_cohort, small_federation, small_specs

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import ConfigError, RoundError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import in_process
from fedsam_core.federation.policy import VARIABLE, SitePolicy, read_policy
from fedsam_core.federation.privacy import PrivacyConfig
from fedsam_core.federation.site import FederatedSite
from fedsam_core.secagg.refusals import AgainstPolicy


def with_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "policy.yaml"))


def test_a_policy_tightens_and_never_loosens() -> None:
    strict = SitePolicy(share_site_scores=False, share_pictures=False, key_dir=Path("/keys"))
    own = strict.tighten(FederationConfig(share_site_scores=True, share_pictures=True))
    assert (own.share_site_scores, own.share_pictures, own.key_dir) == (False, False, Path("/keys"))
    asked = FederationConfig(share_site_scores=False, min_contributors=5)
    assert SitePolicy(share_site_scores=True, min_contributors=4, max_rounds=10).tighten(asked) == asked
    noisy = FederationConfig(privacy=PrivacyConfig(clip=1.0, noise_multiplier=0.5), weights="equal", bits=24)
    assert SitePolicy(noise_multiplier=0.5).tighten(noisy) == noisy
    with pytest.raises(AgainstPolicy, match=r"at least 0\.6 of noise"):
        SitePolicy(noise_multiplier=0.6).tighten(noisy)


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        ({"masked_only": True}, "federation.secure_sum=masked"),
        ({"min_contributors": 4}, "federation.min_contributors=4"),
        ({"roster": Path("/roster.txt")}, "set federation.roster"),
        ({"max_rounds": 9}, "at most 9 rounds"),
        ({"noise_multiplier": 0.5}, "at least 0.5 of noise"),
    ],
)
def test_what_all_sites_must_agree_on_is_refused(policy: dict[str, object], complaint: str) -> None:
    with pytest.raises(AgainstPolicy, match=complaint):
        SitePolicy(**policy).tighten(FederationConfig(secure_sum="plain"))


@pytest.mark.parametrize("text", ["masked: true", "[1]", "masked_only: perhaps", "a: [", "min_contributors: 2"])
def test_a_broken_policy_stops_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with_policy(tmp_path, monkeypatch, text)
    with pytest.raises(ConfigError, match=f"{VARIABLE}=.*is no policy of a site"):
        read_policy()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing.yaml"))
    with pytest.raises(ConfigError, match="is no policy of a site"):
        read_policy()


def test_no_variable_or_an_empty_file_is_the_permissive_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_policy() == SitePolicy()
    with_policy(tmp_path, monkeypatch, "# nothing\n")
    assert read_policy() == SitePolicy()


def test_a_run_in_the_plain_is_refused_by_a_site_whose_policy_is_masked(
    prepared: PreparedCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_policy(tmp_path, monkeypatch, "masked_only: true\n")
    specs = small_specs(prepared, secure_sum="plain")
    with pytest.raises(RoundError, match="site-a cannot take part: AgainstPolicy: this site takes part in masked"):
        small_federation(in_process(specs, FederatedSite), specs[0])


def test_a_site_that_is_told_to_train_otherwise_than_the_rest_gets_no_sum(prepared: PreparedCohort) -> None:
    """With no learning rate at the others, the sum would be the one site's update."""
    specs = small_specs(prepared)
    idle = specs[1].learning.model_copy(update={"learning_rate": 1e-30})
    specs[1:] = [spec.model_copy(update={"learning": idle}) for spec in specs[1:]]
    federation, _ = small_federation(in_process(specs, FederatedSite), specs[0])
    with pytest.raises(RoundError, match=r"OtherAttempt: site site-b refuses .* its config_hash is"):
        federation._weigh()


def test_a_refusal_does_not_tell_the_value_that_it_is_about(
    prepared: PreparedCohort, caplog: pytest.LogCaptureFixture
) -> None:
    specs = small_specs(prepared, attempts=1)
    federation, _state = small_federation(in_process(specs, FederatedSite), specs[0])
    slices = federation.total_weight()
    with pytest.raises(RoundError) as refused:
        federation.train(1, slices / 1000)  # weights of several hundred, which no lane has room for
    assert "UnfitValues" in str(refused.value)
    assert "lane" not in str(refused.value)
    assert "over its clip" in caplog.text  # the site's own log says it all
    with pytest.raises(RoundError, match="was told another total weight than before"):
        federation.train(1, slices)


def test_slices_and_scores_are_not_summed_again_without_a_site(tmp_path: Path) -> None:
    prepared = small_cohort(tmp_path, sites=4)
    specs = small_specs(prepared, attempts=1)
    engine = in_process(specs, FederatedSite)
    federation, _state = small_federation(engine, specs[0])
    federation.total_weight()
    federation.score("test", 0)
    engine._sites["site-d"] = FederatedSite(specs[3])  # it was restarted and is not open
    with pytest.raises(RoundError, match="OpenedBefore: the weights sum of this state"):
        federation._weigh()
    engine._sites["site-d"] = FederatedSite(specs[3])
    federation.attendance.take_back("site-d")
    with pytest.raises(RoundError, match="OpenedBefore: the scores/test sum of this state"):
        federation.score("test", 2)
