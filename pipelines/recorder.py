"""Writes what a federation gives, while it runs: to its folder, to MLflow, and to whoever looks on."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from time import monotonic
from typing import Any

from cluster.tracking import RunTracker, now_ms
from fedsam_core.data.cohort import Cohort
from fedsam_core.data.preprocess import PreprocessConfig
from fedsam_core.errors import StoreError
from fedsam_core.evaluation.overlays import dice_bars
from fedsam_core.federation.rounds import Federation, RoundReport, Scores
from fedsam_core.federation.state import GlobalState, pack_state
from fedsam_core.federation.summation import RECORDED_BYTES
from fedsam_core.sam.adapters import load_shared_state, save_adapter
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.trained import describe
from pipelines.checkpoints import CHECKPOINTS, LOST_LINES, checkpoint_file, note_of, prune, put_checkpoint
from pipelines.commits import UNSENT, RunCommits, read_run_file, results_store, round_place
from pipelines.config import Config
from pipelines.resume import LeftOff
from pipelines.run_folder import RECORD, SUMS, RunFolder, sum_file

_NOT_TRACKED = (SUMS, UNSENT, CHECKPOINTS, LOST_LINES, "lease")  # too large, or of no use once the run is over


@dataclass(frozen=True)
class Event:
    """Something that a person who waits wants to see.

    Attributes:
        text: a line for the log.
        done, total: rounds that are finished, of how many.
        tracked: `run_id` of the tracker, told once: whoever looks on closes that run should the driver be killed.
        run, lease: id of the run, and number of the lease that its driver holds: whoever looks on releases that.
        halt: why the run is to end at once: it was stopped, or another driver has it.
        numbers: of the round that has just been done: "dice" on the validation cases, "bytes_up", "bytes_down" so far.
    """

    text: str
    done: int = 0
    total: int = 0
    tracked: str = ""
    run: str = ""
    lease: int = 0
    halt: BaseException | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """What the closing table shows.

    Attributes:
        folder: the run's folder.
        ui: command that opens the MLflow UI.
        before, after: Dice on the test cases, before the first and after the last round: "dice" and "per_class" over
            all sites, from the masked sum; "per_site", "macro_dice" and "cases" from the sites that tell.
        bytes_up, bytes_down: serialized messages of a training round, mean over rounds, all sites together.
        total_up, total_down: of the whole run, scoring included.
        curve: (round, validation Dice), round 0 before the first.
        trained: parameters trained and sent.
        rounds: how many.
        minutes: from the first to the last score.
        personal: as `after`, of each site's own model; None where it has none.
        epsilon: privacy that the updates have spent; None without differential privacy.
        mlflow_run: id of its MLflow run.
    """

    folder: Path
    ui: str
    before: dict[str, Any]
    after: dict[str, Any]
    bytes_up: float
    bytes_down: float
    total_up: int
    total_down: int
    curve: tuple[tuple[int, float | None], ...]
    trained: int
    rounds: int
    minutes: float
    personal: dict[str, Any] | None = None
    epsilon: float | None = None
    mlflow_run: str = ""


class Recorder:
    """Follows one run from its first score to its last."""

    def __init__(
        self,
        config: Config,
        cohort: Cohort,
        federation: Federation,
        folder: RunFolder,
        tracker: RunTracker,
        emit: Emit,
        preprocess: PreprocessConfig,
        commits: RunCommits | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """A recorder of one run.

        `preprocess` is what the sites' shares were prepared with: the configuration may leave something open.
        `commits` keeps each round in the results store, where the run's folder is not all that is wanted. `check` is
        called before anything is written, and raises where this driver is no longer to write.
        """
        self._config = config
        self._preprocess = preprocess
        self._cohort = cohort
        self._federation = federation
        self._folder = folder
        self._tracker = tracker
        self._emit = emit
        self._commits = commits
        self._check = check
        self._rounds: list[dict[str, Any]] = []
        self._layers: list[dict[str, Any]] = []  # a row a round and layer with LoRA
        self._epsilon: float | None = None
        self._logged: dict[str, Any] = {}  # the last round's metrics, as MLflow gets them
        self._curve: list[tuple[int, float | None]] = []
        self._recorded = 0  # lines of the record that are in its file
        self._started = monotonic()

    def begin(self, test: Scores, validation: Scores) -> None:
        """Before the first round: what is trained from which state, and how the model segments as it is."""
        self._check()
        self._before = self._summary(test)
        self._folder.write_yaml("config.yaml", self._config.model_dump(mode="json"))
        self._folder.write("manifest.json", self._federation.manifest.to_json().encode())
        self._folder.write("initial.safetensors", pack_state(self._federation.manifest, self._state()))
        self.keep_record()
        self._curve.append((0, _known(validation.mean_dice)))
        self._finish_round(
            ["config.yaml", "manifest.json", "initial.safetensors"], self._validation_metrics(validation)
        )
        self._emit(
            Event(f"before training: test Dice {_number(self._before['dice'])}", 0, self._config.federation.rounds)
        )

    def go_on(self, left: LeftOff) -> None:
        """In place of `begin`, for a run that goes on. Its folder is as that checkpoint has it."""
        kept = left.checkpoint.facts
        self._before, self._epsilon, self._logged = kept["before"], kept["epsilon"], kept["logged"]
        self._rounds, self._layers = kept["tables"]["rounds.csv"], kept["tables"]["layers.csv"]
        self._curve = [(number, dice) for number, dice in kept["curve"]]
        self._started -= kept["seconds"]
        self._recorded = len(left.record)
        self.keep_record()  # that it was resumed
        self._log()  # the driver may have been lost before; what MLflow has already, it takes for the same

    def after_round(self, report: RoundReport, state: GlobalState) -> None:
        """After each round: tables, checkpoint, metrics, a line."""
        self._check()
        ledger = self._federation.ledger
        sums = []
        if self._config.federation.keep_sums:
            for total in report.totals:
                if len(total.packed) > RECORDED_BYTES:  # else it stands in the record itself
                    sums.append(sum_file(total.entry))
                    self._folder.write(sums[-1], total.packed)
        self.keep_record()
        self._epsilon = report.epsilon
        metrics = {
            **({} if math.isnan(report.loss) else {"train/loss": report.loss}),
            "train/update_norm": report.update_norm,
            "secagg/error_bound": report.precision.bound,
            "secagg/error_largest": report.precision.largest,
            "secagg/error_rms": report.precision.rms,
            "secagg/cut": report.precision.cut,
            **self._lora_metrics(report),
            **({} if report.epsilon is None else {"privacy/epsilon": report.epsilon}),
            "round/attempts": float(len(report.failed) + 1),
            "round/sites": float(len(report.contributors)),
            "comm/bytes_up": float(report.bytes_up),
            "comm/bytes_down": float(report.bytes_down),
            "comm/bytes_total": float(ledger.total()),
            **{f"round/seconds_{stage}": seconds for stage, seconds in report.seconds.items()},
            **{
                f"train/dice_{name}": dice
                for name, dice in zip(self._cohort.classes, report.dice, strict=True)
                if not math.isnan(dice)
            },
            **(self._validation_metrics(report.validation) if report.validation else {}),
        }
        row = {"round": report.round, "state_hash": report.state_hash, "contributors": " ".join(report.contributors)}
        row |= {
            name: "; ".join(f"{site}: {why}" for site, why in sites.items())
            for name, sites in (("lost", report.lost), ("disturbed", report.disturbed))
        }
        self._rounds.append(row | metrics)
        self._folder.write_table("rounds.csv", self._rounds)
        self._folder.write_table("ledger.csv", ledger.rows())
        if report.validation is not None:
            self._curve.append((report.round, _known(report.validation.mean_dice)))
        self._finish_round(["rounds.csv", "ledger.csv", "layers.csv", *sums], metrics)
        for why in report.failed:
            self._emit(Event(f"round {report.round}: an attempt came to nothing ({why})"))
        for site, why in report.lost.items():
            self._emit(Event(f"round {report.round}: went on without {site} ({why})"))
        for site, why in report.disturbed.items():
            self._emit(Event(f"round {report.round}: {site} is in it, and was lost in one of its sums ({why})"))
        numbers = {"bytes_up": float(ledger.total("up")), "bytes_down": float(ledger.total("down"))}
        if report.validation is not None:
            numbers |= {} if math.isnan(report.validation.mean_dice) else {"dice": report.validation.mean_dice}
        dice = "" if report.validation is None else f" validation Dice {_number(report.validation.mean_dice)},"
        loss = "" if math.isnan(report.loss) else f" loss {report.loss:.3f},"
        line = f"round {report.round}:{loss}{dice} {sum(report.seconds.values()):.0f} s"
        self._emit(Event(line, report.round, self._config.federation.rounds, numbers=numbers))

    def finish(self, segmenter: SamSegmenter, test: Scores, personal: Scores | None, ui: str) -> Outcome:
        """After the last round: adapter, scores, pictures, and the outcome."""
        self._check()
        federation, config = self._federation, self._config
        after = self._summary(test)
        load_shared_state(segmenter, federation.manifest, self._state())
        card = describe(
            segmenter,
            self._cohort,
            run=federation.run,
            dice=after["dice"],
            dice_by_class={name: group["dice"] for name, group in after["per_class"].items()},
            preprocess=self._preprocess,
            slices=config.slices,
            precision=config.learning.precision,
        )
        save_adapter(segmenter, federation.manifest, self._folder.path / "adapter", card)
        self._folder.write_table("ledger.csv", federation.ledger.rows())  # with the closing scores
        self.keep_record()
        rows = site_rows(after)
        self._folder.write_table("scores.csv", rows)
        for site, png in test.pictures.items():
            self._folder.write(f"pictures/{site}.png", png)
        if after["per_site"] and self._before["per_site"]:
            dice_bars(after, self._cohort, self._folder.path / "pictures" / "dice.png", self._before)
        training = [(r["comm/bytes_up"], r["comm/bytes_down"]) for r in self._rounds]
        outcome = Outcome(
            folder=self._folder.path,
            ui=ui,
            before=self._before,
            after=after,
            bytes_up=sum(up for up, _ in training) / len(training),
            bytes_down=sum(down for _, down in training) / len(training),
            total_up=federation.ledger.total("up"),
            total_down=federation.ledger.total("down"),
            curve=tuple(self._curve),
            trained=federation.manifest.trainable,
            rounds=config.federation.rounds,
            minutes=(monotonic() - self._started) / 60,
            personal=None if personal is None else self._summary(personal),
            epsilon=self._epsilon,
            mlflow_run=self._tracker.run_id,
        )
        head = federation.record.head
        absent = federation.attendance.absent
        for site, count in absent.items():
            self._emit(Event(f"{site} is missing in {count} of {outcome.rounds} rounds: rounds.csv says why"))
        said = {"folder": str(outcome.folder), "record_head": head, "absent": absent}
        self._folder.write_json("summary.json", asdict(outcome) | said)
        self._tracker.set_tags({"fedsam.record_head": head})  # where whoever changes the run's folder cannot reach it
        final = self._final_metrics(after)
        if outcome.personal is not None:
            final |= dice_metrics("test/dice_personal", "test_dice_personal", outcome.personal)
        self._tracker.log_round(config.federation.rounds, final, self._logged["time"])
        self._tracker.log_table("rounds", self._rounds)
        if rows:
            self._tracker.log_table("scores", rows)
        for path in sorted(self._folder.path.iterdir()):
            if path.name not in _NOT_TRACKED:
                self._tracker.log_artifact(path, path.name if path.is_dir() else "")
        if self._commits is not None:
            files = [path for part in ("adapter", "pictures") for path in sorted((self._folder.path / part).rglob("*"))]
            names = [path.relative_to(self._folder.path).as_posix() for path in files]
            self._commits.finish(
                [*names, "state.safetensors", "ledger.csv", "scores.csv", "summary.json"], federation.record.lines
            )
            self._emit(Event(f"the run is kept in {self._commits.url}"))
        return outcome

    def _finish_round(self, names: list[str], metrics: Mapping[str, float]) -> None:
        """A checkpoint, which ends the round; in the results store too, and one that is away is waited for with the
        next. MLflow hears of it last: it is told again where the driver is lost before that."""
        federation = self._federation
        number, saved = federation.done, federation.save()
        self._logged = {"round": number, "metrics": dict(metrics), "time": now_ms()}
        saved.facts.update(
            tables={"rounds.csv": self._rounds, "layers.csv": self._layers},
            before=self._before,
            curve=self._curve,
            epsilon=self._epsilon,
            seconds=monotonic() - self._started,
            logged=self._logged,
        )
        if number:
            self._folder.write("state.safetensors", pack_state(federation.manifest, self._state(), note_of(saved)))
        put_checkpoint(self._folder, saved)
        if self._commits is not None:
            place = round_place(number)
            if why := self._commits.commit(place, [*names, checkpoint_file(number)], federation.record.lines):
                self._emit(Event(f"round {number} is not in the results store yet, and goes with the next ({why})"))
        prune(self._folder)
        self._log()

    def _log(self) -> None:
        self._tracker.log_round(self._logged["round"], self._logged["metrics"], self._logged["time"])

    def _state(self) -> dict[str, Any]:
        return self._federation.server.state.tensors

    def _lora_metrics(self, report: RoundReport) -> dict[str, float]:
        """How far LoRA's mean is from the mean of the sites' products, over all layers; each layer in layers.csv."""
        lora = report.lora
        for layer, off in lora.inexactness.items():
            row = {"round": report.round, "layer": layer, "inexactness": off, "change": lora.change[layer]}
            self._layers.append(row | {"truncation": lora.truncation.get(layer)})
        if self._layers:
            self._folder.write_table("layers.csv", self._layers)
        found = {} if math.isnan(lora.relative) else {"lora/inexactness": lora.relative}
        if lora.truncation:
            found["lora/truncation"] = max(lora.truncation.values())
        return found

    def keep_record(self) -> None:
        """Adds to the file what the record has grown by."""
        lines = self._federation.record.lines
        if self._recorded < len(lines):
            self._folder.append(RECORD, b"".join(line + b"\n" for line in lines[self._recorded :]))
        self._recorded = len(lines)

    def _summary(self, scores: Scores) -> dict[str, Any]:
        return summary_of(scores, self._cohort.classes)

    def _validation_metrics(self, scores: Scores) -> dict[str, float]:
        return dice_metrics("val/dice", "dice", self._summary(scores))

    def _final_metrics(self, after: dict[str, Any]) -> dict[str, float]:
        return dice_metrics("test/dice", "test_dice", after) | dice_metrics(
            "test/dice_before", "test_dice_before", self._before
        )


def ended_outcome(config: Config, run: str) -> Outcome:
    """The outcome of a run that has come to its end, as its summary.json has it.

    Raises:
        StoreError: that is not there, or not readable.
    """
    summary = read_run_file(results_store(config), run, "summary.json")
    try:
        told = json.loads(summary or b"")
        kept = {one.name: told[one.name] for one in fields(Outcome)}
        curve = tuple((number, dice) for number, dice in told["curve"])
    except (ValueError, LookupError, TypeError) as error:
        raise StoreError(f"run {run} has ended, but its summary.json is missing or damaged: remove the run") from error
    return Outcome(**{**kept, "folder": config.work_dir / "runs" / run, "curve": curve})


def summary_of(scores: Scores, classes: Sequence[str]) -> dict[str, Any]:
    """Scores as a run's tables tell them: "dice" and "per_class" over all cases; "per_site", "macro_dice" and "cases"
    from the sites that tell."""
    told = [group["dice"] for group in scores.by_site.values() if group["dice"] is not None]
    return {
        "dice": _known(scores.mean_dice),
        "per_class": {name: {"dice": _known(dice)} for name, dice in zip(classes, scores.dice, strict=True)},
        "per_site": scores.by_site,
        "macro_dice": sum(told) / len(told) if told else None,
        "cases": sum(group["cases"] for group in scores.by_site.values()),
    }


def dice_rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """Rows of a closing table: each site and class, then all sites, with Dice before and after training."""
    rows = [
        (f"{what} {name}", before[part][name]["dice"] if name in before[part] else None, group["dice"])
        for what, part in (("site", "per_site"), ("class", "per_class"))
        for name, group in sorted(after[part].items())
    ]
    return [*rows, ("all sites", before["dice"], after["dice"])]


def site_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a site: how many cases, Dice over the classes, Dice of each."""
    return [
        {"site": site, "cases": group["cases"], "dice": group["dice"]}
        | {f"dice_{name}": one["dice"] for name, one in group["per_class"].items()}
        for site, group in summary["per_site"].items()
    ]


def inputs_of(config: Config, preprocess: PreprocessConfig) -> dict[str, Any]:
    """What a scan goes through before the model sees it: an adapter is good for this and nothing else.

    The keys are those of the adapter's card; `preprocess` has nothing left open.
    """
    return {
        "preprocess": preprocess.model_dump(mode="json"),
        "context": config.slices.context,
        "context_mm": config.slices.context_mm,
    }


def dice_metrics(overall: str, by_site: str, summary: dict[str, Any]) -> dict[str, float]:
    """Flat metric names: `overall`, `overall`_CLASS, site/ID/`by_site`. What could not be scored is left out."""
    named = {overall: summary["dice"]}
    named |= {f"{overall}_{name}": group["dice"] for name, group in summary["per_class"].items()}
    named |= {f"site/{site}/{by_site}": group["dice"] for site, group in summary["per_site"].items()}
    return {name: dice for name, dice in named.items() if dice is not None}


def _known(dice: float) -> float | None:
    return None if math.isnan(dice) else dice


def _number(dice: float | None) -> str:
    return "-" if dice is None or math.isnan(dice) else f"{dice:.3f}"
