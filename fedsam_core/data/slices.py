"""Training samples: square slices with their neighbours as the three input channels, augmented.

2.5D: channels are the slices below, at, and above the one to be segmented, a fixed distance in mm away, so that the
model sees the same anatomy at 0.5 mm and at 5 mm slice spacing. Only the middle one is segmented.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedsam_core.data.geometry import Voxels, resize
from fedsam_core.data.preprocess import PreparedCase
from fedsam_core.errors import DataError
from fedsam_core.hashing import derive_seed
from fedsam_core.settings import Settings


class SliceConfig(Settings):
    """How volumes become the model's inputs."""

    context: Literal["2.5d", "single"] = Field(
        default="2.5d", description="2.5d: neighbouring slices as channels; single: the slice itself three times"
    )
    context_mm: float = Field(
        default=2.0, gt=0, description="distance of the neighbours in mm; at least the next slice is taken"
    )
    augment: bool = Field(default=True, description="augment training samples")
    rotation_degrees: float = Field(default=15.0, ge=0, description="largest in-plane rotation")
    scale: float = Field(default=0.15, ge=0, lt=1, description="largest zoom in or out, as a share of the size")
    shift: float = Field(default=0.05, ge=0, lt=1, description="largest in-plane shift, as a share of the size")
    gamma: float = Field(
        default=0.2, ge=0, description="intensities are raised to a power of up to e^gamma or e^-gamma"
    )
    contrast: float = Field(
        default=0.1, ge=0, lt=1, description="largest change of the intensities' gain, and offset / 2"
    )
    noise: float = Field(default=0.02, ge=0, description="largest standard deviation of the Gaussian noise added")


CPU = torch.device("cpu")


def to_square(volume: Voxels, size: int, order: Literal[0, 1], pixel: tuple[float, float]) -> Voxels:
    """Pad slices with zeros to a physical square around their centre, then resample: nothing is stretched.

    Args:
        volume: [..., D, H, W]; a tensor (order 1 alone) stays on its device.
        size: side S of the result.
        order: 0 nearest (labels, dtype kept), 1 linear (float32).
        pixel: (row, column) spacing in mm.

    Returns:
        [..., D, S, S].
    """
    height, width = volume.shape[-2:]
    (top, bottom), (left, right) = _padding(height, width, pixel)
    if isinstance(volume, Tensor):
        padded = F.pad(volume, (left, right, top, bottom))
    else:
        padded = np.pad(volume, [(0, 0)] * (volume.ndim - 2) + [(top, bottom), (left, right)])
    return resize(padded, (volume.shape[-3], size, size), order)


def from_square(array: Voxels, shape: tuple[int, int], order: Literal[0, 1], pixel: tuple[float, float]) -> Voxels:
    """Inverse of `to_square` in geometry: resample onto the padded slices and cut the padding off.

    Args:
        array: [..., D, S, S]; a tensor (order 1 alone) stays on its device.
        shape: (H, W) of the slices.
        order: 0 nearest (dtype kept), 1 linear (float32).
        pixel: (row, column) spacing in mm of the slices.

    Returns:
        [..., D, H, W].
    """
    height, width = shape
    (top, bottom), (left, right) = _padding(height, width, pixel)
    padded = resize(array, (array.shape[-3], top + height + bottom, left + width + right), order)
    return padded[..., top : top + height, left : left + width]


def windows(
    volume: npt.NDArray[Any], indices: Sequence[int] | npt.NDArray[np.integer], spacing_mm: float, config: SliceConfig
) -> npt.NDArray[Any]:
    """Slices with their neighbours as channels; beyond the ends of the volume the end slice is repeated.

    Args:
        volume: [D, S, S].
        indices: n slices.
        spacing_mm: distance between slices.

    Returns:
        [n, 3, S, S]: the slice a step below, the slice, the slice a step above.
    """
    step = max(1, round(config.context_mm / spacing_mm)) if config.context == "2.5d" else 0
    neighbours = np.asarray(indices)[:, None] + np.array([-step, 0, step])
    stacked: npt.NDArray[Any] = volume[neighbours.clip(0, len(volume) - 1)]
    return stacked


class SliceDataset:
    """All slices of some cases, resampled once to S x S and kept in memory (float16 and uint8: 3 bytes a pixel).

    Slices are numbered through the cases in their order.
    """

    def __init__(self, cases: Sequence[PreparedCase], image_size: int, config: SliceConfig) -> None:
        """Raises DataError if a case has no label."""
        self.config = config
        self._images: list[npt.NDArray[np.float16]] = []  # [D, S, S] in [0, 1]
        self._labels: list[npt.NDArray[np.uint8]] = []  # [D, S, S]
        self._spacing = [case.spacing[0] for case in cases]
        self._names = [case.case.id for case in cases]
        for case in cases:
            if case.label is None:
                raise DataError(f"case {case.case.id}: no label map; it cannot be trained on")
            pixel = case.spacing[1:]
            self._images.append(to_square(case.image, image_size, 1, pixel).astype(np.float16))
            self._labels.append(to_square(case.label, image_size, 0, pixel))
        depths = [len(image) for image in self._images]
        self._case_of = np.repeat(np.arange(len(depths)), depths)
        self._slice_of = np.concatenate([np.arange(depth) for depth in depths]) if depths else np.arange(0)

    def __len__(self) -> int:
        return len(self._case_of)

    def name(self, index: int | np.integer) -> tuple[str, int]:
        """A slice's case and its number therein: the same among whatever other cases."""
        return self._names[self._case_of[index]], int(self._slice_of[index])

    def foreground_slices(self) -> npt.NDArray[np.bool_]:
        """bool [len]: which slices show any class."""
        shown = [label.any(axis=(1, 2)) for label in self._labels]
        return np.concatenate(shown) if shown else np.zeros(0, np.bool_)

    def batch(
        self, indices: Sequence[int] | npt.NDArray[np.integer], seed: int, train: bool, device: torch.device = CPU
    ) -> tuple[Tensor, Tensor]:
        """Samples of some slices.

        Args:
            indices: B slices in 0..len - 1.
            seed: of the step; with the slice's case and number alone, it decides the augmentation: neither the rest of
                the batch nor the site's other cases have a say.
            train: augment, if the configuration does.
            device: where it is augmented, and what the samples are for.

        Returns:
            images float32 [B, 3, S, S] in [0, 1]; labels int64 [B, S, S].
        """
        stored = np.concatenate([self._window(int(index)) for index in indices])
        shown = np.stack([self._labels[self._case_of[index]][self._slice_of[index]] for index in indices])
        images, labels = put(torch.from_numpy(stored), device).float(), put(torch.from_numpy(shown), device)
        if not (train and self.config.augment):
            return images, labels.long()
        from fedsam_core.data.augment import augment  # MONAI takes seconds to import, and only training needs it

        streams = [np.random.default_rng(derive_seed(seed, "augment", *self.name(index))) for index in indices]
        return augment(images, labels, streams, self.config)

    def _window(self, index: int) -> npt.NDArray[np.float16]:
        case = self._case_of[index]
        return windows(self._images[case], [int(self._slice_of[index])], self._spacing[case], self.config)


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; by way of memory that a GPU reads by itself, so that nobody waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _padding(height: int, width: int, pixel: tuple[float, float]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels to add (top, bottom), (left, right) for a physical square, to half a pixel."""
    side = max(height * pixel[0], width * pixel[1])
    rows, columns = round(side / pixel[0]) - height, round(side / pixel[1]) - width
    return (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)
