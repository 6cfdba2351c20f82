"""A hospital's side of the federation: a plain class that an engine calls by method name.

Every method takes and returns bytes, numbers or plain dictionaries. The scans, the model and the keys stay here.
"""

import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from fedsam_core.data.preprocess import PreparedCase, PreparedCohort
from fedsam_core.data.slices import SliceConfig, SliceDataset
from fedsam_core.errors import DataError, RoundError
from fedsam_core.evaluation.inference import segment_scan
from fedsam_core.evaluation.metrics import CaseScore, dice_sums, score_case, summarize
from fedsam_core.evaluation.overlays import overlay
from fedsam_core.federation.groups import beyond_rank
from fedsam_core.federation.lanes import (
    CONTROL,
    Round,
    SiteUpdate,
    check_update,
    layout_of,
    put_magnitudes,
    put_private,
    put_update,
)
from fedsam_core.federation.lora_rules import (
    Basis,
    Meter,
    basis_shapes,
    first_basis,
    product_values,
    trained_kinds,
)
from fedsam_core.federation.memory import SiteMemory, close_folder
from fedsam_core.federation.privacy import secret_rng
from fedsam_core.federation.server import take_step, unpack_basis
from fedsam_core.federation.state import GlobalState, apply_changes, first_state, unpack_global, weights_hash
from fedsam_core.federation.summing import SummingSite, SumSpec
from fedsam_core.federation.tasks import Task, sum_hash
from fedsam_core.hashing import derive_seed, stable_hash
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.device import describe_device, pick_device
from fedsam_core.learning.learner import Assignment, Fit, Learner
from fedsam_core.sam.adapters import adapt, save_adapter, shared_state
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.layout import VectorLayout
from fedsam_core.secagg.quantize import Encoder
from fedsam_core.secagg.refusals import OtherAttempt, OtherModel, OutOfTurn
from fedsam_core.selection import LayerSelection, ParameterManifest
from fedsam_core.store import OpenStore, folder_store
from fedsam_core.trained import describe

_log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

_NOISE = "privacy/noise"
"""In the site's memory: what the round's noise is drawn from, with the update itself; uint64 [2]."""


class SiteSpec(SumSpec):
    """All that a site needs to take part in a run."""

    config_hash: str
    cohort: str
    """Where this site's prepared share is: a folder, or a url that the site's `open_store` knows."""
    model: ModelConfig
    selection: LayerSelection
    slices: SliceConfig
    learning: LearningConfig
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
            "federation": {"roster", "key_dir", "site_dir", "share_site_scores", "share_pictures"},
            "model": {"checkpoint"},  # a path; what is in it is in `frozen`
        }
        return stable_hash([self.model_dump(mode="json", exclude=left_out), frozen, roster])


@dataclass(frozen=True)
class Trained:
    """A round's training, kept until the next: a repeated attempt gives the same bits.

    Attributes:
        start: float32 [shared size], the flat vector that it began with, as far as this site has it.
        noise: what the site adds under differential privacy is drawn from here, in every attempt alike.
    """

    fit: Fit
    start: Array
    noise: np.random.Generator | None


@dataclass(frozen=True)
class OpenSite:
    """What a site holds in memory from `open` on."""

    prepared: PreparedCohort
    manifest: ParameterManifest
    learner: Learner
    settings_hash: str
    memory: SiteMemory
    frozen: str
    """Hash of the weights that nobody trains."""
    roster_hash: str
    """Of the pinned roster; "" for a development roster."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes."""
        return self.prepared.cohort.classes


