"""How a federation is run."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fedsam_core.federation.privacy import PrivacyConfig
from fedsam_core.federation.strategies import StrategyConfig
from fedsam_core.settings import Settings

Rule = Literal["factors", "ffa", "rolora", "product-dense", "product-sketch"]


class FederationConfig(Settings):
    """Rounds, the secure sum, and what a site discloses."""

    rounds: int = Field(10, ge=1, description="global steps")
    secure_sum: Literal["masked", "plain"] = Field(
        "masked", description="masked: only the sum is ever opened; plain: for comparison, named in the run's tags"
    )
    rule: Rule = Field(
        "factors",
        description="how LoRA is summed: factors (mean A, mean B), ffa (A frozen), rolora (B and A in turn), "
        "product-dense, product-sketch (mean of BA, cut to the rank)",
    )
    oversampling: int = Field(8, ge=0, description="for product-sketch: columns of the sketch beyond the rank")
    power_iterations: int = Field(
        0, ge=0, le=4, description="for product-sketch: rounds of two more sums that sharpen the sketch"
    )
    meter_probes: int = Field(
        16, ge=0, le=1024, description="random probes a layer for how far LoRA's mean is from the mean of BA; 0: none"
    )
    weights: Literal["slices", "cases", "equal"] = Field(
        "slices", description="what a site's update is weighted by: its training slices, its training cases, or nothing"
    )
    normalize_steps: bool = Field(
        False, description="FedNova: a site's update counts by its steps' mean, however many steps it took"
    )
    scaffold: bool = Field(False, description="SCAFFOLD: control variates correct each site's drift; twice the bytes")
    strategy: StrategyConfig = Field(StrategyConfig(), description="what the server makes of the mean update")
    site_ranks: dict[str, int] = Field(
        {}, description="sites whose LoRA has a lower rank than the selection's (HetLoRA), by name"
    )
    privacy: PrivacyConfig | None = Field(None, description="differential privacy of the sites' updates; unset: none")
    bits: Literal[8, 12, 16, 20, 24, 32] = Field(32, description="bits of a parameter on its way up, masked")
    broadcast_bits: Literal[8, 12, 16, 32] = Field(
        32, description="bits of the step on its way down, before entropy coding; 32: the new values as they are"
    )
    update_clip: float = Field(
        2.0, gt=0, le=1e6, description="largest change of one parameter in a round; beyond it the site refuses to send"
    )
    clip_quantile: float | None = Field(
        None,
        gt=0.5,
        le=1,
        description="a part's clip is this quantile of all sites' changes in the last sum; unset: 1 (the largest), "
        "0.999 for bits of 16 and less, where values are rotated and have no long tail",
    )
    clip_headroom: float | None = Field(
        None,
        ge=1,
        description="times which the clip is; what is beyond is cut and counted; unset: 2, 1.5 for bits of 16 and less",
    )
    min_contributors: int = Field(
        3, ge=3, description="fewest sites whose values are in any lane of a sum that is opened: what protects them"
    )
    min_sites: int | None = Field(
        None,
        ge=3,
        description="fewest sites that a round goes on with: what its result is worth; unset: as few as the secure sum "
        "opens for, which is floor(2n/3)+1 of n, and min_contributors",
    )
    attempts: int = Field(2, ge=1, description="tries of a sum, each with fresh keys, before the run gives up")
    roster: Path | None = Field(
        None, description="file of the consortium's public keys (`fedsam keys`); none: a development roster"
    )
    key_dir: Path = Field(Path("~/.fedsam/keys"), description="with a roster: where each site's node has its SITE.key")
    site_dir: Path = Field(
        Path("~/.fedsam/sites"),
        description="where each site's node keeps what never leaves it: local layers, optimiser state, its own model",
    )
    personal_steps: int = Field(
        0, ge=0, description="optimiser steps of a site's own fine-tune after the last round; its model stays with it"
    )
    keep_sums: bool = Field(
        True, description="keep each round's sum, so that `fedsam verify` can repeat the run's global states"
    )
    deadline_s: float = Field(
        3600.0, gt=0, description="seconds, at most, that the sites have for each stage of a round"
    )
    deadline_factor: float | None = Field(
        4.0,
        ge=1,
        description="a stage closes after so many times what the slowest site took in the rounds before, and after "
        "deadline_s at the latest; unset: always after deadline_s",
    )
    deadline_floor_s: float = Field(
        60.0, gt=0, description="seconds that the sites have for a stage at least, however quick they were before"
    )
    max_wait_after_min: float | None = Field(
        None,
        ge=0,
        description="seconds that a stage waits for the rest once min_sites have answered; unset: as long as for all",
    )
    rejoin_wait_s: float = Field(
        20.0,
        ge=0,
        description="seconds that a round waits, once, for a site that was lost in the round before; later it is taken "
        "back whenever it is there",
    )
    park_after: int = Field(
        3, ge=1, description="rounds in a row in which a site fails until it is left alone for 1, 2, 4, ... rounds"
    )
    validate_every: int = Field(1, ge=0, description="rounds between validations of the global state; 0 for none")
    share_site_scores: bool = Field(
        True,
        description="sites report their own Dice in the open, beside the masked sum of all; false keeps it at the site",
    )
    share_pictures: bool = Field(
        False,
        description="sites send one overlay picture of a test case to the run at its end: an image leaves the site",
    )

    @property
    def is_product(self) -> bool:
        """Whether the rule averages LoRA's products rather than its factors."""
        return self.rule in ("product-dense", "product-sketch")

    @property
    def rotates(self) -> bool:
        """Whether updates are rotated before they are rounded: narrow rings and noise want values of like size."""
        return self.bits <= 16 or self.privacy is not None

    @property
    def quantile(self) -> float:
        """See `clip_quantile`."""
        return self.clip_quantile or (0.999 if self.rotates else 1.0)

    @property
    def headroom(self) -> float:
        """See `clip_headroom`."""
        return self.clip_headroom or (1.5 if self.rotates else 2.0)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.scaffold and self.is_product:
            raise ValueError(
                f"scaffold corrects gradients of single values, but {self.rule} gives LoRA a new basis in every round: "
                "take rule factors, ffa or rolora"
            )
        if self.scaffold and self.site_ranks:
            raise ValueError("scaffold wants the same values at all sites: leave site_ranks out")
        if any(rank < 1 for rank in self.site_ranks.values()):
            raise ValueError("site_ranks: a rank is at least 1")
        if self.site_ranks and not self.is_product and self.weights != "equal":
            raise ValueError(
                f"site_ranks: under rule {self.rule} the weights of all sites, and of those with a full rank, are told "
                "apart, and their difference is the weight of the others: set weights=equal, or take a product rule"
            )
        if self.privacy is not None:
            self._is_private()
        return self

    def _is_private(self) -> None:
        """What differential privacy rules out: anything whose sensitivity has no bound, or that is summed exactly."""
        if self.is_product:
            raise ValueError(f"privacy: how far one site moves the sums of rule {self.rule} has no bound: take factors")
        if self.secure_sum == "plain":
            raise ValueError(
                "privacy: a plain sum shows each update with one site's share of the noise: set secure_sum=masked"
            )
        if self.bits > 24:
            raise ValueError("privacy: the noise is made of whole steps of the ring, up to 24 bits: set bits=24 or 20")
        for key in ("scaffold", "normalize_steps", "site_ranks"):
            if getattr(self, key):
                raise ValueError(f"privacy: {key} sums what has no bound or no noise: leave it out")
        if self.weights != "equal":
            raise ValueError("privacy: a weight by slices or cases would be summed without noise: set weights=equal")

    @field_validator("key_dir", "site_dir")
    @classmethod
    def _of_any_node(cls, value: Path) -> Path:
        if not (value.is_absolute() or value.parts[:1] == ("~",)):
            raise ValueError("must be absolute, or begin with ~ (the home of whoever runs the site's node)")
        return value
