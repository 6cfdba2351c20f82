# mypy: untyped-calls-exclude=nibabel
"""A made-up cohort: abdominal CT in Hounsfield units with two kidneys and their tumours, drawn by a program.

It shows that everything works, without anyone's scans; it says nothing about patients. Wherever it is kept it is called
synthetic: in the cohort, in dataset.json, and in the header of every file.

Sites differ as hospitals do: slice spacing, field of view, contrast phase, reconstruction kernel, noise, and the order
in which their scanners write the axes. Patients differ in size, position, shape of the organs and in their tumours.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from scipy.ndimage import gaussian_filter

from fedsam_core.data.files import write_failed
from fedsam_core.data.sources import Listing
from fedsam_core.data.sources.nifti import list_nifti
from fedsam_core.hashing import derive_seed, stable_hash
from fedsam_core.settings import Settings

CLASSES = ("kidney", "tumour")
DESCRIPTION = "SYNTHETIC abdominal CT phantom made by fedsam, no patient"  # at most 79 bytes fit a NIfTI header
VERSION = 2  # raise it when the same configuration would draw other scans

Field3D = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class PhantomConfig(Settings):
    """How many scans are made, and how fine. Equal configurations make equal scans."""

    sites: int = Field(default=3, ge=1, le=26, description="number of hospitals, called site-a, site-b, ...")
    cases_per_site: int = Field(default=9, ge=1, description="scans of each site")
    test_per_site: int = Field(default=2, ge=0, description="how many of them are test cases; the rest trains")
    shape: tuple[int, int, int] = Field(
        default=(48, 96, 96), description="slices, rows, columns of the first site's scans; slices vary with the site"
    )
    seed: int = Field(default=7, description="seed of all anatomy and noise")

    @model_validator(mode="after")
    def _some_train(self) -> "PhantomConfig":
        if self.test_per_site >= self.cases_per_site:
            raise ValueError("test_per_site must be below cases_per_site, or nothing is left to train on")
        if min(self.shape) < 8:
            raise ValueError("shape must be at least 8 voxels along each axis to hold a kidney")
        return self


@dataclass(frozen=True)
class _Phase:
    """Enhancement by contrast medium: Hounsfield units of what it reaches."""

    cortex: float
    medulla: float
    tumour: float
    liver: float
    spleen: float
    aorta: float
    vein: float


@dataclass(frozen=True)
class _Scanner:
    """What a site's scans have in common."""

    slice_factor: float  # slice spacing, relative to the first site
    field_of_view: float  # mm across the slice
    phase: _Phase
    blur_mm: float  # in-plane standard deviation of the reconstruction kernel
    sharpen: float  # edge enhancement of the kernel
    noise: float  # HU, standard deviation before the kernel
    axes: str  # directions in which the written array's axes grow


_ARTERIAL = _Phase(cortex=185, medulla=95, tumour=100, liver=72, spleen=125, aorta=290, vein=105)
_VENOUS = _Phase(cortex=170, medulla=150, tumour=78, liver=112, spleen=122, aorta=160, vein=150)
_DELAYED = _Phase(cortex=128, medulla=132, tumour=58, liver=88, spleen=92, aorta=108, vein=106)
# A fourth site shares the first one's scanner, and so on: patients still differ.
_SCANNERS = (
    _Scanner(1.0, 295, _VENOUS, blur_mm=2.2, sharpen=0.0, noise=30, axes="LPS"),
    _Scanner(1.5, 315, _ARTERIAL, blur_mm=3.2, sharpen=0.0, noise=32, axes="IPL"),
    _Scanner(0.75, 298, _DELAYED, blur_mm=1.6, sharpen=0.7, noise=24, axes="RAS"),
)
_HEIGHT = 200.0  # mm of the body that every scan covers


def site_names(config: PhantomConfig) -> tuple[str, ...]:
    """The sites of the cohort, whether it was made or not."""
    return tuple(f"site-{chr(ord('a') + site)}" for site in range(config.sites))


def list_phantom(
    config: PhantomConfig, work_dir: Path, progress: Callable[[str, int, int], None] | None = None
) -> Listing:
    """Make the cohort below `work_dir` unless it is there already, and list it like any other NIfTI cohort.

    The folder (Decathlon layout with sites.csv) appears by one rename when all scans are written.

    Raises DataError if the disk refuses.
    """
    folder = work_dir / f"phantom-{stable_hash([VERSION, config.model_dump(mode='json')])[:12]}"
    if not folder.is_dir():
        try:
            work_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".phantom-", dir=work_dir, ignore_cleanup_errors=True) as temporary:
                made = Path(temporary) / "cohort"
                _write_cohort(config, made, progress)
                if not folder.is_dir():  # another process may have been faster; its scans are the same
                    os.rename(made, folder)
        except OSError as error:
            raise write_failed(folder, error) from error
    return replace(list_nifti(folder), synthetic=True)


