"""Preparation where the scans are: each site reads, checks and prepares its own share, and the driver learns counts.

What a cohort settles as a whole (`fedsam_core.data.survey`) comes from one secure sum over the sites, so no site's
histogram is seen in the open. Read `prepare_shares` first; an engine carries its calls as it does those of a run.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import numpy as np

from fedsam_core.data.cohort import Cohort, CohortConfig, Each, Progress, cohort_hash, list_cohort, read_cohort, without
from fedsam_core.data.findings import Compared, find_duplicates
from fedsam_core.data.preprocess import FORMAT, MANIFEST, PreparedCohort, PreprocessConfig, prepare
from fedsam_core.data.sources import Listing, Modality, Problem
from fedsam_core.data.survey import BINS, PLANES, Survey, take_survey
from fedsam_core.errors import ConfigError, DataError, FedsamError, RoundError
from fedsam_core.federation.attendance import Patience
from fedsam_core.federation.engine import Engine
from fedsam_core.federation.ledger import Ledger
from fedsam_core.federation.summation import Contribution, Relay, secure_sum
from fedsam_core.federation.summing import SummingSite, SumSpec
from fedsam_core.federation.tasks import Task
from fedsam_core.hashing import stable_hash
from fedsam_core.secagg.attempt import SMALLEST_PRIVATE_SUM, Attempt, default_threshold
from fedsam_core.secagg.keys import Roster
from fedsam_core.secagg.layout import Lane, VectorLayout
from fedsam_core.secagg.record import Chain
from fedsam_core.secagg.refusals import OtherAttempt
from fedsam_core.store import OpenStore, folder_store

STEP_SECONDS = 1.0  # how long a site works before it says how far it is
TASK = Task(purpose="survey")
_DIGIT = 1 << 16  # counts are summed as two digits, each exact in the ring


class CohortSpec(SumSpec):
    """What a site is told of the cohort that it is to prepare its share of."""

    cohort: CohortConfig
    preprocess: PreprocessConfig
    work_dir: Path
    """Where this site's node may write scans that are made up (the phantom)."""
    prepared: str
    """Where the shares go, each under its site's name: a folder, or a url that the site's `open_store` knows."""

    @property
    def store(self) -> str:
        """Where this site's share goes."""
        return share_at(self.prepared, self.site)

    def settings_hash(self, roster: str) -> str:
        """SHA-256 (hex) of what all sites must agree on, which each of them signs; folders are a site's own."""
        places: Any = {"site": True, "work_dir": True, "prepared": True, "cohort": {"path", "sites", "sites_csv"}}
        places["federation"] = {"roster", "key_dir", "share_site_scores", "share_pictures"}
        return stable_hash([self.model_dump(mode="json", exclude=places), roster])


def share_at(prepared: str, site: str) -> str:
    """Where a site's share lies below the place of all."""
    return f"{prepared.rstrip('/')}/{site}"


@dataclass(frozen=True)
class PreparedSites:
    """What is known of a cohort that its sites have prepared.

    Attributes:
        described: name, classes, modality, problems; its list of cases is empty.
        config: how it was prepared, nothing left open.
        shares: by site "hash", "cases" (by split), "spacing" (median, mm), "url".
    """

    described: Cohort
    config: PreprocessConfig
    shares: dict[str, dict[str, Any]] = dataclass_field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return tuple(sorted(self.shares))

    def without_problems(self) -> "PreparedSites":
        """What a driver is told: names and hashes. Which cases were left out, and why, stays with who prepared them."""
        return replace(self, described=self.described.model_copy(update={"problems": ()}))

    @property
    def hash(self) -> str:
        """`Cohort.hash` of all cases together."""
        return cohort_hash({site: share["hash"] for site, share in self.shares.items()})


