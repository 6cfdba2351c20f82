"""Augmentation of training samples: each sample's own random numbers, the whole batch at once."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from monai.networks.layers.spatial_transforms import AffineTransform
from monai.transforms.utils import create_rotate, create_scale, create_translate
from torch import Tensor

from fedsam_core.data.slices import SliceConfig


def augment(
    images: Tensor, labels: Tensor, streams: Sequence[np.random.Generator], config: SliceConfig
) -> tuple[Tensor, Tensor]:
    """Random similarity transform (MONAI, whole batch at once; labels nearest), then gamma, gain, offset and noise.

    Every sample's numbers come from its own stream. Intensity changes are the same for all pixels and channels of a
    sample, apart from the noise.
    """
    theta = torch.from_numpy(np.stack([_random_affine(stream, config) for stream in streams])).float()
    warp = partial(AffineTransform, normalized=True, padding_mode="zeros", align_corners=False)
    images = warp(mode="bilinear")(images, theta)
    labels = warp(mode="nearest")(labels[:, None].float(), theta)[:, 0].long()

    gamma, gain, offset, deviation = (column[:, None, None, None] for column in _random_intensity(streams, config))
    images = images.clamp(0, 1) ** gamma * gain + offset
    noise = np.stack([stream.standard_normal(images.shape[1:], dtype=np.float32) for stream in streams])
    return (images + deviation * torch.from_numpy(noise)).clamp(0, 1), labels


def _random_affine(stream: np.random.Generator, config: SliceConfig) -> npt.NDArray[np.float64]:
    """3x3, from the augmented slice to the stored one, in coordinates that run from -1 to 1."""
    angle = math.radians(config.rotation_degrees) * stream.uniform(-1, 1)
    zoom = 1 + config.scale * stream.uniform(-1, 1)
    shift = 2 * config.shift * stream.uniform(-1, 1, size=2)
    parts = create_translate(2, tuple(shift)), create_rotate(2, angle), create_scale(2, (zoom, zoom))
    matrix: npt.NDArray[np.float64] = np.linalg.multi_dot([np.asarray(part) for part in parts])
    return matrix


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
