"""A site's resident learner: the model stays in memory, a round trains it from the global state."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from monai.losses.dice import DiceCELoss

from fedsam_core.data.slices import SliceDataset
from fedsam_core.errors import TrainingError
from fedsam_core.hashing import derive_seed
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.device import autocast_dtype
from fedsam_core.learning.schedule import learning_rate
from fedsam_core.sam.adapters import load_shared_state, shared_state
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import ParameterManifest


@dataclass(frozen=True)
class Fit:
    """What a round's training gave. Never leaves the site unmasked.

    Attributes:
        update: float32 [manifest.shared_size], trained minus global state.
        slices: training slices of the site; the weight of its update.
        loss: mean training loss over the round's steps.
        dice_numerator, dice_denominator: float64 [foreground classes], 2 * |prediction and label| and
            |prediction| + |label| over the round's steps, as shares of all pixels seen.
    """

    update: np.ndarray[Any, np.dtype[np.float32]]
    slices: int
    loss: float
    dice_numerator: np.ndarray[Any, np.dtype[np.float64]]
    dice_denominator: np.ndarray[Any, np.dtype[np.float64]]


class Learner:
    """Trains the parameters of a manifest on one site's slices."""

    def __init__(
        self,
        site: str,
        segmenter: SamSegmenter,
        manifest: ParameterManifest,
        dataset: SliceDataset,
        config: LearningConfig,
        device: torch.device,
    ) -> None:
        if len(dataset) == 0:
            raise TrainingError(f"site {site} has no training slice: give it a training case or leave the site out")
        self.site = site
        self.segmenter = segmenter.to(device)
        self.manifest = manifest
        self.dataset = dataset
        self.config = config
        self.device = device
        self.autocast = autocast_dtype(config.precision, device)
        self.loss = DiceCELoss(
            softmax=True,
            to_onehot_y=True,
            batch=True,  # one Dice over the batch: a slice without the structure gives no degenerate term of its own
            lambda_dice=config.dice_weight,
            lambda_ce=config.ce_weight,
        )
        foreground = dataset.foreground_slices()
        self._foreground, self._empty = np.flatnonzero(foreground), np.flatnonzero(~foreground)

    def fit(self, state: Mapping[str, np.ndarray[Any, Any]], round_number: int, rounds: int, seed: int) -> Fit:
        """One round of local training from the global state.

        A pure function of its arguments and the site's slices: the optimiser starts anew, and every random draw comes
        from (seed, round, site). On CPU the result is bit-equal whenever it is repeated with the same thread count.

        Raises:
            TrainingError: a loss or a gradient is not finite; names site, round and step.
        """
        torch.set_num_threads(self.config.threads)
        load_shared_state(self.segmenter, self.manifest, state)
        self.segmenter.train()
        parameters = [p for p in self.segmenter.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
        )
        round_seed = derive_seed(seed, "fit", round_number, self.site)
        batches = self._draw_batches(np.random.default_rng(round_seed))
        losses = []
        overlap = torch.zeros(2, self.segmenter.classes, dtype=torch.float64, device=self.device)
        for step, indices in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, round_number, rounds, step)
            loss, overlaps = self._step(
                optimizer, parameters, indices, derive_seed(round_seed, step), round_number, step
            )
            losses.append(loss)
            overlap += overlaps / len(batches)
        trained = shared_state(self.segmenter, self.manifest)
        update = self.manifest.flatten(trained) - self.manifest.flatten(state)
        numerator, denominator = overlap.cpu().numpy()
        return Fit(update, len(self.dataset), float(np.mean(losses)), numerator, denominator)

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
        indices: np.ndarray[Any, np.dtype[np.int64]],
        seed: int,
        round_number: int,
        step: int,
    ) -> tuple[float, torch.Tensor]:
        images, labels = self.dataset.batch(indices, seed=seed, train=True)
        images, labels = images.to(self.device), labels.to(self.device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = self.segmenter(images)
        loss = self.loss(logits.float(), labels[:, None])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip or float("inf"))
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            what = "the loss" if not torch.isfinite(loss) else "a gradient"
            raise TrainingError(
                f"site {self.site}: {what} is not finite in round {round_number}, step {step + 1}; nothing of this "
                f"round is sent. Lower learning.learning_rate ({self.config.learning_rate:g}), or set "
                "learning.precision=fp32"
            )
        optimizer.step()
        return float(loss.detach()), _overlap(logits.detach(), labels)

    def _draw_batches(self, rng: np.random.Generator) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """Slice indices of every step: of all of them `empty_share` without any structure, the others with one.

        Where the share of a batch is no whole number of slices it is met over the steps. Both kinds are drawn without
        replacement until a pool is exhausted, then shuffled again. A site that has slices of one kind only fills its
        batches with them.
        """
        size, steps = min(self.config.batch_size, len(self.dataset)), self.config.local_steps
        share = self.config.empty_share if len(self._foreground) else 1.0
        share = share if len(self._empty) else 0.0
        until = [round(step * size * share) for step in range(steps + 1)]  # empty slices before each step
        bare = _endless(self._empty, until[-1], rng)
        shown = _endless(self._foreground, size * steps - until[-1], rng)
        return [
            np.concatenate([shown[size * step - begin : size * (step + 1) - end], bare[begin:end]])
            for step, (begin, end) in enumerate(pairwise(until))
        ]


def _overlap(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Numerator and denominator of the Dice of each foreground class, as shares of the pixels: float64 [2, classes].

    Args:
        logits: float [B, 1 + classes, H, W].
        labels: int [B, H, W].
    """
    predicted = logits.argmax(dim=1)
    rows = []
    for index in range(1, logits.shape[1]):
        guess, truth = predicted == index, labels == index
        rows.append(torch.stack([2 * (guess & truth).sum(), guess.sum() + truth.sum()]))
    return torch.stack(rows, dim=1).double() / labels.numel()


def _endless(
    pool: np.ndarray[Any, np.dtype[np.int64]], count: int, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`count` draws from `pool`, going through a fresh permutation each time it is used up."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    passes = -(-count // len(pool))
    return np.concatenate([rng.permutation(pool) for _ in range(passes)])[:count]
