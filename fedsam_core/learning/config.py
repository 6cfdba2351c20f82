"""How a site trains within a round."""

from typing import Literal

from pydantic import Field

from fedsam_core.settings import Settings


class LearningConfig(Settings):
    """Optimiser, loss and schedule of a site's local training."""

    local_steps: int = Field(24, ge=1, description="optimiser steps a site takes in a round")
    batch_size: int = Field(12, ge=1, description="slices in a step; a site with fewer takes all it has")
    learning_rate: float = Field(2e-3, gt=0, description="AdamW's peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decoupled weight decay")
    schedule: Literal["cosine", "poly", "constant"] = Field(
        "cosine", description="decay of the learning rate over the rounds of the run, after the warm-up"
    )
    poly_power: float = Field(0.9, gt=0, description="exponent of the poly schedule")
    warmup_rounds: float = Field(
        0.5, ge=0, description="rounds of linear warm-up; a fraction warms up within the first round"
    )
    ce_weight: float = Field(0.2, ge=0, description="weight of the cross entropy in the loss")
    dice_weight: float = Field(0.8, ge=0, description="weight of the Dice loss")
    empty_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the slices of a round that hold no structure; all others show one",
    )
    gradient_clip: float = Field(1.0, ge=0, description="largest gradient norm of a step; 0 leaves gradients alone")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16 autocasts the forward pass; auto does so where the device multiplies bf16 natively"
    )
    threads: int = Field(
        1, ge=1, description="CPU threads of a site; part of what makes a run repeatable, hence never guessed"
    )
