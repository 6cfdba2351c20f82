"""Where a run stands after a round: all that the next one depends on, in one file.

What sites keep is not in it (`memory`), nor the record of the run, of which it names length and head.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsam_core.errors import CheckpointError
from fedsam_core.federation.sealed import Array, seal, unseal

_FACTS = "facts"  # an array, as a header of safetensors may not grow with the rounds


@dataclass(frozen=True)
class Checkpoint:
    """A run after a round.

    Attributes:
        layout_hash: of the manifest.
        arrays: the global state and what the server keeps beside it, see `Server.arrays`.
        facts: JSON values: "run", "round", what `Federation.save` says, and what its caller adds.
    """

    layout_hash: str
    arrays: dict[str, Array]
    facts: dict[str, Any]

    @property
    def round(self) -> int:
        """The last one that is finished; 0 before the first."""
        return int(self.facts["round"])

    def pack(self) -> bytes:
        """Safetensors; equal checkpoints are equal but for the order of the arrays."""
        facts = json.dumps(self.facts, sort_keys=True).encode()
        return seal({**self.arrays, _FACTS: np.frombuffer(facts, np.uint8)}, self.layout_hash)


def unpack_checkpoint(data: bytes) -> Checkpoint:
    """The inverse of `pack`.

    Raises:
        CheckpointError: its message completes "FILE is ...".
    """
    arrays, layout_hash = unseal(data)
    try:
        checkpoint = Checkpoint(layout_hash, arrays, json.loads(arrays.pop(_FACTS).tobytes()))
        _ = checkpoint.round
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"no checkpoint of a run ({type(error).__name__})") from error
    return checkpoint
