"""Adapters as a run leaves them, with every trained value moved, on vit_t at 32 px."""

from pathlib import Path
from typing import Any, Literal

import torch

from fedsam_core.data.cohort import Cohort
from fedsam_core.data.preprocess import PreprocessConfig
from fedsam_core.data.slices import SliceConfig
from fedsam_core.sam.adapters import adapt, save_adapter
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.selection import LayerSelection
from fedsam_core.trained import describe

CLASSES = ("kidney", "tumour")
PREPROCESS = PreprocessConfig(slice_axis="axial", ct_window=(-100, 200))


def trained_adapter(
    folder: Path,
    selection: LayerSelection,
    *,
    classes: tuple[str, ...] = CLASSES,
    size: int = 32,
    checkpoint: Path | Literal["random"] = "random",
    model: ModelConfig | None = None,
    **card: Any,
) -> Path:
    """An adapter folder, of vit_t if no model is given; `card` overrides what its card says."""
    model = model or ModelConfig(backbone="vit_t", image_size=size, checkpoint=checkpoint)
    segmenter = build_segmenter(model, len(classes), selection, seed=1)
    manifest = adapt(segmenter, selection)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in segmenter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trained_on: dict[str, Any] = {
        "name": "kits",
        "source": "nifti",
        "classes": classes,
        "modality": "ct",
        "synthetic": True,
        "scored_as": {"kidney": ("kidney", "tumour")},
        "cases": (),
    }
    trained_on |= {key: card.pop(key) for key in set(card) & set(trained_on)}
    about: dict[str, Any] = {
        "run": "kits-20261123-141500-ab12cd-9f3e",
        "dice": 0.75,
        "dice_by_class": dict.fromkeys(classes, 0.75),
        "preprocess": PREPROCESS,
        "slices": SliceConfig(context_mm=3.0),
        "precision": "fp32",
        **card,
    }
    save_adapter(segmenter, manifest, folder, describe(segmenter, Cohort(**trained_on), **about))
    return folder


def image_batch(size: int = 32, count: int = 3) -> torch.Tensor:
    """Images float32 [count, 3, size, size] in [0, 1], always the same."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(7))
