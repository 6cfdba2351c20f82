"""Memory and time of `prepare` and `predict` on a long scan: 512 x 512 x 548 voxels, int16, one .nii.gz.

    python benchmarks/long_volume.py --spacing native 1.0 0.5

prints JSON, for each slice spacing in mm that the scan (0.8 mm) is prepared at: {prepare: {seconds, peak_rss_gib},
predict: {seconds, peak_rss_gib, ...}}. Each is measured in a process of its own, from its start to its end, everything
that it imports included; peak_rss_gib is the process's high-water mark. `prepare` inspects and prepares the scan with
its mask, as the stage does; `predict` prepares the scan alone, segments it with vit_t at 112 px and random weights on
the CPU, and writes the mask. One minute or two for each spacing, and half a gigabyte of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

CLASSES = ("kidney", "tumour")
VOXEL = (0.75, 0.75, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 548), metavar=("X", "Y", "Z"))
    parser.add_argument("--spacing", nargs="+", default=["native"], help="of the prepared slices, mm")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--child", choices=["make", "prepare", "predict"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        begun = perf_counter()
        found = {"make": make, "prepare": prepare, "predict": predict}[options.child](options)
        print(json.dumps({"seconds": round(perf_counter() - begun, 1), "peak_rss_gib": peak_rss_gib(), **found}))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        child("make", folder, options, "native")
        for spacing in options.spacing:
            results[spacing] = {name: child(name, folder, options, spacing) for name in ("prepare", "predict")}
    print(json.dumps(results, indent=1))


def child(name: str, folder: str, options: argparse.Namespace, spacing: str) -> dict[str, Any]:
    """What one step says of itself, with the seconds that its process took in all."""
    numbers = [str(number) for number in (*options.shape, options.batch_size)]
    arguments = ["--shape", *numbers[:3], "--batch-size", numbers[3], "--spacing", spacing]
    begun = perf_counter()
    ended = subprocess.run(
        [sys.executable, __file__, "--child", name, "--folder", folder, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return {**found, "seconds": round(perf_counter() - begun, 1)}


def make(options: argparse.Namespace) -> dict[str, Any]:
    """A body with two balls in it, noise over all, in Hounsfield units."""
    import nibabel as nib
    import numpy as np

    rng = np.random.default_rng(0)
    x, y, z = options.shape
    i, j = np.ogrid[-1 : 1 : x * 1j, -1 : 1 : y * 1j]
    image, label = np.empty(options.shape, np.int16, order="F"), np.zeros(options.shape, np.uint8, order="F")
    for k, height in enumerate(np.linspace(-1, 1, z)):
        body = i**2 + 1.6 * j**2 < 0.8
        kidney = (i - 0.4) ** 2 + j**2 + height**2 < 0.05
        tumour = (i - 0.5) ** 2 + j**2 + height**2 < 0.005
        label[:, :, k] = kidney + tumour
        image[:, :, k] = -1000 + 1040 * body + 120 * kidney - 40 * tumour + rng.integers(-20, 20, (x, y))
    affine = np.diag([-VOXEL[0], -VOXEL[1], VOXEL[2], 1.0])
    for name, array in (("scan", image), ("mask", label)):
        file = nib.Nifti1Image(array, affine)
        nib.openers.Opener.default_compresslevel = 1
        nib.save(file, options.folder / f"{name}.nii.gz")
    return {}


def config(options: argparse.Namespace) -> Any:
    from fedsam_core.data.preprocess import PreprocessConfig

    (spacing,) = options.spacing
    target = None if spacing == "native" else (float(spacing), None, None)
    return PreprocessConfig(slice_axis="axial", spacing=target)


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """What the stage does with one case of a cohort."""
    from fedsam_core.data.cohort import Case, Cohort
    from fedsam_core.data.preprocess import prepare
    from fedsam_core.data.scans import inspect_scan
    from fedsam_core.store import LocalStore

    scan, mask = options.folder / "scan.nii.gz", options.folder / "mask.nii.gz"
    facts = inspect_scan(scan, mask, len(CLASSES))
    case = Case(id="long", site="here", split="train", image=str(scan), label=str(mask), **asdict(facts))
    cohort = Cohort(name="long", source="nifti", modality="ct", classes=CLASSES, synthetic=True, cases=(case,))
    prepared = prepare(cohort, config(options), LocalStore(options.folder / f"prepared-{options.spacing[0]}"))
    assert prepared.is_complete()
    return {}


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """What `fedsam predict` does with one scan, once the model is there."""
    from fedsam_core.data.preprocess import prepare_image
    from fedsam_core.data.slices import SliceConfig
    from fedsam_core.evaluation.inference import save_segmentation, segment_scan
    from fedsam_core.sam.backbones import ModelConfig, build_segmenter
    from fedsam_core.selection import preset

    segmenter = build_segmenter(
        ModelConfig(backbone="vit_t", image_size=112, checkpoint="random"), len(CLASSES), preset("flap"), seed=0
    )
    times = [perf_counter()]
    case = prepare_image(options.folder / "scan.nii.gz", config(options), "ct")
    times.append(perf_counter())
    mask = segment_scan(segmenter, case, SliceConfig(), 112, options.batch_size)
    times.append(perf_counter())
    save_segmentation(mask, case.case, options.folder / "out.nii.gz")
    times.append(perf_counter())
    parts = dict(zip(("read_s", "segment_s", "write_s"), pairwise(times), strict=True))
    return {"slices": len(case.image), **{name: round(end - start, 1) for name, (start, end) in parts.items()}}


def peak_rss_gib() -> float:
    """High-water mark of this process's resident memory (Linux; `ru_maxrss` would begin with the parent's)."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 2**20, 2)


if __name__ == "__main__":
    main()
