"""The encoder's frozen first part, computed once a view of a slice.

Where the first trained parameter lies in block k, nothing that a round changes comes before it: the activations that
enter block k are a function of the slice alone. So a site draws a number of augmented views of each slice, once for
the run, and keeps what the frozen stages make of them. Selections of the decoder alone train from embeddings.

An augmentation drawn anew in every step would leave nothing to keep. The views therefore belong to the setting, not to
the cache: a selection that has no frozen part sees the same views, and is compared on equal terms. With
`slices.augment=false` there is one view, the slice itself, and nothing changes but the speed.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsam_core.data.slices import CPU, SliceDataset, put
from fedsam_core.hashing import derive_seed
from fedsam_core.sam.segmenter import SamSegmenter

_log = logging.getLogger(__name__)

Key = tuple[int, int]  # slice, seed of its augmentation


@dataclass(frozen=True)
class _Entry:
    """One view of a slice: what enters the first trained stage, and its labels uint8 [S, S]."""

    activation: Tensor
    label: Tensor

    @property
    def nbytes(self) -> int:
        return self.activation.nbytes + self.label.nbytes


class FrozenPrefix:
    """Stands between a site's slices and its segmenter: `batch` gives what `finish` turns into logits.

    What is kept lies in main memory, up to a bound. Once that is full, what is there stays and all else is computed
    each time it is asked for: a cache that replaced its oldest entry would never hold the one that comes next, since
    slices come round in turn. A warning says, once, how much all of it would take.

    Nothing depends on what is kept already: on a CPU every view goes through the frozen stages by itself, as the other
    members of a batch may change its last bits. A site that restarts with an empty cache repeats a round bit for bit.

    Attributes:
        stages: of the encoder that are frozen and kept; 0 where that is the patches at most, which save nothing.
        nbytes: of what is kept.
    """

    def __init__(
        self,
        segmenter: SamSegmenter,
        dataset: SliceDataset,
        views: int,
        limit: int,
        autocast: torch.dtype | None,
        who: str,
    ) -> None:
        """Of a segmenter whose trained parameters, all that any round trains, require gradients now.

        Args:
            views: of each slice.
            limit: bytes that may be kept.
            autocast: dtype of the forward pass, and then of what is kept; None for fp32.
            who: trains, for the log.
        """
        self.segmenter = segmenter
        self.dataset = dataset
        self.views = views if dataset.config.augment else 1
        self.limit = limit
        self.autocast = autocast
        self.who = who
        frozen = segmenter.frozen_stages()
        self.stages = frozen if frozen > 1 or frozen == len(segmenter.stages()) else 0
        self.nbytes = 0
        self._kept: dict[Key, _Entry] = {}
        self._made_by = ""
        self._seeds: tuple[int, ...] = ()
        self._warned = False

    def open(self, seed: int) -> None:
        """Before a round: the views are those of `seed`. What other weights or another seed made is forgotten."""
        frozen = hashlib.sha256()
        for stage in self.segmenter.stages()[: self.stages]:
            for parameter in stage.parameters:
                frozen.update(parameter.detach().cpu().contiguous().numpy().data)
        made_by = f"{frozen.hexdigest()} {seed}"
        if made_by != self._made_by:
            self._kept, self.nbytes, self._made_by = {}, 0, made_by
        self._seeds = tuple(derive_seed(seed, "view", view) for view in range(self.views))

    def batch(
        self, indices: Sequence[int] | npt.NDArray[np.integer[Any]], seed: int, train: bool, device: torch.device = CPU
    ) -> tuple[Tensor, Tensor]:
        """A view of each of some slices.

        Args:
            indices: B slices.
            seed: of the step; with the slice's case and number alone, it decides which view.
            train: False for the slices as they are.
            device: what the samples are for.

        Returns:
            what `finish` asks for: activations [B, ...], or images [B, 3, S, S] where nothing is frozen; labels int64
            [B, S, S].
        """
        keys = [self._key(int(index), seed) for index in indices]
        if not self.stages or not train:
            samples = [self.dataset.batch([index], seed=view, train=train, device=device) for index, view in keys]
            images = torch.cat([image for image, _ in samples])
            inputs = self._encode(images).to(device) if self.stages else images
            return inputs, torch.cat([label for _, label in samples])
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        found = {key: self._kept[key] for key in keys if key in self._kept} | self._make(missing)
        self._keep(found)
        entries = [found[key] for key in keys]
        activations = put(torch.stack([entry.activation for entry in entries]), device)
        return activations, put(torch.stack([entry.label for entry in entries]), device).long()

    def finish(self, x: Tensor) -> Tensor:
        """What `batch` gave, on the segmenter's device, to logits [B, 1 + classes, S, S]."""
        return self.segmenter.finish(x, self.stages) if self.stages else self.segmenter(x)

    def _key(self, index: int, seed: int) -> Key:
        return index, self._seeds[derive_seed(seed, "view", *self.dataset.name(index)) % self.views]

    def _make(self, keys: Sequence[Key]) -> dict[Key, _Entry]:
        device = self.segmenter.device
        samples = [self.dataset.batch([index], seed=view, train=True, device=device) for index, view in keys]
        activations = self._encode(torch.cat([image for image, _ in samples])).cpu() if samples else ()
        return {
            key: _Entry(activation.clone(), label[0].to("cpu", torch.uint8))
            for key, activation, (_, label) in zip(keys, activations, samples, strict=True)
        }

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        device = self.segmenter.device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            parts = torch.split(images.to(device), 1 if device.type == "cpu" else len(images))
            made = torch.cat([self.segmenter.begin(part, self.stages) for part in parts])
        return made.to(self.autocast or torch.float32)

    def _keep(self, entries: dict[Key, _Entry]) -> None:
        for key, entry in entries.items():
            if key in self._kept:
                continue
            if self.nbytes + entry.nbytes <= self.limit:
                self._kept[key] = entry
                self.nbytes += entry.nbytes
            elif not self._warned:
                self._warned = True
                needed = len(self.dataset) * self.views * entry.nbytes
                _log.warning(
                    "%s: the cache of frozen activations is full; what does not fit is computed each time. All views "
                    "of all slices take up to %.1f GiB: set learning.cache_gib, or fewer learning.cache_views",
                    self.who,
                    needed / 2**30,
                )
