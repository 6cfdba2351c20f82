"""The global shared state on the wire and on disk: safetensors, named by the manifest."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsam_core.errors import CheckpointError
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import ParameterManifest

Array = np.ndarray[Any, Any]


def pack_state(manifest: ParameterManifest, state: Mapping[str, Array], note: Mapping[str, str] | None = None) -> bytes:
    """Serializes a shared state (float32 arrays by entry name), with its layout hash and `note` in the header.

    Raises:
        SelectionError: a name or a shape differs from the manifest.
    """
    ordered = manifest.unflatten(manifest.flatten(state))
    # One entry, because safetensors writes several in any order: equal states are equal bytes.
    about = json.dumps({"layout_hash": manifest.layout_hash, **(note or {})}, sort_keys=True)
    return save(ordered, metadata={"fedsam": about})


def read_note(data: bytes) -> dict[str, str]:
    """The notes in the header of a packed state that `unpack_state` takes.

    Raises:
        CheckpointError: there are none.
    """
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {str(key): str(value) for key, value in json.loads(header["__metadata__"]["fedsam"]).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the global state has no notes in its header: it was not written by fedsam") from error


def unpack_state(manifest: ParameterManifest, data: bytes) -> dict[str, Array]:
    """The inverse of `pack_state`.

    Raises:
        CheckpointError: `data` is not safetensors.
        SelectionError: a name or a shape differs from the manifest.
    """
    try:
        state = load(data)
    except SafetensorError as error:
        raise CheckpointError(f"the global state is not a readable safetensors message ({error})") from error
    return manifest.unflatten(manifest.flatten(state))


def state_hash(manifest: ParameterManifest, state: Mapping[str, Array]) -> str:
    """SHA-256 (hex) over the layout hash and the float32 values in entry order: equal only for bit-equal states."""
    digest = hashlib.sha256(manifest.layout_hash.encode())
    digest.update(np.ascontiguousarray(manifest.flatten(state)).tobytes())
    return digest.hexdigest()


def weights_hash(segmenter: SamSegmenter, manifest: ParameterManifest) -> str:
    """SHA-256 (hex) over the weights that nobody trains: a mean makes sense only over adapters of one backbone."""
    trained = {entry.name for entry in (*manifest.shared, *manifest.local)}
    digest = hashlib.sha256()
    for name, value in segmenter.state_dict().items():
        canonical = name.replace(".base_layer.", ".").replace(".default.", ".")
        if canonical not in trained:
            digest.update(canonical.encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
