"""The benchmarks' arithmetic, and the Dice table of the LoRA rules: runs that are claimed, kept and not repeated."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsam_core.data.cohort import CohortConfig
from fedsam_core.data.sources.phantom import PhantomConfig

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import inference
import round_overhead
import rules
import scale
import soak
import train

CPU = torch.device("cpu")
BUDGET = rules.Budget(rounds=1, local_steps=1, batch_size=2, image_size=32, rank=2)


def row(name: str) -> rules.Row:
    return next(row for row in rules.ROWS if row.name == name)


def test_a_run_is_made_once_and_again_when_its_budget_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phantom = PhantomConfig(cases_per_site=2, test_per_site=1, shape=(8, 32, 32))
    config = CohortConfig(name="phantom", source="phantom", val_fraction=0, phantom=phantom)
    prepared = rules.prepare_once(config, tmp_path)
    for name in ("flap-fp32", "product-sketch-8", "centralized", "local"):
        rules.run_once(tmp_path, prepared, row(name), 0, BUDGET)
    chosen = [row("flap-fp32"), row("product-sketch-8"), row("centralized"), row("local"), row("ffa-8")]
    runs = rules.read_runs(tmp_path, chosen, 1, BUDGET)
    assert set(runs) == {"flap-fp32", "product-sketch-8", "centralized", "local"}, capsys.readouterr().out
    cases = {score["case"] for score in runs["local"][0]["scores"]}
    assert len(cases) == 3
    assert all({score["case"] for score in run[0]["scores"]} == cases for run in runs.values())
    full, coded = runs["flap-fp32"][0], runs["product-sketch-8"][0]
    assert coded["bytes_total"] == coded["bytes_up"] + coded["bytes_down"] < full["bytes_total"] / 2
    assert sum(full["bytes_by_purpose"].values()) == full["bytes_total"]

    path = tmp_path / "runs" / "local-0.json"
    before = path.read_text()
    rules.run_once(tmp_path, prepared, row("local"), 0, BUDGET)
    assert path.read_text() == before
    changed = rules.Budget(rounds=1, local_steps=2, batch_size=2, image_size=32, rank=2)
    assert rules.read_runs(tmp_path, chosen, 1, changed) == {}
    with rules.locked(path.with_suffix(".lock"), wait=False) as claimed:
        assert claimed
        rules.run_once(tmp_path, prepared, row("local"), 0, changed)  # another process is at it
    assert path.read_text() == before
    rules.run_once(tmp_path, prepared, row("local"), 0, changed)
    assert json.loads(path.read_text())["asked"]["local_steps"] == 2

    text = rules.report("phantom", chosen, runs, 1, BUDGET)
    assert "Not finished: ffa-8-0." in text
    assert rules.picture("phantom", chosen, runs).startswith(b"\x89PNG")


def test_a_failed_run_is_told_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing: Any = None  # no cohort: every run fails
    rules.run_once(tmp_path, nothing, row("local"), 0, BUDGET)
    rules.run_once(tmp_path, nothing, row("local"), 0, BUDGET)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("local-0: failed")
    assert "delete" in second
    assert "Traceback" in (tmp_path / "runs" / "local-0.error").read_text()


def test_a_row_that_cannot_be_configured_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing: Any = None
    rules.run_once(tmp_path, nothing, rules.Row("odd", federation={"bits": 5}), 0, BUDGET)
    assert "passed over" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def made_up(dice: np.ndarray[Any, Any], size: int) -> dict[str, Any]:
    """A run's file: Dice [case, class], cases in turn at two sites."""
    names = ("kidney", "tumour")
    scores = [
        {"case": f"case-{n}", "site": f"site-{'ab'[n % 2]}", "dice": dict(zip(names, values, strict=True))}
        for n, values in enumerate(dice.tolist())
    ]
    return {
        "scores": scores,
        "bytes_up": size,
        "bytes_down": size,
        "bytes_total": 2 * size,
        "code": "c",
        "cohort": "d",
        "cpu_seconds": 1.0,
    }


def test_the_cheapest_row_that_loses_nothing_is_named() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.9, size=(20, 2))

    def runs_of(shift: float, size: int) -> dict[int, dict[str, Any]]:
        return {seed: made_up(base + shift + rng.normal(0, 0.01, base.shape), size) for seed in range(3)}

    runs = {
        "flap-fp32": runs_of(0.0, 1000),
        "factors-8": runs_of(-0.02, 100),  # within flap's interval, but below it in every case
        "rolora-8": runs_of(0.0, 300),
        "ffa-8": runs_of(0.0, 200),
        "product-dense-8": runs_of(-0.3, 150),
        "centralized": runs_of(0.1, 0),
    }
    chosen = [row for row in rules.ROWS if row.name in runs]
    told = {line.row.name: line for line in rules.lines(chosen, runs)}
    assert {name for name, line in told.items() if line.within} == {"flap-fp32", "rolora-8", "ffa-8", "centralized"}
    best = rules.cheapest(list(told.values()))
    assert best is not None
    assert best.row.name == "ffa-8"
    assert told["factors-8"].difference == pytest.approx(-0.02, abs=0.01)
    low, high = told["factors-8"].difference_interval or (np.nan, np.nan)
    assert low < told["factors-8"].difference < high < 0
    assert "5.00x" in rules.report("phantom", chosen, runs, 3, BUDGET)


