"""Training samples: squares and back, real neighbours, and augmentation that depends on seed and slice alone."""

import numpy as np
import pytest
import torch

from fedsam_core.data.cohort import Case
from fedsam_core.data.geometry import Geometry
from fedsam_core.data.preprocess import PreparedCase
from fedsam_core.data.slices import SliceConfig, SliceDataset, from_square, to_square, windows
from fedsam_core.errors import DataError


def case(name: str, shape: tuple[int, int, int], spacing=(1.0, 1.0, 1.0), labelled: bool = True) -> PreparedCase:
    rng = np.random.default_rng(len(name))
    image = rng.random(shape, dtype=np.float32)
    label = np.zeros(shape, np.uint8)
    label[1:3, 3:-4, 4:-3] = 1
    label[2, 5:7, 5:7] = 2
    facts = Case(
        id=name,
        site="s",
        split="train",
        image="-",
        label=None,
        shape=shape[::-1],
        spacing=spacing[::-1],
        orientation="LPS",
        label_values=(),
        intensity={},
        image_sha256="",
        label_sha256=None,
    )
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1])
    geometry = Geometry.plan(affine, shape[::-1], "axial", None)
    assert geometry.shape == shape
    return PreparedCase(facts, image, label if labelled else None, spacing, geometry)


@pytest.mark.parametrize(
    ("shape", "pixel"), [((20, 33), (1.0, 1.0)), ((33, 20), (1.0, 1.0)), ((40, 25), (1.0, 1.5)), ((16, 50), (2.0, 1.0))]
)
@pytest.mark.parametrize("size", [64, 112])
def test_labels_return_from_the_square(shape, pixel, size: int) -> None:
    label = np.random.default_rng(0).integers(0, 3, (4, *shape), dtype=np.uint8)
    square = to_square(label, size, 0, pixel)
    assert (square.shape, square.dtype) == ((4, size, size), np.uint8)
    np.testing.assert_array_equal(from_square(square, shape, 0, pixel), label)


def test_probabilities_return_from_the_square_in_place() -> None:
    """A smooth field comes back where it was, in the middle of the slice, to a percent of its range."""
    y, x = np.mgrid[0:30, 0:44]
    volume = np.exp(-((y - 12) ** 2 + (x - 30) ** 2) / 60)[None].astype(np.float32)
    back = from_square(to_square(np.stack([volume, 1 - volume]), 128, 1, (1, 1)), (30, 44), 1, (1, 1))
    assert back.shape == (2, 1, 30, 44)
    inner = np.s_[:, 1:-1, 1:-1]
    np.testing.assert_allclose(back[0][inner], volume[inner], atol=0.015)


def test_square_is_physical_and_centred() -> None:
    """A disc in mm on pixels twice as tall as wide becomes a disc in pixels, in the middle."""
    y, x = np.mgrid[0:30, 0:40]
    disc = (((y - 14.5) * 2) ** 2 + (x - 19.5) ** 2 < 15**2).astype(np.float32)[None]  # 60 x 40 mm
    rows, columns = np.nonzero(to_square(disc, 120, 1, (2.0, 1.0))[0] > 0.5)
    for extent in (np.ptp(rows), np.ptp(columns)):
        assert extent == pytest.approx(30 / 60 * 120, abs=5)  # the disc itself is drawn to 2 mm
    assert (rows.mean(), columns.mean()) == pytest.approx((59.5, 59.5), abs=0.3)


def test_windows_reach_as_far_in_mm_and_stop_at_the_ends() -> None:
    volume = np.arange(10, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)

    def seen(index: int, spacing: float, **settings) -> list[float]:
        return windows(volume, [index], spacing, SliceConfig(**settings))[0, :, 0, 0].tolist()

    assert seen(5, 1.0, context_mm=3) == [2, 5, 8]
    assert seen(5, 3.0, context_mm=3) == [4, 5, 6]
    assert seen(5, 5.0, context_mm=2) == [4, 5, 6]  # the next slice, however far
    assert seen(0, 1.0, context_mm=3) == [0, 0, 3]
    assert seen(9, 1.0, context_mm=3) == [6, 9, 9]
    assert seen(5, 1.0, context="single") == [5, 5, 5]
    assert windows(volume, [1, 2, 3], 1.0, SliceConfig()).shape == (3, 3, 2, 2)


