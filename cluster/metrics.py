"""A run's numbers where Prometheus finds them: Ray exports them, as ray_fedsam_*, at every node's metrics port."""

import logging
import math

import ray
from ray.util.metrics import Counter, Gauge

from fedsam_core.federation.rounds import RoundReport

_log = logging.getLogger(__name__)


class RoundMetrics:
    """Tells of each round of one run: to Ray where there is one, and to the log."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._is_exported = ray.is_initialized()
        if self._is_exported:
            self._round = Gauge("fedsam_round", "last round that is finished", ("run",))
            self._dice = Gauge("fedsam_dice", "mean Dice on the validation cases of all sites", ("run",))
            self._loss = Gauge("fedsam_loss", "mean training loss of the last round", ("run",))
            self._seconds = Gauge("fedsam_seconds", "of the last round, by stage", ("run", "stage"))
            self._bytes = Counter("fedsam_bytes", "messages of all sites, serialized", ("run", "direction"))
            self._lost = Counter("fedsam_lost_sites", "rounds that went on without a site", ("run", "site"))
            self._failed = Counter("fedsam_failed_attempts", "of sums, repeated with fresh keys", ("run",))

    def __call__(self, report: RoundReport) -> None:
        """Takes note of a finished round."""
        about = {"run": self._run, "round": report.round}
        for why in report.failed:
            _log.warning("an attempt failed: %s", why, extra=about)
        for site, why in report.lost.items():
            _log.warning("went on without %s: %s", site, why, extra={**about, "site": site})
        seconds = ", ".join(f"{stage} {took:.1f} s" for stage, took in report.seconds.items())
        _log.info("%d sites, %s", len(report.contributors), seconds, extra={**about, "attempt": len(report.failed) + 1})
        if self._is_exported:
            self._export(report)

    def _export(self, report: RoundReport) -> None:
        run = {"run": self._run}
        self._round.set(report.round, run)
        if report.validation is not None and not math.isnan(report.validation.mean_dice):
            self._dice.set(report.validation.mean_dice, run)
        if not math.isnan(report.loss):
            self._loss.set(report.loss, run)
        for stage, took in report.seconds.items():
            self._seconds.set(took, {**run, "stage": stage})
        for direction, count in (("up", report.bytes_up), ("down", report.bytes_down)):
            if count:
                self._bytes.inc(count, {**run, "direction": direction})
        for site in report.lost:
            self._lost.inc(1, {**run, "site": site})
        if report.failed:
            self._failed.inc(len(report.failed), run)
