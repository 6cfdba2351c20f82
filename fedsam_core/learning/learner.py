"""A site's resident learner: the model stays in memory, a round trains it from the global state."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from monai.losses.dice import DiceCELoss

from fedsam_core.data.slices import SliceDataset
from fedsam_core.errors import TrainingError
from fedsam_core.hashing import derive_seed
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.corrections import ControlVariate, Holes, Proximal
from fedsam_core.learning.device import autocast_dtype
from fedsam_core.learning.memory import keep_freed_memory
from fedsam_core.learning.prefix import FrozenPrefix
from fedsam_core.learning.schedule import learning_rate
from fedsam_core.learning.steps import fit_steps
from fedsam_core.sam.adapters import (
    load_local_state,
    load_shared_state,
    local_state,
    named_parameters,
    shared_state,
)
from fedsam_core.sam.casting import frozen_in
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import ALL_KINDS, LORA_SCALE, Kind, ManifestEntry, ParameterManifest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Assignment:
    """What a round asks of a site's training beside the global state.

    Attributes:
        kinds: shared values of these kinds are trained; local ones always are.
        kept: what the site kept from the round before (`Fit.kept`).
        control: float32 [manifest.shared_size], the common control variate of SCAFFOLD; None without.
        beyond: intp, places of the flat vector that this site does not have, as its rank is lower: held at zero.
        new_basis: LoRA's factors have another basis than in the round before, so its optimiser state is of no use.
        steps: of the optimiser; None for what the configuration says.
    """

    kinds: Collection[Kind] = ALL_KINDS
    kept: Mapping[str, Array] = field(default_factory=dict)
    control: Array | None = None
    beyond: np.ndarray[Any, np.dtype[np.intp]] | None = None
    new_basis: bool = False
    steps: int | None = None


@dataclass(frozen=True)
class Fit:
    """What a round's training gave. Never leaves the site unmasked.

    Attributes:
        update: float32 [manifest.shared_size], trained minus global state (its part that the site has).
        slices: training slices of the site; the weight of its update.
        loss: mean training loss over the round's steps.
        dice_numerator, dice_denominator: float64 [foreground classes], 2 * |prediction and label| and
            |prediction| + |label| over the round's steps, as shares of all pixels seen.
        steps: that the optimiser took.
        control: float32 [manifest.shared_size], change of the site's control variate (SCAFFOLD); None without.
        kept: for the next round, and never sent: local values ("local/NAME"), the optimiser's state
            ("optimizer/NAME/KEY") and the control variate ("control/NAME").
    """

    update: np.ndarray[Any, np.dtype[np.float32]]
    slices: int
    loss: float
    dice_numerator: np.ndarray[Any, np.dtype[np.float64]]
    dice_denominator: np.ndarray[Any, np.dtype[np.float64]]
    steps: int = 1
    control: np.ndarray[Any, np.dtype[np.float32]] | None = None
    kept: Mapping[str, Array] = field(default_factory=dict)


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
        who: str | None = None,
    ) -> None:
        """`site` decides the random draws; `who` learns, in errors, unless it is that site."""
        self.who = who or f"site {site}"
        if len(dataset) == 0:
            raise TrainingError(f"{self.who} has no training slice: give it a training case or leave the site out")
        self.site = site
        self.segmenter = segmenter.to(device)
        self.manifest = manifest
        self.dataset = dataset
        self.config = config
        self.device = device
        self.autocast = autocast_dtype(config.precision, device)
        self.segmenter.checkpointing = config.checkpointing
        if device.type == "cpu":
            keep_freed_memory()
        self.prefix = (
            FrozenPrefix(
                self.segmenter, dataset, config.cache_views, int(config.cache_gib * 2**30), self.autocast, self.who
            )
            if config.cache_views
            else None
        )
        self.loss = DiceCELoss(
            softmax=True,
            to_onehot_y=True,
            batch=True,  # one Dice over the batch: a slice without the structure gives no degenerate term of its own
            lambda_dice=config.dice_weight,
            lambda_ce=config.ce_weight,
        )
        self._shared = frozenset(manifest.shared)
        self._local_start = local_state(segmenter, manifest)
        foreground = dataset.foreground_slices()
        self._foreground, self._empty = np.flatnonzero(foreground), np.flatnonzero(~foreground)

    def fit(
        self,
        state: Mapping[str, Array],
        round_number: int,
        rounds: int,
        seed: int,
        assignment: Assignment = Assignment(),
    ) -> Fit:
        """One round of local training from the global state.

        A pure function of its arguments and the site's slices: every random draw comes from (seed, round, site), and
        the optimiser starts anew unless its state is in `assignment.kept`. On CPU the result is bit-equal whenever it
        is repeated with the same thread count.

        Raises:
            TrainingError: a loss or a gradient is not finite; names site, round and step.
        """
        torch.set_num_threads(self.config.threads)
        start = self.load(state, assignment)
        self.segmenter.train()
        if self.prefix is not None:
            self.prefix.open(derive_seed(seed, "views", self.site))
        with self._trained(assignment.kinds) as trained, frozen_in(self.segmenter, self.autocast, pack=True):
            parameters = [parameter for _, parameter in trained]
            optimizer = self._optimizer(trained, assignment)
            corrections = self._corrections(trained, assignment)
            round_seed = derive_seed(seed, "fit", round_number, self.site)
            steps = self.steps if assignment.steps is None else assignment.steps
            loss, overlap = fit_steps(
                self.prefix.finish if self.prefix else self.segmenter,
                self.prefix or self.dataset,
                self._draw_batches(np.random.default_rng(round_seed), steps),
                [learning_rate(self.config, round_number, rounds, step, steps) for step in range(steps)],
                optimizer,
                self.loss,
                parameters=parameters,
                corrections=[*corrections, *self._holes(trained, assignment)],
                gradient_clip=self.config.gradient_clip,
                autocast=self.autocast,
                device=self.device,
                seed=round_seed,
                who=self.who,
                round_number=round_number,
            )
            kept, control = self._keep(trained, optimizer, corrections, assignment)
        update = self.manifest.flatten(shared_state(self.segmenter, self.manifest)) - start
        numerator, denominator = overlap.cpu().numpy()
        return Fit(update, len(self.dataset), loss, numerator, denominator, steps, control, kept)

    @property
    def steps(self) -> int:
        """Of the optimiser in a round."""
        return steps_of(self.config, len(self.dataset))

    def load(self, state: Mapping[str, Array], assignment: Assignment) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Puts the global state and the site's own local values into the model; the former's flat vector, float32, as
        far as the site has it."""
        start = self.manifest.flatten(state)
        if assignment.beyond is not None:
            start[assignment.beyond] = 0.0
        load_shared_state(self.segmenter, self.manifest, self.manifest.unflatten(start))
        if self.manifest.local:
            own = {
                name.removeprefix("local/"): value for name, value in assignment.kept.items() if name[:6] == "local/"
            }
            load_local_state(self.segmenter, self.manifest, own or self._local_start)
        return start

    @property
    def _batch(self) -> int:
        return batch_of(self.config, len(self.dataset))

    @contextmanager
    def _trained(self, kinds: Collection[Kind]) -> Iterator[list[tuple[ManifestEntry, torch.nn.Parameter]]]:
        """The entries that a round trains, in the manifest's order, while the others require no gradient."""
        found = named_parameters(self.segmenter)
        entries = [*self.manifest.shared, *self.manifest.local]
        resting = [found[entry.name] for entry in self.manifest.shared if entry.kind not in kinds]
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            yield [(entry, found[entry.name]) for entry in entries if found[entry.name].requires_grad]
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)

    def _optimizer(
        self, trained: Sequence[tuple[ManifestEntry, torch.nn.Parameter]], assignment: Assignment
    ) -> torch.optim.Optimizer:
        config = self.config
        scales = [p for entry, p in trained if entry.group == LORA_SCALE]  # 1 is their rest, and decay pulls to 0
        others = [p for entry, p in trained if entry.group != LORA_SCALE]
        groups: list[dict[str, Any]] = [{"params": others, "weight_decay": config.weight_decay}]
        if scales:
            groups.append({"params": scales, "weight_decay": 0.0})
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
        else:
            optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        for entry, parameter in trained:
            prefix = f"optimizer/{entry.name}/"
            found = {name.removeprefix(prefix): v for name, v in assignment.kept.items() if name.startswith(prefix)}
            if found and not (assignment.new_basis and entry.kind != "whole"):
                optimizer.state[parameter] = {
                    key: torch.from_numpy(value.copy()).to(self.device) for key, value in found.items()
                }
        return optimizer

    def _corrections(
        self, trained: Sequence[tuple[ManifestEntry, torch.nn.Parameter]], assignment: Assignment
    ) -> list[Proximal | ControlVariate]:
        """FedProx and SCAFFOLD, of the shared values alone: local ones have no global counterpart."""
        shared = [(entry, p) for entry, p in trained if entry in self._shared]
        parameters = [p for _, p in shared]
        corrections: list[Proximal | ControlVariate] = []
        if assignment.control is not None:  # first, as it learns from the raw gradient
            common = self.manifest.unflatten(assignment.control)
            zeros = {entry.name: np.zeros(entry.shape, np.float32) for entry, _ in shared}
            own = [assignment.kept.get(f"control/{entry.name}", zeros[entry.name]) for entry, _ in shared]
            corrections.append(
                ControlVariate(
                    parameters,
                    [torch.from_numpy(np.array(value)) for value in own],
                    [torch.from_numpy(common[entry.name]) for entry, _ in shared],
                )
            )
        if self.config.proximal > 0:
            corrections.append(Proximal(parameters, self.config.proximal))
        return corrections

    def _holes(
        self, trained: Sequence[tuple[ManifestEntry, torch.nn.Parameter]], assignment: Assignment
    ) -> list[Holes]:
        """What a site of a lower rank has not: its gradient is to be zero."""
        if assignment.beyond is None or not assignment.beyond.size:
            return []
        flat = np.zeros(self.manifest.shared_size, np.float32)
        flat[assignment.beyond] = 1.0
        missing = self.manifest.unflatten(flat)
        found = [
            (parameter, torch.from_numpy(missing[entry.name] > 0).to(self.device))
            for entry, parameter in trained
            if entry in self._shared and missing[entry.name].any()
        ]
        return [Holes(found)]

    def _keep(
        self,
        trained: Sequence[tuple[ManifestEntry, torch.nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        corrections: Sequence[Proximal | ControlVariate],
        assignment: Assignment,
    ) -> tuple[dict[str, Array], np.ndarray[Any, np.dtype[np.float32]] | None]:
        """What the site keeps for its next round, and the change of its control variate."""
        kept: dict[str, Array] = dict(assignment.kept)
        kept |= {f"local/{name}": value for name, value in local_state(self.segmenter, self.manifest).items()}
        if self.config.keep_optimizer:
            for entry, parameter in trained:
                for key, value in optimizer.state[parameter].items():
                    if isinstance(value, torch.Tensor):
                        kept[f"optimizer/{entry.name}/{key}"] = value.detach().cpu().numpy().copy()
        change = None
        for correction in corrections:
            if isinstance(correction, ControlVariate):
                changes = {entry.name: np.zeros(entry.shape, np.float32) for entry in self.manifest.shared}
                shared = [entry for entry, _ in trained if entry in self._shared]
                for entry, own in zip(shared, correction.new_own(), strict=True):
                    new = own.detach().cpu().numpy().astype(np.float32)
                    changes[entry.name] = new - assignment.kept.get(f"control/{entry.name}", np.float32(0))
                    kept[f"control/{entry.name}"] = new
                change = self.manifest.flatten(changes)
        return kept, change

    def _draw_batches(self, rng: np.random.Generator, steps: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """Slice indices of every step: of all of them `empty_share` without any structure, the others with one.

        Where the share of a batch is no whole number of slices it is met over the steps. Both kinds are drawn without
        replacement until a pool is exhausted, then shuffled again. A site that has slices of one kind only fills its
        batches with them.
        """
        size = self._batch
        share = self.config.empty_share if len(self._foreground) else 1.0
        share = share if len(self._empty) else 0.0
        until = [round(step * size * share) for step in range(steps + 1)]  # empty slices before each step
        bare = _endless(self._empty, until[-1], rng)
        shown = _endless(self._foreground, size * steps - until[-1], rng)
        return [
            np.concatenate([shown[size * step - begin : size * (step + 1) - end], bare[begin:end]])
            for step, (begin, end) in enumerate(pairwise(until))
        ]


def batch_of(config: LearningConfig, slices: int) -> int:
    """Slices of a step, at a site that has so many."""
    return min(config.batch_size, slices)


def steps_of(config: LearningConfig, slices: int) -> int:
    """Steps of a round, at a site that has so many slices."""
    if config.local_epochs is None:
        return config.local_steps
    return max(1, math.ceil(config.local_epochs * slices / batch_of(config, slices)))


def _endless(
    pool: np.ndarray[Any, np.dtype[np.int64]], count: int, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`count` draws from `pool`, going through a fresh permutation each time it is used up."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    passes = -(-count // len(pool))
    return np.concatenate([rng.permutation(pool) for _ in range(passes)])[:count]
