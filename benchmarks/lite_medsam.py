"""lite_medsam beside the code of its authors (time), and beside vit_t from random weights (Dice at equal steps).

    python benchmarks/lite_medsam.py time --json time.json                # two minutes of one core
    python benchmarks/lite_medsam.py dice --out FOLDER --json dice.json   # half an hour; start it twice for two cores

`time`: seconds of CPU, on one thread, for a slice through the image encoder: forward alone, and forward and backward
to the attention of every block, as LoRA needs it. One after the other in turns, and the median of the turns; ratios are
to the authors' code. `whole images` and `softmax` undo one rewriting each: frozen convolutions over a few rows at a
time, and attention with its bias in PyTorch's fused kernel. Channels are last, and batch norms are folded, in all three
of ours. `difference` is the largest of an embedding from the authors'.

`dice`: federations of the hippocampus (FEDSAM_REAL_DATA/Task04_Hippocampus, 3 sites), in one process without Ray, with
plain sums; see benchmarks/rules.py, which this uses, for what is kept in FOLDER and not run again.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from rules import Budget, Row, cohort_config, mean_dice, prepare_once, run_once, tables
from torch import Tensor, nn
from torch.nn import functional as F

from fedsam_core.sam import tinyvit
from fedsam_core.sam.adapters import BuiltModel
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.checkpoints import official_state_dict
from fedsam_core.sam.official import official_sam
from fedsam_core.selection import LayerSelection, preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "dice"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 64], help="time: sides of the image in pixels")
    parser.add_argument("--turns", type=int, default=5, help="time: measurements of each")
    parser.add_argument("--out", type=Path, help="dice: folder of prepared scans and runs")
    parser.add_argument("--seeds", type=int, default=1, help="dice: runs of each line")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    options = parser.parse_args()
    if options.what == "dice" and options.out is None:
        parser.error("dice needs --out FOLDER")
    found = times(options.sizes, options.turns) if options.what == "time" else dices(options.out, options.seeds)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


# ---- time


def times(sizes: list[int], turns: int) -> list[dict[str, Any]]:
    """Prints and returns a line for each size and way."""
    torch.set_num_threads(1)
    print("| px | encoder | forward, ms | ratio | forward and backward, ms | ratio | difference |")
    print("|---|---|---|---|---|---|---|")
    return [line for size in sizes for line in _of_size(size, turns)]


def _of_size(size: int, turns: int) -> Iterator[dict[str, Any]]:
    model = ModelConfig(backbone="lite_medsam", image_size=size)
    segmenter = build_segmenter(model, 1, preset("lora"), seed=0).eval()
    sam = official_sam(BuiltModel.of(segmenter))
    sam.load_state_dict(official_state_dict(segmenter), strict=True)
    theirs, ours = sam.eval().requires_grad_(False).image_encoder, segmenter.image_encoder
    for encoder in (theirs, ours):
        for name, value in encoder.named_parameters():
            value.requires_grad_(any(part in name for part in ("attn.qkv.w", "q_proj.w", "k_proj.w", "v_proj.w")))
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    pixels = images.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], Tensor]] = {
        "authors'": lambda: theirs(images),
        "lite_medsam": lambda: ours(pixels),
        "lite_medsam, whole images": lambda: whole_images(ours, pixels),
        "lite_medsam, softmax": lambda: with_softmax(ours, pixels),
    }
    forward: dict[str, list[float]] = {way: [] for way in ways}
    both: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        embeddings = {way: run() for way, run in ways.items()}  # and a turn to warm up
    for _ in range(turns):
        for way, run in ways.items():
            with torch.no_grad(), measured(forward[way]):
                run()
            with measured(both[way]):
                run().sum().backward()
    for way in ways:
        times = {"forward": median(forward[way]), "both": median(both[way])}
        ratios = {
            f"{part}_ratio": median(of["authors'"]) / times[part] for part, of in (("forward", forward), ("both", both))
        }
        difference = float((embeddings[way] - embeddings["authors'"]).abs().max())
        print(
            f"| {size} | {way} | {1000 * times['forward']:.0f} | {ratios['forward_ratio']:.2f}x "
            f"| {1000 * times['both']:.0f} | {ratios['both_ratio']:.2f}x | {difference:.1e} |",
            flush=True,
        )
        yield {"size": size, "encoder": way, **times, **ratios, "difference": difference}


@contextmanager
def measured(into: list[float]) -> Iterator[None]:
    """Adds the CPU seconds that the block takes."""
    begun = process_time()
    yield
    into.append(process_time() - begun)


def whole_images(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """The encoder with all rows of an image at a time."""
    with patch.object(tinyvit, "ROWS", pixels.shape[-1]):
        return encoder(pixels)


def with_softmax(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """The encoder with attention written out."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + attn_mask).softmax(-1) @ v

    with patch.object(F, "scaled_dot_product_attention", attention):
        return encoder(pixels)


# ---- Dice


@dataclass(frozen=True)
class Trial(Budget):
    """What every federation is given: few steps, as the start is what pre-training is about."""

    rounds: int = 3
    local_steps: int = 16
    backbone: str = "vit_t"
    layers: str = "flap"

    @property
    def model(self) -> ModelConfig:
        """vit_t is that of `Budget`: random weights."""
        if self.backbone == "vit_t":
            return super().model
        return ModelConfig.model_validate({"backbone": self.backbone, "image_size": self.image_size})

    @property
    def selection(self) -> LayerSelection:
        return preset(self.layers, self.rank)


# Both were tried; a decoder that knows something forgets it at the higher one.
LEARNING_RATES = {"decoder": 1e-3, "partial-decoder": 4e-3, "flap": 4e-3}


def dices(folder: Path, seeds: int) -> list[dict[str, Any]]:
    """Runs what is not there yet; prints and returns a line for each backbone and selection."""
    prepared = prepare_once(cohort_config("hippocampus"), folder)
    plain = {"rule": "factors", "secure_sum": "plain", "bits": 32, "broadcast_bits": 32}
    lines = []
    for layers, rate in LEARNING_RATES.items():
        for backbone in ("vit_t", "lite_medsam"):
            row = Row(f"{backbone}-{layers}", federation=plain)
            trial = Trial(backbone=backbone, layers=layers, learning_rate=rate)
            for seed in range(seeds):
                run_once(folder, prepared, row, seed, trial)
            files = [folder / "runs" / f"{row.name}-{seed}.json" for seed in range(seeds)]
            runs = [json.loads(file.read_text()) for file in files if file.exists()]
            if runs:
                lines.append(
                    {
                        "backbone": backbone,
                        "selection": layers,
                        "learning_rate": rate,
                        "dice": [mean_dice(tables([run["scores"]])) for run in runs],
                        "cpu_seconds": median(run["cpu_seconds"] for run in runs),
                        "bytes": median(run["bytes_total"] for run in runs),
                    }
                )
    trial = Trial()
    print(
        f"{trial.rounds} rounds of {trial.local_steps} steps of {trial.batch_size} slices at {trial.image_size} px, "
        f"rank {trial.rank}\n\n"
        "| selection | backbone | learning rate | Dice | runs | s of CPU | MB in all |\n|---|---|---|---|---|---|---|"
    )
    for line in lines:
        dice = line["dice"]
        print(
            f"| {line['selection']} | {line['backbone']} | {line['learning_rate']:g} | {sum(dice) / len(dice):.3f} "
            f"| {len(dice)} | {line['cpu_seconds']:.0f} | {line['bytes'] / 1e6:.1f} |"
        )
    return lines


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # numpy's BLAS and torch read it when they are imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    main()