class CohortSite(SummingSite):
    """A site's share of a cohort.

    First `read`; where the cohort has something to settle `count` and a sum of `survey`; then `prepare`; `describe`.
    `read`, `count` and `prepare` only begin their work, which goes on while `advance` waits for it.
    """

    spec: CohortSpec

    def __init__(self, spec: CohortSpec, open_store: OpenStore = folder_store, each: Each = map) -> None:
        super().__init__(spec)
        self._open_store = open_store
        self._each = each
        self._roster_hash: str | None = None  # known once this node's policy was read, before anything is told
        self._work: Future[None] | None = None
        self._stage = ("", 0, 0)
        self._stop = threading.Event()
        self._made_from = ""
        self._cohort: Cohort | None = None
        self._counts: Survey | None = None
        self._prepared: PreparedCohort | None = None

    def look(self) -> bool:
        """Whether this site's share is there and nothing has changed since: file names, sizes and times, no scan.

        Raises:
            DataError: the layout makes no sense as a whole.
        """
        spec = self.spec
        listing = list_cohort(spec.cohort, spec.work_dir, self._note, spec.site)
        how = [FORMAT, spec.cohort.model_dump(mode="json"), spec.preprocess.model_dump(mode="json"), spec.sites]
        self._made_from = stable_hash([_fingerprint(listing), how])
        store = self._open_store(spec.store)
        if not store.exists(MANIFEST):
            return False
        try:
            there = PreparedCohort.open(store)
        except DataError:
            return False  # of an older version, or damaged: made anew
        if there.made_from != self._made_from or not there.is_complete():
            return False
        self._prepared, self._cohort = there, there.cohort
        return True

    def read(self) -> None:
        """Begins to open this site's scans, unless its share is there already and nothing has changed since."""
        self._begin(self._read)

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Begins to prepare the scans that were read, by a configuration that leaves nothing open."""
        settled = PreprocessConfig.model_validate(config)

        def work() -> None:
            cohort = self._known
            store = self._open_store(self.spec.store)
            self._prepared = prepare(cohort, settled, store, self._note, self._each, self._made_from)

        self._begin(work)

    def contents(self) -> list[dict[str, Any]]:
        """What tells this site's scans from those of others: `Compared` of each, where all lie in one folder anyway.

        Raises:
            ConfigError: sites have folders of their own; then nobody is told what is in them.
        """
        if self.spec.cohort.sites is not None:
            raise ConfigError("sites with folders of their own do not compare their scans")
        return [asdict(Compared(c.id, c.site, c.split, c.content, c.label_content)) for c in self._known.cases]

    def leave_out(self, problems: Sequence[Mapping[str, Any]]) -> None:
        """Takes note of what comparing the sites' scans has shown.

        Raises:
            DataError: no training case is left, or the cohort is strict.
        """
        found = [Problem.model_validate(problem) for problem in problems]
        self._cohort = without(self._known, found, self.spec.cohort.strict)
        self._prepared = None

    def count(self) -> None:
        """Begins to count what the cohort settles as a whole."""

        def work() -> None:
            histogram = self.spec.preprocess.asks_for_histogram(self._known.modality)
            self._counts = take_survey(self._known, histogram, self._each, self._note)

        self._begin(work)

    def advance(self, seconds: float) -> dict[str, Any]:
        """Waits up to `seconds` for what was begun: "finished", and how far it is.

        Raises:
            FedsamError: what went wrong with it.
        """
        if self._work is None:
            raise RoundError(f"site {self.spec.site} has nothing under way (it may have been restarted)")
        finished, _ = wait([self._work], seconds)
        if finished:
            self._work.result()
        stage, done, total = self._stage
        return {"finished": bool(finished), "stage": stage, "done": done, "total": total}

    def stop(self) -> None:
        """Ends what is under way at the next case; what is finished is kept."""
        self._stop.set()

    def state(self) -> dict[str, Any]:
        """What the driver goes on by: the modality, and the configuration of a share that is up to date, else None."""
        config = None if self._prepared is None else self._prepared.config.model_dump(mode="json")
        return {"modality": self._known.modality, "config": config}

    def open(self) -> dict[str, str]:
        """Before any sum: this site's public key, and the hash of the roster that it pins.

        Raises:
            SecureSumError: the roster or this site's key cannot be used, or the site's policy forbids the sum.
        """
        with self._logged("open"):
            roster_hash = self._roster_hash = self._identify()
        return {"identity": self._identity.public.hex(), "roster_hash": roster_hash}

    def survey(self, delivered: bytes) -> bytes:
        """Contributes this share's counts to the masked sum."""
        with self._logged("survey"):
            with self._masks_ahead(delivered):
                counts = digits(self._counted)
            return self._contribute(lambda encoder, _: encoder.put_all(counts))

    def tell(self) -> dict[str, Any]:
        """The counts in the open: planes always (which way most scans are sliced says little), the histogram only where
        the configuration allows sums in the open."""
        _ = self._pinned
        histogram = self.spec.preprocess.asks_for_histogram(self._known.modality)
        if histogram and self.spec.federation.secure_sum != "plain":
            raise ConfigError("this site tells no histogram in the open: set federation.secure_sum=plain knowingly")
        return {"planes": self._counted.planes, "histogram": self._counted.histogram}

    def describe(self) -> dict[str, Any]:
        """What the driver may know of the finished share."""
        prepared = self._prepared
        if prepared is None:
            raise RoundError(f"site {self.spec.site} has prepared nothing (it may have been restarted)")
        cohort, site = prepared.cohort, self.spec.site
        spacings = sorted(case.spacing for case in cohort.cases)
        return {
            "described": cohort.model_copy(update={"cases": ()}).model_dump(mode="json"),
            "config": prepared.config.model_dump(mode="json"),
            "hash": cohort.share_hash(site),
            "cases": {split: len(cohort.select(site, split)) for split in ("train", "val", "test")},
            "spacing": spacings[len(spacings) // 2],
            "url": self.spec.store,
        }

    @property
    def _known(self) -> Cohort:
        if self._cohort is None:
            raise RoundError(f"site {self.spec.site} has not read its scans (it may have been restarted)")
        return self._cohort

    @property
    def _pinned(self) -> str:
        """Hash of the roster, of a site that has read its policy."""
        if self._roster_hash is None:
            raise RoundError(f"site {self.spec.site} is not open (it may have been restarted)")
        return self._roster_hash

    @property
    def _counted(self) -> Survey:
        if self._counts is None:
            raise RoundError(f"site {self.spec.site} has not counted its scans (it may have been restarted)")
        return self._counts

    def _begin(self, work: Callable[[], None]) -> None:
        """Runs in a thread, so that the site can say how far it is."""
        self._stop.clear()
        pool = ThreadPoolExecutor(1, thread_name_prefix=f"site {self.spec.site}")
        self._work = pool.submit(work)
        pool.shutdown(wait=False)

    def _note(self, stage: str, done: int, total: int) -> None:
        self._stage = (stage, done, total)
        if self._stop.is_set():
            raise InterruptedError(f"site {self.spec.site} was told to stop")

    def _read(self) -> None:
        if not self.look():
            spec = self.spec
            self._cohort = read_cohort(spec.cohort, spec.work_dir, self._note, spec.site, self._each)

    def _lanes(self, task: Task, round_number: int) -> VectorLayout:
        if task != TASK:
            raise RoundError(f"site {self.spec.site} prepares scans: it has nothing to say about {task.purpose}")
        return survey_layout(len(self.spec.sites))

    def _signed(self, task: Task, layout: VectorLayout) -> dict[str, str]:
        return {"config_hash": self.spec.settings_hash(self._pinned), "layout_hash": _sum_hash(layout)}

    def _compare(self, attempt: Attempt, task: Task, layout: VectorLayout) -> None:
        super()._compare(attempt, task, layout)
        if attempt.round or attempt.model_hash:  # a second name for the same question
            raise OtherAttempt(f"site {self.spec.site} refuses a survey of a round or of a global state: it is of none")


def survey_layout(sites: int) -> VectorLayout:
    """The lanes of a survey's sum. All sites must be in it: counts of some would settle for all, and what a second sum
    adds would be a site's own."""
    lanes = (
        Lane("planes", len(PLANES), float(_DIGIT)),
        Lane("histogram/low", BINS, float(_DIGIT)),
        Lane("histogram/high", BINS, float(_DIGIT)),
    )
    return VectorLayout(lanes, max_sites=sites, min_contributors=sites)


def digits(counts: Survey) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """The lanes of a site's counts: two digits of 16 bits a bin, each small enough to be exact in a ring of 32 bits."""
    high, low = np.divmod(counts.histogram, _DIGIT)
    lanes = {"planes": counts.planes, "histogram/low": low, "histogram/high": high}
    return {name: values.astype(np.float64) for name, values in lanes.items()}


def counts_of(
    layout: VectorLayout, lanes: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]], contributors: int
) -> Survey:
    """The counts from a sum. Rounding in the ring is within `layout.error_bound`; below one half it is undone here.

    Raises DataError for so many sites that it is not.
    """
    worst = max(layout.error_bound(lane.name, contributors) for lane in layout.lanes)
    if worst >= 0.5:
        raise DataError(f"{contributors} sites are too many for an exact sum of counts: give ct_window and slice_axis")
    whole = {name: np.rint(values).astype(np.int64) for name, values in lanes.items()}
    return Survey(whole["planes"], whole["histogram/high"] * _DIGIT + whole["histogram/low"])


