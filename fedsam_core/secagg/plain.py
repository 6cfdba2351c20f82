"""The plain sum: the same vectors without masks, for comparison. The aggregator sees every site's values."""

import numpy as np
from numpy.typing import NDArray

from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.keys import Identity, Roster
from fedsam_core.secagg.layout import VectorLayout
from fedsam_core.secagg.messages import PlainInput, encode_signed, expect_signed
from fedsam_core.secagg.packing import add_packed, pack, reduce
from fedsam_core.secagg.record import Received, received
from fedsam_core.secagg.refusals import BadSignature, OutOfTurn, TooFewSites


def plain_input(
    attempt: Attempt, site_id: str, identity: Identity, layout: VectorLayout, vector: NDArray[np.uint32]
) -> bytes:
    """A site's only message: `vector` (uint32 [size]) as it is, packed and signed."""
    return encode_signed(PlainInput(pack(layout, vector)), attempt.digest(), attempt.index(site_id), identity)


class PlainAggregator:
    """Adds the vectors as they come. Its total is bit-equal to that of an AggregatorSession over the same sites."""

    def __init__(self, attempt: Attempt, roster: Roster, layout: VectorLayout) -> None:
        self._attempt = attempt
        self._roster = roster
        self._context = attempt.digest()
        self._layout = layout
        self._sum: NDArray[np.uint32] = np.zeros(layout.size, dtype=np.uint32)
        self._arrived: set[int] = set()
        self.received: list[Received] = []

    def receive_plain(self, site: str, data: bytes) -> None:
        """A site's vector. Raises SecureSumError for a damaged, forged or repeated message, or another attempt's."""
        index = self._attempt.index(site)
        if index in self._arrived:
            raise OutOfTurn(f"site {site!r} sent PlainInput twice: the second is refused")
        sender, body, message = expect_signed(data, PlainInput, self._context, self._attempt.sites, self._roster)
        if sender != index:
            raise BadSignature(f"site {site!r} sent a message in the name of {self._attempt.sites[sender]!r}: refused")
        add_packed(self._layout, self._sum, body.packed)
        self._arrived.add(sender)
        self.received.append(received(site, data, message))

    def total(self) -> tuple[NDArray[np.uint32], tuple[str, ...]]:
        """The sum (uint32 [size], modulo 2^32) and its sites. Raises TooFewSites below the attempt's threshold."""
        if len(self._arrived) < self._attempt.threshold:
            raise TooFewSites(f"only {len(self._arrived)} of the {self._attempt.threshold} sites that are needed sent")
        reduce(self._layout, self._sum)
        return self._sum, self._attempt.names(self._arrived)
