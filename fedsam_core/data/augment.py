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

    Every sample's numbers come from its own stream, so that none depends on what else is in the batch. Intensity
    changes are the same for all pixels and channels of a sample, apart from the noise. The work is done on the images'
    device: a GPU takes slices faster than a processor augments them.
    """
    device = images.device
    theta = torch.from_numpy(np.stack([_random_affine(stream, config) for stream in streams])).float().to(device)
    warp = partial(AffineTransform, normalized=True, padding_mode="zeros", align_corners=False)
    images = warp(mode="bilinear")(images, theta)
    labels = warp(mode="nearest")(labels[:, None].float(), theta)[:, 0].long()

    intensity = _random_intensity(streams, config).to(device)
    gamma, gain, offset, deviation = (column[:, None, None, None] for column in intensity)
    images = images.clamp(0, 1) ** gamma * gain + offset
    noise = torch.stack([_noise(stream, images[0].shape, device) for stream in streams])
    return (images + deviation * noise).clamp(0, 1), labels


def _noise(stream: np.random.Generator, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal float32. A GPU draws it by itself, from a seed of the stream: other numbers than a CPU's."""
    if device.type == "cpu":
        return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(int(stream.integers(2**63))), device=device)


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
