"""One small cohort for all tests of this folder."""

from typing import Any

import pytest
from support.federations import small_cohort

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.learning.learner import Fit, Learner


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedCohort:
    return small_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fit]:
    """What each site's training gave in the last round, taken where the driver cannot look. Ask for it last."""
    taken: dict[str, Fit] = {}
    original = Learner.fit

    def fit(self: Learner, *args: Any) -> Fit:
        taken[self.site] = original(self, *args)
        return taken[self.site]

    monkeypatch.setattr(Learner, "fit", fit)
    return taken
