import tracemalloc
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from fedsam_core.data.cohort import Case
from fedsam_core.data.geometry import Geometry
from fedsam_core.data.slices import SliceConfig, SliceDataset, from_square, to_square
from fedsam_core.errors import DataError
from fedsam_core.evaluation.inference import predict_volume, save_segmentation, segment_scan
from fedsam_core.evaluation.metrics import truth_on_scan_grid
from fedsam_core.sam.adapters import adapt
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.selection import preset

from .conftest import GrayReader, MakeCase, blobs, prepared

CONFIG = SliceConfig()


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("spacing", [0.4, 1.0, 5.0])
def test_every_slice_goes_in_once_and_as_in_training(make_case: MakeCase, batch_size: int, spacing: float) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (20, 14, 17)).astype(np.uint8)
    case = prepared(make_case(labels, spacing=(1.0, 1.0, spacing)), slice_axis="axial")
    case = replace(case, label=np.zeros(case.image.shape, np.uint8))
    reader = GrayReader(classes=2)

    segment_scan(reader, case, CONFIG, 32, batch_size)

    seen = torch.cat(reader.seen)
    expected, _ = SliceDataset([case], 32, CONFIG).batch(range(17), seed=0, train=False)
    assert len(seen) == 17
    assert torch.equal(seen, expected)
    assert max(len(batch) for batch in reader.seen) <= batch_size


def test_probabilities_are_those_of_the_whole_volume_at_once(make_case: MakeCase) -> None:
    case = prepared(make_case(blobs((20, 14, 17), (1, 1, 1))))
    reader = GrayReader(classes=2).eval()

    probabilities = predict_volume(reader, case, CONFIG, 32, batch_size=5)

    squares = torch.from_numpy(to_square(case.image, 32, 1, case.spacing[1:]).astype(np.float16)).float()
    logits = -200 * (squares[None] - torch.tensor([0, 0.5, 1])[:, None, None, None]) ** 2
    expected = from_square(logits.softmax(0).numpy(), case.image.shape[1:], 1, case.spacing[1:])
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (3, *case.image.shape)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "IPL", "ASR", "SRA", "PIR"])
@pytest.mark.parametrize("slice_axis", ["axial", "coronal", "sagittal"])
def test_a_model_that_knows_the_truth_lands_on_every_voxel(
    make_case: MakeCase, orientation: str, slice_axis: str
) -> None:
    case = make_case(blobs((24, 24, 24), (1, 1, 1)), orientation=orientation)

    segmentation = segment_scan(GrayReader(2), prepared(case, slice_axis=slice_axis), CONFIG, 24, batch_size=7)

    assert segmentation.dtype == np.uint8
    assert segmentation.flags.c_contiguous
    np.testing.assert_array_equal(segmentation, np.asarray(nib.load(case.label).dataobj))


def test_oblong_scans_keep_their_shape(make_case: MakeCase) -> None:
    case = make_case(blobs((40, 28, 9), (1, 1, 4)), spacing=(1.0, 1.0, 4.0), orientation="IPL")
    # 40 px is the padded square's own size, so nothing is interpolated.
    segmentation = segment_scan(GrayReader(2), prepared(case), CONFIG, 40, batch_size=4)
    assert segmentation.shape == case.shape
    np.testing.assert_array_equal(segmentation, truth_on_scan_grid(case))


@pytest.mark.parametrize("spacing", [None, (None, 1.5, 0.8), (2.0, None, None), (0.7, 1.5, 0.8), (3.0, 0.9, 1.3)])
def test_labels_are_the_argmax_of_resampled_probabilities(
    make_case: MakeCase, spacing: tuple[float, float, float] | None
) -> None:
    case = prepared(make_case(blobs((40, 48, 22), (1, 1, 1.5)), spacing=(1.0, 1.0, 1.5), orientation="LPS"), spacing)

    segmentation = segment_scan(GrayReader(2), case, CONFIG, 32, batch_size=5)

    resampled = case.geometry.to_scan(predict_volume(GrayReader(2), case, CONFIG, 32, batch_size=9), order=1)
    differs = segmentation != resampled.argmax(axis=0)
    first, second = np.sort(resampled, axis=0)[-1], np.sort(resampled, axis=0)[-2]
    assert np.all((first - second)[differs] < 1e-5)  # only where the last bit decides
    assert differs.sum() < 10
    assert (segmentation > 0).sum() > 500


