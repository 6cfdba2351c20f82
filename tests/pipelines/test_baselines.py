"""Pooled, alone and untrained: the same budget and the same scores as a federation, interrupted or not, Ray or not."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import yaml
from mlflow.tracking import MlflowClient
from support.dying import dying

from cluster.placement import Node, SiteNeeds
from cluster.trainer import scaling
from fedsam_core.errors import ClusterError, ConfigError, DataError, TrainingError
from fedsam_core.evaluation.metrics import summarize
from fedsam_core.federation.preparation import PreparedSites
from pipelines import baselines, console
from pipelines import evaluate as evaluation
from pipelines.baselines import Baseline, centralized, local, zero_shot
from pipelines.config import Config, load_config
from pipelines.federate import federate, open_tracking
from pipelines.prepare import prepare_sites, prepared_cohort
from pipelines.recorder import Event
from pipelines.run_folder import RunFolder

Made = tuple[Config, PreparedSites]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Three synthetic sites with five cases each, prepared; no Ray."""
    config = load_config(
        None,
        [
            "name=small",
            f"work_dir={tmp_path_factory.mktemp('work')}",
            "cohort.name=phantom",
            "cohort.source=phantom",
            "cohort.phantom.sites=3",
            "cohort.phantom.cases_per_site=5",
            "cohort.phantom.test_per_site=1",
            "model.backbone=vit_t",
            "model.image_size=32",
            "rank=4",
            "engine.kind=in-process",
            "federation.rounds=2",
            "learning.local_steps=1",
            "learning.batch_size=4",
            "learning.precision=fp32",
        ],
    )
    return config, prepare_sites(config)


@pytest.fixture(scope="module")
def pooled(made: Made) -> Baseline:
    """Never interrupted, without Ray."""
    return centralized(*made, ignore)


@pytest.fixture(scope="module")
def on_ray(made: Made) -> Iterator[Made]:
    import ray

    found = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}  # of the tests' own modules, too
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=found,
    )
    try:
        config, prepared = made
        engine = config.engine.model_copy(update={"kind": "ray"})
        yield config.model_copy(update={"engine": engine}), prepared
    finally:
        ray.shutdown()


def ignore(event: Event) -> None:
    pass


def result_of(baseline: Baseline) -> tuple[Any, ...]:
    """All that must not depend on how a baseline was run."""
    files = ("adapter/adapter_model.safetensors", "adapter/trained.safetensors", "rounds.csv", "scores.csv")
    found = {name: (baseline.folder / name).read_bytes() for name in files if (baseline.folder / name).exists()}
    assert len(found) == 3
    return found, baseline.test, baseline.before, baseline.curve


def test_pooled_training_has_a_runs_folder_and_the_sites_budget(made: Made, pooled: Baseline) -> None:
    config, prepared = made
    assert [number for number, _ in pooled.curve] == [0, 1, 2]
    assert pooled.test["cases"] == 3
    assert set(pooled.test["per_site"]) == set(prepared.sites)
    assert pooled.rounds == 2
    assert {path.name for path in pooled.folder.iterdir()} >= {
        *("config.yaml", "manifest.json", "summary.json", "scores.csv", "rounds.csv", "adapter", "pictures")
    }
    assert {path.name for path in (pooled.folder / "pictures").iterdir()} == {
        *(f"{site}.png" for site in prepared.sites),
        "dice.png",
    }
    assert Config.model_validate(yaml.safe_load((pooled.folder / "config.yaml").read_text())) == config
    assert not any((config.work_dir / "unfinished").iterdir())
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        centralized(*made, lambda event: stop_at("are POOLED", event, told))
    assert "2 rounds of 3 steps" in told[-1]  # a step of each of three sites


def stop_at(text: str, event: Event, told: list[str]) -> None:
    told.append(event.text)
    if text in event.text:
        raise KeyboardInterrupt


def test_a_resumed_run_ends_as_if_it_had_never_stopped(made: Made, pooled: Baseline) -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        centralized(*made, lambda event: stop_at("round 2:", event, told))
    again: list[str] = []
    resumed = centralized(*made, lambda event: again.append(event.text), parent=pooled.mlflow_run, tags={"mine": "1"})
    assert any("round 1 was done before" in line for line in again)
    assert any(line.startswith(f"run {resumed.run}:") for line in told)  # the run that was begun
    assert result_of(resumed) == result_of(pooled)
    client = MlflowClient(open_tracking(made[0]).uri)
    experiment = client.get_experiment_by_name(made[0].tracking.experiment)
    assert experiment is not None
    runs = {run.data.tags["fedsam.spool"]: run for run in client.search_runs([experiment.experiment_id])}
    tags, metrics = runs[resumed.mlflow_run].data.tags, runs[resumed.mlflow_run].data.metrics
    parent = runs[pooled.mlflow_run].info.run_id
    assert (tags["mlflow.parentRunId"], tags["mine"], tags["fedsam.stage"]) == (parent, "1", "centralize")
    assert metrics["test/dice"] == pytest.approx(resumed.test["dice"])
    assert {f"site/{site}/test_dice" for site in made[1].sites} <= metrics.keys()
    assert [point.step for point in client.get_metric_history(runs[resumed.mlflow_run].info.run_id, "val/dice")] == [
        0,
        1,
        2,
    ]


