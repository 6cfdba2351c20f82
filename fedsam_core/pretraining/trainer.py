"""SAM's pre-training on drawn scenes: prompts, corrections, and once a scene no prompt at all.

Every image is encoded once and asked about each of its targets: with a point or a box first, then with further points
where the mask is wrong and the last logits as mask prompt. Of the three masks that answer an ambiguous prompt the best
one learns (arXiv 2304.02643); the single mask answers boxes and corrections. The decode without a prompt is not SAM's:
fedsam adapts the decoder prompt-free, and so its transformer meets that case here: each of the three masks learns the
target that it comes closest to.

SAM's encoder came from a masked autoencoder. Here linear layers, thrown away at the end, read the clean scene and its
outlines off the encoder's tokens, and off the decoder's pixels while it is given random tokens, as a new head has them:
both have to look through noise and blur, and to keep what is smaller than a patch, whatever they are asked.

Step n depends on (configuration, n) and the weights alone, so that a run goes on from its checkpoint bit for bit.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from fedsam_core.data.files import write_atomic
from fedsam_core.errors import CheckpointError
from fedsam_core.hashing import derive_seed, stable_hash
from fedsam_core.learning.device import autocast_dtype
from fedsam_core.pretraining.losses import iou, mask_loss
from fedsam_core.pretraining.promptable import decode, embed_prompts, encode, enlarge, two_way
from fedsam_core.pretraining.prompts import corrected, first_prompts
from fedsam_core.pretraining.scenes import TARGETS, Scenes, draw_scenes
from fedsam_core.sam.adapters import BuiltModel
from fedsam_core.sam.backbones import seeded
from fedsam_core.sam.decoder import CHANNELS
from fedsam_core.sam.geometry import PATCH
from fedsam_core.sam.official import official_sam
from fedsam_core.sam.shipped import unpack
from fedsam_core.settings import Settings

TABLE_SIZE = 112  # pixels: the grid of this size is the one that position tables are kept for, vit_t's own window


class PretrainConfig(Settings):
    """What decides the weights, beside the machine's arithmetic."""

    steps: int = Field(default=2000, ge=1, description="optimizer steps")
    seed: int = Field(default=0, ge=0, description="seed of weights, scenes and prompts")
    sizes: dict[int, float] = Field(
        default={64: 0.55, 112: 0.4, 224: 0.05},
        min_length=1,
        description="image sides in pixels: how often each is drawn",
    )
    batch_pixels: int = Field(default=8 * 112 * 112, ge=1, description="pixels of a batch, whatever the image size")
    corrections: int = Field(default=1, ge=0, description="rounds of further points after the first prompt")
    learning_rate: float = Field(default=1e-3, gt=0, description="AdamW's, after the warm-up")
    weight_decay: float = Field(default=0.05, ge=0, description="AdamW's, on matrices")
    warmup: int = Field(default=100, ge=0, description="steps of linear warm-up")
    cooldown: float = Field(default=0.2, ge=0, le=1, description="share of the steps, the last ones, that decay to 0")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="of the forward pass")

    @field_validator("sizes")
    @classmethod
    def _sizes(cls, value: dict[int, float]) -> dict[int, float]:
        if any(size < PATCH or size % PATCH for size in value) or any(share <= 0 for share in value.values()):
            raise ValueError(
                f"sizes are positive multiples of {PATCH}, with positive shares, like {{64: 0.5, 112: 0.5}}"
            )
        return value

    def size_of(self, step: int) -> int:
        """Image size of a step."""
        place = derive_seed(self.seed, "size", step) / 2**63 * sum(self.sizes.values())
        for size, share in sorted(self.sizes.items()):
            place -= share
            if place < 0:
                return size
        return max(self.sizes)

    def rate_of(self, step: int) -> float:
        """Learning rate of a step: constant between warm-up and cool-down, so that a run can still be made longer
        (Hägele et al. 2024, arXiv 2405.18392)."""
        begun = (step + 1) / self.warmup if self.warmup else 1.0
        left = (self.steps - step) / (self.cooldown * self.steps) if self.cooldown else 1.0
        return self.learning_rate * min(begun, left, 1.0)


@dataclass(frozen=True)
class StepReport:
    """A step's figures: its loss, and the mean IoU of the first answer (best of three) and of the last correction."""

    step: int
    size: int
    loss: float
    first_iou: float
    last_iou: float


