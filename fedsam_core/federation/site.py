"""A hospital's side of the federation: a plain class that an engine calls by method name.

Every method takes and returns bytes, numbers or plain dictionaries. The scans, the model and the keys stay here.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from fedsam_core.data.preprocess import PreparedCase, PreparedCohort
from fedsam_core.data.slices import SliceConfig, SliceDataset
from fedsam_core.errors import DataError, RoundError, SecureSumError
from fedsam_core.evaluation.inference import segment_scan
from fedsam_core.evaluation.metrics import CaseScore, dice_sums, score_case, summarize
from fedsam_core.evaluation.overlays import overlay
from fedsam_core.federation.answered import Answered
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import describe_failure
from fedsam_core.federation.lanes import Task, attempt_from_json, layout_of, put_update, sum_hash, task_from_dict
from fedsam_core.federation.policy import read_policy
from fedsam_core.federation.state import state_hash, unpack_state, weights_hash
from fedsam_core.hashing import derive_seed, stable_hash
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.device import describe_device, pick_device
from fedsam_core.learning.learner import Fit, Learner
from fedsam_core.sam.adapters import adapt, load_shared_state
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.secagg.attempt import Attempt, default_threshold
from fedsam_core.secagg.keyfiles import passphrase_from_environment, read_identity, read_roster
from fedsam_core.secagg.keys import Identity, Roster
from fedsam_core.secagg.layout import VectorLayout
from fedsam_core.secagg.plain import plain_input
from fedsam_core.secagg.quantize import Encoder
from fedsam_core.secagg.refusals import ForgedKeys, OtherAttempt, OtherModel, OutOfTurn, UnfitValues, UnknownSite
from fedsam_core.secagg.site import SiteSession
from fedsam_core.selection import LayerSelection, ParameterManifest
from fedsam_core.settings import Settings

_log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Fill = Callable[[Encoder, VectorLayout], None]
"""Puts a site's values into the lanes of a sum."""


class SiteSpec(Settings):
    """All that a site needs to take part in a run."""

    run: str = Field(pattern=r"^\w[\w.-]*$")
    site: str
    sites: tuple[str, ...]
    """All sites of the run: this one refuses a sum over fewer."""
    seed: int
    config_hash: str
    cohort: Path
    model: ModelConfig
    selection: LayerSelection
    slices: SliceConfig
    learning: LearningConfig
    federation: FederationConfig
    inference_batch: int

    def settings_hash(self, frozen: str, roster: str) -> str:
        """SHA-256 (hex) of all that decides what the sites of the run send to whom; every site signs its own.

        A driver that hands one site other settings than the rest (none but it a learning rate, say, so that the sum is
        its update) gets no sum. What a site may decide for itself is left out: folders, and what it discloses.

        Args:
            frozen: hash of the weights that nobody trains.
            roster: hash of the pinned roster, "" for a development roster.
        """
        left_out: Any = {
            "site": True,
            "cohort": True,
            "federation": {"roster", "key_dir", "share_site_scores", "share_pictures"},
            "model": {"checkpoint"},  # a path; what is in it is in `frozen`
        }
        return stable_hash([self.model_dump(mode="json", exclude=left_out), frozen, roster])


