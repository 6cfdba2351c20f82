import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.dicom import write_series

from fedsam_core.data.cohort import Cohort
from fedsam_core.data.dicom import read_segmentation, read_series
from fedsam_core.data.preprocess import PreprocessConfig, prepare_image
from fedsam_core.data.slices import SliceConfig
from fedsam_core.errors import CheckpointError, ConfigError, DataError
from fedsam_core.evaluation.inference import segment_scan
from fedsam_core.sam.adapters import adapt, save_adapter
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.selection import preset
from fedsam_core.trained import describe, load_trained
from pipelines import predict
from pipelines.predict import find_scans, mask_files, newest_run, predict_scan, scan_name

SHAPE = (24, 20, 8)
CLASSES = ("kidney", "tumour")
AFFINE = np.array([[-0.8, 0, 0, 30], [0, -0.8, 0, -12.5], [0, 0, 2.5, 101], [0, 0, 0, 1.0]])
UNITS = np.array([-1000.0, 0, 100])  # HU of background and of each class


class HounsfieldReader(torch.nn.Module):
    """A "model" that knows the truth: the window makes 0, 10/11 and 1 of `UNITS`."""

    classes, image_size, device = 2, 24, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = torch.tensor((UNITS - UNITS[0]) / (UNITS[-1] - UNITS[0])).float()[None, :, None, None]
        return -9000 * self.weight * (images[:, 1:2] - values) ** 2


def knowing(modality: str = "ct") -> Any:
    card = SimpleNamespace(
        classes=CLASSES,
        modality=modality,
        synthetic=False,
        precision="fp32",
        preprocess=PreprocessConfig(slice_axis="axial", ct_window=(UNITS[0], UNITS[-1])),
    )
    return SimpleNamespace(segmenter=HounsfieldReader(), card=card, slices=SliceConfig())


@pytest.fixture
def truth() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:15, 3:12, 1:6] = 1
    labels[9:13, 5:10, 3:5] = 2
    return labels


@pytest.fixture
def scan(tmp_path: Path, truth: np.ndarray) -> Path:
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(UNITS[truth].astype(np.int16), AFFINE), path)
    return path


@pytest.fixture
def series(tmp_path: Path, truth: np.ndarray) -> Path:
    write_series(tmp_path / "CT", UNITS[truth], AFFINE @ np.diag([1, 1, -1, 1.0]))
    return tmp_path / "CT"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """command("scan.nii.gz", "--overwrite", ...) with the model that knows the truth: status, output, errors."""
    monkeypatch.setattr(predict, "load_trained", lambda path, checkpoint: knowing())

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            predict.main([*(str(argument) for argument in arguments), "--device", "cpu", "--model", "none"])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


Command = Callable[..., tuple[int, str, str]]


