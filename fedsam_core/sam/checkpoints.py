"""Official SAM checkpoints in and out: q, k, v split and fused, position tables fitted to any image size."""

import os
import pickle
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsam_core.errors import CheckpointError
from fedsam_core.hashing import file_sha256
from fedsam_core.sam.geometry import BACKBONES, LITE_MEDSAM
from fedsam_core.sam.litemedsam import from_lite_medsam, is_lite_medsam, to_lite_medsam
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.sam.shipped import SUFFIX, unpack

_POS_EMBED = "image_encoder.pos_embed"
_QKV = re.compile(r"(image_encoder\.blocks\.\d+\.attn\.)qkv\.(weight|bias)")
_PARTS = ("q_proj", "k_proj", "v_proj")
# What a head for other classes or of another shape replaces; with FLAP's also the stages that SAM does not have.
_HEAD = r"mask_decoder\.(?:mask_tokens|output_hypernetworks_mlps|iou_prediction_head)\..*"
_FLAP_STAGES = r"mask_decoder\.output_upscaling\.(?:4|6|7|9)\..*"


@dataclass(frozen=True)
class LoadReport:
    """What became of each parameter of a checkpoint and of the segmenter, by canonical name.

    loaded: taken as they are; resized: position tables fitted to the image size; new: not in the file, left at their
    random start; left_out: in the file, not used.
    """

    path: Path
    sha256: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]


def load_official(segmenter: SamSegmenter, path: Path) -> LoadReport:
    """Load a state dict of the official `Sam` class, or of LiteMedSAM, into a segmenter that is not adapted yet.

    Strict: encoder, prompt encoder and decoder transformer must be there in full. Only the head may be new, and only as
    one piece: where its mask tokens, hypernetworks and IoU head (with FLAP also the later upscaling stages) have the
    file's shapes they are loaded, otherwise all of them start at random, as in FLAP-SAM (arXiv 2407.21739). SAM's first
    two transposed convolutions and their norm are always loaded.

    Raises:
        CheckpointError: no such file, not a checkpoint, another backbone's, or parameters that do not fit.
    """
    file = read_official(path)
    _check_backbone(segmenter, file, path)
    state = from_lite_medsam(file, path) if segmenter.backbone == LITE_MEDSAM else split_qkv(file)
    own = segmenter.state_dict()

    resized = [
        name
        for name, value in state.items()
        if name in own and _is_table(segmenter, name) and value.shape != own[name].shape
    ]
    for name in resized:
        state[name] = resize_table(state[name], own[name].shape)

    replaceable = rf"{_HEAD}|{_FLAP_STAGES}" if segmenter.head == "flap" else _HEAD
    head = {name for name in own if re.fullmatch(replaceable, name)}
    file_head = {name for name in state if re.fullmatch(replaceable, name)}
    fits = head == file_head and all(state[name].shape == own[name].shape for name in head)
    new = set() if fits or segmenter.head == "pretrained" else head
    left_out = file_head if new else set()

    for name in sorted(own.keys() - new - state.keys()):
        raise CheckpointError(f"{path} lacks {name}: use an official SAM checkpoint of {segmenter.backbone}")
    for name in sorted(state.keys() - left_out - own.keys()):
        raise CheckpointError(f"{path} has an unknown parameter {name}: use an official SAM checkpoint")
    for name in sorted(own.keys() - new):
        if state[name].shape != own[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}: use an official "
                f"SAM checkpoint of {segmenter.backbone}"
            )
    segmenter.load_state_dict({name: own[name] if name in new else state[name] for name in own}, strict=True)
    digest = file_sha256(path)
    segmenter.weights = f"{'fedsam' if path.suffix == SUFFIX else 'sam'}:{digest[:12]}"
    return LoadReport(
        path=path,
        sha256=digest,
        loaded=tuple(name for name in own if name not in new and name not in resized),
        resized=tuple(resized),
        new=tuple(name for name in own if name in new),
        left_out=tuple(name for name in state if name in left_out),
    )


