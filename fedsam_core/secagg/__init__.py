"""The secure sum: an aggregator learns the sum of the sites' vectors and nothing else.

A round is driven so, with `AggregatorSession` on one side and a `SiteSession` at each site:

    advertise -> receive_advertise ... advertised -> share -> receive_share ... deliveries -> deliver, masked_input
    -> receive_masked ... survivors -> confirm -> receive_confirmation ... confirmations -> unmask
    -> receive_unmask ... total

`encode` and `decode_sum` turn named real values into such a vector and the sum of vectors back.
"""

from fedsam_core.secagg.aggregator import AggregatorSession
from fedsam_core.secagg.attempt import Attempt, default_threshold
from fedsam_core.secagg.keys import Identity, Roster, development_roster
from fedsam_core.secagg.layout import Lane, VectorLayout
from fedsam_core.secagg.plain import PlainAggregator, plain_input
from fedsam_core.secagg.quantize import Encoder, decode_sum, encode
from fedsam_core.secagg.site import SiteSession

__all__ = [
    "AggregatorSession",
    "Attempt",
    "Encoder",
    "Identity",
    "Lane",
    "PlainAggregator",
    "Roster",
    "SiteSession",
    "VectorLayout",
    "decode_sum",
    "default_threshold",
    "development_roster",
    "encode",
    "plain_input",
]
