"""What one secure sum is about: the context that every key, signature and message of it is bound to."""

from dataclasses import dataclass

from fedsam_core.errors import SecureSumError
from fedsam_core.hashing import stable_hash
from fedsam_core.secagg.refusals import TooFewSites, UnknownSite

PROTOCOL = "fedsam/secagg/v1"
SMALLEST_PRIVATE_SUM = 3
"""A sum over two sites shows each of them the other's value, and a sum over one is no sum."""


def default_threshold(sites: int) -> int:
    """floor(2n/3) + 1 of n sites: what Bonawitz et al. 2017 (eprint 2017/281, section 6) ask for against a malicious
    server with which up to a third of the sites collude."""
    return 2 * sites // 3 + 1


@dataclass(frozen=True)
class Attempt:
    """One try at one round. Another try of the same round is another attempt, with fresh keys and another digest.

    `layout_hash`, `config_hash` and `model_hash` are part of the digest: parties that were told different ones refuse
    each other's messages. Whoever answers compares them with what it computes itself. `sites` is sorted; a site's place
    in it is its index on the wire. `threshold` sites can recover the sum of the survivors, fewer can recover nothing.
    """

    run: str
    round: int
    attempt: int
    layout_hash: str
    config_hash: str
    model_hash: str
    sites: tuple[str, ...]
    threshold: int

    def __post_init__(self) -> None:
        if not self.sites or list(self.sites) != sorted(set(self.sites)) or "" in self.sites:
            raise SecureSumError(f"the sites of an attempt must be named, sorted and distinct, not {self.sites}")
        if len(self.sites) >= 1 << 16:
            raise SecureSumError(f"{len(self.sites)} sites are more than the messages can count (65,535)")
        if not 1 <= self.threshold <= len(self.sites):
            raise SecureSumError(
                f"threshold {self.threshold} does not fit {len(self.sites)} sites: take 1 to their number"
            )
        if self.round < 0 or self.attempt < 0:
            raise SecureSumError(f"round {self.round} and attempt {self.attempt} must not be negative")

    def digest(self) -> bytes:
        """32 bytes that depend on every field and on the protocol's version."""
        fields = {
            "protocol": PROTOCOL,
            "run": self.run,
            "round": self.round,
            "attempt": self.attempt,
            "layout": self.layout_hash,
            "config": self.config_hash,
            "model": self.model_hash,
            "sites": list(self.sites),
            "threshold": self.threshold,
        }
        return bytes.fromhex(stable_hash(fields))

    @property
    def minimum(self) -> int:
        """Fewest sites that a masked sum may be opened for."""
        return max(self.threshold, SMALLEST_PRIVATE_SUM)

    def index(self, site: str) -> int:
        """A site's number on the wire. Raises UnknownSite for a site that is not in the attempt."""
        if site not in self.sites:
            raise UnknownSite(f"site {site!r} is not in this attempt, which has {', '.join(self.sites)}")
        return self.sites.index(site)

    def names(self, indices: tuple[int, ...] | list[int] | set[int]) -> tuple[str, ...]:
        """The names of site indices, in order."""
        return tuple(self.sites[index] for index in sorted(indices))

    def require_private(self) -> None:
        """Raises SecureSumError where a masked sum would not protect its sites."""
        n = len(self.sites)
        if n < SMALLEST_PRIVATE_SUM:
            raise TooFewSites(
                f"a secure sum needs at least {SMALLEST_PRIVATE_SUM} sites, not {n} ({', '.join(self.sites)}), because "
                "a sum of two shows each site the other's update: add a site, or use the plain sum knowingly"
            )
        if 2 * self.threshold <= n:
            raise TooFewSites(
                f"threshold {self.threshold} of {n} sites lets two disjoint groups open different sums: "
                f"take at least {n // 2 + 1} (default {default_threshold(n)})"
            )
