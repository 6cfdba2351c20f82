"""What a person sees of a study in MLflow's pages. Needs Chromium, and is skipped without it."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from support.browser import Browser, browser, missing
from support.mlflow import mlflow_server
from support.mlflow_pages import UNFOLD, compare_url, differences, parallel_coordinates
from support.servers import free_ports

from cluster.tracking import Tracking, TrackingConfig
from pipelines.config import load_config
from pipelines.federate import run_params

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

STUDY = "layers-made-up"
FINAL = {"full": 0.78, "decoder": 0.69, "lora": 0.74, "flap": 0.77}
SENT = {"full": 362e6, "decoder": 15.6e6, "lora": 5.5e6, "flap": 7.4e6}
CHILDREN = [f"{selection}-seed{seed}" for selection in FINAL for seed in (0, 1)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, list[str]]]:
    """(server, experiment's id, MLflow ids of the children) of a study of four selections with two seeds each.

    Its numbers are made up; names of parameters and metrics are those of a federation.
    """
    folder = tmp_path_factory.mktemp("ui")
    with mlflow_server(folder / "server", free_ports(1)[0]) as server:
        tracking = Tracking(TrackingConfig(uri=server.uri, experiment=STUDY), folder / "work")
        rng = np.random.default_rng(0)
        with tracking.start(STUDY, {}, {"fedsam.stage": "ablate", "fedsam.study": STUDY}) as parent:
            for selection, final in FINAL.items():
                for seed in (0, 1):
                    config = load_config("demo", [f"selection={selection}", f"seed={seed}", "federation.rounds=8"])
                    tags = {"fedsam.stage": "federate", "fedsam.study": STUDY, "fedsam.synthetic": "true"}
                    end = final + 0.01 * rng.normal()
                    with tracking.start(f"{selection}-seed{seed}", run_params(config), tags, parent.run_id) as child:
                        for step in range(9):
                            dice = end * (1 - math.exp(-step / 2)) + 0.005 * rng.normal()
                            metrics = {"val/dice": dice, "comm/bytes_up": SENT[selection]}
                            metrics |= {"comm/bytes_total": 2 * 8 * SENT[selection], "train/loss": 1 - 0.9 * dice}
                            child.log_round(step, metrics)
                        sites = {f"site/{site}/test_dice": end + 0.03 * rng.normal() for site in ("north", "south")}
                        child.log_round(8, {"test/dice": end, "test/dice_before": 0.02, **sites})
        client = MlflowClient(server.uri, server.uri)
        experiment = client.get_experiment_by_name(STUDY)
        assert experiment is not None
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert set(runs) == {STUDY, *CHILDREN}
        yield server.uri, experiment.experiment_id, [runs[name].info.run_id for name in CHILDREN]


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with browser(free_ports(1)[0]) as opened:
        yield opened


def test_the_charts_page_shows_parent_and_children(
    study: tuple[str, str, list[str]], page: Browser, tmp_path: Path
) -> None:
    server, experiment, _ = study
    page.open(f"{server}/#/experiments/{experiment}/runs?compareRunsMode=CHART")
    page.wait_for([STUDY, "9 matching runs"])
    page.click(UNFOLD)
    page.wait_for([STUDY, *CHILDREN, "comm/bytes_total"])
    page.save(tmp_path / "mlflow-charts.png")


def test_the_compare_page_shows_every_child(study: tuple[str, str, list[str]], page: Browser, tmp_path: Path) -> None:
    """docs/mlflow-parallel-coordinates.png and docs/mlflow-compare.png are these pictures."""
    server, experiment, runs = study
    page.open(compare_url(server, experiment, runs))
    parallel_coordinates(page, CHILDREN, set(FINAL), tmp_path / "mlflow-parallel-coordinates.png")
    table = differences(page, tmp_path / "mlflow-compare.png")
    # The axes' names are in the table too: beside the parameter stand the selections, beside the metric the Dice.
    assert "selection\t" + "\t".join(name for name in FINAL for _ in (0, 1)) in table
    assert "\ntest/dice\n" in table
    for picture in ("parallel-coordinates", "compare"):
        assert (tmp_path / f"mlflow-{picture}.png").stat().st_size > 20_000
