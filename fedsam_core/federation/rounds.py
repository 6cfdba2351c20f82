"""The run of a federation, from the first handshake to the last global state.

Read `run_rounds` first. What a round gave is handed to a callback; files, MLflow and the terminal are the
business of whoever calls.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal

import numpy as np

from fedsam_core import __version__
from fedsam_core.errors import RoundError
from fedsam_core.federation.engine import Engine
from fedsam_core.federation.lanes import Precision, Task, Update, layout_of, read_update, sum_hash
from fedsam_core.federation.ledger import Ledger
from fedsam_core.federation.site import SiteSpec
from fedsam_core.federation.state import pack_state, state_hash
from fedsam_core.federation.summation import Contribution, Relay, Total, plain_sum, secure_sum
from fedsam_core.secagg.attempt import PROTOCOL, Attempt, default_threshold
from fedsam_core.secagg.keyfiles import read_roster
from fedsam_core.secagg.keys import Roster
from fedsam_core.secagg.record import Chain
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
        failed: why earlier attempts of the round's sum came to nothing.
        loss: mean training loss, weighted as the updates are.
        dice: by class, Dice on the training slices of all sites together.
        precision: what rounding and cutting did to the mean update.
        clips: of the next round, by tensor group.
        total: the opened sum.
        update_norm: Euclidean norm of the change of the global state.
        validation: of the global state after it, None in rounds without validation.
        bytes_up, bytes_down: serialized messages of all sites in this round.
        seconds: by stage, "train" and "validate".
    """

    round: int
    state_hash: str
    contributors: tuple[str, ...]
    lost: dict[str, str]
    failed: tuple[str, ...]
    loss: float
    dice: tuple[float, ...]
    precision: Precision
    clips: dict[str, float]
    total: Total
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
        spec: SiteSpec,
        manifest: ParameterManifest,
        classes: int,
        weights: str,
        about: Mapping[str, str] | None = None,
    ) -> None:
        """A run of the sites that `engine` reaches.

        Args:
            engine: carries the calls.
            spec: what a site of the run is told, any one of them.
            manifest: of the adapted model.
            classes: foreground classes.
            weights: the driver's own `weights_hash`, which every site's must equal.
            about: goes into the record.
        """
        self.engine = engine
        self.manifest = manifest
        self.classes = classes
        self.run = spec.run
        self.config_hash = spec.config_hash
        self.config = spec.federation
        roster = self.config.roster
        self._pinned = None if roster is None else read_roster(roster)
        self._settings_hash = spec.settings_hash(weights, self._pinned.hash if self._pinned else "")
        self.ledger = Ledger()
        self.sites: dict[str, dict[str, str]] = {}
        self._roster = Roster({})
        self._weights_hash = weights
        self._lost: list[str] = []
        self._attempts = 0
        self._about = dict(about or {})
        self.record = Chain()
        self.failed: list[str] = []  # attempts of the present sum that came to nothing
        self._clips: dict[str, float] | None = None  # of the next update, known after the first
        self._held: dict[str, str] = {}  # which global state each site holds, by hash: nothing is sent twice

    def open(self, state: State) -> None:
        """Opens every site for a run that starts from `state`, and settles whose keys count: those of the configured
        roster, which every site holds itself; else of a development roster that the driver collects and nobody vouches
        for.

        Raises:
            RoundError: a site cannot take part, was opened with another layout, or has another key than the roster's.
            SecureSumError: the roster's file cannot be used.
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
        for site, reply in replies.items():
            if self._pinned is not None and reply["roster_hash"] != self._pinned.hash:
                raise RoundError(
                    f"site {site} pins another roster than {self.config.roster}: compare them (`fedsam keys show`)"
                )
        self.sites = replies
        self.record.add(
            "run",
            protocol=PROTOCOL,
            version=__version__,
            run=self.run,
            config_hash=self.config_hash,
            layout_hash=self.manifest.layout_hash,
            weights_hash=self._weights_hash,
            settings_hash=self._settings_hash,
            roster_hash=self._pinned.hash if self._pinned else "",
            sites=list(self.engine.sites),
            classes=self.classes,
            about=self._about,
            secure_sum=self.config.secure_sum,
            federation=self.config.model_dump(mode="json", exclude={"roster", "key_dir"}),
        )
        lost = self._enroll()
        if lost and self._pinned is not None:
            raise RoundError("; ".join(f"site {site} refuses the roster: {why}" for site, why in sorted(lost.items())))
        self.record.add("state", round=0, state_hash=state_hash(self.manifest, state), sum=None)

    def total_slices(self) -> float:
        """Training slices of all sites together, from the first secure sum."""
        return float(self._sum(Task(purpose="weights"), 0, "weigh", None).lanes["slices"][0])

    def train(self, state: State, round_number: int, total_slices: float) -> tuple[State, Update, Total]:
        """One round of training: the weighted mean of the sites' updates added to the global state."""
        task = Task(purpose="update", total_slices=total_slices, clips=self._clips)
        total = self._sum(task, round_number, "fit", state)
        update = read_update(total.layout, total.lanes, total.contributors, self.manifest, self.config)
        new = apply_update(self.manifest, state, update)
        self._clips = update.clips
        self.record.add("state", round=round_number, state_hash=state_hash(self.manifest, new), sum=total.entry)
        return new, update, total

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

    def _enroll(self) -> dict[str, str]:
        """Tells every site all keys; why some do not take them. Those of a pinned roster sites only compare."""
        keys = {site: reply["identity"] for site, reply in self.sites.items()}
        if self._pinned is not None:
            for site, key in keys.items():
                if self._pinned.key(site).hex() != key:
                    raise RoundError(f"site {site} has another key than {self.config.roster} pins for it")
        self._roster = Roster({site: bytes.fromhex(key) for site, key in keys.items()})
        self.record.add("roster", keys=keys)
        _, lost = self.engine.call("enroll", {site: {"roster": keys} for site in keys}, self.config.deadline_s)
        return lost

    def _fits(self, reply: Mapping[str, str]) -> bool:
        return reply["layout_hash"] == self.manifest.layout_hash and reply["weights_hash"] == self._weights_hash

    def _sum(self, task: Task, round_number: int, contribute: str, state: State | None) -> Total:
        """Opens a sum. An attempt that fails is followed by another with fresh keys, as often as is configured."""
        self.failed = []
        while True:
            self._rejoin()
            try:
                return self._attempt(task, round_number, contribute, state)
            except RoundError as error:
                self.failed.append(str(error))
                if len(self.failed) >= self.config.attempts:
                    raise

    def _attempt(self, task: Task, round_number: int, contribute: str, state: State | None) -> Total:
        sites = self.engine.sites
        layout = layout_of(task, len(sites), self.manifest, self.classes, self.config)
        self._attempts += 1
        attempt = Attempt(
            run=self.run,
            round=round_number,
            attempt=self._attempts,
            layout_hash=sum_hash(self.manifest, layout, task),
            config_hash=self._settings_hash,
            model_hash=state_hash(self.manifest, state) if state is not None else "",
            sites=sites,
            threshold=default_threshold(len(sites)),
        )
        relay = Relay(self.engine, attempt, task, self.ledger, self.config.deadline_s)
        packed = None if state is None else pack_state(self.manifest, state)
        holders = frozenset(site for site, held in self._held.items() if held == attempt.model_hash)
        open_sum = plain_sum if self.config.secure_sum == "plain" else secure_sum
        try:
            total = open_sum(relay, self._roster, layout, Contribution(contribute, packed, holders), self.record)
        finally:
            self._lost = sorted(relay.lost)  # to be opened again before the next attempt
        if state is not None:
            self._held = dict.fromkeys(total.contributors, attempt.model_hash)
        return total


def apply_update(manifest: ParameterManifest, state: State, update: Update) -> State:
    """The global state after a round: the mean update added in float64, rounded to float32 once."""
    vector = manifest.flatten(state).astype(np.float64) + update.mean
    return manifest.unflatten(vector.astype(np.float32))


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
        new, update, total = federation.train(state, number, slices)
        failed = tuple(federation.failed)
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
            failed=failed,
            loss=update.loss,
            dice=update.dice,
            precision=update.precision,
            clips=update.clips,
            total=total,
            update_norm=float(np.linalg.norm(change.astype(np.float64))),
            validation=validation,
            bytes_up=ledger.total("up", number),
            bytes_down=ledger.total("down", number),
            seconds={"train": trained - started, "validate": monotonic() - trained},
        )
        on_round(report, state)
    return state