def _write_cohort(config: PhantomConfig, folder: Path, progress: Callable[[str, int, int], None] | None) -> None:
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    rows = ["case,site,split"]
    for site in range(config.sites):
        for index in range(config.cases_per_site):
            name = f"phantom_{chr(ord('a') + site)}{index:02d}"
            image, label = make_scan(config, site, index)
            nib.save(image, folder / "imagesTr" / f"{name}.nii.gz")
            nib.save(label, folder / "labelsTr" / f"{name}.nii.gz")
            test = index >= config.cases_per_site - config.test_per_site
            rows.append(f"{name},{site_names(config)[site]},{'test' if test else 'train'}")
            if progress is not None:
                progress("phantom", len(rows) - 1, config.sites * config.cases_per_site)
    (folder / "sites.csv").write_text("\n".join(rows) + "\n")
    description = {
        "name": "phantom",
        "description": DESCRIPTION,
        "synthetic": True,
        "modality": {"0": "CT"},
        "labels": {"0": "background", **{str(value): name for value, name in enumerate(CLASSES, start=1)}},
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")


def make_scan(config: PhantomConfig, site: int, index: int) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Scan (int16, HU) and label map (uint8: 1 kidney, 2 tumour) of one patient, with the affine of the site's scanner.

    A patient depends on (seed, site, index) alone: more sites or cases leave the others as they are.
    """
    scanner = _SCANNERS[site % len(_SCANNERS)]
    rng = np.random.default_rng(derive_seed(config.seed, "phantom", site, index))
    slices, rows, columns = round(config.shape[0] / scanner.slice_factor), *config.shape[1:]
    spacing = (_HEIGHT / slices, scanner.field_of_view / rows, scanner.field_of_view / columns)
    body = _Body((slices, rows, columns), spacing, rng)
    units, label = _draw(body, scanner.phase, rng)
    units = _reconstruct(units, spacing, scanner, rng)

    # Voxel [slice, row, column] -> mm in RAS+: columns grow to the left, rows to the back, slices upwards.
    affine = np.zeros((4, 4))
    affine[0, 2], affine[1, 1], affine[2, 0], affine[3, 3] = -spacing[2], -spacing[1], spacing[0], 1
    isocentre = rng.uniform(-20, 20, size=3)
    affine[:3, 3] = isocentre - affine[:3, :3] @ ((np.array(units.shape) - 1) / 2)
    return _nifti(np.rint(units).astype(np.int16), affine, scanner.axes), _nifti(label, affine, scanner.axes)


def _nifti(array: npt.NDArray[Any], affine: npt.NDArray[np.float64], axes: str) -> nib.Nifti1Image:
    image = nib.Nifti1Image(array, affine)
    image.header["descrip"] = DESCRIPTION.encode()
    image.header.set_xyzt_units("mm")
    written = nib.orientations.axcodes2ornt(axes)
    turned: nib.Nifti1Image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), written))
    return turned


class _Body:
    """A patient's own coordinates on the scanner's grid, in mm from the middle of the abdomen.

    Patients are one atlas seen through a smooth random deformation, so that neighbours stay neighbours.
    """

    def __init__(
        self, shape: tuple[int, int, int], spacing: tuple[float, float, float], rng: np.random.Generator
    ) -> None:
        self._axes = [
            ((np.arange(n) - (n - 1) / 2) * size).astype(np.float32) for n, size in zip(shape, spacing, strict=True)
        ]
        z, y, x = np.ix_(*self._axes)
        size = rng.uniform(0.92, 1.06)
        turn = np.deg2rad(rng.uniform(-5, 5))
        shift = rng.uniform(-6, 6, size=3) * (1, 1, 2)
        self.x = ((x * np.cos(turn) - y * np.sin(turn) + shift[0]) / size + 4 * self.waves(rng, 120)).astype(np.float32)
        self.y = ((x * np.sin(turn) + y * np.cos(turn) + shift[1]) / size + 4 * self.waves(rng, 120)).astype(np.float32)
        self.z = (z / size + shift[2] + 8 * self.waves(rng, 130)).astype(np.float32)
        self._bumps = [self.waves(rng, length) for length in (45, 55, 65, 80)]
        self._rng = rng

    def waves(self, rng: np.random.Generator, length: float) -> Field3D:
        """Smooth noise of about unit standard deviation: plane waves of about `length` mm in random directions."""
        count = 7
        direction = rng.normal(size=(count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        k = 2 * np.pi / (length * rng.uniform(0.7, 1.5, size=(count, 1))) * direction
        phase = np.exp(2j * np.pi * rng.uniform(size=count))
        along = [np.exp(1j * k[:, axis, None] * self._axes[axis]).astype(np.complex64) for axis in range(3)]
        along[0] = (along[0] * phase[:, None]).astype(np.complex64)
        plane = (along[1][:, :, None] * along[2][:, None, :]).reshape(count, -1)
        field: Field3D = (along[0].T @ plane).real.reshape([len(axis) for axis in self._axes])
        field *= np.float32(np.sqrt(2 / count))
        return field

    def ellipsoid(
        self,
        centre: tuple[float, float, float],
        radii: tuple[float, float, float],
        lean: float = 0.0,
        rough: float = 0.12,
    ) -> Field3D:
        """Squared distance from `centre` in `radii` (x, y, z; mm), bumpy: below 1 inside. `lean`: x moves with z."""
        dz = self.z - centre[2]
        square: Field3D = ((self.x - centre[0] - lean * dz) / radii[0]) ** 2
        square += ((self.y - centre[1]) / radii[1]) ** 2
        square += (dz / radii[2]) ** 2
        square += rough * self._bumps[self._rng.integers(len(self._bumps))]
        return square

    def tube(self, x: float, y: float, radii: tuple[float, float], rough: float = 0.1) -> Field3D:
        """Like `ellipsoid`, without end along z."""
        square: Field3D = ((self.x - x) / radii[0]) ** 2 + ((self.y - y) / radii[1]) ** 2
        square += rough * self._bumps[self._rng.integers(len(self._bumps))]
        return square


def _draw(body: _Body, phase: _Phase, rng: np.random.Generator) -> tuple[Field3D, npt.NDArray[np.uint8]]:
    """Hounsfield units and labels of a patient. x grows to the patient's left, y to the back, z to the head."""

    def vary(mean: float, by: float) -> float:
        return float(rng.normal(mean, by))

    units = np.full(body.x.shape, -1000, np.float32)
    outline = (np.abs(body.x) / vary(142, 4)) ** 2.3 + (np.abs(body.y) / vary(101, 3)) ** 2.3
    skin, wall, inner = outline < 1, outline < vary(0.74, 0.03), outline < vary(0.56, 0.02)
    units[skin] = -105
    units[wall] = 52
    units[inner] = -98

    # Bowel: loops in front, some with gas, their content as bright as muscle, liver or kidney without contrast medium.
    for _ in range(rng.integers(20, 30)):
        centre = (rng.uniform(-88, 88), rng.uniform(-64, 2), rng.uniform(-105, 75))
        loop = body.ellipsoid(centre, (rng.uniform(13, 24), rng.uniform(11, 18), rng.uniform(14, 34)), rough=0.2)
        units[inner & (loop < 1)] = vary(62, 12)
        units[inner & (loop < 0.55)] = vary(25, 12)
        if rng.uniform() < 0.45:
            units[inner & (loop < 0.5) & (body.y < centre[1] - 3)] = -750  # gas rises to the front

    liver = inner & (body.ellipsoid((-68, -18, 72), (72, 66, vary(72, 6))) < 1)
    units[liver] = vary(phase.liver, 5)
    vessels = liver & (body.waves(rng, 30) > 1.45)
    units[vessels] = vary(phase.vein, 5)
    units[inner & (body.ellipsoid((-42, -42, 18), (13, 13, 22)) < 1)] = vary(12, 4)  # gallbladder
    spleen = inner & (body.ellipsoid((88, 28, 68), (28, 36, vary(42, 5)), lean=0.15) < 1)
    units[spleen] = vary(phase.spleen, 6)
    stomach = body.ellipsoid((52, -34, 62), (40, 30, 42), rough=0.15)
    units[inner & (stomach < 1) & ~spleen] = vary(70, 5)
    units[inner & (stomach < 0.72) & ~spleen] = vary(20, 6)
    units[inner & (stomach < 0.65) & (body.y < -46)] = -800

    for side in (-1, 1):
        units[inner & (body.tube(side * 37, 44, (17, 19)) < 1)] = vary(58, 3)  # psoas
        units[wall & (body.tube(side * 32, 82, (27, 17)) < 1)] = vary(55, 3)  # erector spinae
    _draw_bones(units, body, outline, wall, rng)
    units[inner & (body.tube(9, 22, (10, 10), rough=0.05) < 1)] = vary(phase.aorta, 8)
    units[inner & (body.tube(-17, 21, (12, 9), rough=0.08) < 1)] = vary(phase.vein, 6)

    label = np.zeros(units.shape, np.uint8)
    with_tumour = {-1: (-1,), 0: (-1, 1), 1: (1,)}[int(rng.choice([-1, 0, 1], p=[0.35, 0.3, 0.35]))]
    for side in (-1, 1):
        _draw_kidney(units, label, body, outline, phase, rng, side, tumour=side in with_tumour)

    texture = 5 * body.waves(rng, 18) + 5 * body.waves(rng, 40)
    units[skin] += texture[skin]
    table = np.abs(body.y - 122 - 0.0006 * body.x**2) < 3.5
    units[~skin & table] = -420
    return units, label


def _draw_bones(units: Field3D, body: _Body, outline: Field3D, wall: Mask, rng: np.random.Generator) -> None:
    """Vertebrae with discs, canal, arch and processes, and ribs in the wall of the upper half."""
    height = (body.z + rng.uniform(0, 34)) % 34  # a vertebra and its disc
    vertebra = body.tube(0, 52, (23, 18), rough=0.06)
    bone = height > 8
    units[(vertebra < 1) & bone] = 290
    units[(vertebra < 0.72) & bone] = 165
    units[(vertebra < 1) & ~bone] = 85
    canal = body.tube(0, 77, (10, 8), rough=0.03)
    units[(canal < 2.2) & bone] = 380
    units[canal < 1] = 22
    spinous = (np.abs(body.x) < 4) & (body.y > 86) & (body.y < 103) & (height > 14) & (height < 28)
    transverse = (np.abs(body.x) < 44) & (np.abs(body.y - 70) < 5) & (height > 16) & (height < 25) & (canal > 1)
    units[wall & (spinous | transverse)] = 330
    ribs = (body.z - 0.8 * body.y + 6) % 32 < 9  # they run downwards to the front
    ring = (outline > 0.60) & (outline < 0.70) & (body.z > -15) & (np.abs(body.x) > 62)
    units[ring & ribs] = 310


def _draw_kidney(
    units: Field3D,
    label: npt.NDArray[np.uint8],
    body: _Body,
    outline: Field3D,
    phase: _Phase,
    rng: np.random.Generator,
    side: int,
    tumour: bool,
) -> None:
    """One kidney (`side` -1 right, 1 left) in its fat, and a tumour that grows from its surface."""
    centre = (side * rng.normal(72, 3), rng.normal(41, 3), rng.normal(-8 if side < 0 else 2, 7))
    radii = (rng.normal(29, 2), rng.normal(25, 1.5), rng.normal(54, 4))
    lean = -0.22 * side  # the upper poles lean to the spine
    shape = body.ellipsoid(centre, radii, lean, rough=0.14)
    units[(shape < 1.45) & (units > 0) & (units < 250)] = -95  # perirenal fat keeps the organs off, mostly
    sinus = body.ellipsoid((centre[0] - 17 * side, centre[1] - 3, centre[2]), (17, 11, 23), lean, rough=0.2)
    shape[outline > 0.62] = np.inf  # everything stays within the abdominal wall
    kidney = (shape < 1) & (sinus > 1)
    units[shape < 1] = rng.normal(phase.cortex, 6)
    units[kidney & (shape < 0.6) & (body.waves(rng, 24) > -0.5)] = rng.normal(phase.medulla, 6)
    units[(shape < 1) & (sinus < 1)] = -60
    units[(shape < 1) & (sinus < 0.3)] = rng.normal(25, 6)  # renal pelvis
    label[kidney] = 1
    if not tumour:
        return
    # Anywhere on the surface but towards the spine; the larger ones bulge out.
    angle, level = rng.uniform(-1.9, 1.9), rng.uniform(-0.75, 0.75)
    radius = rng.uniform(16, 31)
    across = 0.85 * np.sqrt(1 - level**2)
    seat = (
        centre[0] + side * radii[0] * across * np.cos(angle) + lean * radii[2] * level,
        centre[1] + radii[1] * across * np.sin(angle),
        centre[2] + radii[2] * level,
    )
    growth = body.ellipsoid(
        seat, (radius, radius * rng.uniform(0.85, 1.1), radius * rng.uniform(0.85, 1.2)), rough=0.18
    )
    growth[outline > 0.62] = np.inf
    mass = growth < 1
    units[mass] = rng.normal(phase.tumour, 7) + 12 * body.waves(rng, 22)[mass]
    if radius > 20:
        units[growth < rng.uniform(0.15, 0.4)] = rng.normal(32, 5)  # necrosis
    label[mass] = 2


def _reconstruct(
    units: Field3D, spacing: tuple[float, float, float], scanner: _Scanner, rng: np.random.Generator
) -> Field3D:
    """What the scanner makes of it: partial volume, noise, kernel."""
    noise = rng.standard_normal(units.shape, dtype=np.float32) * scanner.noise
    sigma = (0.35, scanner.blur_mm / spacing[1], scanner.blur_mm / spacing[2])  # the kernel works within a slice
    image: Field3D = gaussian_filter(units + noise, sigma)
    if scanner.sharpen:
        image += scanner.sharpen * (image - gaussian_filter(image, (0, 1.2, 1.2)))
    return image.clip(-1024, 2000)
