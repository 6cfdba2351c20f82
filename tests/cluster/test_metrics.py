"""A run's numbers, read back from a node's metrics port as Prometheus does."""

import logging
import re
import time
import urllib.request
from dataclasses import replace

import pytest
import ray
from support.federations import small_cohort, small_federation, small_specs

from cluster.metrics import RoundMetrics
from fedsam_core.federation.engine import in_process
from fedsam_core.federation.rounds import RoundReport, run_rounds
from fedsam_core.federation.site import FederatedSite


def scraped(run: str) -> dict[str, float]:
    """Samples of a run by name and the tag beside the run, from all nodes."""
    found: dict[str, float] = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            text = urllib.request.urlopen(url, timeout=10).read().decode()
        except OSError:
            continue
        for name, tags, value in re.findall(r"^ray_(fedsam_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            if f'run="{run}"' in tags:
                own = re.search(r'(?:direction|stage|site)="([^"]*)"', tags)
                found[f"{name}/{own[1]}" if own else name] = float(value)
    return found


def test_a_rounds_numbers_are_exported_and_logged(
    ray_cluster: tuple[str, ...], tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    specs = small_specs(small_cohort(tmp_path), rounds=1)
    federation, _ = small_federation(in_process(specs, FederatedSite), specs[0])
    reports: list[RoundReport] = []
    metrics = RoundMetrics("exported")
    with caplog.at_level(logging.INFO, "cluster.metrics"):
        run_rounds(federation, lambda report, _: (reports.append(report), metrics(report)))
    (report,) = reports
    trouble = replace(report, lost={"site-c": "gone"}, failed=("too few answered",), loss=float("nan"), validation=None)
    RoundMetrics("troubled")(trouble)
    end = time.monotonic() + 60
    while not ((found := scraped("exported")) and scraped("troubled")) and time.monotonic() < end:
        time.sleep(0.5)
    assert found["fedsam_round"] == 1
    assert found["fedsam_dice"] == pytest.approx(report.validation.mean_dice)
    assert found["fedsam_loss"] == pytest.approx(report.loss)
    assert found["fedsam_bytes_total/up"] == report.bytes_up
    assert found["fedsam_bytes_total/down"] == report.bytes_down
    for stage, took in report.seconds.items():
        assert found[f"fedsam_seconds/{stage}"] == pytest.approx(took)
    assert not [name for name in found if "lost" in name]
    told = [record for record in caplog.records if record.name == "cluster.metrics"]
    assert [(record.run, record.round, record.attempt) for record in told[:1]] == [("exported", 1, 1)]
    found = scraped("troubled")
    assert found["fedsam_lost_sites_total/site-c"] == 1
    assert found["fedsam_failed_attempts_total"] == 1
    assert not {"fedsam_loss", "fedsam_dice"} & set(found)