def prepared_before(sites: Sequence[CohortSite]) -> PreparedSites | None:
    """The cohort, if the share of every site is up to date as seen from this process; None if not, or not seen."""
    try:
        if not all(site.look() for site in sites) or len({stable_hash(site.state()) for site in sites}) > 1:
            return None
    except FedsamError:
        return None  # whatever is wrong is said by the site itself
    return _together({site.spec.site: site.describe() for site in sites})


def prepare_shares(engine: Engine, specs: Sequence[CohortSpec], progress: Progress | None = None) -> PreparedSites:
    """Has every site read, check and prepare its share; what is up to date is left alone.

    Args:
        engine: over `CohortSite`s.
        specs: what each site was told.
        progress: called as (stage, done, total), summed over sites.

    Raises:
        DataError: a site's cohort cannot be used, with the site's reason.
        RoundError: the secure sum failed, with the reason for each site that was lost.
    """
    call = _Caller(engine, specs[0].federation.deadline_s)
    try:
        call.all("read")
        call.until_finished(progress)
        states = call.all("state")
        configs = {stable_hash(state["config"]) for state in states.values()}
        if len(configs) > 1 or any(state["config"] is None for state in states.values()):
            modalities = {state["modality"] for state in states.values()}
            if len(modalities) > 1:
                raise DataError(f"sites hold {' and '.join(sorted(modalities))} scans: set cohort.modality")
            modality = modalities.pop()
            if specs[0].cohort.sites is None:
                _compare_scans(call)
            if not specs[0].preprocess.is_resolved(modality):
                call.all("count")
                call.until_finished(progress)
            config = _settle(engine, call, specs[0], modality)
            call.all("prepare", config=config.model_dump(mode="json"))
            call.until_finished(progress)
        return _together(call.all("describe"))
    except BaseException:
        call.stop()
        raise