def read_official(path: Path) -> dict[str, Tensor]:
    """The tensors of an official .pth file, or of a packed one, on the CPU; nothing but tensors is unpickled.

    Raises:
        CheckpointError: no such file, truncated, not a checkpoint, or neither SAM's nor LiteMedSAM's.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist: give the path of an official SAM .pth file")
    if path.suffix == SUFFIX:
        return unpack(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise CheckpointError(f"{path} is truncated or not a checkpoint ({reason}): download it again") from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        inside = ", ".join(map(str, list(state)[:4])) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} holds {inside}, not the parameters of SAM: save the state dict alone")
    if _POS_EMBED not in state and not is_lite_medsam(state):
        raise CheckpointError(f"{path} has no {_POS_EMBED}: it is not a SAM checkpoint; use an official .pth file")
    return state


def save_official(segmenter: SamSegmenter, path: Path) -> None:
    """Write `official_state_dict` as a .pth file, whole or not at all.

    Raises:
        CheckpointError: LoRA is still beside the weights.
        OSError: the disk refuses.
    """
    state = official_state_dict(segmenter)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("wb") as stream:
            torch.save(state, stream)
        os.replace(part, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides what the disk said behind a word about its own state
            raise error.__context__ from error
        raise
    finally:
        part.unlink(missing_ok=True)


def official_state_dict(segmenter: SamSegmenter) -> dict[str, Tensor]:
    """The segmenter's parameters under official names, q, k and v fused (tensors on the CPU).

    `segment_anything`'s own classes load it strictly, assembled for the same image size and number of mask tokens; for
    FLAP's head with its upscaling in the place of SAM's (`fedsam_core.sam.official`). At 1024 px and with four tokens
    ("pretrained", or "sam" with three classes) so does `segment_anything.sam_model_registry`. LiteMedSAM's names are
    those of its own image encoder.

    Raises:
        CheckpointError: LoRA is still beside the weights.
    """
    state = {name: value.detach().cpu() for name, value in segmenter.state_dict().items()}
    if any(".lora_A." in name for name in state):
        raise CheckpointError("the segmenter still carries LoRA layers: merge it before writing SAM's own layout")
    return to_lite_medsam(state) if segmenter.backbone == LITE_MEDSAM else fuse_qkv(state)


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official `attn.qkv` parameters [3 dim, ...] as `attn.q_proj`, `attn.k_proj` and `attn.v_proj` [dim, ...]."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        if found := _QKV.fullmatch(name):
            split |= {f"{found[1]}{part}.{found[2]}": piece for part, piece in zip(_PARTS, value.chunk(3), strict=True)}
        else:
            split[name] = value
    return split


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_qkv`."""
    fused: dict[str, Tensor] = {}
    for name, value in state.items():
        if found := re.fullmatch(r"(image_encoder\.blocks\.\d+\.attn\.)(q|k|v)_proj\.(weight|bias)", name):
            if found[2] == "q":
                fused[f"{found[1]}qkv.{found[3]}"] = torch.cat([state[f"{found[1]}{p}.{found[3]}"] for p in _PARTS])
        else:
            fused[name] = value
    return fused


def resize_table(table: Tensor, shape: torch.Size) -> Tensor:
    """Fit a position table to another grid: pos_embed [1, g, g, C] bilinearly, a relative table [2g-1, C] linearly."""
    if table.dim() == 4:
        grid = F.interpolate(
            table.permute(0, 3, 1, 2).float(), size=tuple(shape[1:3]), mode="bilinear", align_corners=False
        )
        return grid.permute(0, 2, 3, 1).contiguous()
    line = F.interpolate(table.T[None].float(), size=shape[0], mode="linear", align_corners=False)
    return line[0].T.contiguous()


def _is_table(segmenter: SamSegmenter, name: str) -> bool:
    """Whether a parameter's size follows the image's: pos_embed, and the relative tables of blocks without windows."""
    if name == _POS_EMBED:
        return True
    found = re.fullmatch(r"image_encoder\.blocks\.(\d+)\.attn\.rel_pos_[hw]", name)
    return found is not None and int(found[1]) in BACKBONES[segmenter.backbone].global_blocks


def _check_backbone(segmenter: SamSegmenter, state: Mapping[str, Tensor], path: Path) -> None:
    """Tell a checkpoint of another backbone by its layout, width and number of blocks."""
    if is_lite_medsam(state) != (segmenter.backbone == LITE_MEDSAM):
        layout, fix = ("a LiteMedSAM", "=lite_medsam") if is_lite_medsam(state) else ("a SAM", " to that of the SAM")
        raise CheckpointError(f"{path} is {layout} checkpoint, not {segmenter.backbone}'s: set model.backbone{fix}")
    if segmenter.backbone == LITE_MEDSAM:
        return
    width = state[_POS_EMBED].shape[-1]
    depth = len({found[1] for name in state if (found := re.match(r"image_encoder\.blocks\.(\d+)\.", name))})
    wanted = BACKBONES[segmenter.backbone]
    if (width, depth) == (wanted.embed_dim, wanted.depth):
        return
    found_name = next((name for name, b in BACKBONES.items() if (b.embed_dim, b.depth) == (width, depth)), None)
    looks = f"looks like {found_name}" if found_name else "is of no known backbone"
    fix = f"set model.backbone={found_name}" if found_name else "use an official SAM checkpoint"
    file = f" or give {wanted.checkpoint}" if wanted.checkpoint else " or leave model.checkpoint out"
    raise CheckpointError(
        f"{path} {looks} (width {width}, {depth} blocks), not {segmenter.backbone} (width {wanted.embed_dim}, "
        f"{wanted.depth} blocks): {fix}{file}"
    )
