"""Why the secure sum refuses something: one name for each kind of refusal, for logs, records and tests."""

from fedsam_core.errors import SecureSumError


class MalformedMessage(SecureSumError):
    """Bytes that are not exactly one well-formed message of the kind that is due."""


class OtherAttempt(SecureSumError):
    """A message of another run, round, attempt, layout, configuration or model."""


class OtherModel(SecureSumError):
    """A global model that is not the one that the sites signed for."""


class UnknownSite(SecureSumError):
    """A site that the roster or the attempt does not list."""


class BadSignature(SecureSumError):
    """A message that the roster's key of its sender did not sign, or that came in another's name."""


class OutOfTurn(SecureSumError):
    """An answer that was given already, came late, or is not due yet."""


class TooFewSites(SecureSumError):
    """Fewer sites than protect one another."""


class ForgedKeys(SecureSumError):
    """A list of public keys that an honest aggregator would not send."""


class ForgedShares(SecureSumError):
    """Shares that are for another, cannot be decrypted, or do not fit what their owner committed to."""


class ForgedSurvivors(SecureSumError):
    """A survivor set that cannot be, or that the peers did not sign."""


class OpenedBefore(SecureSumError):
    """A sum that was opened before for other survivors: the difference of the two would be one site's."""


class AgainstPolicy(SecureSumError):
    """A run that asks for less protection than a site's own policy demands."""


class BareLane(SecureSumError):
    """A lane that fewer than `min_contributors` sites would be summed in: it would be laid bare."""


class UnfitValues(SecureSumError):
    """Values that the ring has no room for: NaN, beyond the clip, another size, an impossible sum."""
