"""The run of a federation, from the first handshake to the last global state.

Read `run_rounds` first. What a round gave is handed to a callback; files, MLflow and the terminal are the
business of whoever calls.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal

import numpy as np

from fedsam_core.errors import RoundError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import Engine
from fedsam_core.federation.lanes import Task, layout_of, sum_hash
from fedsam_core.federation.ledger import Ledger
from fedsam_core.federation.state import pack_state, state_hash
from fedsam_core.federation.summation import Contribution, Relay, Total, plain_sum, secure_sum
from fedsam_core.secagg.attempt import Attempt, default_threshold
from fedsam_core.secagg.keys import Roster
from fedsam_core.selection import ParameterManifest

State = dict[str, np.ndarray[Any, Any]]

_REJOIN_SECONDS = 120.0  # what the others wait for a lost site to open again before a sum


@dataclass(frozen=True)
class Scores:
    """How the global state segments, summed over sites.

    Attributes:
        dice: mean Dice per class over all cases of all sites; nan where no case had one.
        by_site: a site's own means, as `summarize` groups them, from the sites that disclose them.
        pictures: PNG bytes by site, from the sites that disclose one.
    """

    dice: tuple[float, ...]
    by_site: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)

    @property
    def mean_dice(self) -> float:
        """Mean over the classes that have a score."""
        return float(np.nanmean(self.dice)) if not np.all(np.isnan(self.dice)) else float("nan")


@dataclass(frozen=True)
class RoundReport:
    """What a round gave.

    Attributes:
        round: 1 for the first.
        state_hash: of the global state after it.
        contributors: sites whose updates are in it.
        lost: why other sites are not.
        loss: mean training loss, weighted as the updates are.
        update_norm: Euclidean norm of the change of the global state.
        validation: of the global state after it, None in rounds without validation.
        bytes_up, bytes_down: serialized messages of all sites in this round.
        seconds: by stage, "train" and "validate".
    """

    round: int
    state_hash: str
    contributors: tuple[str, ...]
    lost: dict[str, str]
    loss: float
    update_norm: float
    validation: Scores | None
    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]


class Federation:
    """One run: an engine with open sites, a manifest, and the sums between them."""

    def __init__(
        self,
        engine: Engine,
        manifest: ParameterManifest,
        classes: int,
        run: str,
        config_hash: str,
        config: FederationConfig,
        weights: str,
    ) -> None:
        """`weights` is the driver's own `weights_hash`, which every site's must equal."""
        self.engine = engine
        self.manifest = manifest
        self.classes = classes
        self.run = run
        self.config_hash = config_hash
        self.config = config
        self.ledger = Ledger()
        self.sites: dict[str, dict[str, str]] = {}
        self._roster = Roster({})
        self._weights_hash = weights
        self._lost: list[str] = []
        self._attempts = 0
        self._held: dict[str, str] = {}  # which global state each site holds, by hash: nothing is sent twice

    def open(self) -> None:
        """Opens every site and pins their keys.

        The roster is a development roster: the driver collects the keys, nobody vouches for them.

        Raises:
            RoundError: a site cannot take part, or was opened with another layout.
        """
        replies = self._ask_all("open", {})
        for site, reply in replies.items():
            if not self._fits(reply):
                raise RoundError(
                    f"site {site} adapts another model than the driver (other layers or other frozen weights): start "
                    "all with the same configuration, code and checkpoint"
                )
        if len({reply["precision"] for reply in replies.values()}) > 1:
            mixed = ", ".join(f"{site}: {reply['precision']}" for site, reply in sorted(replies.items()))
            raise RoundError(f"sites would train in different precisions ({mixed}): set learning.precision=fp32")
        self.sites = replies
        self._enroll()

    def total_slices(self) -> float:
        """Training slices of all sites together, from the first secure sum."""
        return float(self._sum(Task(purpose="weights"), 0, "weigh", None).lanes["slices"][0])

    def train(self, state: State, round_number: int, total_slices: float) -> tuple[State, Total]:
        """One round of training: the weighted mean of the sites' updates added to the global state."""
        total = self._sum(Task(purpose="update", total_slices=total_slices), round_number, "fit", state)
        mean = total.lanes["update"] / total.lanes["weight"][0]
        vector = self.manifest.flatten(state).astype(np.float64) + mean
        return self.manifest.unflatten(vector.astype(np.float32)), total

    def score(self, state: State, split: Literal["val", "test"], round_number: int, pictures: bool = False) -> Scores:
        """Dice of a global state over the sites' cases of a split, and what the sites disclose beside it."""
        total = self._sum(Task(purpose="scores", split=split), round_number, "score", state)
        lanes = total.lanes
        with np.errstate(invalid="ignore"):
            dice = np.where(lanes["cases"] > 0.5, lanes["dice"] / lanes["cases"], np.nan)
        asked = {site: {"picture": pictures} for site in total.contributors}
        told, _ = self.engine.call("disclose", asked, self.config.deadline_s)
        return Scores(
            dice=tuple(dice.tolist()),
            by_site={site: told[site]["summary"] for site in sorted(told) if told[site]["summary"]},
            pictures={site: told[site]["picture"] for site in sorted(told) if told[site]["picture"]},
        )

    def _ask_all(self, method: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
        replies, lost = self.engine.call(method, dict.fromkeys(self.engine.sites, keywords), self.config.deadline_s)
        if lost:
            raise RoundError("; ".join(f"site {site} cannot take part: {why}" for site, why in sorted(lost.items())))
        return replies

    def _rejoin(self) -> None:
        """Opens sites anew that the last sum lost: one that was restarted has neither scans, model nor known key."""
        if not self._lost:
            return
        patience = min(_REJOIN_SECONDS, self.config.deadline_s)
        replies, _ = self.engine.call("open", {site: {} for site in self._lost}, patience)
        back = {site: reply for site, reply in replies.items() if self._fits(reply)}
        self.sites |= back
        self._held = {site: held for site, held in self._held.items() if site not in back}
        self._lost = [site for site in self._lost if site not in back]
        if back:
            self._enroll()

    def _enroll(self) -> None:
        keys = {site: reply["identity"] for site, reply in self.sites.items()}
        self._roster = Roster({site: bytes.fromhex(key) for site, key in keys.items()})
        self.engine.call("enroll", {site: {"roster": keys} for site in self.sites}, self.config.deadline_s)

    def _fits(self, reply: Mapping[str, str]) -> bool:
        return reply["layout_hash"] == self.manifest.layout_hash and reply["weights_hash"] == self._weights_hash

    def _sum(self, task: Task, round_number: int, contribute: str, state: State | None) -> Total:
        self._rejoin()
        sites = self.engine.sites
        layout = layout_of(task.purpose, len(sites), self.manifest.shared_size, self.classes, self.config.update_clip)
        self._attempts += 1
        attempt = Attempt(
            run=self.run,
            round=round_number,
            attempt=self._attempts,
            layout_hash=sum_hash(self.manifest, layout, task),
            config_hash=self.config_hash,
            model_hash=state_hash(self.manifest, state) if state is not None else "",
            sites=sites,
            threshold=default_threshold(len(sites)),
        )
        relay = Relay(self.engine, attempt, task, self.ledger, self.config.deadline_s)
        packed = None if state is None else pack_state(self.manifest, state)
        holders = frozenset(site for site, held in self._held.items() if held == attempt.model_hash)
        open_sum = plain_sum if self.config.secure_sum == "plain" else secure_sum
        how = Contribution(contribute, packed, holders)
        total = open_sum(relay, attempt, self._roster, layout, how)
        if state is not None:
            self._held = dict.fromkeys(total.contributors, attempt.model_hash)
        self._lost = sorted(total.lost)
        return total


def run_rounds(federation: Federation, state: State, on_round: Callable[[RoundReport, State], None]) -> State:
    """Trains for the configured number of rounds.

    Args:
        federation: with open sites.
        state: float32 arrays by entry name, the global state to start from.
        on_round: called after each round with its report and the new global state.

    Returns:
        The last global state.

    Raises:
        RoundError: a round could not be completed with enough sites.
    """
    config, ledger = federation.config, federation.ledger
    slices = federation.total_slices()
    for number in range(1, config.rounds + 1):
        started = monotonic()
        new, total = federation.train(state, number, slices)
        trained = monotonic()
        due = config.validate_every and (number % config.validate_every == 0 or number == config.rounds)
        validation = federation.score(new, "val", number) if due else None
        change = federation.manifest.flatten(new) - federation.manifest.flatten(state)
        state = new
        report = RoundReport(
            round=number,
            state_hash=state_hash(federation.manifest, state),
            contributors=total.contributors,
            lost=total.lost,
            loss=float(total.lanes["loss"][0] / total.lanes["weight"][0]),
            update_norm=float(np.linalg.norm(change.astype(np.float64))),
            validation=validation,
            bytes_up=ledger.total("up", number),
            bytes_down=ledger.total("down", number),
            seconds={"train": trained - started, "validate": monotonic() - trained},
        )
        on_round(report, state)
    return state
