"""The run of a federation, from the first handshake to the last global state.

Read `run_rounds` first. What a round gave is handed to a callback; files, MLflow and the terminal are the
business of whoever calls.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Literal

import numpy as np

from fedsam_core import __version__
from fedsam_core.errors import CheckpointError, RoundError
from fedsam_core.federation.answered import topic
from fedsam_core.federation.attendance import Attendance, Kind, Patience
from fedsam_core.federation.checkpoint import Checkpoint
from fedsam_core.federation.engine import Engine
from fedsam_core.federation.lanes import Precision, Round, layout_of
from fedsam_core.federation.ledger import Ledger
from fedsam_core.federation.memory import KEPT
from fedsam_core.federation.rejoining import Enough, Rejoining
from fedsam_core.federation.server import Course, LoraReport, Server, Step
from fedsam_core.federation.site import SiteSpec
from fedsam_core.federation.state import GlobalState, pack_global
from fedsam_core.federation.summation import Contribution, HalfOpened, Relay, Total, plain_sum, secure_sum
from fedsam_core.federation.tasks import Task, sum_hash
from fedsam_core.secagg.attempt import PROTOCOL, Attempt, default_threshold
from fedsam_core.secagg.keyfiles import read_roster
from fedsam_core.secagg.keys import Roster
from fedsam_core.secagg.record import Chain
from fedsam_core.selection import ParameterManifest

State = dict[str, np.ndarray[Any, Any]]


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
        contributors: sites whose updates are in it; none where the round was given up.
        lost: why other sites are not.
        disturbed: why sites were lost that are: after they had sent their vectors, or in another sum of the round.
        failed: why earlier attempts of the round's sum came to nothing.
        loss: mean training loss, weighted as the updates are.
        dice: by class, Dice on the training slices of all sites together.
        precision: what rounding and cutting did to the mean update.
        clips: of the round's parts in their next sum.
        lora: how the LoRA rule did.
        epsilon: privacy spent up to here; None without differential privacy.
        totals: the opened sums that the state follows from.
        update_norm: Euclidean norm of the change of the global state.
        validation: of the global state after it, None in rounds without validation.
        bytes_up, bytes_down: serialized messages of all sites in this round.
        seconds: by stage, "train" and "validate".
    """

    round: int
    state_hash: str
    contributors: tuple[str, ...]
    lost: dict[str, str]
    disturbed: dict[str, str]
    failed: tuple[str, ...]
    loss: float
    dice: tuple[float, ...]
    precision: Precision
    clips: dict[str, float]
    lora: LoraReport
    epsilon: float | None
    totals: tuple[Total, ...]
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
        self.attendance = Attendance(engine.sites, self.config.park_after)
        self.patience = Patience(
            self.config.deadline_s,
            self.config.deadline_factor,
            min(self.config.deadline_floor_s, self.config.deadline_s),
            self.config.max_wait_after_min,
        )
        self.disturbed: dict[str, str] = {}  # why sites were lost in sums of the present round, whatever became of it
        self._rejoining = Rejoining(engine, self.attendance, self.patience, self._take_back)
        self._told: dict[str, str] = {}  # hash of the roster that each site knows
        self._attempts = 0
        self._about = dict(about or {})
        self.record = Chain()
        self.failed: list[str] = []  # attempts of the present sum that came to nothing
        self._seed = spec.seed
        self._sites_of_run = spec.sites
        self._server: Server | None = None
        self._present: Round | None = None
        self._held: dict[str, str] = {}  # which global state each site holds, by hash: nothing is sent twice
        self._before = ""  # hash of the global state before the present one
        self._step = b""  # what leads from it to the present one
        self._total: float | None = None  # weight of all sites, once it is known
        self.done = 0  # rounds that are finished
        self.forgetful: tuple[str, ...] = ()  # sites that have lost what they kept of a run that goes on
        self._bound: dict[str, list[str]] = {}  # sums that a lost driver had opened: of these sites only, by topic

    def open(self, state: State, saved: Checkpoint | None = None, record: Sequence[bytes] = ()) -> None:
        """Opens every site for a run that starts from `state`, and settles whose keys count: those of the configured
        roster, which every site holds itself; else of a development roster that the driver collects and nobody vouches
        for.

        With `saved`, which `save` gave, and the record up to then, the run goes on from there.

        Raises:
            RoundError: a site cannot take part, was opened with another layout, or has another key than the roster's.
            CheckpointError: `saved` is of another run, or does not belong to the record.
            SecureSumError: the roster's file cannot be used, or the record is none.
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
        self._server = Server(self._round(1), state)
        self._held = {site: reply["state_hash"] for site, reply in replies.items()}
        for site, reply in replies.items():
            if self._pinned is not None and self._pinned.key(site).hex() != reply["identity"]:
                raise RoundError(f"site {site} has another key than {self.config.roster} pins for it")
        if saved is None:
            self.record.add("run", **self._beginning())
        else:
            self._restore(saved, record)
        if saved is not None or self._pinned is not None:
            self._go_on(saved)
        lost = self._enroll(self.engine.sites)
        if lost and self._pinned is not None:
            raise RoundError("; ".join(f"site {site} refuses the roster: {why}" for site, why in sorted(lost.items())))
        for site, why in lost.items():
            self.attendance.lose(site, why, failed=None)
        if saved is None:
            self.record.add("state", round=0, state_hash=self.server.state.hash, sums=[])

    def save(self) -> Checkpoint:
        """The run after the last finished round, for `open` to go on from."""
        facts = {
            "run": self.run,
            "round": self.done,
            "state_hash": self.server.state.hash,
            "attempts": self._attempts,
            "total": self._total,
            "sites": self.sites,
            "attendance": self.attendance.to_dict(),
            "patience": self.patience.to_dict(),
            "ledger": self.ledger.rows(),
            "record": {"lines": len(self.record.lines), "head": self.record.head},
            **self.server.facts(),
        }
        return Checkpoint(self.manifest.layout_hash, self.server.arrays(), facts)

    @property
    def server(self) -> Server:
        """The global state, and the arithmetic that makes the next."""
        if self._server is None:
            raise RoundError("the federation is not open: call open(state) first")
        return self._server

    def total_weight(self) -> float:
        """What all sites' updates weigh together: from the first secure sum, unless all weigh alike."""
        if self.config.weights == "equal":
            return float(len(self.engine.sites))
        if self._total is None:
            self._total = self._weigh()
        return self._total

    def _weigh(self) -> float:
        # Of all sites, with SCAFFOLD: the common variate is a sum of shares of the whole. It cannot be weighed again
        # later, as the same question is not answered for other survivors.
        needed = len(self.engine.sites) if self.config.scaffold else 0
        try:
            return float(self._sum(Task(purpose="weights"), 0, Contribution("weigh"), needed).lanes["amount"][0])
        except RoundError as error:
            if not needed:
                raise
            raise RoundError(
                f"{error}. SCAFFOLD has to weigh every site once, at the start: mend the site, leave it out, or set "
                "federation.weights=equal"
            ) from error

    def train(self, round_number: int, total_weight: float) -> tuple[Step, tuple[Total, ...]]:
        """One round of training: its sums, and the global state that follows.

        Raises:
            RoundError: too few sites are left.
        """
        server = self.server
        course, before = server.begin(round_number, total_weight), server.state.hash
        totals: list[Total] = []
        failed: list[str] = []
        self.disturbed = {}
        if round_number == 1:
            self.attendance.begin()
        self._rejoin(round_number, self.config.rejoin_wait_s)
        while (task := course.task()) is not None:
            how = self._fitting("fit") if course.basis_message is None else self._projecting(course, totals[-1])
            try:
                total = self._sum(task, round_number, how)
            except RoundError as error:
                if course.give_up():
                    failed += [*self.failed[:-1], f"the round's LoRA step was given up: {error}"]
                    continue
                if not isinstance(error, HalfOpened) or not self._can_go_on(round_number):
                    raise
                self.failed = [*failed, *self.failed[:-1], f"the round was given up: {error}"]
                self._close(round_number, totals)
                return course.forgo(error.survivors), tuple(totals)
            failed += self.failed
            course.take(task, total.layout, total.lanes, total.contributors)
            totals.append(total)
        step = course.finish()
        self.failed = failed
        self._before, self._step = before, step.message
        self._close(round_number, totals)
        return step, tuple(totals)

    def _close(self, round_number: int, totals: Sequence[Total]) -> None:
        """A round is over; the server's state is the one after it."""
        contributors = next((total.contributors for total in totals if total.about == "update"), ())
        self.attendance.close(round_number, contributors)
        self.done = round_number
        sums = [total.entry for total in totals]
        self.record.add("state", round=round_number, state_hash=self.server.state.hash, sums=sums)

    def _can_go_on(self, round_number: int) -> bool:
        """Whether enough sites are left, or come back, for the next round."""
        needed = max(self._round(round_number).minimum, self.config.min_sites or 0)

        def enough(present: Collection[str]) -> bool:
            return len(present) >= needed

        self._rejoin(round_number, 0.0, enough)
        return enough(self.attendance.present(round_number))

    def score(
        self, split: Literal["val", "test"], round_number: int, pictures: bool = False, personal: bool = False
    ) -> Scores:
        """Dice of the present global state over the sites' cases of a split, and what the sites disclose beside it.

        With `personal` each site first fine-tunes its own model from it, and scores that.
        """
        task = Task(purpose="scores", split=split, personal=personal)
        how = self._fitting("score")
        validation = math.ceil(round_number / (self.config.validate_every or 1))
        if split == "val":
            how = replace(how, left_out=self._unfit_to_validate(validation, round_number))
        total = self._sum(task, round_number, how)
        if split == "val":
            self.attendance.close_validation(validation, total.contributors)
        lanes = total.lanes
        with np.errstate(invalid="ignore"):
            dice = np.where(lanes["cases"] > 0.5, lanes["dice"] / lanes["cases"], np.nan)
        asked = {site: {"picture": pictures} for site in total.contributors}
        told, lost = self._ask("disclose", asked)
        for site, why in lost.items():
            self.attendance.lose(site, why, failed=None)
        for site, reply in told.items():
            self.ledger.add(site, "up", round_number, "scores/disclose", len(json.dumps(reply["summary"]).encode()))
            if reply["picture"]:
                self.ledger.add(site, "up", round_number, "picture", len(reply["picture"]))
        return Scores(
            dice=tuple(dice.tolist()),
            by_site={site: told[site]["summary"] for site in sorted(told) if told[site]["summary"]},
            pictures={site: told[site]["picture"] for site in sorted(told) if told[site]["picture"]},
        )

    def _unfit_to_validate(self, validation: int, round_number: int) -> dict[str, str]:
        """Sites that are not asked, and why; none where the others that are there are too few."""
        parked = self.attendance.unfit_to_validate(validation)
        others = set(self.attendance.present(round_number)) - parked.keys()
        return parked if len(others) >= self._round(round_number).minimum else {}

    def _beginning(self) -> dict[str, Any]:
        """What the record begins with: all that the sites sign for, and what it was made from."""
        return {
            "protocol": PROTOCOL,
            "version": __version__,
            "run": self.run,
            "config_hash": self.config_hash,
            "layout_hash": self.manifest.layout_hash,
            "weights_hash": self._weights_hash,
            "settings_hash": self._settings_hash,
            "roster_hash": self._pinned.hash if self._pinned else "",
            "sites": list(self.engine.sites),
            "classes": self.classes,
            "about": self._about,
            "secure_sum": self.config.secure_sum,
            "seed": self._seed,
            "federation": self.config.model_dump(mode="json", exclude={"roster", "key_dir", "site_dir"}),
        }

    def _restore(self, saved: Checkpoint, record: Sequence[bytes]) -> None:
        """Takes the record and the server's state of a run that was left off.

        Raises:
            CheckpointError: they do not belong together, or this run is set up otherwise.
            SecureSumError: the record is none.
        """
        facts = saved.facts
        self.record.restore(record)
        if (len(record), self.record.head) != (facts["record"]["lines"], facts["record"]["head"]):
            raise CheckpointError(f"the checkpoint of round {saved.round} does not belong to the record of the run")
        begun, now = json.loads(record[0]), self._beginning()
        for key in sorted(now.keys() - {"about", "version", "federation"}):
            if begun.get(key) != now[key]:
                raise CheckpointError(
                    f"run {self.run} was begun with another {key} ({begun.get(key)}, now {now[key]}): go on with the "
                    "configuration, code, backbone and sites that it was begun with"
                )
        if saved.layout_hash != self.manifest.layout_hash:
            raise CheckpointError(f"the checkpoint of round {saved.round} is of another selection or model")
        self.server.load(saved.arrays, facts)
        if self.server.state.hash != facts["state_hash"]:
            raise CheckpointError(f"the checkpoint of round {saved.round} does not hold the state that it names")
        self.ledger.restore(facts["ledger"])
        self.attendance.restore(facts["attendance"])
        for site in self.attendance.away:
            self.attendance.take_back(site)  # it has just opened
        self.patience.restore(facts["patience"])
        self._attempts, self._total, self.done = int(facts["attempts"]), facts["total"], saved.round

    def _go_on(self, saved: Checkpoint | None) -> None:
        """Asks the sites what a driver that was lost had begun with them, and goes on behind it.

        Raises:
            RoundError: a site no longer has what it kept after the round that the run goes on from.
        """
        known = self._ask_all("answered", {"state_hash": self.server.state.hash})
        for site, told in sorted(known.items()):
            self._bound |= told["opened"]
            if self.done and len(told["kept"] or ()) >= KEPT and min(told["kept"]) > self.done:
                raise RoundError(
                    f"site {site} keeps what it had after rounds {', '.join(map(str, told['kept']))}, the run would go "
                    f"on from round {self.done}: resume it where the later rounds are, or begin a new run"
                )
        self.forgetful = tuple(site for site in sorted(known) if self.done and known[site]["kept"] == [])
        last = max([self._attempts, *(told["attempt"] for told in known.values())])
        if saved is not None or last > self._attempts:
            # Numbers of attempts are used once: what a lost driver did with those in between is in no record.
            self.record.add("resumed", round=self.done, attempts=last, version=__version__, about=self._about)
        self._attempts = last

    def _round(self, number: int) -> Round:
        if self._present is None or self._present.number != number:  # kept, as it finds out places of many values
            self._present = Round(number, self._seed, self._sites_of_run, self.manifest, self.classes, self.config)
        return self._present

    def _fitting(self, method: str) -> Contribution:
        """A contribution that is made from the present global state: it is sent as far as a site lacks it."""
        state = self.server.state
        holders = frozenset(site for site, held in self._held.items() if held == state.hash)
        followers = (
            frozenset(site for site, held in self._held.items() if self._step and held == self._before) - holders
        )
        everyone = holders | followers >= set(self.engine.sites)
        common = b"" if everyone else pack_global(state)
        own = {site: {"counted": number} for site, number in self.attendance.counted.items()}
        return Contribution(method, "state", common, self._step, holders, followers, own=own)

    def _projecting(self, course: Course, last: Total) -> Contribution:
        """A contribution to a later sum of a round: of just those who are in its first, else sites refuse it."""
        absent = [site for site in self.engine.sites if site not in last.contributors]
        left_out = dict.fromkeys(absent, "is not in the sum of the updates that this one goes on from")
        return Contribution("project", "basis", course.basis_message or b"", left_out=left_out)

    def _ask(self, method: str, args: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
        """A call outside of sums, with a deadline that is learnt as theirs are."""
        took: list[float] = []

        def on_answer(_: str, seconds: float) -> float:
            took.append(seconds)
            return math.inf

        replies, lost = self.engine.call(method, args, self.patience.deadline(method), on_answer)
        if took:
            self.patience.took(method, max(took))
        return replies, lost

    def _ask_all(self, method: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """What every site answers. Raises RoundError where one does not."""
        replies, lost = self._ask(method, dict.fromkeys(self.engine.sites, keywords))
        if lost:
            raise RoundError("; ".join(f"site {site} cannot take part: {why}" for site, why in sorted(lost.items())))
        return replies

    def _rejoin(self, round_number: int, seconds: float, enough: Enough = lambda present: True) -> None:
        """Takes back sites that were lost (see `Rejoining`), and tells keys to whoever does not know them yet."""
        self._rejoining.rejoin(round_number, seconds, enough)
        for site, why in self._enroll(self.attendance.present(round_number)).items():
            self.attendance.lose(site, why)

    def _take_back(self, site: str, reply: Any) -> str:
        """A site has opened again: it may have been restarted, and hold another state and another key."""
        if not self._fits(reply):
            return "it opened with another model than the driver's"
        if self._pinned is not None and self._pinned.key(site).hex() != reply["identity"]:
            return f"it has another key than {self.config.roster} pins for it"
        self.sites[site] = reply
        self._held[site] = reply["state_hash"]
        self._told.pop(site, None)
        return ""

    def _enroll(self, sites: Collection[str]) -> dict[str, str]:
        """Tells sites all keys, if they do not know them; why some do not take them. Those of a pinned roster sites
        only compare."""
        keys = {site: reply["identity"] for site, reply in self.sites.items()}
        roster = Roster({site: bytes.fromhex(key) for site, key in keys.items()})
        if roster.hash != self._roster.hash:
            self._roster = roster
            self.record.add("roster", keys=keys)
        asked = [site for site in sites if self._told.get(site) != roster.hash]
        if not asked:
            return {}
        args = {site: {"roster": keys} for site in asked}
        _, lost = self._ask("enroll", args)
        for site in asked:
            self.ledger.add(site, "down", 0, "enroll", len(json.dumps(keys).encode()))
            if site not in lost:
                self._told[site] = roster.hash
        return lost

    def _fits(self, reply: Any) -> bool:
        own = {"layout_hash": self.manifest.layout_hash, "weights_hash": self._weights_hash}
        return isinstance(reply, dict) and all(reply.get(key) == value for key, value in own.items())

    def _sum(self, task: Task, round_number: int, how: Contribution, needed: int = 0) -> Total:
        """Opens a sum. An attempt that fails is followed by another with fresh keys, as often as is configured.

        Raises:
            HalfOpened: sites had begun to open it, and not all whose values were in it have come back: it can be
                opened no more, without them or with others.
            RoundError: too few sites are left.
        """
        self.failed = []
        half_opened: HalfOpened | None = None
        wanted = self.config.min_sites if task.purpose in ("update", "magnitudes") else None
        needed = max(needed, self._round(round_number).minimum, wanted or 0)
        left_out = dict(how.left_out)

        def enough(present: Collection[str]) -> bool:
            return len(set(present) - left_out.keys()) >= needed

        while True:
            self._rejoin(round_number, 0.0, enough)
            if how.keyword == "state":
                how = self._fitting(how.method)  # whoever rejoined holds another state
            try:
                return self._attempt(task, round_number, replace(how, left_out=left_out), needed)
            except RoundError as error:
                self.failed.append(str(error))
                if isinstance(error, HalfOpened):
                    half_opened = error
                    others = [site for site in self.engine.sites if site not in error.survivors]
                    left_out |= dict.fromkeys(others, "was not in the attempt that sites have begun to open")
                    needed = len(error.survivors)
                if len(self.failed) >= self.config.attempts:
                    if half_opened is None:
                        raise
                    raise HalfOpened(str(error), half_opened.survivors) from error

    def _attempt(self, task: Task, round_number: int, how: Contribution, needed: int) -> Total:
        sites = self.engine.sites
        layout = layout_of(task, self._round(round_number))
        self._attempts += 1
        attempt = Attempt(
            run=self.run,
            round=round_number,
            attempt=self._attempts,
            layout_hash=sum_hash(self.manifest, layout, task),
            config_hash=self._settings_hash,
            model_hash=self.server.state.hash if how.keyword else "",
            sites=sites,
            threshold=default_threshold(len(sites)),
        )
        how = self._as_opened(how, topic(attempt, task.about))
        left_out = {**how.left_out, **self.attendance.left_out(round_number)}
        relay = Relay(self.engine, attempt, task, self.ledger, self.patience, left_out, needed)
        open_sum = plain_sum if self.config.secure_sum == "plain" else secure_sum
        kind: Kind | None = "validation" if task.split == "val" else None
        if task.purpose in ("update", "magnitudes"):
            kind = "training"
        contributors: tuple[str, ...] = ()
        try:
            total = open_sum(relay, self._roster, layout, how, self.record)
            contributors = total.contributors
        finally:
            for site in sorted(relay.lost.keys() - left_out.keys()):
                why = relay.lost[site]
                self.disturbed.setdefault(site, why)
                # Slower than the others in opening a sum that it is in: no reason to leave it out of the next rounds.
                slower = site in relay.cut and site in contributors
                self.attendance.lose(site, why, None if slower else kind)
        if how.keyword == "state":
            self._held |= dict.fromkeys(total.contributors, attempt.model_hash)
        return total

    def _as_opened(self, how: Contribution, name: str) -> Contribution:
        """Without the sites that were not in the same sum when a lost driver had it opened: the others refuse them."""
        absent = set(self.engine.sites) - set(self._bound.get(name, self.engine.sites))
        why = dict.fromkeys(absent, "was not in this sum when it was opened, before the driver was lost")
        return replace(how, left_out={**how.left_out, **why})


def run_rounds(federation: Federation, on_round: Callable[[RoundReport, GlobalState], None]) -> GlobalState:
    """Trains until the configured number of rounds is done.

    Args:
        federation: with open sites.
        on_round: called after each round with its report and the new global state.

    Returns:
        The last global state.

    Raises:
        RoundError: a round could not be completed with enough sites.
    """
    config, ledger = federation.config, federation.ledger
    weight = federation.total_weight()
    for number in range(federation.done + 1, config.rounds + 1):
        started = monotonic()
        before = federation.server.state
        step, totals = federation.train(number, weight)
        failed = tuple(federation.failed)
        trained = monotonic()
        due = config.validate_every and (number % config.validate_every == 0 or number == config.rounds)
        validation = None
        if due and step.state.hash != before.hash:  # the same state is not scored again: not by others, anyway
            try:
                validation = federation.score("val", number)
            except HalfOpened as error:
                failed += (f"the validation was given up: {error}",)
        change = step.state.vector.astype(np.float64) - before.vector
        lost = {site: why for total in reversed(totals) for site, why in total.lost.items()}
        report = RoundReport(
            round=number,
            state_hash=step.state.hash,
            contributors=() if step.given_up else totals[-1].contributors,
            lost=lost,
            disturbed={site: why for site, why in federation.disturbed.items() if site not in lost},
            failed=failed,
            loss=step.update.loss,
            dice=step.update.dice,
            precision=step.precision,
            clips=step.update.clips,
            lora=step.lora,
            epsilon=step.epsilon,
            totals=totals,
            update_norm=float(np.linalg.norm(change)),
            validation=validation,
            bytes_up=ledger.total("up", number),
            bytes_down=ledger.total("down", number),
            seconds={"train": trained - started, "validate": monotonic() - trained},
        )
        on_round(report, step.state)
    return federation.server.state
