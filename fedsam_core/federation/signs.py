"""Public pseudo-random signs that every machine, numpy version and site draws alike.

A seed is a tuple of words and numbers, e.g. (run seed, round, "rotation"). Its fingerprint keys an AES counter stream
(see `secagg.masks`), 32 signs to a value. Nothing here is secret: whoever knows the run's seed draws the same signs.
"""

import numpy as np
from numpy.typing import NDArray

from fedsam_core.secagg.keys import Secret, fingerprint
from fedsam_core.secagg.masks import PIECE, Keystream, new_scratch

_BITS = 32


def signs(size: int, *seed: str | int) -> NDArray[np.float64]:
    """`size` signs (float64 [size], each +1.0 or -1.0), equal for equal seeds; the first n of a longer draw are these.

    1 and "1" are the same seed; ("a", "b") and ("ab",) are not.
    """
    words = _stream(-(-size // _BITS), seed)
    bits = np.unpackbits(words.view(np.uint8), count=size, bitorder="little")
    return 1.0 - 2.0 * bits.astype(np.float64)


def _stream(count: int, seed: tuple[str | int, ...]) -> NDArray[np.uint32]:
    """The first `count` values of the seed's stream, little endian in memory on any machine."""
    words = np.empty(count, dtype="<u4")
    stream = Keystream(Secret(fingerprint(b"public signs", *(str(part).encode() for part in seed))))
    scratch = new_scratch()
    for start in range(0, count, PIECE):
        piece = words[start : start + PIECE]
        piece[:] = stream.fill(scratch, piece.size)
    return words
