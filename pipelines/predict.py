"""`fedsam predict SCAN`: a mask for a scan, or for every scan of a folder, from a trained model."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch

from fedsam_core.data.dicom import is_series, read_header, write_segmentation
from fedsam_core.data.preprocess import PreparedCase, prepare_image
from fedsam_core.errors import CheckpointError, ConfigError, DataError, FedsamError, UnreadableScan
from fedsam_core.evaluation.inference import save_segmentation, segment_scan
from fedsam_core.learning.device import autocast_dtype, describe_device, pick_device
from fedsam_core.trained import Trained, load_trained
from pipelines import console
from pipelines.stage import guarded

SOME_FAILED = 1
BATCH_SIZE = 16
NIFTI = (".nii.gz", ".nii")
MASK_NAME = re.compile(r"_(seg|label|mask|segmentation)$", re.IGNORECASE)
CHANNEL = re.compile(r"_0000$")  # nnU-Net's first channel
STARTED = re.compile(r"-(\d{8}-\d{6})-[0-9a-f]{6}")  # in the name of a run
DICOM_MODALITY = {"ct": "CT", "mri": "MR"}
AIR = -200.0  # HU; a CT that goes no lower shows no air, or is not in HU
METAL = 10_000.0  # HU, at most
HELP = """
SCAN is one of
  scan.nii.gz    a NIfTI file (.nii too)
  FOLDER         of one DICOM series: the files of its slices, whatever they are called
  FOLDER         of many scans: NIfTI files, and folders of a DICOM series each. Names that end in _seg, _label, _mask
                 or _segmentation are masks and left alone; nnU-Net's _0000 is no part of a scan's name

The mask has the scan's own voxels: same shape, same place in the patient. 0 is background, k is the model's class k.
  -o left out    beside the scan, as NAME_seg.nii.gz
  -o FILE        ending in .nii.gz or .nii, for one scan
  -o FOLDER      NAME_seg.nii.gz in it; the folder is made
For a DICOM series a DICOM segmentation (NAME_seg.dcm), for the picture archive, is written beside the NIfTI file.

No scan is ever written over. A mask that is there is kept, since someone may have corrected it: for one scan that is an
error, in a folder the scan is passed over (so an interrupted run goes on where it stopped). --overwrite makes it anew.

examples:
  fedsam predict scan.nii.gz
  fedsam predict series/ -o kidney.nii.gz --model ~/.fedsam/runs/kits-20261123-141500-ab12cd-9f3e --device cuda:1
  fedsam predict scans/ -o masks/ --model adapter/ --checkpoint sam_vit_b_01ec64.pth

exit status: 0 every scan has its mask, 1 some scans of a folder could not be done (the others are), 2 nothing was done.
These are masks of a research model: have a qualified person look at them before anyone relies on them.
"""


@dataclass(frozen=True)
class Prediction:
    """What was made of one scan.

    Attributes:
        files: that were written: the NIfTI mask, and the DICOM segmentation of a DICOM series.
        voxels, millilitres: of each class, by name.
        warnings: why the scan may not be what the model was trained on, a line each.
    """

    scan: Path
    files: tuple[Path, ...]
    voxels: Mapping[str, int]
    millilitres: Mapping[str, float]
    seconds: float
    warnings: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Segments what it is given and says where the masks are. Exit status: see `HELP`."""
    parser = argparse.ArgumentParser(
        prog="fedsam predict",
        description="Segments a scan, or every scan of a folder, with a trained model.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scan", type=Path, metavar="SCAN", help="NIfTI file, DICOM series, or folder of scans")
    parser.add_argument("-o", "--output", type=Path, metavar="MASK", help="where the mask goes (below)")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="RUN",
        help="a run's folder, an adapter folder, or a merged checkpoint (`fedsam export`); default: the newest run in "
        "WORK_DIR/runs",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="SAM.pth",
        help="the SAM file that the model was trained from, where it was; a merged checkpoint needs none",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="N",
        help=f"slices at once (default {BATCH_SIZE}): fewer take less memory, and change no mask",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        help="of the forward pass; default: as the model was trained and scored; auto: bf16 where the device has it",
    )
    parser.add_argument("--overwrite", action="store_true", help="make masks anew that are there already")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("~/.fedsam"), help="where runs are looked for (default ~/.fedsam)"
    )
    options = parser.parse_args(arguments)
    failed: list[Path] = []
    status = guarded(lambda: failed.extend(run(options)))
    sys.exit(SOME_FAILED if status == 0 and failed else status)


