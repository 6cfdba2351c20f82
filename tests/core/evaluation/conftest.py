"""Small scans on disk, and a stand-in for the segmenter that reads the labels off the gray values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff

from fedsam_core.data.cohort import Case
from fedsam_core.data.preprocess import PreparedCase, PreprocessConfig, prepare_image

Array = np.ndarray[Any, Any]
MakeCase = Callable[..., Case]


class GrayReader(torch.nn.Module):
    """A "model" for scans whose gray values are their labels: value k / classes in the middle channel is class k.

    It keeps what it was shown (if `keep`), so that tests can count and compare.
    """

    def __init__(self, classes: int, keep: bool = True) -> None:
        super().__init__()
        self.classes, self.device = classes, torch.device("cpu")
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.part = torch.nn.Dropout(0.5)
        self.keep = keep
        self.seen: list[torch.Tensor] = []
        self.modes: list[tuple[bool, bool, bool, bool]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.keep:
            self.seen.append(images)
        autocast = torch.is_autocast_enabled(images.device.type)
        self.modes.append((self.training, self.part.training, torch.is_grad_enabled(), autocast))
        values = torch.linspace(0, 1, self.classes + 1)[None, :, None, None]
        return -200 * self.weight * (self.part(images)[:, 1:2] - values) ** 2


def blobs(shape: tuple[int, int, int], spacing: tuple[float, float, float], classes: int = 2) -> Array:
    """uint8 label map of overlapping balls, off the center, in physical proportions."""
    extent = np.array(shape) * spacing
    grid = np.stack(
        np.meshgrid(*[(np.arange(n) + 0.5) * d for n, d in zip(shape, spacing, strict=True)], indexing="ij")
    )
    labels = np.zeros(shape, dtype=np.uint8)
    for value in range(1, classes + 1):
        center = extent * (0.3 + 0.3 * value / classes)
        inside = np.linalg.norm(grid - center[:, None, None, None], axis=0) < extent.min() * (
            0.36 - 0.1 * value / classes
        )
        labels[inside] = value
    return labels


@pytest.fixture
def make_case(tmp_path: Path) -> MakeCase:
    """Writes a scan and its label map in any orientation and returns the case."""

    def make(
        labels: Array,
        image: Array | None = None,
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        orientation: str = "RAS",
        name: str = "case",
        site: str = "site-a",
        classes: int = 2,
    ) -> Case:
        # Labels are given along right, anterior, superior; stored as `orientation` says, with an affine that fits.
        ornt = nib.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = (-31.0, 12.5, 40.0)
        stored_affine = affine @ inv_ornt_aff(ornt, labels.shape)
        voxels = labels / classes if image is None else image
        stored = nib.apply_orientation(labels, ornt)
        scan, mask = tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_label.nii.gz"
        nib.save(nib.Nifti1Image(nib.apply_orientation(voxels, ornt).astype(np.float32), stored_affine), scan)
        nib.save(nib.Nifti1Image(stored.astype(np.uint8), stored_affine), mask)
        return Case(
            id=name,
            site=site,
            split="test",
            image=str(scan),
            label=str(mask),
            shape=stored.shape,
            spacing=tuple(float(size) for size in nib.affines.voxel_sizes(stored_affine)),
            orientation=orientation,
            label_values=tuple(int(value) for value in np.unique(labels)),
            intensity={"min": 0.0, "max": 1.0, "p01": 0.0, "p99": 1.0, "mean": 0.1, "std": 0.1},
            image_sha256="0" * 64,
            label_sha256="0" * 64,
        )

    return make


def prepared(case: Case, spacing: tuple[float, float, float] | None = None, slice_axis: str = "auto") -> PreparedCase:
    """The case prepared from its file, gray values 0 and 1 kept as they are (a CT window from 0 to 1)."""
    config = PreprocessConfig(spacing=spacing, slice_axis=slice_axis, ct_window=(0.0, 1.0))  # type: ignore[arg-type]
    image = prepare_image(Path(case.image), config, "ct")
    return PreparedCase(case, image.image, None, image.spacing, image.geometry)
