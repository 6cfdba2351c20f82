"""Scores a baseline and writes what it gives, as a federation's recorder does: to its folder and to MLflow."""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import numpy as np

from cluster.tracking import RunTracker
from fedsam_core.data.cohort import Case
from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.evaluation.inference import segment_scan
from fedsam_core.evaluation.metrics import CaseScore, dice_sums, score_case, summarize
from fedsam_core.evaluation.overlays import dice_bars, overlay
from fedsam_core.federation.rounds import Scores
from fedsam_core.learning.device import autocast_dtype
from fedsam_core.sam.adapters import save_adapter
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import ParameterManifest
from fedsam_core.trained import describe
from pipelines.config import Config
from pipelines.recorder import Emit, Event, dice_metrics, site_rows, summary_of
from pipelines.run_folder import RunFolder

Kind = Literal["centralized", "local", "zero-shot"]
Summary = dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """What a baseline gave; what a study keeps of it.

    Attributes:
        kind: which baseline.
        run: id of the run; its folder is `folder`.
        mlflow_run: id of its MLflow run.
        ui: command that opens the MLflow UI.
        before, test: as a federation's: Dice on the test cases, before the first and after the last round. A local
            baseline's are every site's cases under the site's own model.
        curve: (round, validation Dice); round 0 is before.
        cross: of a local baseline, Dice of each site's model (outer key) on each site's test cases.
        trainable: parameters trained.
        rounds: 0 for zero-shot.
        minutes: from the first to the last score.
    """

    kind: Kind
    run: str
    folder: Path
    mlflow_run: str
    ui: str
    before: Summary
    test: Summary
    curve: tuple[tuple[int, float | None], ...]
    trainable: int
    rounds: int
    minutes: float
    config_hash: str
    cohort_hash: str
    code_hash: str
    cross: dict[str, dict[str, float | None]] = field(default_factory=dict)