def _compare_scans(call: "_Caller") -> None:
    """Finds scans that several sites hold, which no site can see by itself."""
    told = [Compared(**one) for contents in call.all("contents").values() for one in contents]
    found = find_duplicates(told)
    of = {case.id: case.site for case in told}
    sites = {site: [p.model_dump(mode="json") for p in found if of[p.case] == site] for site in set(of.values())}
    call.each("leave_out", {site: {"problems": problems} for site, problems in sites.items() if problems})


class _Caller:
    """Asks all sites, or raises."""

    def __init__(self, engine: Engine, deadline: float) -> None:
        self._engine = engine
        self._deadline = deadline

    def all(self, method: str, **keywords: Any) -> dict[str, Any]:
        return self.each(method, dict.fromkeys(self._engine.sites, keywords))

    def each(self, method: str, keywords: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        replies, lost = self._engine.call(method, keywords, self._deadline)
        if lost:
            raise DataError("; ".join(f"site {site} cannot be prepared: {why}" for site, why in sorted(lost.items())))
        return replies

    def until_finished(self, progress: Progress | None) -> None:
        while True:
            states = self.all("advance", seconds=STEP_SECONDS)
            if progress is not None:
                for stage in dict.fromkeys(state["stage"] for state in states.values() if state["total"]):
                    at = [state for state in states.values() if state["stage"] == stage]
                    progress(stage, sum(state["done"] for state in at), sum(state["total"] for state in at))
            if all(state["finished"] for state in states.values()):
                return

    def stop(self) -> None:
        self._engine.call("stop", {site: {} for site in self._engine.sites}, STEP_SECONDS)


def _settle(engine: Engine, call: _Caller, spec: CohortSpec, modality: Modality) -> PreprocessConfig:
    """The configuration with nothing left open."""
    config, federation = spec.preprocess, spec.federation
    if config.is_resolved(modality):
        return config
    if len(spec.sites) >= SMALLEST_PRIVATE_SUM and federation.secure_sum == "masked":
        return config.resolve(secure_survey(engine, spec), modality)
    if config.asks_for_histogram(modality) and federation.secure_sum == "masked":
        raise ConfigError(
            f"preprocess.ct_window=auto needs a secure sum over at least {SMALLEST_PRIVATE_SUM} sites, here are "
            f"{len(spec.sites)}: give a window in HU, like [-160, 240], or set federation.secure_sum=plain"
        )
    call.all("open")
    told = call.all("tell")
    counts = [Survey(np.asarray(reply["planes"]), np.asarray(reply["histogram"])) for reply in told.values()]
    return config.resolve(sum(counts[1:], counts[0]), modality)


def secure_survey(engine: Engine, spec: CohortSpec) -> Survey:
    """The sum of all sites' counts; nothing else is opened.

    Raises:
        RoundError: a site was lost or refused, in every attempt: counts of some sites would settle for all.
    """
    federation = spec.federation
    layout = survey_layout(len(spec.sites))
    replies, lost = engine.call("open", {site: {} for site in engine.sites}, federation.deadline_s)
    failed = [f"site {site}: {why}" for site, why in lost.items()]
    if len({reply["roster_hash"] for reply in replies.values()}) > 1:
        failed.append("sites pin different rosters (`fedsam keys show`)")
    keys = {site: reply["identity"] for site, reply in replies.items()}
    if not failed:
        _, lost = engine.call("enroll", {site: {"roster": keys} for site in keys}, federation.deadline_s)
        failed += [f"site {site}: {why}" for site, why in lost.items()]
    if failed:
        raise RoundError(f"the cohort's statistics cannot be summed: {'; '.join(sorted(failed))}")
    roster = Roster({site: bytes.fromhex(key) for site, key in keys.items()})
    (roster_hash,) = {reply["roster_hash"] for reply in replies.values()}
    for number in range(1, federation.attempts + 1):
        attempt = Attempt(
            run=spec.run,
            round=0,
            attempt=number,
            layout_hash=_sum_hash(layout),
            config_hash=spec.settings_hash(roster_hash),
            model_hash="",
            sites=engine.sites,
            threshold=default_threshold(len(engine.sites)),
        )
        relay = Relay(engine, attempt, TASK, Ledger(), Patience(federation.deadline_s))
        try:
            total = secure_sum(relay, roster, layout, Contribution("survey"), Chain())
        except RoundError as error:
            failed.append(str(error))
            continue
        if not total.lost:
            return counts_of(layout, total.lanes, len(total.contributors))
        failed.append("; ".join(f"lost {site}: {why}" for site, why in sorted(total.lost.items())))
    raise RoundError(f"the cohort's statistics cannot be summed: {'; '.join(failed)}")


def _together(replies: Mapping[str, Mapping[str, Any]]) -> PreparedSites:
    cohorts = {site: Cohort.model_validate(reply["described"]) for site, reply in sorted(replies.items())}
    configs = {site: PreprocessConfig.model_validate(reply["config"]) for site, reply in replies.items()}
    first = next(iter(cohorts.values()))
    for site, cohort in cohorts.items():
        if (cohort.classes, cohort.scored_as) != (first.classes, first.scored_as):
            raise DataError(
                f"site {site} has classes {', '.join(cohort.classes)}, others {', '.join(first.classes)}: set "
                "cohort.classes"
            )
    problems = tuple(dict.fromkeys(problem for cohort in cohorts.values() for problem in cohort.problems))
    kept = ("hash", "cases", "spacing", "url")
    shares = {site: {key: reply[key] for key in kept} for site, reply in sorted(replies.items())}
    return PreparedSites(first.model_copy(update={"problems": problems}), next(iter(configs.values())), shares)


def _sum_hash(layout: VectorLayout) -> str:
    return stable_hash([layout.hash, TASK.model_dump()])


def _fingerprint(listing: Listing) -> list[Any]:
    """Names, sizes and times of the files, and what is said of them: quick, and enough to notice a change."""

    def stamps(path: Path) -> Iterator[tuple[str, int, int]]:
        try:
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                about = file.stat()
                yield str(file), about.st_size, about.st_mtime_ns
        except OSError:
            yield str(path), -1, -1  # a link to nowhere, say: whoever opens the case says what is wrong

    cases = [
        [files.id, files.site, files.split, list(stamps(files.image)), list(stamps(files.label))]
        for files in listing.cases
    ]
    said = [listing.classes, listing.modality, dict(listing.scored_as), listing.merge_labels]
    return [cases, said, [problem.model_dump() for problem in listing.problems]]