def new_sam(seed: int) -> Sam:
    """vit_t as `segment_anything`'s own `Sam`, random, tables for 112 px; in training mode."""
    model = BuiltModel(
        backbone="vit_t", image_size=TABLE_SIZE, classes=1, head="pretrained", weights=f"random(seed={seed})", seed=seed
    )
    with seeded(derive_seed(seed, "pretraining")):
        sam = official_sam(model)
        nn.init.trunc_normal_(sam.image_encoder.pos_embed, std=0.02)
    return sam.train()


def sketch_loss(sketch: nn.Module, features: Tensor, scenes: Scenes) -> Tensor:
    """How far clean scene (squared error) and outlines (cross-entropy) are from what `sketch` reads off features.

    Args:
        sketch: from C to 2 p p values, for the p x p pixels that a feature stands for.
        features: [B, C, S / p, S / p].
    """
    drawn = sketch(features.movedim(1, -1)).movedim(-1, 1)
    drawn = F.pixel_shuffle(drawn, scenes.images.shape[-1] // features.shape[-1]).float()
    clean = F.mse_loss(drawn[:, 0], scenes.clean)
    return clean + F.binary_cross_entropy_with_logits(drawn[:, 1], scenes.outlines.float())


def foreign_pixels(sam: Sam, embeddings: Tensor, generator: torch.Generator) -> Tensor:
    """The decoder's pixels [B, 32, 4 g, 4 g] where its mask tokens are random, and from two to five."""
    count, channels = embeddings.shape[:2]
    several = int(torch.randint(2, 6, (), generator=generator, device=generator.device))
    foreign = torch.randn(count, several, channels, generator=generator, device=generator.device)
    tokens = torch.cat([sam.mask_decoder.iou_token.weight.expand(count, -1, -1), foreign], dim=1)
    return two_way(sam, embeddings, tokens, None)[1]


def promptable_loss(
    sam: Sam, embeddings: Tensor, scenes: Scenes, corrections: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a batch with its embeddings [B, 256, g, g], and the mean IoU of first and last answers (scalars)."""
    size, real = scenes.images.shape[-1], scenes.real.flatten()
    targets = scenes.masks.flatten(0, 1)
    loss = _unprompted_loss(sam, embeddings, scenes)

    # Losses are counted at half size, where they cost little.
    half = F.avg_pool2d(scenes.masks.float(), 2).flatten(0, 1)
    sharp = half > 0.5
    repeated = embeddings.repeat_interleave(TARGETS, dim=0)
    boxed = torch.rand(len(targets), generator=generator, device=targets.device) < 0.5
    prompts = first_prompts(targets, boxed, generator)
    low, quality = decode(sam, repeated, embed_prompts(sam, prompts.coordinates, prompts.labels, size), None)
    logits = enlarge(low, size // 2)
    losses, found = mask_loss(logits, half[:, None]), iou(logits > 0, sharp[:, None])
    # A box means one thing: the single mask answers it too.
    answers = losses[:, 1:].min(dim=1).values + boxed * losses[:, 0]
    errors = (quality.float() - found) ** 2
    answers = answers + errors[:, 1:].mean(dim=1) + boxed * errors[:, 0]
    loss = loss + _mean(answers, real)
    first_iou = last_iou = _mean(found[:, 1:].max(dim=1).values, real)

    shown = low[torch.arange(len(low)), 1 + quality[:, 1:].argmax(dim=1), None]  # which one would be shown to a user
    for _ in range(corrections):
        previous = shown.float().detach()
        prompts = corrected(prompts, enlarge(previous, size)[:, 0] > 0, targets, generator)
        low, quality = decode(sam, repeated, embed_prompts(sam, prompts.coordinates, prompts.labels, size), previous)
        shown = low[:, :1]
        logits = enlarge(shown, size // 2)[:, 0]
        found = iou(logits > 0, sharp)
        loss = loss + _mean(mask_loss(logits, half) + (quality[:, 0].float() - found) ** 2, real)
        last_iou = _mean(found, real)
    return loss, first_iou, last_iou


def _unprompted_loss(sam: Sam, embeddings: Tensor, scenes: Scenes) -> Tensor:
    nothing = embeddings.new_zeros(len(embeddings), 0, embeddings.shape[1])
    low, _ = decode(sam, embeddings, nothing, None)
    small = F.adaptive_avg_pool2d(scenes.masks.float(), low.shape[-1])
    losses = mask_loss(low[:, 1:, None].float(), small[:, None])  # [B, 3, TARGETS]
    closest = losses.masked_fill(~scenes.real[:, None], torch.inf).min(dim=2).values.mean(dim=1)
    return _mean(closest, scenes.real.any(dim=1))


def _mean(values: Tensor, real: Tensor) -> Tensor:
    return torch.where(real, values, 0).sum() / real.sum().clamp(min=1)


class Pretraining:
    """A run: weights and optimizer. `step` is the next one.

    Args:
        device: where scenes are drawn and weights are trained; other devices give other bits.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config, self.device, self.step = config, device, 0
        self.sam = new_sam(config.seed).to(device)
        with seeded(derive_seed(config.seed, "sketch")):
            layers = {
                "tokens": nn.Linear(CHANNELS, 2 * PATCH**2),
                "pixels": nn.Linear(CHANNELS // 8, 2 * (PATCH // 4) ** 2),
            }
            self.sketches = nn.ModuleDict(layers).to(device)
        trained = [*self.sam.parameters(), *self.sketches.parameters()]
        decayed, others = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self._dtype = autocast_dtype(config.precision, device)

    def advance(self) -> StepReport:
        """Makes one step."""
        config, step = self.config, self.step
        size = config.size_of(step)
        scenes = draw_scenes(config.seed, step, max(1, config.batch_pixels // size**2), size, self.device)
        generator = torch.Generator(self.device).manual_seed(derive_seed(config.seed, "prompts", step))
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate_of(step)
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None):
            embeddings = encode(self.sam, scenes.images).float()
            loss, first, last = promptable_loss(self.sam, embeddings, scenes, config.corrections, generator)
            loss = loss + sketch_loss(self.sketches["tokens"], embeddings, scenes)
            pixels = foreign_pixels(self.sam, embeddings, generator)
            loss = loss + sketch_loss(self.sketches["pixels"], pixels, scenes)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([*self.sam.parameters(), *self.sketches.parameters()], 1.0)
        self.optimizer.step()
        self.step += 1
        return StepReport(step, size, loss.item(), first.item(), last.item())

    def run(self, checkpoint: Path, every: int, report: Callable[[StepReport], None]) -> None:
        """Makes the remaining steps; the state is kept every so many steps, and at the end.

        Raises OSError if the disk refuses.
        """
        while self.step < self.config.steps:
            report(self.advance())
            if self.step % every == 0 or self.step == self.config.steps:
                self.save(checkpoint)

    def save(self, path: Path) -> None:
        """Writes all that `load` needs, whole or not at all."""
        stream = io.BytesIO()
        torch.save(self._state(), stream)
        write_atomic(path, stream.getvalue())

    def load(self, path: Path) -> None:
        """Goes on where a run of the same configuration left off.

        Raises:
            CheckpointError: the file cannot be read, or another configuration's.
        """
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            key = state["key"]
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): delete it to begin anew") from error
        if key != self._key() or self.config.rate_of(state["step"] - 1) != state["rate"]:
            raise CheckpointError(f"{path} is of another configuration: give the same options, or another folder")
        self.sam.load_state_dict(state["sam"])
        self.sketches.load_state_dict(state["sketches"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])

    def _state(self) -> dict[str, Any]:
        parts = {"sam": self.sam, "sketches": self.sketches, "optimizer": self.optimizer}
        states = {name: part.state_dict() for name, part in parts.items()}
        return {"key": self._key(), "step": self.step, "rate": self.config.rate_of(self.step - 1), **states}

    def _key(self) -> str:
        """What must be as it was for a run to go on: all but its length, which counts only once the rate decays."""
        return stable_hash(self.config.model_dump(mode="json", exclude={"steps"}))


def packed_sam(path: Path) -> Sam:
    """The `Sam` of a packed file (see `fedsam_core.sam.shipped`), in evaluation mode.

    Raises:
        CheckpointError: the file cannot be read.
    """
    sam = new_sam(0)
    sam.load_state_dict(unpack(path), strict=True)
    return sam.eval()
