"""The model card of pre-trained weights, and a picture of what the model answers."""

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from segment_anything.modeling import Sam

from fedsam_core.pretraining.promptable import INSIDE, OUTSIDE
from fedsam_core.pretraining.scoring import KINDS, Answers, answer, held_out

Scores = Mapping[tuple[int, str], Mapping[str, float]]
"""(image size, kind of weights) -> kind of prompt -> mean IoU."""

_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")  # Okabe and Ito's, a target each


def model_card(facts: Mapping[str, Any], digest: str, size: int, scores: Scores) -> str:
    """Markdown: what the weights are, how they were made, how good they are, and what they are not for."""
    rows = [
        f"| {pixels} | {kept} | {' | '.join(f'{found[kind]:.3f}' for kind in KINDS)} |"
        for (pixels, kept), found in scores.items()
    ]
    again = (
        "The same command\n  on the same kind of machine, with as many threads, gives the same bytes."
        if facts["device"] == "cpu"
        else "A GPU adds\n  in any order: the same command gives weights as good, but not the same bytes."
    )
    return f"""# vit_t, pre-trained on drawn scenes

A small Segment Anything (SAM): `segment_anything`'s own image encoder (width 192, 6 blocks), prompt encoder and mask
decoder, 7.5 M parameters, trained from random weights as a promptable model. `fedsam` adapts it where no official
checkpoint is given (`model.backbone=vit_t model.checkpoint=auto`).

- File: `vit_t.safetensors`, {size / 1e6:.1f} MB, SHA-256 `{digest}`. Official parameter names; matrices int8 with a
  scale a row (`fedsam_core/sam/shipped.py`).
- Made by: `{facts["command"]} --out FOLDER`, seed {facts["config"]["seed"]}, {facts["config"]["steps"]} steps, with
  fedsam {facts["fedsam"]} and PyTorch {facts["torch"]} on {facts["device"]} ({facts["machine"]}). {again}
- Trained on: scenes drawn by `fedsam_core/pretraining/scenes.py`, each seen once. No scan, photograph or download; not
  fedsam's own phantoms either.
- License: that of fedsam.

## How good it is

Mean IoU with the masks of scenes from a stream that it was not trained on. For a point: the mask that the model itself
thinks the best of three. `packed` are the weights of the file, `float32` those before rounding.

| pixels | weights | {" | ".join(KINDS)} |
|---|---|{"---|" * len(KINDS)}
{chr(10).join(rows)}

## What it is not

It has never seen a scan, an organ or a patient, and segments none as it is: it is a start for training, better than
random weights and far from Meta's checkpoints, which saw eleven million photographs. Its images were
{", ".join(map(str, sorted(int(s) for s in facts["config"]["sizes"])))} pixels wide; it has not been looked at beyond.

## Configuration

```json
{json.dumps(facts, indent=1, sort_keys=True)}
```
"""


def examples(sam: Sam, size: int, seed: int, device: torch.device) -> bytes:
    """PNG: held-out scenes with the masks that the model gives for a point, a box, and box and point; truth first."""
    count = 6
    answers = answer(sam, held_out(seed, 0, count, size, device), seed)
    figure = Figure(figsize=(1.9 * count, 7.8), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(1 + len(KINDS), count)
    for column in range(count):
        image = answers.scenes.images[column].cpu().numpy().transpose(1, 2, 0)
        for row, kind in enumerate(("truth", *KINDS)):
            axes: Axes = rows[row, column]
            axes.imshow(image, vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(kind)
            _masks(axes, answers, kind, column)
    figure.suptitle(f"Drawn scenes, not trained on, {size} px", fontsize=10)
    stream = BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": "fedsam"})
    return stream.getvalue()


def _masks(axes: Axes, answers: Answers, kind: str, image: int) -> None:
    """Outlines of a scene's masks, and the points that they were asked with."""
    found = answers.scenes.masks if kind == "truth" else answers.masks[kind]
    for target, mask in enumerate(found[image].cpu().numpy()):
        if not answers.scenes.real[image, target]:
            continue
        if mask.any():
            axes.contour(mask.astype(np.float32), levels=[0.5], colors=[_COLORS[target]], linewidths=1.3)
        if kind in answers.prompts:
            row = image * found.shape[1] + target
            places, labels = answers.prompts[kind].coordinates[row], answers.prompts[kind].labels[row]
            for marker, label in (("+", INSIDE), ("x", OUTSIDE)):
                x, y = places[labels == label].cpu().numpy().T
                axes.plot(x, y, marker, color=_COLORS[target], markersize=7, markeredgewidth=1.6)
