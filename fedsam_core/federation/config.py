"""How a federation is run."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from fedsam_core.settings import Settings


class FederationConfig(Settings):
    """Rounds, the secure sum, and what a site discloses."""

    rounds: int = Field(10, ge=1, description="global steps")
    secure_sum: Literal["masked", "plain"] = Field(
        "masked", description="masked: only the sum is ever opened; plain: for comparison, named in the run's tags"
    )
    bits: Literal[16, 20, 24, 32] = Field(
        32, description="bits of a parameter on the wire; the first round, which knows no clip yet, takes 32"
    )
    update_clip: float = Field(
        2.0, gt=0, le=1e6, description="largest change of one parameter in a round; beyond it the site refuses to send"
    )
    clip_quantile: float = Field(
        1.0,
        gt=0.5,
        le=1,
        description="a group's clip is this quantile of all sites' changes in the round before; 1: max",
    )
    clip_headroom: float = Field(2.0, ge=1, description="times which the clip is; what is beyond is cut and counted")
    min_contributors: int = Field(3, ge=3, description="fewest sites in any sum that is opened")
    attempts: int = Field(2, ge=1, description="tries of a sum, each with fresh keys, before the run gives up")
    roster: Path | None = Field(
        None, description="file of the consortium's public keys (`fedsam keys`); none: a development roster"
    )
    key_dir: Path = Field(Path("~/.fedsam/keys"), description="with a roster: where each site's node has its SITE.key")
    keep_sums: bool = Field(
        True, description="keep each round's sum, so that `fedsam verify` can repeat the run's global states"
    )
    deadline_s: float = Field(3600.0, gt=0, description="seconds that the sites have for each stage of a round")
    validate_every: int = Field(1, ge=0, description="rounds between validations of the global state; 0 for none")
    share_site_scores: bool = Field(
        True,
        description="sites report their own Dice in the open, beside the masked sum of all; false keeps it at the site",
    )
    share_pictures: bool = Field(
        False,
        description="sites send one overlay picture of a test case to the run at its end: an image leaves the site",
    )

    @field_validator("key_dir")
    @classmethod
    def _of_any_node(cls, value: Path) -> Path:
        if not (value.is_absolute() or value.parts[:1] == ("~",)):
            raise ValueError("must be absolute, or begin with ~ (the home of whoever runs the site's node)")
        return value
