"""How a federation is run."""

from typing import Literal

from pydantic import Field

from fedsam_core.settings import Settings


class FederationConfig(Settings):
    """Rounds, the secure sum, and what a site discloses."""

    rounds: int = Field(10, ge=1, description="global steps")
    secure_sum: Literal["masked", "plain"] = Field(
        "masked", description="masked: only the sum is ever opened; plain: for comparison, named in the run's tags"
    )
    update_clip: float = Field(
        2.0, gt=0, description="largest change of one parameter in a round; beyond it the site refuses to send"
    )
    deadline_s: float = Field(3600.0, gt=0, description="seconds that the sites have for each stage of a round")
    validate_every: int = Field(1, ge=0, description="rounds between validations of the global state; 0 for none")
    share_site_scores: bool = Field(
        True,
        description="sites report their own Dice in the open, beside the masked sum of all; false keeps it at the site",
    )
    share_pictures: bool = Field(
        True, description="sites send one overlay picture of a test case to the run; false where images must not leave"
    )