def test_evaluate_finds_the_same_dice_in_the_adapter(made: Made, pooled: Baseline, tmp_path: Path) -> None:
    config = load_config(str(pooled.folder / "config.yaml"), [f"evaluation.adapter={pooled.folder}"])
    cohort = prepared_cohort(config)
    segmenter = evaluation.load_segmenter(config, cohort, evaluation.find_adapter(config))
    with console.Bars() as bars:
        scores = evaluation.evaluate(config, cohort, segmenter, RunFolder(tmp_path), bars)
    summary = summarize(scores, cohort.cohort.classes)
    assert summary["dice"] == pytest.approx(pooled.test["dice"], abs=1e-12)
    assert {site: group["dice"] for site, group in summary["per_site"].items()} == {
        site: group["dice"] for site, group in pooled.test["per_site"].items()
    }


def test_untrained_is_where_a_federation_begins(made: Made) -> None:
    config, prepared = made
    alone = zero_shot(*made, ignore)
    one_round = config.federation.model_copy(update={"rounds": 1})
    outcome = federate(config.model_copy(update={"federation": one_round}), prepared, ignore)
    assert alone.test == alone.before
    assert alone.test["per_site"] == outcome.before["per_site"]
    assert alone.test["macro_dice"] == outcome.before["macro_dice"]
    assert alone.test["dice"] == pytest.approx(outcome.before["dice"], abs=1e-6)  # that is from whole numbers
    assert alone.test.keys() == outcome.before.keys()
    assert (alone.trainable, alone.rounds) == (0, 0)


def test_each_site_alone_is_scored_at_every_site(made: Made) -> None:
    found = local(*made, ignore)
    sites = set(made[1].sites)
    assert set(found.cross) == sites
    assert all(set(row) == sites and None not in row.values() for row in found.cross.values())
    for site in sites:
        assert found.cross[site][site] == found.test["per_site"][site]["dice"]
    assert [number for number, _ in found.curve] == [0, 1, 2]
    assert (found.folder / "cross.csv").is_file()
    assert not (found.folder / "adapter").exists()


def test_ray_gives_the_same_bits_even_when_a_worker_is_lost(
    on_ray: Made, pooled: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_train_pooled", dying)
    told: list[str] = []
    result = centralized(*on_ray, lambda event: told.append(event.text))
    assert (on_ray[0].work_dir / "died").exists()
    assert any("round 1 was done before" in line for line in told)
    ours, theirs = result_of(result), result_of(pooled)
    assert ours == theirs


def test_two_workers_share_the_batches(on_ray: Made, pooled: Baseline) -> None:
    config, prepared = on_ray
    engine = config.engine.model_copy(update={"workers": 2})
    result = centralized(config.model_copy(update={"engine": engine}), prepared, ignore)
    assert result.before == pooled.before
    assert [number for number, _ in result.curve] == [0, 1, 2]
    assert (result.folder / "adapter" / "card.json").is_file()


def test_what_diverges_is_an_error_in_a_line(on_ray: Made) -> None:
    config, prepared = on_ray
    wild = config.learning.model_copy(update={"learning_rate": 1e30, "gradient_clip": 0.0, "warmup_rounds": 0.0})
    with pytest.raises(TrainingError, match=r"pooled training: .* is not finite in round \d, step \d.*learning_rate"):
        centralized(config.model_copy(update={"learning": wild}), prepared, ignore)


def test_what_cannot_be_pooled_is_refused(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, prepared = made
    first, share = next(iter(prepared.shares.items()))
    gone = replace(prepared, shares={**prepared.shares, first: {**share, "url": str(tmp_path / "gone")}})
    with pytest.raises(ConfigError, match=f"share of site {first} .* is not on this machine"):
        centralized(config, gone, ignore)
    bare = replace(prepared, shares={**prepared.shares, first: {**share, "cases": {"train": 0, "val": 1, "test": 1}}})
    with pytest.raises(DataError, match=f"site {first}: no training case"):
        local(config, bare, ignore)
    monkeypatch.setattr(baselines, "cluster_nodes", lambda: (Node("one"), Node("two")))
    cohort = config.cohort.model_copy(update={"sites": dict.fromkeys(prepared.sites, tmp_path)})
    engine = config.engine.model_copy(update={"kind": "ray"})
    apart = config.model_copy(update={"cohort": cohort, "engine": engine})
    with pytest.raises(ConfigError, match=r"cohort\.sites keeps the scans of .* cohort\.path"):
        zero_shot(apart, prepared, ignore)
    for kind, workers, reason in (("in-process", 2, "needs Ray"), ("ray", 5, "cannot share batches of 4")):
        engine = config.engine.model_copy(update={"kind": kind, "workers": workers})
        with pytest.raises(ConfigError, match=reason):
            centralized(config.model_copy(update={"engine": engine}), prepared, ignore)


@pytest.mark.parametrize(
    ("workers", "nodes", "needs", "books"),
    [
        (2, (Node("a", 2),), SiteNeeds(), {"CPU": 0.5}),
        (4, (Node("a", 2, 2), Node("b", 2, 2)), SiteNeeds(cpus=1), {"CPU": 1, "GPU": 1}),
        (5, (Node("a", 2, 2), Node("b", 2, 2)), SiteNeeds(cpus=1), None),
        (5, (Node("a", 2),), SiteNeeds(), None),
        (2, (Node("a", 2, 1),), SiteNeeds(gpus=0.5), {"CPU": 0.5, "GPU": 0.5}),
    ],
)
def test_workers_book_what_a_site_books(
    workers: int, nodes: tuple[Node, ...], needs: SiteNeeds, books: dict[str, float] | None
) -> None:
    if books is None:
        with pytest.raises(ClusterError, match=rf"engine\.workers={workers} .* room for 4"):
            scaling(workers, nodes, needs)
    else:
        assert scaling(workers, nodes, needs).resources_per_worker == books