@pytest.mark.parametrize(("own", "target"), [(5.0, 1.0), (1.0, 5.0), (1.0, 1.0)])
def test_resampled_slices_come_back_to_their_place(make_case: MakeCase, own: float, target: float) -> None:
    shape = (64, 64, round(80 / own))
    case = make_case(blobs(shape, (1.25, 1.25, own), classes=1), spacing=(1.25, 1.25, own), classes=1)

    ready = prepared(case, spacing=(target, 1.25, 1.25), slice_axis="axial")
    segmentation = segment_scan(GrayReader(1), ready, CONFIG, 64, batch_size=8)

    # From 1 mm to 5 mm the ends of the ball (42 mm across) are lost, whatever the way back.
    least = {(5.0, 1.0): 0.97, (1.0, 5.0): 0.95, (1.0, 1.0): 1.0}[own, target]
    assert dice(segmentation == 1, truth_on_scan_grid(case) == 1) >= least


def test_the_model_is_left_as_it_was(make_case: MakeCase) -> None:
    case = prepared(make_case(blobs((12, 12, 6), (1, 1, 1))))
    reader = GrayReader(2).train()
    reader.part.eval()  # a part that the caller keeps frozen

    predict_volume(reader, case, CONFIG, 16, batch_size=4)

    assert reader.modes == [(False, False, False, False)] * 2
    assert (reader.training, reader.part.training, torch.is_grad_enabled()) == (True, False, True)

    reader.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        segment_scan(reader, case, CONFIG, 16, batch_size=4)
    assert (reader.training, reader.part.training, torch.is_grad_enabled()) == (True, False, True)


def test_progress_is_told(make_case: MakeCase) -> None:
    case = prepared(make_case(blobs((12, 12, 6), (1, 1, 1))))
    told: list[tuple[int, int]] = []
    segment_scan(GrayReader(2), case, CONFIG, 16, 4, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 6), (6, 6)]


def test_one_slice_without_signal_is_encoded_for_all(make_case: MakeCase) -> None:
    """What comes back is what a segmenter gives that sees every slice: here none depends on the rest of its batch."""
    labels = np.zeros((14, 12, 20), np.uint8)
    labels[3:9, 4:8, 9:11] = 1
    case = prepared(make_case(labels), slice_axis="axial")
    reader = GrayReader(2)
    found = predict_volume(reader, case, SliceConfig(context_mm=1.0), 16, batch_size=4)

    seen = torch.cat(reader.seen)
    signal = seen.flatten(1).any(dim=1)
    assert (len(seen), int(signal.sum())) == (5, 4)  # two slices of the ball, one at either side that looks at it
    for index in range(20):
        alone = predict_volume(reader, replace(case, image=case.image[[index] * 3]), CONFIG, 16, batch_size=1)
        if not 8 <= index <= 11:
            np.testing.assert_array_equal(found[:, index], alone[:, 1])


def test_autocast_reaches_the_forward_pass(make_case: MakeCase) -> None:
    case = prepared(make_case(blobs((12, 12, 6), (1, 1, 1))))
    reader = GrayReader(2)
    probabilities = predict_volume(reader, case, CONFIG, 16, 4, torch.bfloat16)
    assert [mode[3] for mode in reader.modes] == [True, True]
    assert probabilities.dtype == np.float32


def test_the_real_segmenter(make_case: MakeCase) -> None:
    case = prepared(make_case(blobs((30, 26, 7), (1, 1, 3)), spacing=(1.0, 1.0, 3.0)))
    segmenter = build_segmenter(ModelConfig(backbone="vit_t", image_size=32), 2, preset("flap"), seed=3)
    adapt(segmenter, preset("flap"))
    segmenter.train()
    encoded: list[int] = []
    hook = segmenter.image_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))

    first = predict_volume(segmenter, case, CONFIG, 32, batch_size=3)
    again = predict_volume(segmenter, case, CONFIG, 32, batch_size=3)
    at_once = predict_volume(segmenter, case, CONFIG, 32, batch_size=7)
    labels = segment_scan(segmenter, case, CONFIG, 32, batch_size=3)
    hook.remove()

    assert encoded == [3, 3, 1, 3, 3, 1, 7, 3, 3, 1]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first, at_once, atol=1e-4)
    np.testing.assert_array_equal(labels, case.geometry.to_scan(first, order=1).argmax(axis=0))
    # Nothing that inference mode made was left in the model: it still trains.
    images, _ = SliceDataset([replace(case, label=np.zeros(case.image.shape, np.uint8))], 32, CONFIG).batch(
        [0, 1], seed=0, train=False
    )
    segmenter(images).sum().backward()
    assert all(p.grad is not None for p in segmenter.parameters() if p.requires_grad)


def case_of(mask: Path, tmp_path: Path) -> Case:
    """A case whose scan shows the labels of a real mask as gray values, in the mask's own geometry."""
    label = nib.load(mask)
    scan = tmp_path / "scan.nii"
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj).astype(np.float32) / 2, label.affine, label.header), scan)
    return Case(
        id=mask.name,
        site="site",
        split="test",
        image=str(scan),
        label=str(mask),
        shape=label.shape,
        spacing=tuple(float(size) for size in nib.affines.voxel_sizes(label.affine)),
        orientation="".join(nib.aff2axcodes(label.affine)),
        label_values=(0, 1, 2),
        intensity={},
        image_sha256="",
        label_sha256="",
    )