def mask_of(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_a_mask_lands_beside_its_scan(command: Command, scan: Path, truth: np.ndarray) -> None:
    before = scan.read_bytes()
    status, out, _ = command(scan)

    assert status == 0
    np.testing.assert_array_equal(mask_of(scan.with_name("scan_seg.nii.gz")), truth)
    assert scan.read_bytes() == before
    kidney, tumour = ((truth == value).sum() for value in (1, 2))
    assert f"kidney {kidney:,} voxels ({kidney * 0.0016:.3g} ml), tumour {tumour:,} voxels" in out
    assert "scan_seg.nii.gz" in out
    assert "warning" not in out
    assert "slices: 8 of 8" in out


def test_a_series_gets_nifti_and_dicom(command: Command, series: Path, truth: np.ndarray, tmp_path: Path) -> None:
    status, out, _ = command(series, "-o", tmp_path / "out" / "mine.nii.gz")

    assert status == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["mine.dcm", "mine.nii.gz"]
    assert "mine.dcm" in out
    mask = sitk.ReadImage(str(tmp_path / "out" / "mine.nii.gz"))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    image = reader.Execute()
    for of in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, of)(), getattr(image, of)(), rtol=1e-6, atol=1e-6)
    classes = np.searchsorted(UNITS, sitk.GetArrayFromImage(image))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), classes)
    volume = read_series(series)
    np.testing.assert_array_equal(read_segmentation(tmp_path / "out" / "mine.dcm", volume), classes.T)
    header = nib.load(tmp_path / "out" / "mine.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"]), header.get_xyzt_units()[0]) == (1, 1, "mm")
    np.testing.assert_allclose(header.get_sform(), volume.affine, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(header.get_qform(), volume.affine, rtol=1e-6, atol=1e-5)


@pytest.fixture
def many(tmp_path: Path, scan: Path, series: Path) -> Path:
    """Two good scans, a series, a scan that is none, and what is no scan."""
    folder = tmp_path / "many"
    folder.mkdir()
    shutil.copy(scan, folder / "a_0000.nii.gz")
    shutil.copytree(series, folder / "b")
    (folder / "c.nii.gz").write_bytes(b"no scan")
    nib.save(nib.load(scan), folder / "d.nii")
    for mask in ("d_seg.nii.gz", "x_Label.nii", "x_mask.nii.gz", "x_segmentation.nii.gz"):
        shutil.copy(scan, folder / mask)
    (folder / "notes").mkdir()
    (folder / "notes.txt").write_text("")
    (folder / "._d.nii").write_bytes(b"")
    return folder


def test_a_folder_and_one_bad_scan_in_it(command: Command, many: Path, truth: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "masks"
    status, said, errors = command(many, "-o", out)

    assert status == 1
    assert sorted(file.name for file in out.iterdir()) == [
        *("a_seg.nii.gz", "b_seg.dcm", "b_seg.nii.gz", "d_seg.nii.gz"),
    ]
    np.testing.assert_array_equal(mask_of(out / "a_seg.nii.gz"), truth)
    np.testing.assert_array_equal(mask_of(out / "d_seg.nii.gz"), truth)
    assert "c.nii.gz: truncated or not a NIfTI file" in errors
    assert "1 of 4 scans could not be done: c.nii.gz" in errors
    assert "scans: 4 of 4" in said

    (many / "c.nii.gz").unlink()
    (out / "a_seg.nii.gz").unlink()
    corrected = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE)
    nib.save(corrected, out / "d_seg.nii.gz")
    status, said, _ = command(many, "-o", out)
    assert status == 0
    assert "2 of 3 scans have a mask and keep it" in said
    assert (out / "a_seg.nii.gz").exists()
    assert not mask_of(out / "d_seg.nii.gz").any()

    status, said, _ = command(many, "-o", out, "--overwrite")
    assert status == 0
    np.testing.assert_array_equal(mask_of(out / "d_seg.nii.gz"), truth)


def test_masks_beside_the_scans_do_not_become_scans(command: Command, many: Path) -> None:
    """Nor do the DICOM segmentations make the folder a series."""
    (many / "c.nii.gz").unlink()
    (many / "d_seg.nii.gz").unlink()
    assert command(many)[0] == 0
    names = {path.name for path in many.iterdir()}
    status, said, _ = command(many)
    assert status == 0
    assert "3 of 3 scans have a mask" in said
    assert {path.name for path in many.iterdir()} == names
    assert {"a_seg.nii.gz", "b_seg.nii.gz", "b_seg.dcm", "d_seg.nii.gz"} <= names


def test_nothing_is_written_over(command: Command, scan: Path, series: Path) -> None:
    before = scan.read_bytes()
    for overwrite in ((), ("--overwrite",)):
        status, _, error = command(scan, "-o", scan, *overwrite)
        assert status == 2
        assert "this is the scan; give the mask another name" in error
        status, _, error = command(series, "-o", series / "IM0001.nii.gz", *overwrite)
        assert status == 2
        assert "among the files of the series" in error
    assert scan.read_bytes() == before
    assert not (series / "IM0001.nii.gz").exists()

    mask = scan.with_name("scan_seg.nii.gz")
    mask.write_bytes(b"by hand")
    status, _, error = command(scan)
    assert status == 2
    assert "scan_seg.nii.gz: there is a file of this name; --overwrite" in error
    assert mask.read_bytes() == b"by hand"
    series.with_name("CT_seg.dcm").write_bytes(b"by hand")
    assert command(series)[0] == 2
    assert not series.with_name("CT_seg.nii.gz").exists()


def test_what_cannot_be_done_is_said(command: Command, scan: Path, series: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing" / "inside").mkdir(parents=True)
    (tmp_path / "file.txt").write_text("")
    for arguments, words in (
        ((tmp_path / "gone.nii.gz",), "gone.nii.gz: no such file or folder"),
        ((tmp_path / "file.txt",), "file.txt: not a NIfTI file (.nii.gz, .nii); of a DICOM series, give the folder"),
        (
            (tmp_path / "nothing",),
            "no scan in this folder, neither NIfTI files nor folders of a DICOM series; it holds ",
        ),
        ((scan, "-o", tmp_path / "mask.mha"), "mask.mha: for one scan, name a NIfTI file"),
        ((tmp_path, "-o", tmp_path / "mask.nii.gz"), "for a folder of scans, name a folder"),
        ((scan, "--batch-size", "0"), "--batch-size is a number of slices"),
    ):
        status, _, error = command(*arguments)
        assert status == 2
        assert words in error


def test_a_series_whose_headers_do_for_nifti_alone(command: Command, truth: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "CT", UNITS[truth], AFFINE, StudyInstanceUID=None)
    status, _, error = command(tmp_path / "CT")
    assert status == 2
    assert "no DICOM segmentation can be made" in error
    assert f"the NIfTI mask is written: {tmp_path / 'CT_seg.nii.gz'}" in error
    assert mask_of(tmp_path / "CT_seg.nii.gz").any()


def test_devices(scan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (("gpu", "write cpu, cuda or cuda:N"), ("cuda:99", "--device cuda:99: PyTorch on this machine")):
        with pytest.raises(SystemExit) as ended:
            predict.main([str(scan), "--device", name])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_a_scan_of_another_kind_is_doubted(truth: np.ndarray, scan: Path, tmp_path: Path) -> None:
    def warned(path: Path, modality: str) -> tuple[str, ...]:
        return predict_scan(knowing(modality), path, tmp_path / "out.nii.gz", overwrite=True).warnings

    write_series(tmp_path / "MR", UNITS[truth] + 1000, AFFINE, modality="MR", intercept=0)
    assert warned(tmp_path / "MR", "mri") == ()
    assert warned(tmp_path / "MR", "ct") == ("its header says MR, but the model was trained on CT",)
    assert warned(scan, "ct") == ()
    (text,) = warned(scan, "mri")
    assert "look like a CT's" in text
    nib.save(nib.Nifti1Image((UNITS[truth] + 1024).astype(np.int16), AFFINE), tmp_path / "raw.nii")
    (text,) = warned(tmp_path / "raw.nii", "ct")
    assert text.startswith("intensities from 24 to 1124 do not look like a CT's Hounsfield units")


def test_too_large_a_batch_is_said(scan: Path, tmp_path: Path) -> None:
    def full(module: Any, inputs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trained = knowing()
    trained.segmenter.register_forward_pre_hook(full)
    with pytest.raises(ConfigError, match=r"16 slices at once .* smaller --batch-size"):
        predict_scan(trained, scan, tmp_path / "out.nii.gz")


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [scan_name(Path(name)) for name in ("a/x_0000.nii.gz", "x.y.nii", "s/CT.1/", "x_0001.nii.gz")] == [
        *("x", "x.y", "CT.1", "x_0001"),
    ]
    monkeypatch.chdir(tmp_path)
    assert mask_files([Path()], None, one=True) == {Path(): tmp_path.parent / f"{tmp_path.name}_seg.nii.gz"}
    with pytest.raises(ConfigError, match=r"x\.nii and x\.nii\.gz would both get the mask x_seg\.nii\.gz"):
        mask_files([Path("x.nii"), Path("x.nii.gz")], None, one=False)
    linked = tmp_path / "here" / "scan.nii"  # a link's mask lies beside the link
    linked.parent.mkdir()
    (tmp_path / "scan.nii").write_bytes(b"")
    linked.symlink_to(tmp_path / "scan.nii")
    assert mask_files([linked], None, one=True) == {linked: linked.with_name("scan_seg.nii.gz")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no scan in this folder"):
        find_scans(tmp_path / "empty")


def test_the_newest_run_is_taken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no trained model here; name one with --model"):
        newest_run(tmp_path)
    for name in ("zeta-20260101-101010-ab12cd-9f3e", "alpha-20260203-080000-ab12cd-0000", "old"):
        (tmp_path / "runs" / name / "adapter").mkdir(parents=True)
        (tmp_path / "runs" / name / "adapter" / "card.json").write_text("{}")
    (tmp_path / "runs" / "beta-20260301-080000-ab12cd-0000").mkdir()  # broke off
    assert newest_run(tmp_path).name == "alpha-20260203-080000-ab12cd-0000"


def test_a_run_s_adapter_from_the_command_line(
    tmp_path: Path, scan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing: a segmenter whose adapter lies in a run's folder, found without --model."""
    segmenter = build_segmenter(ModelConfig(backbone="vit_t", image_size=32), 2, preset("flap", 4), seed=3)
    manifest = adapt(segmenter, preset("flap", 4))
    card = describe(
        segmenter,
        Cohort(name="c", source="nifti", classes=CLASSES, modality="ct", synthetic=True, cases=()),
        run="r",
        dice=None,
        dice_by_class={},
        preprocess=PreprocessConfig(slice_axis="axial"),
        slices=SliceConfig(),
        precision="fp32",
    )
    run = tmp_path / "work" / "runs" / "r-20260101-101010-ab12cd-9f3e"
    save_adapter(segmenter, manifest, run / "adapter", card)

    with pytest.raises(SystemExit) as ended:
        predict.main([str(scan), "--work-dir", str(tmp_path / "work"), "--device", "cpu", "--batch-size", "3"])

    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"model {run}: kidney, tumour in CT, trained on made-up scans" in said
    trained = load_trained(run)
    case = prepare_image(scan, trained.card.preprocess, "ct")
    expected = segment_scan(trained.segmenter, case, trained.slices, 32, batch_size=8)
    np.testing.assert_array_equal(mask_of(scan.with_name("scan_seg.nii.gz")), expected)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        predict.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("NAME_seg.nii.gz", "NAME_seg.dcm", "--overwrite", "--device", "exit status", "examples:"):
        assert word in text