class FederatedSite(SummingSite):
    """One site. `open` and `enroll` first; then secure sums (see `SummingSite`).

    The contributions are `weigh` (slices, cases or 1), `fit` (train; the update or how large its values are), `project`
    (what a later stage of the round asks of the same update) and `score` (segment; Dice).
    """

    spec: SiteSpec

    def __init__(self, spec: SiteSpec, open_store: OpenStore = folder_store) -> None:
        """`open_store` opens the share's location: a folder, unless the caller knows more."""
        super().__init__(spec)
        self._open_store = open_store
        self._opened: OpenSite | None = None
        self._held: GlobalState | None = None
        self._about: Round | None = None
        self._total: float | None = None
        self._pictured = False
        self._fit: tuple[tuple[int, str], Trained] | None = None
        self._scored: list[tuple[CaseScore, Array]] = []

    def open(self) -> dict[str, str]:
        """Loads scans and model, unless they are; the site's public key, layout hash and device come back.

        Raises:
            DataError: a prepared case is missing or damaged, or the site has no training case.
            CheckpointError: the weights do not fit the backbone.
            SelectionError: the selection does not fit the model.
            SecureSumError: the roster or this site's key cannot be used, or the site's policy forbids the run.
        """
        if self._opened is not None:
            return self._told()  # it was lost for the driver alone: slow, or cut off
        with self._logged("open"):
            roster_hash = self._identify()
        spec = self.spec
        torch.set_num_threads(spec.learning.threads)
        prepared = PreparedCohort.open(self._open_store(spec.cohort))
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
        memory = SiteMemory(self._folder if self._keeps else None, manifest.layout_hash)
        settings = spec.settings_hash(frozen, roster_hash)
        self._opened = OpenSite(prepared, manifest, learner, settings, memory, frozen, roster_hash)
        # Drawn alike by all: whoever starts from it need not be sent it.
        self._held = first_state(manifest, shared_state(segmenter, manifest), spec.federation.scaffold)
        return self._told()

    def _told(self) -> dict[str, str]:
        """What `open` says."""
        site, held = self._site, self._held
        assert held is not None  # set with the open site
        return {
            "identity": self._identity.public.hex(),
            "layout_hash": site.manifest.layout_hash,
            "weights_hash": site.frozen,
            "state_hash": held.hash,
            "roster_hash": site.roster_hash,
            "device": describe_device(site.learner.device),
            "precision": "bf16" if site.learner.autocast else "fp32",
        }

    def answered(self, state_hash: str) -> dict[str, Any]:
        """For a driver that goes on with a run, which it may have lost in the midst of a sum: what this site knows.

        Returns:
            "attempt": the last one that it entered. "opened": the survivors of each sum of that state, which it opens
            for no others. "kept": the rounds after which it keeps values of its own; None where it keeps none.
        """
        kept = list(self._site.memory.rounds) if self._keeps else None
        return {"attempt": self._answered.last, "opened": self._answered.opened_of(state_hash), "kept": kept}

    def weigh(self, delivered: bytes) -> bytes:
        """Contributes what this site's updates weigh: its training slices, its training cases, or 1."""
        with self._logged("weigh"):
            with self._masks_ahead(delivered):
                amount = self._amount()
            return self._contribute(lambda encoder, _: encoder.put_all({"amount": amount}))

    def fit(
        self, delivered: bytes, state: bytes | None, step: bytes | None = None, counted: int | None = None
    ) -> bytes:
        """Trains from the global state; contributes the update, or only how large its values are.

        `counted`: the last round whose sum has this site's update, see `SiteMemory.settle`.
        """
        with self._logged("fit"):
            task = self._task
            if task.purpose not in ("update", "magnitudes") or task.stage:
                raise OutOfTurn(f"site {self.spec.site} was asked to train, but the sum is about {task.about}")
            self._check_total(task)
            accepted = self._accept(state, step)
            if counted is not None:
                self._site.memory.settle(counted, self._current().round)
            with self._masks_ahead(delivered):
                # A repeated attempt of a round starts from the same state: what was trained is still right.
                key = (self._current().round, self._current().model_hash)
                if self._fit is None or self._fit[0] != key:
                    self._fit = None
                    self._fit = (key, self._train(accepted))
                basis = first_basis(self.spec.federation, self._site.manifest, self.spec.seed, self._current().round)
            return self._give(task, basis)

    def project(self, delivered: bytes, basis: bytes) -> bytes:
        """Contributes what a later stage asks of the round's update: its products, projected on a basis.

        Raises:
            OtherModel: the basis is not the one that was announced.
            CheckpointError: it does not fit the layers.
        """
        with self._logged("project"):
            task, federation, attempt = self._task, self.spec.federation, self._current()
            if not task.stage:
                raise OutOfTurn(f"site {self.spec.site} was asked to project, but the sum is about {task.about}")
            self._check_total(task)
            if sha256(basis).hexdigest() != task.basis:
                raise OtherModel(f"site {self.spec.site} was sent another basis than the one that was announced")
            if self._fit is None or self._fit[0] != (attempt.round, attempt.model_hash):
                raise RoundError(f"site {self.spec.site} has no update of this round (it may have been restarted)")
            with self._masks_ahead(delivered):
                shapes = basis_shapes(federation, self._site.manifest, task.stage)
                unpacked = unpack_basis(basis, shapes, federation.broadcast_bits)
            return self._give(task, unpacked)

    def score(
        self, delivered: bytes, state: bytes | None, step: bytes | None = None, counted: int | None = None
    ) -> bytes:
        """Segments the cases of the task's split with the global state and the site's own local layers, or with the
        site's own model; contributes Dice sums and counts per class. `counted` as in `fit`."""
        with self._logged("score"):
            self._scored = []
            task = self._task
            if task.split is None:
                raise OutOfTurn(f"site {self.spec.site} was asked to score, but the sum is about {task.about}")
            accepted = self._accept(state, step)
            if counted is not None:
                self._site.memory.keep(counted)
            with self._masks_ahead(delivered):
                if task.personal:
                    self._fine_tune(accepted)
                else:
                    self._site.learner.load(accepted.tensors, self._assignment(accepted, None))
                self._scored = self._segment_all(task.split)
            totals, counts = dice_sums([score for score, _ in self._scored], len(self._site.classes))
            return self._contribute(lambda encoder, _: encoder.put_all({"dice": totals, "cases": counts}))

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
    def _folder(self) -> Path:
        """Where this site keeps what never leaves it."""
        return self.spec.federation.site_dir.expanduser() / self.spec.run / self.spec.site

    @property
    def _keeps(self) -> bool:
        """Whether anything of this site outlives a round."""
        federation = self.spec.federation
        return bool(
            self.spec.selection.local or federation.scaffold or federation.privacy or self.spec.learning.keep_optimizer
        )

    def _round(self, number: int) -> Round:
        spec, site = self.spec, self._site
        if self._about is None or self._about.number != number:  # kept, as it finds out places of millions of values
            self._about = Round(number, spec.seed, spec.sites, site.manifest, len(site.classes), spec.federation)
        return self._about

    def _amount(self) -> float:
        if self.spec.federation.weights == "equal":
            return 1.0
        if self.spec.federation.weights == "cases":
            return float(len(self._site.prepared.cohort.select(self.spec.site, "train")))
        return float(len(self._site.learner.dataset))

    def _check_total(self, task: Task) -> None:
        if task.total != (self._total or task.total):
            raise OtherAttempt(f"site {self.spec.site} was told another total weight than before")
        self._total = task.total

    def _assignment(self, state: GlobalState, round_number: int | None) -> Assignment:
        """What this site brings to a round's training; None for scoring, with the newest it has."""
        site, federation = self._site, self.spec.federation
        rank = federation.site_ranks.get(self.spec.site)
        kept = site.memory.latest() if round_number is None else site.memory.before(round_number)
        return Assignment(
            kinds=trained_kinds(federation, round_number or 1),
            kept={name: value for name, value in kept[1].items() if name != _NOISE} if kept else {},
            control=state.control,
            beyond=None if rank is None else beyond_rank(site.manifest, rank),
            new_basis=federation.is_product,
        )

    def _train(self, state: GlobalState) -> Trained:
        spec, number = self.spec, self._current().round
        assignment = self._assignment(state, number)
        fit = self._site.learner.fit(state.tensors, number, spec.federation.rounds, spec.seed, assignment)
        start = state.vector.copy()
        if assignment.beyond is not None:
            start[assignment.beyond] = 0.0
        return Trained(fit, start, self._noise(number, fit.update) if spec.federation.privacy else None)

    def _give(self, task: Task, basis: Basis) -> bytes:
        """Contributes what the task asks of the round's training."""
        assert self._fit is not None  # made by `fit`, asked for by `project`
        if task.purpose == "update" and task.stage == 0 and self._keeps:
            self._hold(self._current().round, self._fit[1].fit)
        trained, about, site = self._fit[1], self._round(self._current().round), self.spec.site
        if trained.noise is not None:
            state = trained.noise.bit_generator.state
            try:
                return self._contribute(
                    lambda encoder, _: put_private(encoder, about, trained.fit.update, trained.noise)  # type: ignore[arg-type]
                )
            finally:
                trained.noise.bit_generator.state = state
        given = self._contribution(trained, about, task, basis)

        def fill(encoder: Encoder, layout: VectorLayout) -> None:
            check_update(trained.fit.update, about.config)
            if task.purpose == "magnitudes":
                put_magnitudes(encoder, about, task, site, given, trained.fit.steps)
            else:
                put_update(encoder, layout, about, task, site, given, trained.fit)

        return self._contribute(fill)

    def _contribution(self, trained: Trained, about: Round, task: Task, basis: Basis) -> SiteUpdate:
        assert task.total is not None
        config, manifest, fit = self.spec.federation, self._site.manifest, trained.fit
        after = trained.start.astype(np.float64) + fit.update
        parts: dict[str, Array] = {}
        probes = np.empty(0)
        if task.stage == 0:
            for name, group in about.groups.items():
                parts[name] = fit.update[group.index]
                if fit.control is not None:
                    parts[CONTROL + name] = fit.control[group.index]
            if config.meter_probes:
                meter = Meter(config, manifest, about.seed, about.number)
                probes = (meter.read(after) - meter.read(trained.start)).ravel()
        parts |= product_values(config, manifest, task.stage, basis, trained.start, after)
        return SiteUpdate(parts, self._amount() / task.total, probes)

    def _hold(self, number: int, fit: Fit) -> None:
        """Sets aside what this site keeps for the next round, before the update leaves: whether that is in a sum it may
        not live to see."""
        kept, newest = dict(fit.kept), self._site.memory.latest()
        if newest and newest[0] == number and _NOISE in newest[1]:
            kept[_NOISE] = newest[1][_NOISE]
        self._site.memory.hold(number, kept)

    def _contributed(self) -> None:
        """What this site keeps for the next round counts once its update is in a sum."""
        if self._task.purpose == "update" and self._task.stage == 0 and self._keeps:
            self._site.memory.keep(self._current().round)

    def _noise(self, number: int, update: Array) -> np.random.Generator:
        """What an update's noise is drawn from: a secret, made once a round and noted, and the update's own bits.

        A site gives one update a round, with one noise, so that as many sums of it can be opened as the run has rounds,
        which is what epsilon is told for. The same update with two noises would be spent twice, and so would two
        updates, which a driver may ask for from two states.

        Raises:
            OtherModel: another update of the round was given before, or this one with a noise that is forgotten.
        """
        memory, digest = self._site.memory, sha256(np.ascontiguousarray(update).tobytes())
        newest, given = memory.latest(), memory.given(number)
        key = newest[1].get(_NOISE) if newest is not None and newest[0] == number else None
        if given is not None and (key is None or given != digest.hexdigest()):
            raise OtherModel(
                f"site {self.spec.site} refuses round {number}: it has given an update of it with its noise, and a "
                "second would spend more privacy than is told"
            )
        if key is None:
            key = secret_rng().integers(0, 2**64, 2, dtype=np.uint64)
            before = memory.before(number)
            memory.save(number, {**(before[1] if before else {}), _NOISE: key})
        memory.give(number, digest.hexdigest())
        seed = sha256(b"fedsam noise" + key.tobytes() + digest.digest()).digest()
        return np.random.Generator(np.random.Philox(key=np.frombuffer(seed[:16], np.uint64)))

    def _fine_tune(self, state: GlobalState) -> None:
        """This site's own model: the last global state with its own local layers, trained on by `personal_steps`. It is
        left in the model, and saved on this node; nothing of it is sent."""
        spec, site = self.spec, self._site
        assignment, steps = self._assignment(state, None), spec.federation.personal_steps
        if steps:
            own = Assignment(kept=assignment.kept, beyond=assignment.beyond, new_basis=True, steps=steps)
            site.learner.fit(state.tensors, 1, 1, derive_seed(spec.seed, "personal"), own)
        else:
            site.learner.load(state.tensors, assignment)
        cohort = site.prepared.cohort
        card = describe(
            site.learner.segmenter,
            cohort,
            run=spec.run,
            dice=None,
            dice_by_class=dict.fromkeys(cohort.classes),
            preprocess=site.prepared.config,
            slices=spec.slices,
            precision=spec.learning.precision,
        )
        close_folder(self._folder)
        save_adapter(site.learner.segmenter, site.manifest, self._folder / "adapter", card)

    def _lanes(self, task: Task, round_number: int) -> VectorLayout:
        return layout_of(task, self._round(round_number))

    def _signed(self, task: Task, layout: VectorLayout) -> dict[str, str]:
        site = self._site
        return {"config_hash": site.settings_hash, "layout_hash": sum_hash(site.manifest, layout, task)}

    def _compare(self, attempt: Attempt, task: Task, layout: VectorLayout) -> None:
        super()._compare(attempt, task, layout)
        spec = self.spec
        if task.purpose == "weights" and attempt.model_hash:
            raise OtherAttempt(f"site {spec.site} refuses to count slices for a global state: they depend on none")
        if attempt.round > spec.federation.rounds:
            raise OtherAttempt(f"site {spec.site} refuses round {attempt.round} of {spec.federation.rounds}")

    def _accept(self, state: bytes | None, step: bytes | None) -> GlobalState:
        """The global state, if it is the one that all sites were told of: sent whole, or as a step from the one that
        this site holds, or held already."""
        attempt, manifest = self._current(), self._site.manifest
        if state is not None:
            unpacked = unpack_global(manifest, state)
        elif self._held is None:
            raise RoundError(f"site {self.spec.site} holds no global state (it may have been restarted)")
        elif step is None:
            unpacked = self._held
        elif self.spec.federation.broadcast_bits == 32:
            unpacked = apply_changes(self._held, step)
        else:
            unpacked = take_step(self._held, step)
        if unpacked.hash != attempt.model_hash:
            raise OtherModel(
                f"site {self.spec.site} refuses round {attempt.round}: the global state it received has hash "
                f"{unpacked.hash}, announced was {attempt.model_hash}"
            )
        self._held = unpacked
        return unpacked

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
        return score_case(
            prediction, prepared.case, self._site.classes, self._site.prepared.cohort.structures
        ), prediction

    def _picture(self) -> bytes:
        """PNG of the case with the median Dice: neither the best nor the worst of the site."""
        ranked = sorted(self._scored, key=lambda pair: (np.nan_to_num(pair[0].mean_dice), pair[0].case))
        score, prediction = ranked[(len(ranked) - 1) // 2]
        with TemporaryDirectory() as folder:
            path = Path(folder) / "overlay.png"
            caption = f"{self.spec.site} · a {score.split} case"  # its name stays at the site
            overlay(self._site.prepared.cohort, score, prediction, path, caption=caption)
            return path.read_bytes()
