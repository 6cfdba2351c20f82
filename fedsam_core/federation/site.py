"""A hospital's side of the federation: a plain class that an engine calls by method name.

Every method takes and returns bytes, numbers or plain dictionaries. The scans, the model and the keys stay here.
"""

import logging
from dataclasses import dataclass
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
from fedsam_core.federation.lanes import Task, layout_of, put_update, sum_hash
from fedsam_core.federation.state import state_hash, unpack_state, weights_hash
from fedsam_core.federation.summing import SummingSite, SumSpec
from fedsam_core.hashing import derive_seed, stable_hash
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.device import describe_device, pick_device
from fedsam_core.learning.learner import Fit, Learner
from fedsam_core.sam.adapters import adapt, load_shared_state
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.layout import VectorLayout
from fedsam_core.secagg.refusals import OtherAttempt, OtherModel, OutOfTurn
from fedsam_core.selection import LayerSelection, ParameterManifest
from fedsam_core.store import OpenStore, folder_store

_log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


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


class FederatedSite(SummingSite):
    """One site. `open` and `enroll` first; then secure sums (see `SummingSite`).

    The contributions are `weigh` (how many slices), `fit` (train; the update) and `score` (segment; Dice).
    """

    spec: SiteSpec

    def __init__(self, spec: SiteSpec, open_store: OpenStore = folder_store) -> None:
        """`open_store` opens the share's location: a folder, unless the caller knows more."""
        super().__init__(spec)
        self._open_store = open_store
        self._opened: OpenSite | None = None
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
        self._opened = OpenSite(prepared, manifest, learner, spec.settings_hash(frozen, roster_hash))
        return {
            "identity": self._identity.public.hex(),
            "layout_hash": manifest.layout_hash,
            "weights_hash": frozen,
            "roster_hash": roster_hash,
            "device": describe_device(device),
            "precision": "bf16" if learner.autocast else "fp32",
        }

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

    def _lanes(self, task: Task) -> VectorLayout:
        site = self._site
        return layout_of(task, len(self.spec.sites), site.manifest, len(site.classes), self.spec.federation)

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
