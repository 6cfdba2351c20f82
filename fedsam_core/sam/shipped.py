"""The weights that come with the package, and the file that they are in: vit_t, pre-trained on drawn scenes.

A packed file is safetensors with SAM's official parameter names. Matrices are int8 with a scale a row (a quarter of
float32; `NAME` and `NAME:scale`), everything small is float32. Its metadata say how the weights were made.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsam_core.data.files import write_atomic
from fedsam_core.errors import CheckpointError

SHIPPED = {"vit_t": Path(str(resources.files("fedsam_core.sam") / "weights" / "vit_t.safetensors"))}
SUFFIX = ".safetensors"
_SCALE = ":scale"
_SMALL = 4096  # values; what has fewer stays float32
_FACTS = "fedsam"  # the one key of the metadata: several would be written in any order


def pack(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state dict (float, official names), whole or not at all; equal input, equal bytes.

    Args:
        facts: how the weights were made; JSON values.

    Raises:
        DataError: the disk refuses.
    """
    packed: dict[str, Tensor] = {}
    for name, value in sorted(state.items()):
        value = value.detach().cpu().float()
        if value.dim() < 2 or value.numel() < _SMALL:
            packed[name] = value.contiguous()
            continue
        rows = value.flatten(1)
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        packed[name] = (rows / scale).round().to(torch.int8).view(value.shape).contiguous()
        packed[name + _SCALE] = scale[:, 0].contiguous()
    write_atomic(path, save(packed, {_FACTS: json.dumps(facts, sort_keys=True)}))


def unpack(path: Path) -> dict[str, Tensor]:
    """The state dict of a packed file: float32, on the CPU.

    Raises:
        CheckpointError: not a packed file, or a damaged one.
    """
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            known = _FACTS in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}): get it again") from error
    if not known:
        raise CheckpointError(
            f"{path} was not written by `fedsam pretrain`: give such a file, or an official .pth file"
        )
    state = {}
    for name, value in stored.items():
        if name.endswith(_SCALE):
            continue
        if value.dtype == torch.int8:
            if name + _SCALE not in stored or stored[name + _SCALE].shape != value.shape[:1]:
                raise CheckpointError(f"{path} lacks the scales of {name}: get it again")
            value = (value.flatten(1) * stored[name + _SCALE][:, None]).view(value.shape)
        state[name] = value
    return state


def facts_of(path: Path) -> dict[str, Any]:
    """How a packed file's weights were made. Raises CheckpointError: it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})[_FACTS])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no file of `fedsam pretrain` ({error}): give one") from error
    return found
