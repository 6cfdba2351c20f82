"""How a site trains within a round."""

from typing import Literal

from pydantic import Field

from fedsam_core.settings import Settings


class LearningConfig(Settings):
    """Optimiser, loss and schedule of a site's local training."""

    local_steps: int = Field(24, ge=1, description="optimiser steps a site takes in a round")
    local_epochs: float | None = Field(
        None, gt=0, description="passes over a site's slices in a round, in place of local_steps"
    )
    batch_size: int = Field(12, ge=1, description="slices in a step; a site with fewer takes all it has")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="a site's optimiser")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd")
    keep_optimizer: bool = Field(
        False,
        description="a site keeps its optimiser's state from round to round; false: every round starts anew. LoRA's "
        "part starts anew all the same where the rule gives it a new basis (product-dense, product-sketch)",
    )
    proximal: float = Field(0.0, ge=0, description="FedProx: pull (mu) of a site's values towards the global state")
    learning_rate: float = Field(2e-3, gt=0, description="the optimiser's peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="the optimiser's weight decay, decoupled in AdamW")
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
    checkpointing: bool = Field(
        False,
        description="keep the inputs of encoder blocks alone and compute the rest again in the backward pass: a third "
        "more time, a fraction of the memory",
    )
    cache_views: int = Field(
        0,
        ge=0,
        description="augmented views of each slice, drawn once for the run; what the encoder's frozen first part makes "
        "of them is computed once. 0: every step augments anew and runs the whole encoder",
    )
    cache_gib: float = Field(
        4.0,
        gt=0,
        description="most main memory that a site's cached views take; what does not fit is computed each time",
    )
    threads: int = Field(
        1, ge=1, description="CPU threads of a site; part of what makes a run repeatable, hence never guessed"
    )