@pytest.mark.real_data
def test_real_masks_come_back_voxel_by_voxel(real_data: Path, tmp_path: Path) -> None:
    masks = sorted((real_data / "Task04_Hippocampus" / "labelsTr").glob("hippocampus_*.nii.gz"))[::11]
    masks.append(real_data / "kits19" / "data" / "case_00039" / "segmentation.nii.gz")  # uint16; axes I, P, L
    assert len(masks) == 7
    for mask in masks:
        case = prepared(case_of(mask, tmp_path))
        square = max(case.image.shape[1:])
        segmentation = segment_scan(GrayReader(2, keep=False), case, CONFIG, square, batch_size=8)
        np.testing.assert_array_equal(segmentation, nib.load(mask).get_fdata())


@pytest.mark.real_data
def test_real_masks_survive_resampling_from_5_mm_to_1_mm(real_data: Path, tmp_path: Path) -> None:
    mask = real_data / "kits19" / "data" / "case_00038" / "segmentation.nii.gz"
    case = prepared(case_of(mask, tmp_path), spacing=(1.0, 1.0, 1.0))
    assert case.image.shape[0] == 160
    segmentation = segment_scan(GrayReader(2, keep=False), case, CONFIG, max(case.image.shape[1:]), batch_size=8)
    truth = nib.load(mask).get_fdata()
    for value in (1, 2):
        assert dice(segmentation == value, truth == value) >= 0.97


@pytest.mark.parametrize("slices_resampled", [False, True])
def test_memory_grows_with_the_result_alone(make_case: MakeCase, slices_resampled: bool) -> None:
    def peak(depth: int) -> int:
        case = prepared(make_case(blobs((96, 96, depth), (1, 1, 1), classes=6), classes=6))
        if slices_resampled:  # every tenth slice of the scan was left out, say
            scan_depth = depth * 11 // 10
            geometry = Geometry.plan(np.diag([1, 1, 10 / 11, 1.0]), (96, 96, scan_depth), "axial", (1.0, 1.0, 1.0))
            case = replace(case, geometry=geometry)
            assert geometry.shape == case.image.shape
        reader = GrayReader(6, keep=False)
        tracemalloc.start()
        segment_scan(reader, case, CONFIG, 48, batch_size=4)
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    growth = (peak(130) - peak(40)) / (90 * 96 * 96)
    assert growth < 1.25 * 3  # all seven probabilities in float32 would be 28


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_a_saved_segmentation_has_the_scan_s_geometry(make_case: MakeCase, tmp_path: Path, suffix: str) -> None:
    labels = blobs((10, 12, 8), (0.7, 0.9, 2.5))
    case = make_case(labels, spacing=(0.7, 0.9, 2.5), orientation="IPL")
    scan = nib.load(case.image)
    scan.header.set_qform(scan.affine, code=1)
    scan.header.set_sform(scan.affine, code=2)
    scan.header.set_xyzt_units("mm")
    scan.header["cal_max"] = 300
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a patient's name"))
    nib.save(nib.Nifti1Image(scan.get_fdata(), None, scan.header), case.image)
    out = tmp_path / "out" / f"mask{suffix}"

    save_segmentation(truth_on_scan_grid(case), case, out)
    first = out.read_bytes()
    save_segmentation(truth_on_scan_grid(case), case, out)

    saved = nib.load(out)
    np.testing.assert_array_equal(np.asarray(saved.dataobj), truth_on_scan_grid(case))
    np.testing.assert_allclose(saved.affine, scan.affine, atol=1e-6)
    assert saved.get_data_dtype() == np.uint8
    assert (int(saved.header["qform_code"]), int(saved.header["sform_code"])) == (1, 2)
    assert saved.header.get_xyzt_units()[0] == "mm"
    assert float(saved.header["cal_max"]) == 0
    assert b"patient" not in bytes(saved.header.binaryblock) + out.read_bytes()
    assert len(saved.header.extensions) == 0
    assert out.read_bytes() == first
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_what_cannot_be_saved(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(blobs((10, 12, 8), (1, 1, 1)))
    with pytest.raises(DataError, match=r"mask\.png.*\.nii"):
        save_segmentation(truth_on_scan_grid(case), case, tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"\(10, 12, 7\)"):
        save_segmentation(truth_on_scan_grid(case)[..., 1:], case, tmp_path / "mask.nii.gz")
    Path(case.image).write_bytes(b"no scan")
    with pytest.raises(DataError, match=r"case\.nii\.gz"):
        save_segmentation(truth_on_scan_grid(case), case, tmp_path / "mask.nii.gz")
    assert not (tmp_path / "mask.nii.gz").exists()
