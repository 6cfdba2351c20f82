"""Secret sharing: any threshold shares give the secret back, fewer fit every secret."""

import itertools
import os

import pytest

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg.keys import Secret
from fedsam_core.secagg.shamir import PRIME, SHARE_BYTES, combine, split, weights


def recover(shares: dict[int, Secret], points: tuple[int, ...]) -> bytes:
    return bytes(combine([shares[x].reveal() for x in points], weights(points)).reveal())


@pytest.mark.parametrize("raw", [bytes(32), b"\xff" * 32, bytes(range(32))])
def test_every_group_of_threshold_sites_recovers_the_secret(raw, entropy):
    shares = split(Secret(raw), 3, [1, 2, 4, 7, 100], entropy("s"))
    assert all(len(share.reveal()) == SHARE_BYTES for share in shares.values())
    for points in itertools.permutations(shares, 3):
        assert recover(shares, points) == raw
    for points in itertools.combinations(shares, 4):
        assert recover(shares, points) == raw


def test_fewer_shares_fit_any_secret(entropy):
    """For two of three shares and any secret there is a polynomial through both: they say nothing."""
    shares = split(Secret(b"\x01" * 32), 3, [1, 2, 3], entropy("s"))
    y1, y2 = (int.from_bytes(shares[x].reveal(), "big") for x in (1, 2))
    for other in (0, 12345, 2**256 - 1):
        points = {0: other, 1: y1, 2: y2}  # the third share for which the secret is `other`
        y3 = sum(
            y * numerator * pow(denominator, -1, PRIME)
            for x, y in points.items()
            for numerator, denominator in [_basis(x, points, at=3)]
        )
        forged = [y1.to_bytes(66, "big"), y2.to_bytes(66, "big"), (y3 % PRIME).to_bytes(66, "big")]
        assert int.from_bytes(combine(forged, weights([1, 2, 3])).reveal(), "big") == other


def _basis(x: int, points: dict[int, int], at: int) -> tuple[int, int]:
    numerator = denominator = 1
    for other in points:
        if other != x:
            numerator = numerator * (at - other) % PRIME
            denominator = denominator * (x - other) % PRIME
    return numerator, denominator


def test_shares_are_fresh_each_time():
    first, second = (split(Secret(bytes(32)), 2, [1, 2], os.urandom) for _ in range(2))
    assert first[1].reveal() != second[1].reveal()


def test_wrong_shares_are_noticed(entropy):
    shares = split(Secret(b"\x01" * 32), 3, [1, 2, 3], entropy("s"))
    raw = [bytes(share.reveal()) for share in shares.values()]
    raw[1] = (int.from_bytes(raw[1], "big") ^ 1 << 300).to_bytes(66, "big")
    with pytest.raises(SecureSumError, match="do not fit"):
        combine(raw, weights([1, 2, 3]))
    with pytest.raises(SecureSumError, match="distinct"):
        weights([1, 1, 2])
    with pytest.raises(SecureSumError, match="cannot share"):
        split(Secret(bytes(32)), 4, [1, 2, 3], entropy("s"))
    with pytest.raises(SecureSumError, match="cannot share"):
        split(Secret(bytes(32)), 2, [0, 1, 2], entropy("s"))