def test_means_are_over_sites_and_leave_out_what_has_no_dice() -> None:
    def score(case: str, site: str, kidney: float | None, tumour: float | None) -> rules.Score:
        return {"case": case, "site": site, "dice": {"kidney": kidney, "tumour": tumour}}

    one = [score("1", "a", 0.8, None), score("2", "a", 0.6, 0.4), score("3", "b", 1.0, 1.0)]
    two = [score("1", "a", 0.6, None), score("2", "a", 0.6, 0.2), score("3", "b", 0.0, 1.0)]
    groups = rules.tables([one, two])
    np.testing.assert_allclose(groups["a"], [[0.7, np.nan], [0.6, 0.3]])
    np.testing.assert_allclose(groups["b"], [[0.5, 1.0]])
    assert rules.mean_dice(groups) == pytest.approx(((0.65 + 0.3) / 2 + 0.75) / 2)


def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    """Seven sites, of which one in twenty is lost in every stage; `benchmarks/soak.py` does it at length."""
    found, knows = soak.in_one_process(sites=7, rounds=30, share=0.05, minutes=5, folder=tmp_path)
    assert found.rounds == 30
    assert sum(found.faults.values()) > 30
    assert found.contributors[0] >= 5
    assert knows
    assert abs(found.growth) < 30  # MiB


def test_overhead_is_what_is_left_of_a_round_without_training_and_validation() -> None:
    clock = round_overhead.Clock(side_by_side=True)
    calls = [("update/advertise", 0.3, 0.1), ("update/fit", 30.0, 11.0), ("scores/score", 9.0, 3.0)]
    clock.rounds = {0: (5.0, []), 1: (99.0, calls), 2: (40.0, calls), 3: (41.0, calls)}
    found = round_overhead.summarize(clock, {1: 50.0, 2: 10.0, 3: 10.0})
    phases = {"update/advertise": 0.1, "update/fit": 1.0, "driver": 40.5 - 39.3}
    assert found["by_phase"] == pytest.approx(phases)
    assert found["overhead_s"] == pytest.approx(sum(phases.values()))
    assert found["overhead"] == pytest.approx(0.23)
    assert found["spread"] == pytest.approx([0.18, 0.28])
    assert (found["training_s"], found["validation_s"]) == (10.0, 3.0)


def test_the_exponent_of_a_power() -> None:
    x = [3.0, 6.0, 24.0]
    assert scale.exponent(x, [5 * value**1.5 for value in x]) == pytest.approx(1.5)
    assert scale.exponent(x, [7.0, 7.0, 7.0]) == pytest.approx(0.0)


def test_the_papers_scheme_gives_the_same_labels_at_five_times_the_slices() -> None:
    options = argparse.Namespace(backbone="vit_t", size=32, slices=6, edge=32, batch=4, repeats=1, device=CPU)
    rows = {line["way"]: line for line in inference.measure(options)}
    assert rows["fp32"]["labels_as_paper"] == 1.0
    assert rows["bf16"]["labels_as_paper"] > 0.95


def test_what_a_step_is_compared_with_is_the_same_step() -> None:
    options = argparse.Namespace(backbone="vit_t", size=32, batch=2, steps=1, repeats=1, threads=1, device=CPU)
    options.selections, options.variants = ["flap", "decoder"], ["fp32", "cached"]
    rows = train.step_rows(options)
    assert [line["variant"] for line in rows] == ["plain", "fp32", "plain", "fp32", "cached"]  # flap freezes no block
    operations = [line["gflop_per_slice"] for line in rows if line["selection"] == "decoder"]
    assert operations[0] == operations[1] > operations[2] > 0
    with torch.no_grad():
        ours, plain = (inference.built(argparse.Namespace(backbone="vit_t", size=112, device=CPU)) for _ in range(2))
        train.install_official_attention(plain)
        for block in ours.image_encoder.blocks[0], plain.image_encoder.blocks[0]:
            block.attn.rel_pos_h.fill_(0.1)
        images = torch.rand(1, 3, 112, 112)
        torch.testing.assert_close(ours(images), plain(images), atol=1e-5, rtol=1e-5)
