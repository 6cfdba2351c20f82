"""Named arrays as bytes that tell whether they are still what was written: safetensors with a SHA-256 in the header."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsam_core.errors import CheckpointError

Array = np.ndarray[Any, Any]


def seal(arrays: Mapping[str, Array], layout_hash: str) -> bytes:
    """Arrays by name, any dtype that numpy and safetensors share, for the manifest with that layout hash."""
    ordered = {name: np.array(value, order="C") for name, value in arrays.items()}
    about = json.dumps({"layout_hash": layout_hash, "sha256": _digest(ordered, layout_hash)}, sort_keys=True)
    return save(ordered, metadata={"fedsam": about})


def unseal(data: bytes) -> tuple[dict[str, Array], str]:
    """The arrays of `seal`, and their layout hash.

    Raises:
        CheckpointError: its message completes "FILE is ...".
    """
    try:
        arrays = {name: np.array(value) for name, value in load(data).items()}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["fedsam"])
        layout, digest = str(about["layout_hash"]), about["sha256"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"unreadable ({' '.join(str(error).split())[:200]})") from error
    if digest != _digest(arrays, layout):
        raise CheckpointError("damaged, its values are not those that were written")
    return arrays, layout


def _digest(arrays: Mapping[str, Array], layout_hash: str) -> str:
    """SHA-256 (hex) over the layout hash, and names, dtypes, shapes and values in the names' order."""
    digest = hashlib.sha256(json.dumps(layout_hash).encode())
    for name in sorted(arrays):
        value = arrays[name]
        digest.update(json.dumps([name, value.dtype.str, list(value.shape)]).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
