"""The plain sum: the same vectors without masks, for comparison. The aggregator sees every site's values."""

import numpy as np
from numpy.typing import NDArray

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.keys import Identity, Roster
from fedsam_core.secagg.messages import PlainInput, encode_signed, expect_signed


def plain_input(attempt: Attempt, site_id: str, identity: Identity, vector: NDArray[np.uint32]) -> bytes:
    """A site's only message: `vector` (uint32 [size]) as it is, signed."""
    if vector.dtype != np.uint32 or vector.ndim != 1 or vector.size == 0:
        raise SecureSumError(f"a vector to send must be uint32 [size], not {vector.dtype} {vector.shape}")
    return encode_signed(PlainInput(vector), attempt.digest(), attempt.index(site_id), identity)


class PlainAggregator:
    """Adds the vectors as they come. Its total is bit-equal to that of an AggregatorSession over the same sites."""

    def __init__(self, attempt: Attempt, roster: Roster, vector_size: int) -> None:
        self._attempt = attempt
        self._roster = roster
        self._context = attempt.digest()
        self._sum: NDArray[np.uint32] = np.zeros(vector_size, dtype=np.uint32)
        self._arrived: set[int] = set()

    def receive_plain(self, site: str, data: bytes) -> None:
        """A site's vector. Raises SecureSumError for a damaged, forged or repeated message, or another attempt's."""
        index = self._attempt.index(site)
        if index in self._arrived:
            raise SecureSumError(f"site {site!r} sent PlainInput twice: the second is refused")
        sender, body, _ = expect_signed(data, PlainInput, self._context, self._attempt.sites, self._roster)
        if sender != index:
            raise SecureSumError(
                f"site {site!r} sent a message in the name of {self._attempt.sites[sender]!r}: refused"
            )
        if body.values.size != self._sum.size:
            raise SecureSumError(f"site {site!r} sent {body.values.size} values where {self._sum.size} were due")
        np.add(self._sum, body.values, out=self._sum)
        self._arrived.add(sender)

    def total(self) -> tuple[NDArray[np.uint32], tuple[str, ...]]:
        """The sum (uint32 [size], modulo 2^32) and its sites. Raises SecureSumError below the attempt's threshold."""
        if len(self._arrived) < self._attempt.threshold:
            raise SecureSumError(
                f"only {len(self._arrived)} of the {self._attempt.threshold} sites that are needed sent"
            )
        return self._sum, self._attempt.names(self._arrived)
