"""How far the masks of a run agree: as the sites scored them, and from predict, the merged checkpoint and ONNX.

    fedsam evaluate ... && fedsam export RUN && python benchmarks/agreement.py RUN --images imagesTr

prints JSON: for each way the voxels that differ from the masks of `fedsam evaluate`, the lowest Dice between the two,
and, for reference, how many voxels are labelled; and the largest difference between the Dice that the sites reported at
the end of the federation and that of these masks. Adapter and merged checkpoint are used at the run's own precision and
compared with evaluate; ONNX, which is fp32, and the merged checkpoint in fp32 are compared with the adapter in fp32.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnxruntime
import torch

from fedsam_core.data.preprocess import prepare_image
from fedsam_core.evaluation.inference import segment_scan
from fedsam_core.learning.device import autocast_dtype
from fedsam_core.trained import Trained, load_trained

Masks = dict[str, np.ndarray[Any, Any]]


class OnnxSegmenter(torch.nn.Module):
    """What `segment_scan` asks of a segmenter, computed by onnxruntime."""

    def __init__(self, file: Path, classes: int) -> None:
        super().__init__()
        self.classes, self.device = classes, torch.device("cpu")
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, evaluated and exported")
    parser.add_argument("--images", type=Path, required=True, help="folder of the cohort's scans")
    options = parser.parse_args()
    print(json.dumps(agreement(options.run, options.images), indent=1))


def agreement(run: Path, images: Path) -> dict[str, Any]:
    """What is printed."""
    evaluation = run / "evaluation" / "test"
    evaluated: Masks = {path.name: np.asarray(nib.load(path).dataobj) for path in (evaluation / "masks").iterdir()}
    scans = {name: images / name for name in sorted(evaluated)}
    adapter, merged = load_trained(run), load_trained(run / "export" / "merged")
    own = autocast_dtype(adapter.card.precision, torch.device("cpu"))
    ways = {
        "predict": segment(adapter, adapter.segmenter, scans, own),
        "merged": segment(merged, merged.segmenter, scans, own),
    }
    exact = segment(adapter, adapter.segmenter, scans, None)
    onnx = OnnxSegmenter(run / "export" / "onnx" / "segmenter.onnx", adapter.segmenter.classes)
    in_fp32 = {
        "merged, fp32": segment(merged, merged.segmenter, scans, None),
        "onnx": segment(adapter, onnx, scans, None),
    }
    told = json.loads((run / "summary.json").read_text())["after"]["per_site"]
    found = json.loads((evaluation / "summary.json").read_text())["per_site"]
    return {
        "cases": len(scans),
        "labelled_voxels": sum(int(np.count_nonzero(mask)) for mask in evaluated.values()),
        "precision": "fp32" if own is None else "bf16",
        "sites_dice_off_by": max(abs(told[site]["dice"] - found[site]["dice"]) for site in told),
        **{name: compare(masks, evaluated) for name, masks in ways.items()},
        **{name: compare(masks, exact) for name, masks in in_fp32.items()},
        "predict, fp32 beside the run's precision": compare(exact, evaluated),
    }


def segment(trained: Trained, segmenter: Any, scans: dict[str, Path], autocast: torch.dtype | None) -> Masks:
    """Masks on the scans' own voxels."""
    masks = {}
    for name, path in scans.items():
        case = prepare_image(path, trained.card.preprocess, trained.card.modality)
        masks[name] = segment_scan(segmenter, case, trained.slices, trained.card.model.image_size, 16, autocast)
    return masks


def compare(masks: Masks, reference: Masks) -> dict[str, float]:
    """Over all cases: voxels that differ, and the lowest Dice of any class in any case."""
    lowest, different = 1.0, 0
    for name, other in reference.items():
        different += int(np.count_nonzero(masks[name] != other))
        for value in range(1, int(max(masks[name].max(), other.max())) + 1):
            ours, theirs = masks[name] == value, other == value
            if total := int(ours.sum() + theirs.sum()):
                lowest = min(lowest, 2 * int(np.count_nonzero(ours & theirs)) / total)
    return {"voxels_that_differ": different, "lowest_dice": lowest}


if __name__ == "__main__":
    main()