def test_plain_batch_is_the_resized_volume() -> None:
    cases = [case("a", (5, 20, 24)), case("bb", (4, 18, 18))]
    data = SliceDataset(cases, 48, SliceConfig(context_mm=1))
    assert len(data) == 9
    images, labels = data.batch([6, 2], seed=1, train=False)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.shape, labels.shape) == ((2, 3, 48, 48), (2, 48, 48))
    second, first = to_square(cases[1].image, 48, 1, (1, 1)), to_square(cases[0].image, 48, 1, (1, 1))
    np.testing.assert_allclose(images[0], second[0:3], atol=5e-4)
    np.testing.assert_allclose(images[1], first[1:4], atol=5e-4)
    np.testing.assert_array_equal(labels[0], to_square(cases[1].label, 48, 0, (1, 1))[1])
    assert data.foreground_slices().tolist() == [False, True, True, False, False, False, True, True, False]


def test_augmentation_depends_on_seed_and_slice_alone() -> None:
    data = SliceDataset([case("a", (12, 20, 24))], 48, SliceConfig())
    images, labels = data.batch(range(12), seed=3, train=True)
    again, same = data.batch(range(12), seed=3, train=True)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    for chosen in ([7], [2, 7, 1], [7, 7]):
        few, masks = data.batch(chosen, seed=3, train=True)
        assert torch.equal(few, images[chosen])
        assert torch.equal(masks, labels[chosen])
    other, _ = data.batch(range(12), seed=4, train=True)
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(images, other, strict=True))
    assert 0 <= images.min() <= images.max() <= 1
    plain, _ = SliceDataset([case("a", (12, 20, 24))], 48, SliceConfig(augment=False)).batch([7], seed=3, train=True)
    assert torch.equal(plain, data.batch([7], seed=3, train=False)[0])


def test_global_random_state_is_left_alone() -> None:
    data = SliceDataset([case("a", (5, 20, 24))], 48, SliceConfig())
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data.batch([1, 2], seed=0, train=True)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_image_and_label_move_together_and_stay_in_bounds() -> None:
    """With the label as the image, the augmented image thresholded is the augmented label."""
    made = case("a", (6, 40, 40))
    made.label[:, 10:22, 14:30] = 1
    made.label[made.label == 2] = 1
    twin = PreparedCase(made.case, made.label.astype(np.float32), made.label, made.spacing, made.geometry)
    quiet = SliceConfig(gamma=0, contrast=0, noise=0, rotation_degrees=30, scale=0.2, shift=0.1, context="single")
    data = SliceDataset([twin], 96, quiet)
    moved = []
    for seed in range(10):
        images, labels = data.batch(range(6), seed=seed, train=True)
        assert set(labels.unique().tolist()) <= {0, 1}
        shown = images[:, 1] > 0.5
        assert (2 * (shown & (labels == 1)).sum() / (shown.sum() + (labels == 1).sum())) > 0.98
        plain = data.batch(range(6), seed=seed, train=False)[1]
        moved.append(((labels != plain).float().mean(), (labels == 1).sum() / (plain == 1).sum()))
    changed, area = torch.tensor(moved).T
    assert changed.min() > 0.005
    assert area.min() > 0.6
    assert area.max() < 1.7


def test_nothing_moves_when_all_amounts_are_zero() -> None:
    still = SliceConfig(rotation_degrees=0, scale=0, shift=0, gamma=0, contrast=0, noise=0)
    data = SliceDataset([case("a", (5, 20, 24))], 48, still)
    augmented, plain = data.batch(range(5), seed=0, train=True), data.batch(range(5), seed=0, train=False)
    torch.testing.assert_close(augmented[0], plain[0], atol=2e-4, rtol=0)
    assert torch.equal(augmented[1], plain[1])


def test_intensities_change_alike_in_all_slices_of_a_sample() -> None:
    made = case("a", (5, 20, 20))
    flat = PreparedCase(made.case, np.full((5, 20, 20), 0.5, np.float32), made.label, made.spacing, made.geometry)
    data = SliceDataset([flat], 32, SliceConfig(rotation_degrees=0, scale=0, shift=0, noise=0))
    images, _ = data.batch(range(5), seed=0, train=True)
    values = images.flatten(1)
    assert (values.max(1).values - values.min(1).values).max() < 1e-6
    assert len({round(float(value), 3) for value in values[:, 0]}) == 5
    assert values.min() > 0.3
    assert values.max() < 0.75


def test_case_without_label_cannot_be_trained_on() -> None:
    with pytest.raises(DataError, match="case a: no label map"):
        SliceDataset([case("a", (5, 20, 24), labelled=False)], 48, SliceConfig())


def test_no_case_is_an_empty_set() -> None:
    data = SliceDataset([], 48, SliceConfig())
    assert (len(data), data.foreground_slices().shape) == (0, (0,))
