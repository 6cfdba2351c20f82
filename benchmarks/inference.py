"""Time of a whole volume, beside the paper's scheme: every slice encoded five times, in fp32, in blocks of five.

    python benchmarks/inference.py --json inference.json        # ViT-B, 224 px, 12 slices: two minutes

FLAP-SAM's code (arXiv 2407.21739) cuts a volume into all blocks of five neighbouring slices, sends each block through
the model as a batch of five, and keeps the middle one. Both ways get the same weights, the same slices and a model that
looks at one slice at a time (`context=single`), so that the results must be the same where the arithmetic is. Printed
for each way: CPU and clock time of a slice, how many times faster than the paper's it is, and the share of voxels whose
label is the paper's. "blank ends" is a volume whose first and last quarter hold no signal.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from train import CLASSES, install_official_attention, random_case, table, timed, told

from fedsam_core.data.preprocess import PreparedCase
from fedsam_core.data.slices import SliceConfig, from_square, to_square
from fedsam_core.evaluation.inference import predict_volume
from fedsam_core.learning.device import pick_device
from fedsam_core.sam.adapters import adapt
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import preset

SLICES = SliceConfig(context="single")
Array = np.ndarray[Any, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_b")
    parser.add_argument("--size", type=int, default=224, help="side of the model's images, px")
    parser.add_argument("--slices", type=int, default=12)
    parser.add_argument("--edge", type=int, default=256, help="side of the volume's slices, voxels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=pick_device())
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"options": told(options), "rows": rows}, indent=1))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way, the paper's first."""
    case = random_case(options.slices, options.edge)
    ends = options.slices // 4
    blank = random_case(options.slices, options.edge)
    blank.image[:ends] = blank.image[-ends:] = 0
    segmenter, plain = (built(options) for _ in range(2))
    install_official_attention(plain)

    def whole(case: PreparedCase, dtype: torch.dtype | None) -> Callable[[], Array]:
        return lambda: predict_volume(segmenter, case, SLICES, options.size, options.batch, dtype)

    ways = {
        "paper": lambda: five_fold(plain, case, options.size),
        "fp32": whole(case, None),
        "bf16": whole(case, torch.bfloat16),
        "bf16, blank ends": whole(blank, torch.bfloat16),
    }
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    labels: dict[str, Array] = {}
    for repeat in range(options.repeats):
        for name, way in ways.items():
            if not repeat and options.device.type == "cuda":
                way()  # its kernels are chosen and its memory is claimed
            held: list[Array] = []
            times[name].append(timed(lambda way=way, held=held: held.append(way())))  # type: ignore[misc]
            labels[name] = held[0].argmax(axis=0)
    clock_paper, cpu_paper = (median(values) for values in zip(*times["paper"], strict=True))
    rows = []
    for name, found in times.items():
        clock, cpu = (median(values) for values in zip(*found, strict=True))
        same = float((labels[name] == labels["paper"]).mean()) if "blank" not in name else None
        rows.append(
            {
                "way": name,
                "cpu_ms_per_slice": round(1000 * cpu / options.slices, 1),
                "clock_ms_per_slice": round(1000 * clock / options.slices, 1),
                "slices_per_s": round(options.slices / clock, 2),
                "times_paper_cpu": round(cpu_paper / cpu, 2),
                "times_paper_clock": round(clock_paper / clock, 2),
                "labels_as_paper": None if same is None else round(same, 6),
            }
        )
    return rows


def built(options: argparse.Namespace) -> SamSegmenter:
    """`flap` on random weights, LoRA's B included: always the same."""
    model = ModelConfig(backbone=options.backbone, image_size=options.size)
    segmenter = build_segmenter(model, CLASSES, preset("flap"), seed=0)
    adapt(segmenter, preset("flap"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in segmenter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return segmenter.to(options.device)


@torch.inference_mode()
def five_fold(segmenter: SamSegmenter, case: PreparedCase, size: int) -> Array:
    """The paper's scheme: of each block of five slices that goes in, the middle one's probabilities are kept."""
    segmenter.eval()
    pixel = case.spacing[1:]
    squares = to_square(case.image, size, 1, pixel).astype(np.float16).astype(np.float32)
    depth = len(squares)
    kept = []
    for middle in range(depth):
        block = squares[np.clip(np.arange(middle - 2, middle + 3), 0, depth - 1)]
        logits = segmenter(torch.from_numpy(block)[:, None].expand(-1, 3, -1, -1).to(segmenter.device))
        kept.append(logits[2].softmax(dim=0).cpu().numpy())
    return from_square(np.stack(kept, axis=1), case.image.shape[1:], 1, pixel)


if __name__ == "__main__":
    main()
