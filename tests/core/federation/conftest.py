"""One small cohort for all tests of this folder."""

import pytest
from support.federations import small_cohort

from fedsam_core.data.preprocess import PreparedCohort


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedCohort:
    return small_cohort(tmp_path_factory.mktemp("cohort"))