def run(options: argparse.Namespace) -> list[Path]:
    """Does what the command line asks for. Returns the scans of a folder that could not be done.

    Raises:
        FedsamError: nothing can be done at all: no scan, no model, no such device, or the one scan is at fault.
    """
    if options.batch_size < 1:
        raise ConfigError("--batch-size is a number of slices: 1 or more")
    device = _device(options.device)
    scans = find_scans(options.scan)
    one = scans == [options.scan]
    masks = mask_files(scans, options.output, one)
    kept = [] if one or options.overwrite else [s for s in scans if all(file.exists() for file in _files(s, masks[s]))]
    todo = [scan for scan in scans if scan not in kept]
    if kept:
        console.out.print(f"{len(kept)} of {len(scans)} scans have a mask and keep it (--overwrite makes them anew)")
    if not todo:
        return []
    model = options.model or newest_run(options.work_dir.expanduser())
    trained = load_trained(model, options.checkpoint)
    trained.segmenter.to(device)
    console.out.print(console.plain(_introduce(trained, model, device)))
    autocast = autocast_dtype(options.precision or trained.card.precision, device)
    failed = []
    with console.Bars() as bars:
        for done, scan in enumerate(todo, start=1):
            try:
                made = predict_scan(
                    trained,
                    scan,
                    masks[scan],
                    batch_size=options.batch_size,
                    autocast=autocast,
                    overwrite=options.overwrite,
                    progress=lambda part, total: bars("slices", part, total),
                )
                for line in _report(made):
                    console.out.print(console.plain(line))
            except FedsamError as error:
                if one:
                    raise
                failed.append(scan)
                console.err.print(f"[bold red]error:[/] {console.plain(' '.join(str(error).split()))}")
            if not one:
                bars("scans", done, len(todo))
    if failed:
        console.err.print(
            console.plain(
                f"{len(failed)} of {len(todo)} scans could not be done: {', '.join(scan.name for scan in failed)}"
            )
        )
    return failed


