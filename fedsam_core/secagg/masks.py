"""Masks: AES-256 in counter mode as a stream of uint32, added to and taken from a vector modulo 2^32.

Each key makes one stream in its life, so the counter starts at zero without a nonce. The vector is worked through in
pieces that stay in the processor's cache; memory beyond the vector does not grow with it.
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from fedsam_core.secagg.keys import Secret

PIECE = 1 << 16
"""Values that are worked on at a time: 256 KiB."""

_BLOCK = 16
_ZEROS = memoryview(bytes(4 * PIECE))


class Keystream:
    """The uint32 stream (little endian, whatever the machine) of one key."""

    def __init__(self, key: Secret) -> None:
        self._cipher = Cipher(AES(key.reveal()), CTR(bytes(_BLOCK))).encryptor()

    def fill(self, scratch: bytearray, count: int) -> NDArray[np.uint32]:
        """The next `count` <= PIECE values, a view into `scratch` (from `new_scratch`): the next call overwrites it."""
        self._cipher.update_into(_ZEROS[: 4 * count], scratch)
        return np.frombuffer(scratch, dtype="<u4", count=count)


def new_scratch() -> bytearray:
    """Room for one piece of a stream; the cipher asks for a block more than it writes."""
    return bytearray(4 * PIECE + _BLOCK - 1)


def apply_masks(vector: NDArray[np.uint32], plus: Sequence[Secret], minus: Sequence[Secret]) -> None:
    """Add the streams of `plus` to `vector` (1-D uint32) and take those of `minus` from it, in place, modulo 2^32."""
    added = [Keystream(key) for key in plus]
    taken = [Keystream(key) for key in minus]
    scratch = new_scratch()
    for start in range(0, vector.size, PIECE):
        piece = vector[start : start + PIECE]
        for stream in added:
            np.add(piece, stream.fill(scratch, piece.size), out=piece)
        for stream in taken:
            np.subtract(piece, stream.fill(scratch, piece.size), out=piece)
    scratch[:] = bytes(len(scratch))
