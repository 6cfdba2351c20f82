"""The global state that all sites hold alike: its hash, and how it travels and is stored (safetensors)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsam_core.errors import CheckpointError
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import ParameterManifest

Array = np.ndarray[Any, Any]

_CONTROL = "scaffold.control"


@dataclass(frozen=True)
class GlobalState:
    """What all sites hold alike.

    Attributes:
        vector: float32 [manifest.shared_size], the shared values.
        control: float32 [manifest.shared_size], the common control variate (SCAFFOLD); None without.
    """

    manifest: ParameterManifest
    vector: np.ndarray[Any, np.dtype[np.float32]]
    control: np.ndarray[Any, np.dtype[np.float32]] | None = None

    @property
    def tensors(self) -> dict[str, Array]:
        """The shared values by entry name."""
        return self.manifest.unflatten(self.vector)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over layout and values; without control variates that of `state_hash`."""
        plain = _vector_hash(self.manifest, self.vector)
        if self.control is None:
            return plain
        return hashlib.sha256(plain.encode() + self.control.tobytes()).hexdigest()


def first_state(manifest: ParameterManifest, state: Mapping[str, Array], scaffold: bool) -> GlobalState:
    """The global state before the first round, from the shared values; control variates begin at zero."""
    control = np.zeros(manifest.shared_size, np.float32) if scaffold else None
    return GlobalState(manifest, manifest.flatten(state), control)


def pack_global(state: GlobalState) -> bytes:
    """The whole state, for a site that holds no earlier one."""
    extra = {} if state.control is None else {_CONTROL: state.control}
    return save({**state.tensors, **extra})


def unpack_global(manifest: ParameterManifest, data: bytes) -> GlobalState:
    """The inverse of `pack_global`.

    Raises:
        CheckpointError: `data` is not safetensors.
        SelectionError: a name or a shape differs from the manifest.
    """
    tensors = _load(data)
    control = tensors.pop(_CONTROL, None)
    if control is not None and control.shape != (manifest.shared_size,):
        raise CheckpointError(f"control variates have shape {control.shape}, not ({manifest.shared_size},)")
    return GlobalState(
        manifest, manifest.flatten(tensors), None if control is None else control.astype(np.float32, copy=False)
    )


def pack_changes(old: GlobalState, new: GlobalState) -> bytes:
    """The tensors of `new` that differ from those of `old`, as they are."""
    before, after = old.tensors, new.tensors
    changed = {name: value for name, value in after.items() if value.tobytes() != before[name].tobytes()}
    if new.control is not None:
        changed[_CONTROL] = new.control
    return save(changed)


def apply_changes(state: GlobalState, data: bytes) -> GlobalState:
    """The inverse of `pack_changes`. Raises as `unpack_global`."""
    changed = _load(data)
    control = changed.pop(_CONTROL, state.control)
    tensors = state.tensors | changed
    return GlobalState(state.manifest, state.manifest.flatten(tensors), control)


def _load(data: bytes) -> dict[str, Array]:
    try:
        return load(data)
    except SafetensorError as error:
        raise CheckpointError(f"the global state is not a readable safetensors message ({error})") from error


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
    return manifest.unflatten(manifest.flatten(_load(data)))


def state_hash(manifest: ParameterManifest, state: Mapping[str, Array]) -> str:
    """SHA-256 (hex) over the layout hash and the float32 values in entry order: equal only for bit-equal states."""
    return _vector_hash(manifest, manifest.flatten(state))


def _vector_hash(manifest: ParameterManifest, vector: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    return hashlib.sha256(manifest.layout_hash.encode() + vector.tobytes()).hexdigest()


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
