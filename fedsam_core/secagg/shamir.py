"""Shamir's secret sharing of 32-byte secrets (Shamir 1979, "How to share a secret").

The field is that of the Mersenne prime 2^521 - 1, larger than any secret here. Python's integers are not constant-time:
the arithmetic on a site runs only on its own secrets, in its own process. Any `threshold` shares give the secret back,
fewer say nothing about it.
"""

from collections.abc import Sequence

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg.keys import KEY_BYTES, Entropy, Secret
from fedsam_core.secagg.refusals import ForgedShares

PRIME = (1 << 521) - 1
SHARE_BYTES = 66


def split(secret: Secret, threshold: int, points: Sequence[int], entropy: Entropy) -> dict[int, Secret]:
    """One share (66 bytes) for each of `points`, which are distinct and positive."""
    if not 1 <= threshold <= len(points) or len(set(points)) != len(points) or not all(0 < x < PRIME for x in points):
        raise SecureSumError(f"cannot share a secret among {len(points)} sites with threshold {threshold}")
    raw = secret.reveal()
    if len(raw) != KEY_BYTES:
        raise SecureSumError(f"a secret to share must be {KEY_BYTES} bytes, not {len(raw)}")
    # Highest coefficient first, the secret last, as Horner's rule takes them.
    coefficients = [_field_element(entropy) for _ in range(threshold - 1)] + [int.from_bytes(raw, "big")]
    shares: dict[int, Secret] = {}
    for x in points:
        y = 0
        for coefficient in coefficients:
            y = (y * x + coefficient) % PRIME
        shares[x] = Secret(y.to_bytes(SHARE_BYTES, "big"))
    return shares


def weights(points: Sequence[int]) -> list[int]:
    """Lagrange's coefficients at zero for distinct `points`; computed once for all secrets shared by the same sites."""
    if len(set(points)) != len(points) or not points:
        raise SecureSumError("shares must come from distinct sites")
    result = []
    for x in points:
        numerator = denominator = 1
        for other in points:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        result.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return result


def combine(shares: Sequence[bytes | bytearray], lagrange: Sequence[int]) -> Secret:
    """The secret from `threshold` shares and the `weights` of their points, in the same order.

    Raises ForgedShares for shares that cannot belong to a 32-byte secret. That does not catch every wrong
    share: the caller still has to hold the secret against what its owner committed to.
    """
    total = 0
    for weight, share in zip(lagrange, shares, strict=True):
        total += weight * int.from_bytes(share, "big")
    total %= PRIME
    if total >> (8 * KEY_BYTES):
        raise ForgedShares("shares do not fit together: at least one of them is wrong")
    return Secret(total.to_bytes(KEY_BYTES, "big"))


def _field_element(entropy: Entropy) -> int:
    """Uniform in [0, PRIME), by rejection."""
    while True:
        value = int.from_bytes(entropy(SHARE_BYTES), "big") & PRIME
        if value != PRIME:
            return value