@dataclass
class Scorer:
    """Segments and scores cases as the sites of a federation do, all in one place."""

    config: Config
    prepared: PreparedCohort
    segmenter: SamSegmenter
    emit: Emit

    def scores(self, cases: Sequence[Case], masks: dict[str, bytes] | None = None) -> list[CaseScore]:
        """A score a case, with the segmenter as it is; the masks, packed, go into `masks`."""
        found = []
        for case in cases:
            mask = self._segment(case)
            found.append(score_case(mask, case, self.classes, self.prepared.cohort.structures))
            if masks is not None:
                masks[case.id] = zlib.compress(mask.tobytes(), 1)
        return found

    def summary(self, scores: Sequence[CaseScore]) -> Summary:
        """The numbers that a federation's secure sum gives: sums over the cases of each site, then over sites."""
        sites = sorted({score.site for score in scores})
        sums = [dice_sums([score for score in scores if score.site == site], len(self.classes)) for site in sites]
        empty = np.zeros(len(self.classes))
        totals, counts = (sum((one[k] for one in sums), empty) for k in range(2))
        with np.errstate(invalid="ignore"):
            dice = np.where(counts > 0, totals / counts, np.nan)
        by_site = summarize(scores, self.classes)["per_site"] if scores else {}
        return summary_of(Scores(tuple(dice.tolist()), by_site), self.classes)

    def split(self, split: Literal["val", "test"], site: str | None = None) -> Sequence[Case]:
        """The cases of a split, of all sites or of one."""
        return self.prepared.cohort.select(site, split)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes."""
        return self.prepared.cohort.classes

    def _segment(self, case: Case) -> np.ndarray[Any, np.dtype[np.uint8]]:
        config = self.config
        return segment_scan(
            self.segmenter,
            self.prepared.load(case.id),
            config.slices,
            config.model.image_size,
            config.evaluation.batch_size,
            autocast_dtype(config.learning.precision, self.segmenter.device),
        )


class BaselineRecorder:
    """Follows one baseline from its first score to its last; goes on where an interrupted one was."""

    def __init__(
        self,
        kind: Kind,
        run: str,
        scorer: Scorer,
        manifest: ParameterManifest,
        folder: RunFolder,
        tracker: RunTracker,
        history: dict[str, Any] | None = None,
    ) -> None:
        """`history` is what `history()` told at the last checkpoint."""
        self._kind: Kind = kind
        self._run = run
        self._scorer = scorer
        self._manifest = manifest
        self._folder = folder
        self._tracker = tracker
        self._history: dict[str, Any] = {"seconds": 0.0, "before": None, "curve": [], "rounds": [], **(history or {})}
        self._started = monotonic() - self._history["seconds"]
        self._rounds_total = 0 if kind == "zero-shot" else scorer.config.federation.rounds
        folder.write_yaml("config.yaml", scorer.config.model_dump(mode="json"))
        folder.write("manifest.json", manifest.to_json().encode())
        for number, dice, metrics in self._history["curve"]:  # of a run that was interrupted
            tracker.log_round(number, metrics)
            scorer.emit(Event(f"round {number} was done before: validation Dice {_number(dice)}"))

    def history(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps."""
        return self._history | {"seconds": monotonic() - self._started}

    def begin(self) -> None:
        """Before the first round: how the model segments as it is."""
        scorer = self._scorer
        self._history["before"] = scorer.summary(scorer.scores(scorer.split("test")))
        self.after_round(0, scorer.summary(scorer.scores(scorer.split("val"))), {})
        dice = self.before["dice"]
        scorer.emit(Event(f"before training: test Dice {_number(dice)}", 0, self._rounds_total))

    @property
    def before(self) -> Summary:
        """Dice on the test cases before training."""
        found: Summary = self._history["before"]
        return found

    def after_round(self, number: int, validation: Summary | None, metrics: dict[str, float]) -> None:
        """After each round; `validation` is None in a round without."""
        dice = validation["dice"] if validation else None
        metrics = metrics | (dice_metrics("val/dice", "dice", validation) if validation else {})
        if validation:
            self._history["curve"].append([number, dice, metrics])
        self._tracker.log_round(number, metrics)
        if number:
            self._history["rounds"].append({"round": number, **metrics})
            self._folder.write_table("rounds.csv", self._history["rounds"])

    def finish(
        self,
        test: Sequence[CaseScore],
        masks: dict[str, bytes],
        ui: str,
        hashes: dict[str, str],
        cross: dict[str, dict[str, float | None]] | None = None,
    ) -> Baseline:
        """After the last round: scores, pictures and, of pooled training, the adapter."""
        scorer, folder, tracker, cohort = self._scorer, self._folder, self._tracker, self._scorer.prepared.cohort
        after = scorer.summary(test)
        if self._kind == "centralized":
            self._save_adapter(after)
        folder.write_table("scores.csv", site_rows(after))
        for site in after["per_site"]:
            self._picture(site, [score for score in test if score.site == site], masks)
        dice_bars(after, cohort, folder.path / "pictures" / "dice.png", self.before)
        result = Baseline(
            kind=self._kind,
            run=self._run,
            folder=folder.path,
            mlflow_run=tracker.run_id,
            ui=ui,
            before=self.before,
            test=after,
            curve=tuple((number, dice) for number, dice, _ in self._history["curve"]),
            trainable=0 if self._kind == "zero-shot" else self._manifest.trainable,
            rounds=self._rounds_total,
            minutes=(monotonic() - self._started) / 60,
            cross=cross or {},
            **hashes,
        )
        told = asdict(result) | {"folder": str(folder.path), "after": after}
        folder.write_json("summary.json", told)
        final = dice_metrics("test/dice", "test_dice", after)
        final |= dice_metrics("test/dice_before", "test_dice_before", self.before)
        tracker.log_round(self._rounds_total, final)
        for name, rows in (
            ("rounds", self._history["rounds"]),
            ("scores", site_rows(after)),
            ("cross", [{"model of": site, **row} for site, row in result.cross.items()]),
        ):
            if rows:
                folder.write_table(f"{name}.csv", rows)
                tracker.log_table(name, rows)
        for path in sorted(folder.path.iterdir()):
            tracker.log_artifact(path, path.name if path.is_dir() else "")
        return result

    def _save_adapter(self, after: Summary) -> None:
        config, cohort = self._scorer.config, self._scorer.prepared.cohort
        card = describe(
            self._scorer.segmenter,
            cohort,
            run=self._run,
            dice=after["dice"],
            dice_by_class={name: group["dice"] for name, group in after["per_class"].items()},
            preprocess=self._scorer.prepared.config,
            slices=config.slices,
            precision=config.learning.precision,
        )
        save_adapter(self._scorer.segmenter, self._manifest, self._folder.path / "adapter", card)

    def _picture(self, site: str, scores: Sequence[CaseScore], masks: dict[str, bytes]) -> None:
        """The case with the median Dice: neither the best nor the worst of the site."""
        ranked = sorted(scores, key=lambda score: (np.nan_to_num(score.mean_dice), score.case))
        score = ranked[(len(ranked) - 1) // 2]
        case = next(case for case in self._scorer.split("test", site) if case.id == score.case)
        mask = np.frombuffer(zlib.decompress(masks[score.case]), np.uint8).reshape(case.shape)
        path = self._folder.file(f"pictures/{site}.png")
        overlay(self._scorer.prepared.cohort, score, mask, path, caption=f"{site} · median test case")


def _number(dice: float | None) -> str:
    return "-" if dice is None else f"{dice:.3f}"
