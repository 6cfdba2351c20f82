"""What a site insists on, whatever a driver asks: a file on the site's own node, which can only tighten.

A driver hands every site its settings. A site whose node has `FEDSAM_SITE_POLICY=/etc/fedsam/policy.yaml` holds them
against that file:

    masked_only: true                    # never a plain sum
    roster: /etc/fedsam/roster.txt       # these keys, and no development roster
    key_dir: /etc/fedsam/keys            # where this site's own key is
    min_contributors: 4                  # no sum over fewer sites
    share_site_scores: false             # even where a run asks for them
    share_pictures: false
    max_rounds: 50                       # no run of more rounds
    noise_multiplier: 1.0                # no run without at least this noise (differential privacy)
"""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from fedsam_core.errors import ConfigError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.secagg.refusals import AgainstPolicy
from fedsam_core.settings import Settings

VARIABLE = "FEDSAM_SITE_POLICY"


class SitePolicy(Settings):
    """See the module. The defaults allow what every run allows."""

    masked_only: bool = Field(False, description="never a plain sum")
    roster: Path | None = Field(None, description="these keys, and no development roster")
    key_dir: Path | None = Field(None, description="where this site's own key is")
    min_contributors: int = Field(3, ge=3, description="no sum over fewer sites")
    share_site_scores: bool = Field(True, description="tell this site's own mean Dice, where a run asks for it")
    share_pictures: bool = Field(True, description="send one overlay picture, where a run asks for it")
    max_rounds: int | None = Field(None, ge=1, description="no run of more rounds")
    noise_multiplier: float | None = Field(
        None, gt=0, description="no run with less noise than this, as federation.privacy has it"
    )

    def tighten(self, asked: FederationConfig) -> FederationConfig:
        """The settings that this site goes by.

        Raises:
            AgainstPolicy: what is asked cannot be tightened without changing what all sites must agree on.
        """
        if self.masked_only and asked.secure_sum != "masked":
            raise AgainstPolicy("this site takes part in masked sums only: set federation.secure_sum=masked")
        if asked.min_contributors < self.min_contributors:
            raise AgainstPolicy(
                f"this site wants at least {self.min_contributors} sites in a sum: set "
                f"federation.min_contributors={self.min_contributors}"
            )
        if self.roster is not None and asked.roster is None:
            raise AgainstPolicy("this site pins a roster of keys: set federation.roster")
        if self.max_rounds is not None and asked.rounds > self.max_rounds:
            raise AgainstPolicy(f"this site takes part in at most {self.max_rounds} rounds: set federation.rounds")
        noise = asked.privacy.noise_multiplier if asked.privacy else 0.0
        if self.noise_multiplier is not None and noise < self.noise_multiplier:
            raise AgainstPolicy(
                f"this site wants differential privacy with at least {self.noise_multiplier:g} of noise: set "
                "federation.privacy.noise_multiplier"
            )
        own: dict[str, Any] = {
            "share_site_scores": asked.share_site_scores and self.share_site_scores,
            "share_pictures": asked.share_pictures and self.share_pictures,
        }
        own |= {key: path for key, path in (("roster", self.roster), ("key_dir", self.key_dir)) if path is not None}
        return asked.model_copy(update=own)


def read_policy() -> SitePolicy:
    """This node's policy; the permissive one where the variable is not set.

    Raises:
        ConfigError: the file is missing or no policy; a site with a broken policy takes part in nothing.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return SitePolicy()
    try:
        return SitePolicy.model_validate(yaml.safe_load(Path(path).read_text()) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{VARIABLE}={path} is no policy of a site ({reason}): correct it, or unset it") from error