@dataclass(frozen=True)
class OpenSite:
    """What a site holds in memory from `open` on."""

    prepared: PreparedCohort
    manifest: ParameterManifest
    learner: Learner
    settings_hash: str

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes."""
        return self.prepared.cohort.classes


class FederatedSite:
    """One site. `open` and `enroll` first; then secure sums: advertise, share, a contribution, confirm, unmask.

    The contributions are `weigh` (how many slices), `fit` (train; the update) and `score` (segment; Dice).
    """

    def __init__(self, spec: SiteSpec) -> None:
        self.spec = spec
        self._identity = Identity.generate()  # a development identity, unless the configuration names a roster
        self._answered = Answered()
        self._opened: OpenSite | None = None
        self._roster: Roster | None = None
        self._attempt: Attempt | None = None
        self._task = Task(purpose="weights")
        self._session: SiteSession | None = None
        self._layout: VectorLayout | None = None
        self._held: dict[str, Array] | None = None
        self._total_slices: float | None = None
        self._pictured = False
        self._fit: tuple[tuple[int, str], Fit] | None = None
        self._scored: list[tuple[CaseScore, Array]] = []

    def open(self) -> dict[str, str]:
        """Loads scans and model; the site's public key, layout hash and device come back.

        Raises:
            DataError: a prepared case is missing or damaged, or the site has no training case.
            CheckpointError: the weights do not fit the backbone.
            SelectionError: the selection does not fit the model.
            SecureSumError: the roster or this site's key cannot be used, or the site's policy forbids the run.
        """
        with self._logged("open"):
            policy = read_policy()
            self.spec = spec = self.spec.model_copy(update={"federation": policy.tighten(self.spec.federation)})
            roster_hash = self._pin(spec.federation.roster) if spec.federation.roster else ""
        torch.set_num_threads(spec.learning.threads)
        prepared = PreparedCohort.open(spec.cohort)
        train = [prepared.load(case.id) for case in prepared.cohort.select(spec.site, "train")]
        if not train:
            raise DataError(f"site {spec.site}: no training case; give it one in sites.csv, or leave the site out")
        classes = len(prepared.cohort.classes)
        segmenter = build_segmenter(spec.model, classes, spec.selection, seed=derive_seed(spec.seed, "model"))
        manifest = adapt(segmenter, spec.selection)
        device = pick_device()
        dataset = SliceDataset(train, spec.model.image_size, spec.slices)
        learner = Learner(spec.site, segmenter, manifest, dataset, spec.learning, device)
        frozen = weights_hash(segmenter, manifest)
        self._opened = OpenSite(prepared, manifest, learner, spec.settings_hash(frozen, roster_hash))
        return {
            "identity": self._identity.public.hex(),
            "layout_hash": manifest.layout_hash,
            "weights_hash": frozen,
            "roster_hash": roster_hash,
            "device": describe_device(device),
            "precision": "bf16" if learner.autocast else "fp32",
        }

    def enroll(self, roster: Mapping[str, str]) -> None:
        """Takes the public identity keys (hex, by site) of everyone in the run from the driver: a development roster.

        Raises:
            UnknownSite: this site pins a roster, and the driver's is another.
        """
        with self._logged("enroll"):
            path, pinned = self.spec.federation.roster, self._roster
            if path is None:
                self._roster = _told_roster(roster)
            elif pinned is None or any(
                site not in pinned.keys or pinned.key(site).hex() != roster[site] for site in roster
            ):
                raise UnknownSite(
                    f"site {self.spec.site} was told other keys than those of {path}, which it pins: compare the "
                    "rosters (`fedsam keys show`)"
                )

    def advertise(self, attempt: bytes, task: Mapping[str, Any]) -> bytes:
        """Starts a sum with fresh keys.

        Raises:
            OtherAttempt: run, sites, threshold, configuration or layout are not the ones this site was opened with.
            OutOfTurn: the attempt, or a later one, was entered before.
        """
        with self._logged("advertise"):
            announced = attempt_from_json(attempt)
        with self._logged("advertise", announced):
            asked = task_from_dict(task)
            layout = layout_of(
                asked, len(self.spec.sites), self._site.manifest, len(self._site.classes), self.spec.federation
            )
            self._compare(announced, asked, layout)
            self._answered.enter(announced)
            self._end_sum()
            self._attempt, self._task, self._layout = announced, asked, layout
            if self.spec.federation.secure_sum == "plain":
                return b""
            if self._roster is None:
                raise UnknownSite(f"site {self.spec.site} was asked for a secure sum before it knew its peers' keys")
            self._session = SiteSession(announced, self.spec.site, self._identity, self._roster, layout)
            return self._session.advertise()

    def share(self, advertised: bytes) -> bytes:
        """Sends every peer its encrypted shares of this site's keys."""
        with self._logged("share"):
            return self._running().share(advertised)

    def weigh(self, delivered: bytes) -> bytes:
        """Contributes the number of this site's training slices."""
        with self._logged("weigh"):
            with self._masks_ahead(delivered):
                slices = float(len(self._site.learner.dataset))
            return self._contribute(lambda encoder, _: encoder.put_all({"slices": slices}))

    def fit(self, delivered: bytes, state: bytes | None) -> bytes:
        """Trains from the global state; contributes the weighted update, the weight and the weighted loss."""
        spec, total = self.spec, self._task.total_slices
        with self._logged("fit"):
            if total is None:
                raise OutOfTurn(f"site {spec.site} was asked to train, but the sum is about {self._task.purpose}")
            if total != (self._total_slices or total):
                raise OtherAttempt(f"site {spec.site} was told another total of slices than before")
            self._total_slices = total
            accepted, attempt = self._accept(state), self._current()
            with self._masks_ahead(delivered):
                # A repeated attempt of a round starts from the same state: what was trained is still right.
                key = (attempt.round, attempt.model_hash)
                if self._fit is None or self._fit[0] != key:
                    self._fit = None
                    self._fit = (
                        key,
                        self._site.learner.fit(accepted, attempt.round, spec.federation.rounds, spec.seed),
                    )
            fit, manifest = self._fit[1], self._site.manifest
            return self._contribute(
                lambda encoder, layout: put_update(encoder, layout, manifest, spec.federation, fit, total)
            )

    def score(self, delivered: bytes, state: bytes | None) -> bytes:
        """Segments the cases of the task's split with the global state; contributes Dice sums and counts per class."""
        with self._logged("score"):
            self._scored = []
            if self._task.split is None:
                raise OutOfTurn(f"site {self.spec.site} was asked to score, but the sum is about {self._task.purpose}")
            load_shared_state(self._site.learner.segmenter, self._site.manifest, self._accept(state))
            with self._masks_ahead(delivered):
                self._scored = self._segment_all(self._task.split)
            totals, counts = dice_sums([score for score, _ in self._scored], len(self._site.classes))
            return self._contribute(lambda encoder, _: encoder.put_all({"dice": totals, "cases": counts}))

    def confirm(self, survivors: bytes) -> bytes:
        """Signs whose contributions are in the sum."""
        with self._logged("confirm"):
            session = self._running()
            message = session.confirm(survivors)
            self._answered.check(self._current(), self._about, session.survivors)
            return message

    def unmask(self, confirmations: bytes) -> bytes:
        """Opens the sum, and only the sum; the attempt's keys are wiped afterwards."""
        with self._logged("unmask"):
            session = self._running()
            message = session.unmask(confirmations)
            # Before the shares leave, for whom they are is noted for good.
            self._answered.open(self._current(), self._about, session.survivors)
            self._end_sum()
            return message

    def disclose(self, picture: bool) -> dict[str, Any]:
        """What the configuration lets this site tell in the open about its last scoring.

        Returns:
            "summary": means over the site's cases by class, and their number; None unless
                `federation.share_site_scores`. No case, and no volume of a structure, is told apart.
            "picture": PNG bytes of the median test case, once in a run; None unless asked for and
                `federation.share_pictures`.
        """
        allowed = self.spec.federation
        summary = None
        if allowed.share_site_scores and self._scored:
            groups = summarize([score for score, _ in self._scored], self._site.classes)["per_site"]
            summary = groups[self.spec.site]
        png = None
        if picture and allowed.share_pictures and self._scored and self._task.split == "test" and not self._pictured:
            png, self._pictured = self._picture(), True
        return {"summary": summary, "picture": png}

    @property
    def _site(self) -> OpenSite:
        if self._opened is None:
            raise RoundError(f"site {self.spec.site} is not open (it may have been restarted)")
        return self._opened

    @property
    def _about(self) -> str:
        """What the present sum is about, whatever attempt it is."""
        return self._task.purpose + (f"/{self._task.split}" if self._task.split else "")

    def _current(self) -> Attempt:
        if self._attempt is None:
            raise RoundError(f"site {self.spec.site} has no sum under way (it may have been restarted)")
        return self._attempt

    def _running(self) -> SiteSession:
        if self._session is None:
            raise RoundError(f"site {self.spec.site} has no sum under way (it may have been restarted)")
        return self._session

    def _accept(self, state: bytes | None) -> dict[str, Array]:
        """The global state, if it is the one that all sites were told of. None stands for the one held already."""
        attempt = self._current()
        unpacked = self._held if state is None else unpack_state(self._site.manifest, state)
        if unpacked is None:
            raise RoundError(f"site {self.spec.site} holds no global state (it may have been restarted)")
        if (received := state_hash(self._site.manifest, unpacked)) != attempt.model_hash:
            raise OtherModel(
                f"site {self.spec.site} refuses round {attempt.round}: the global state it received has hash "
                f"{received}, announced was {attempt.model_hash}"
            )
        self._held = unpacked
        return unpacked

    def _pin(self, path: Path) -> str:
        """Takes the roster and this site's own key from this node's files; gives the roster's hash."""
        spec = self.spec
        self._roster = read_roster(path)
        folder = spec.federation.key_dir.expanduser()
        key_file = folder / f"{spec.site}.key"
        self._identity = read_identity(key_file, passphrase_from_environment())
        if self._roster.key(spec.site) != self._identity.public:
            raise ForgedKeys(f"{key_file} is not the key that {path} pins for site {spec.site}: exchange keys again")
        self._answered = Answered(folder / f"{spec.site}.answered" / f"{spec.run}.json")
        return self._roster.hash

    def _compare(self, attempt: Attempt, task: Task, layout: VectorLayout) -> None:
        """Refuses an attempt that is not about what this site was opened for."""
        spec = self.spec
        own = {
            "run": spec.run,
            "sites": spec.sites,
            "threshold": default_threshold(len(spec.sites)),
            "config_hash": self._site.settings_hash,
            "layout_hash": sum_hash(self._site.manifest, layout, task),
        }
        for key, value in own.items():
            if (theirs := getattr(attempt, key)) != value:
                raise OtherAttempt(
                    f"site {spec.site} refuses the {task.purpose} sum of round {attempt.round}: its {key} is {value}, "
                    f"the driver's {theirs}. Start all with the same configuration and code"
                )
        if task.purpose == "weights" and attempt.model_hash:
            raise OtherAttempt(f"site {spec.site} refuses to count slices for a global state: they depend on none")
        if attempt.round > spec.federation.rounds:
            raise OtherAttempt(f"site {spec.site} refuses round {attempt.round} of {spec.federation.rounds}")

    @contextmanager
    def _logged(self, what: str, announced: Attempt | None = None) -> Iterator[None]:
        """Every refusal is in the log of the site, by name, whatever the driver makes of it, and ends the sum."""
        try:
            yield
        except SecureSumError as error:
            attempt = announced or self._attempt
            place = f"run {attempt.run}, round {attempt.round}, attempt {attempt.attempt}" if attempt else "no attempt"
            _log.warning("site %s refused %s (%s): %s", self.spec.site, what, place, describe_failure(error))
            if not isinstance(error, OutOfTurn):  # whoever asks out of turn does not end what is under way
                self._end_sum()
            raise

    @contextmanager
    def _masks_ahead(self, delivered: bytes) -> Iterator[None]:
        """Makes the masks of the vector in another thread while the caller trains or segments."""
        if self.spec.federation.secure_sum == "plain":
            yield
            return
        session = self._running()
        with ThreadPoolExecutor(1, thread_name_prefix="masks") as pool:
            making = pool.submit(session.deliver, delivered)
            try:
                yield
                making.result()
            except OutOfTurn:
                raise  # ends nothing that is under way
            except BaseException:
                making.exception()  # has ended, before its secrets are wiped
                self._end_sum()
                raise

    def _contribute(self, fill: Fill) -> bytes:
        attempt, layout = self._current(), self._layout
        assert layout is not None  # set with the attempt
        # Not of the attempt: a repeated attempt of a round gives the same bits.
        encoder = Encoder(layout, derive_seed(self.spec.seed, "rounding", layout.hash, attempt.round, self.spec.site))
        try:
            fill(encoder, layout)
        except UnfitValues as error:
            # What exactly is the site's own business: even how far a value is beyond its clip says something of it.
            _log.warning("site %s sends nothing in round %d: %s", self.spec.site, attempt.round, error)
            raise UnfitValues(
                f"site {self.spec.site} sends nothing in round {attempt.round}: its values do not fit their clips (its "
                "log says which). Where an update is too large, lower learning.learning_rate or raise "
                f"federation.update_clip ({self.spec.federation.update_clip:g})"
            ) from None
        if self.spec.federation.secure_sum == "plain":
            return plain_input(attempt, self.spec.site, self._identity, layout, encoder.vector())
        return self._running().masked_input(encoder.vector())

    def _end_sum(self) -> None:
        """Keys do not outlive their sum, however it ended."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _cases(self, split: Literal["train", "val", "test"]) -> list[PreparedCase]:
        return [self._site.prepared.load(case.id) for case in self._site.prepared.cohort.select(self.spec.site, split)]

    def _segment_all(self, split: Literal["val", "test"]) -> list[tuple[CaseScore, Array]]:
        try:
            return [self._segment(prepared) for prepared in self._cases(split)]
        except DataError as error:
            # Names of files are often names of cases, and why a site is lost is in the run's tables and record.
            _log.exception("site %s cannot score", self.spec.site)
            raise DataError(f"site {self.spec.site} cannot read a {split} case: its log names the file") from error

    def _segment(self, prepared: PreparedCase) -> tuple[CaseScore, Array]:
        """Score and label map of a case, on the scan's own grid."""
        prediction = segment_scan(
            self._site.learner.segmenter,
            prepared,
            self.spec.slices,
            self.spec.model.image_size,
            self.spec.inference_batch,
            self._site.learner.autocast,
        )
        return score_case(prediction, prepared.case, self._site.classes), prediction

    def _picture(self) -> bytes:
        """PNG of the case with the median Dice: neither the best nor the worst of the site."""
        ranked = sorted(self._scored, key=lambda pair: (np.nan_to_num(pair[0].mean_dice), pair[0].case))
        score, prediction = ranked[(len(ranked) - 1) // 2]
        with TemporaryDirectory() as folder:
            path = Path(folder) / "overlay.png"
            caption = f"{self.spec.site} · a {score.split} case"  # its name stays at the site
            overlay(self._site.prepared.cohort, score, prediction, path, caption=caption)
            return path.read_bytes()


def _told_roster(keys: Mapping[str, str]) -> Roster:
    try:
        return Roster({site: bytes.fromhex(key) for site, key in keys.items()})
    except ValueError as error:
        raise ForgedKeys("the driver told keys that are not written in hex") from error
