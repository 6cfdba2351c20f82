"""Augmentation of training samples: each sample's own random numbers, the whole batch at once."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms.utils import create_rotate, create_scale, create_translate
from torch import Tensor
from torch.nn import functional as F

from fedsam_core.data.slices import SliceConfig


def augment(
    images: Tensor, labels: Tensor, streams: Sequence[np.random.Generator], config: SliceConfig
) -> tuple[Tensor, Tensor]:
    """Random similarity transform (whole batch at once; labels nearest), then gamma, gain, offset and noise.

    Every sample's numbers come from its own stream, so that none depends on what else is in the batch. Intensity
    changes are the same for all pixels and channels of a sample, apart from the noise. The work is done on the images'
    device: a GPU takes slices faster than a processor augments them.
    """
    device = images.device
    theta = torch.from_numpy(np.stack([_random_affine(stream, config) for stream in streams])).float().to(device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    warp = partial(F.grid_sample, grid=grid, padding_mode="zeros", align_corners=False)
    images = warp(images, mode="bilinear")
    labels = warp(labels[:, None].float(), mode="nearest")[:, 0].long()

    intensity = _random_intensity(streams, config).to(device)
    gamma, gain, offset, deviation = (column[:, None, None, None] for column in intensity)
    images.clamp_(0, 1).pow_(gamma).mul_(gain).add_(offset)  # in place: `warp` has made them
    noise = _noise(streams, images)
    return images.add_(noise.mul_(deviation)).clamp_(0, 1), labels


def _noise(streams: Sequence[np.random.Generator], images: Tensor) -> Tensor:
    """Standard normal float32, as many as there are pixels. A GPU draws them by itself, from a seed of each stream:
    other numbers than a CPU's."""
    noise = torch.empty_like(images)
    for stream, sample in zip(streams, noise, strict=True):
        if noise.is_cpu:
            stream.standard_normal(dtype=np.float32, out=sample.numpy())
        else:
            sample.normal_(generator=torch.Generator(noise.device).manual_seed(int(stream.integers(2**63))))
    return noise


def _random_affine(stream: np.random.Generator, config: SliceConfig) -> npt.NDArray[np.float64]:
    """2x3, from the augmented slice to the stored one, of columns and rows that run from -1 to 1, as torch has them."""
    angle = math.radians(config.rotation_degrees) * stream.uniform(-1, 1)
    zoom = 1 + config.scale * stream.uniform(-1, 1)
    shift = 2 * config.shift * stream.uniform(-1, 1, size=2)
    parts = create_translate(2, tuple(shift)), create_rotate(2, angle), create_scale(2, (zoom, zoom))
    matrix: npt.NDArray[np.float64] = np.linalg.multi_dot([np.asarray(part) for part in parts])
    return matrix[[1, 0]][:, [1, 0, 2]]  # MONAI's are of rows and columns


def _random_intensity(streams: Sequence[np.random.Generator], config: SliceConfig) -> Tensor:
    """float32 [4, B]: exponent, gain, offset, standard deviation of the noise."""
    rows = [
        (
            math.exp(config.gamma * stream.uniform(-1, 1)),
            1 + config.contrast * stream.uniform(-1, 1),
            config.contrast / 2 * stream.uniform(-1, 1),
            config.noise * stream.uniform(),
        )
        for stream in streams
    ]
    return torch.tensor(rows, dtype=torch.float32).T