def predict_scan(
    trained: Trained,
    scan: Path,
    out: Path,
    *,
    batch_size: int = BATCH_SIZE,
    autocast: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """Segment a scan on the device that the model is on, and write its mask on the scan's own voxels.

    Args:
        trained: the model, from `fedsam_core.trained.load_trained`.
        scan: a NIfTI file, or the folder of a DICOM series.
        out: NIfTI file to write (.nii.gz or .nii); a series gets a DICOM segmentation of the same name (.dcm) too.
        batch_size: slices at once.
        autocast: dtype of the forward pass, None for fp32.
        overwrite: write over a mask that is there; never over the scan.
        progress: called as (slices done, slices in all).

    Raises:
        DataError: the scan cannot be read, the mask is there already, or it cannot be written.
        ConfigError: the device's memory does not do for a batch.
    """
    begun = perf_counter()
    card = trained.card
    files = _files(scan, out)
    if out.parent.exists() and out.parent.samefile(scan):
        raise DataError(f"{out}: this is among the files of the series; write the mask into another folder with -o")
    for file in files:
        if file.exists() and file.samefile(scan):
            raise DataError(f"{file}: this is the scan; give the mask another name with -o")
        if file.exists() and not overwrite:
            raise DataError(f"{file}: there is a file of this name; --overwrite replaces it, -o writes elsewhere")
    prepared = prepare_image(scan, card.preprocess, card.modality)
    try:
        mask = segment_scan(
            trained.segmenter,
            prepared,
            trained.slices,
            trained.segmenter.image_size,
            batch_size,
            autocast,
            progress,
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{scan}: {batch_size} slices at once do not fit into the GPU's memory; set a smaller --batch-size"
        ) from error
    save_segmentation(mask, prepared.case, out)
    if scan.is_dir():
        try:
            write_segmentation(mask, scan, card.classes, files[1])
        except DataError as error:
            raise DataError(f"{error} (the NIfTI mask is written: {out})") from error
    counts = np.bincount(mask.ravel(), minlength=len(card.classes) + 1)
    voxels = {name: int(counts[value]) for value, name in enumerate(card.classes, start=1)}
    voxel = abs(float(np.linalg.det(prepared.geometry.affine[:3, :3]))) / 1000  # ml
    return Prediction(
        scan=scan,
        files=files,
        voxels=voxels,
        millilitres={name: count * voxel for name, count in voxels.items()},
        seconds=perf_counter() - begun,
        warnings=tuple(_doubts(scan, prepared, card.modality)),
    )


def find_scans(path: Path) -> list[Path]:
    """The scan itself, or the scans directly in a folder, by name.

    Raises:
        DataError: there is none.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a NIfTI file, a DICOM series or a folder of scans")
    if path.is_file():
        if not path.name.endswith(NIFTI):
            raise DataError(
                f"{path}: not a NIfTI file (.nii.gz, .nii); of a DICOM series, give the folder that holds its files"
            )
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: neither a file nor a folder; give a NIfTI file, a DICOM series or a folder of scans")
    if is_series(path):
        return [path]
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    scans = [
        entry
        for entry in entries
        if (entry.is_file() and entry.name.endswith(NIFTI) and not MASK_NAME.search(scan_name(entry)))
        or _may_be_series(entry)
    ]
    if not scans:
        inside = [entry.name for entry in entries if entry.is_dir()]
        hint = f"it holds folders ({', '.join(inside[:3])}{', ...' * (len(inside) > 3)}): give one of them" * bool(
            inside
        )
        raise DataError(
            f"{path}: no scan in this folder, neither NIfTI files nor folders of a DICOM series; "
            + (hint or "check the path")
        )
    return scans


def _may_be_series(entry: Path) -> bool:
    """A folder that cannot be read is a scan that fails, and does not stop the others."""
    try:
        return is_series(entry)
    except UnreadableScan:
        return True


def scan_name(scan: Path) -> str:
    """A scan's name without what is not of it: NAME.nii.gz, NAME_0000.nii.gz and NAME/ are NAME."""
    return CHANNEL.sub("", _stem(scan))


def _stem(path: Path) -> str:
    name = os.path.basename(os.path.abspath(path))  # of a folder, also where it is given as "."
    return next((name.removesuffix(suffix) for suffix in NIFTI if name.endswith(suffix)), name)


def mask_files(scans: Sequence[Path], out: Path | None, one: bool) -> dict[Path, Path]:
    """Where the mask of each scan goes.

    Args:
        out: what -o says; None: beside the scan.
        one: whether a scan was named, not a folder of scans.

    Raises:
        ConfigError: `out` cannot be a mask's name, or two masks would have the same.
    """
    if one and out is not None and out.name.endswith(NIFTI) and not out.is_dir():
        return {scans[0]: out}
    if out is not None and not out.is_dir() and (out.exists() or out.suffix):
        what = "a NIfTI file, ending in .nii.gz or .nii, or a folder" if one else "a folder"
        raise ConfigError(f"-o {out}: for {'one scan' if one else 'a folder of scans'}, name {what}")
    masks: dict[Path, Path] = {}
    for scan in scans:
        mask = (out or Path(os.path.abspath(scan)).parent) / f"{scan_name(scan)}_seg.nii.gz"
        if mask in masks.values():
            (other,) = (scan.name for scan, there in masks.items() if there == mask)
            raise ConfigError(f"{other} and {scan.name} would both get the mask {mask.name}; rename one of them")
        masks[scan] = mask
    return masks


def _files(scan: Path, mask: Path) -> tuple[Path, ...]:
    """What is written for a scan whose mask goes to `mask`."""
    return (mask, mask.with_name(f"{_stem(mask)}.dcm")) if scan.is_dir() else (mask,)


def newest_run(work_dir: Path) -> Path:
    """The run that was started last and has an adapter.

    Raises:
        CheckpointError: there is none.
    """
    runs = [card.parent.parent for card in (work_dir / "runs").glob("*/adapter/card.json")]
    if not runs:
        raise CheckpointError(
            f"{work_dir / 'runs'}: no trained model here; name one with --model, or train one with `fedsam federate`"
        )
    return max(runs, key=_started)


def _started(run: Path) -> tuple[str, str]:
    stamp = STARTED.search(run.name)
    return (stamp[1] if stamp else "", run.name)


def _device(name: str | None) -> torch.device:
    """The device of that name. Raises ConfigError if this machine has none."""
    if name is None:
        return pick_device()
    if name == "cpu":
        return torch.device(name)
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise ConfigError(f"--device {name}: write cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name)
    if (device.index or 0) >= count:
        have = f"has {count} of them, from cuda:0 on" if count else "sees no GPU: use --device cpu"
        raise ConfigError(f"--device {name}: PyTorch on this machine {have}")
    return device


def _introduce(trained: Trained, model: Path, device: torch.device) -> str:
    """The model in words."""
    card = trained.card
    made_up = ", trained on made-up scans (for trying out)" if card.synthetic else ""
    return f"model {model}: {', '.join(card.classes)} in {card.modality.upper()}{made_up}; on {describe_device(device)}"


def _report(made: Prediction) -> list[str]:
    """A prediction in words."""
    found = ", ".join(
        f"{name} {count:,} voxels ({made.millilitres[name]:.3g} ml)" if count else f"{name} none"
        for name, count in made.voxels.items()
    )
    line = f"{scan_name(made.scan)}: {found}; {made.seconds:.1f} s; {', '.join(str(file) for file in made.files)}"
    return [line, *(f"warning: {scan_name(made.scan)}: {text}" for text in made.warnings)]


def _doubts(scan: Path, prepared: PreparedCase, modality: Literal["ct", "mri"]) -> list[str]:
    """Why the scan may not be of the kind that the model was trained on."""
    if scan.is_dir():
        said = read_header(scan).modality
        if said != DICOM_MODALITY[modality]:
            return [f"its header says {said or 'no modality'}, but the model was trained on {DICOM_MODALITY[modality]}"]
    low, high = prepared.case.intensity["min"], prepared.case.intensity["max"]
    if modality == "ct" and not (low < AIR and high < METAL):
        return [
            f"intensities from {low:.4g} to {high:.4g} do not look like a CT's Hounsfield units (air is -1000): the "
            "mask is not to be trusted if they are scaled or shifted"
        ]
    if modality == "mri" and low <= -900:  # HU of the air around a body
        return [f"intensities down to {low:.4g} look like a CT's, but the model was trained on MR"]
    return []


if __name__ == "__main__":
    main()
