"""A trained model in the forms that others use (PEFT adapter, plain SAM checkpoint, ONNX), each checked when written.

    FOLDER/adapter/   what was trained, with a model card        FOLDER/merged/   sam.pth, for `segment_anything` itself
    FOLDER/onnx/      segmenter.onnx

Each is there whole or not at all, and only if it computes what the model computes.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fedsam_core.errors import CheckpointError
from fedsam_core.folders import whole_folder
from fedsam_core.hashing import file_sha256
from fedsam_core.readmes import adapter_readme, merged_readme, onnx_readme
from fedsam_core.sam.adapters import merge
from fedsam_core.sam.checkpoints import read_official, save_official
from fedsam_core.sam.official import in_registry, official_logits, official_sam
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.trained import CARD, MERGED, ModelCard, Trained

Format = Literal["adapter", "merged", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
Progress = Callable[[str, int, int], None]  # stage, done, total
TOLERANCE = 1e-4  # of merged logits, as a share of the largest one (at least 1)
README = "README.md"


@dataclass(frozen=True)
class Exported:
    """A file of an export.

    Attributes:
        size: bytes.
        checked: what was compared, and how far it is off.
    """

    file: Path
    size: int
    checked: str


def export(
    trained: Trained, folder: Path, formats: Sequence[Format], progress: Progress | None = None
) -> list[Exported]:
    """Write a model into folders of `folder`, one a format; earlier exports there are replaced.

    Everything is computed on the CPU in fp32. LoRA is folded into `trained.segmenter` on the way, in place.

    Raises:
        CheckpointError: a merged checkpoint is to become an adapter, a folder is in use for something else, or what was
            written does not compute what the model does; nothing wrong is left behind.
        DataError: the disk refuses.
    """
    wanted = [name for name in FORMATS if name in formats]  # the adapter before LoRA is folded in
    if "adapter" in wanted and trained.card.merged_sha256 is not None:
        raise CheckpointError(
            f"{trained.folder} is a merged checkpoint, which has no adapter any more: export the run, or leave "
            "adapter out of --format"
        )
    for name in wanted:
        if (folder / name).resolve() == trained.folder.resolve():
            raise CheckpointError(f"{folder / name} is the model that is to be exported: choose another folder with -o")
    segmenter = trained.segmenter.float().eval()
    card = trained.card.model_copy(update={"merged_sha256": None})
    size = card.model.image_size
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = _logits(segmenter, images) if wanted != ["adapter"] else torch.empty(0)
    files: list[Exported] = []
    for done, name in enumerate(wanted):
        if progress is not None:
            progress("export", done, len(wanted))
        if name == "adapter":
            files += _export_adapter(trained, folder / name)
        elif name == "merged":
            files += _export_merged(merge(segmenter), card, folder / name, images, expected)
        else:
            files += _export_onnx(merge(segmenter), card, folder / name, images, expected)
    if progress is not None:
        progress("export", len(wanted), len(wanted))
    return files


def _export_adapter(trained: Trained, folder: Path) -> list[Exported]:
    """The adapter's files as they are, and a model card."""
    with whole_folder(folder, "manifest.json", "an adapter") as part:
        weights = ("adapter_config.json", "adapter_model.safetensors", "trained.safetensors")
        names = [name for name in (*weights, "manifest.json", CARD) if (trained.folder / name).is_file()]
        for name in names:
            shutil.copyfile(trained.folder / name, part / name)
            if file_sha256(part / name) != file_sha256(trained.folder / name):
                raise CheckpointError(f"{folder / name}: the copy is damaged: the disk may be failing")
        peft = "adapter_config.json" in names
        (part / README).write_text(adapter_readme(trained.card, peft))
    kept = [name for name in names if name.endswith(".safetensors")]
    return [_exported(folder / name, "the same bytes as were loaded") for name in kept]


def _export_merged(
    segmenter: SamSegmenter, card: ModelCard, folder: Path, images: Tensor, expected: Tensor
) -> list[Exported]:
    """A checkpoint that SAM's own classes load strictly and compute the same with."""
    with whole_folder(folder, CARD, "an exported model") as part:
        save_official(segmenter, part / MERGED)
        card = card.model_copy(update={"merged_sha256": file_sha256(part / MERGED)})
        (part / CARD).write_text(card.model_dump_json(indent=2))
        (part / README).write_text(merged_readme(card))
        off = check_merged(part / MERGED, card, images, expected)
    where = "sam_model_registry" if in_registry(card.model) else "segment_anything"
    return [_exported(folder / MERGED, f"{where} loads it strictly: logits within {off:.0e}")]


def check_merged(path: Path, card: ModelCard, images: Tensor, expected: Tensor) -> float:
    """Load a merged checkpoint strictly into `segment_anything`'s own classes and compare the logits.

    Args:
        images: [B, 3, S, S] in [0, 1].
        expected: logits [B, classes + 1, S, S] of the model.

    Returns:
        the largest absolute difference.

    Raises:
        CheckpointError: it cannot be loaded, or a logit differs by more than 1e-4 of the largest one.
    """
    sam = official_sam(card.model)
    try:
        sam.load_state_dict(read_official(path), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path.name}: segment_anything does not load it ({reason}): report this") from error
    sam.eval()  # when it is called, and only then, LiteMedSAM's encoder spreads out its tables of biases
    off = float((official_logits(sam, images, card.model) - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not off <= allowed:
        raise CheckpointError(
            f"{path.name}: a logit of segment_anything's differs by {off:.1e}, over {allowed:.1e}: nothing is written; "
            "report this"
        )
    return off


def _export_onnx(
    segmenter: SamSegmenter, card: ModelCard, folder: Path, images: Tensor, expected: Tensor
) -> list[Exported]:
    from fedsam_core.sam.onnx import check_onnx, write_onnx  # seconds to import, for this alone

    with whole_folder(folder, CARD, "an exported model") as part:
        files = [path.name for path in write_onnx(segmenter, part, card.model_dump_json())]
        (part / CARD).write_text(card.model_dump_json(indent=2))
        (part / README).write_text(onnx_readme(card, files))
        off = check_onnx(part / files[0], images, expected)
    checked = f"onnxruntime, batches of 1 and {len(images)}: logits within {off:.0e}"
    return [_exported(folder / name, checked) for name in files]


@torch.inference_mode()
def _logits(segmenter: SamSegmenter, images: Tensor) -> Tensor:
    """One image at a time: large images need a lot of memory each."""
    return torch.cat([segmenter(image[None]) for image in images])


def _exported(file: Path, checked: str) -> Exported:
    return Exported(file, file.stat().st_size, checked)
