"""Pre-training: it learns, it goes on bit for bit, and it may be made longer."""

from pathlib import Path

import pytest
import torch

from fedsam_core.errors import CheckpointError
from fedsam_core.pretraining.trainer import PretrainConfig, Pretraining, StepReport

CPU = torch.device("cpu")
TINY = PretrainConfig(steps=4, sizes={32: 1.0, 48: 1.0}, batch_pixels=2 * 48 * 48, warmup=2, precision="fp32")


def trained(
    config: PretrainConfig, checkpoint: Path, resume: Path | None = None
) -> tuple[Pretraining, list[StepReport]]:
    run, reports = Pretraining(config, CPU), []
    if resume is not None:
        run.load(resume)
    run.run(checkpoint, 2, reports.append)
    return run, reports


def same(one: Pretraining, other: Pretraining) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.sam.parameters(), other.sam.parameters(), strict=True))


def test_an_interrupted_run_gives_the_same_bits(tmp_path: Path) -> None:
    whole, reports = trained(TINY, tmp_path / "whole.pt")
    assert {report.size for report in reports} == {32, 48}
    half = Pretraining(TINY, CPU)
    half.advance(), half.advance()
    half.save(tmp_path / "half.pt")
    resumed, rest = trained(TINY, tmp_path / "resumed.pt", tmp_path / "half.pt")
    assert rest == reports[2:]
    assert same(whole, resumed)


def test_a_run_can_be_made_longer_until_its_rate_decays(tmp_path: Path) -> None:
    short, long = TINY.model_copy(update={"steps": 10}), TINY.model_copy(update={"steps": 20})
    run = Pretraining(short, CPU)
    for _ in range(2):
        run.advance()
    run.save(tmp_path / "early.pt")
    longer = Pretraining(long, CPU)
    longer.load(tmp_path / "early.pt")
    assert longer.step == 2
    run.step = 10  # as after the last one
    run.save(tmp_path / "late.pt")
    with pytest.raises(CheckpointError, match="another configuration"):
        longer.load(tmp_path / "late.pt")
    with pytest.raises(CheckpointError, match="another configuration"):
        Pretraining(long.model_copy(update={"seed": 1}), CPU).load(tmp_path / "early.pt")
    (tmp_path / "late.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="delete it"):
        longer.load(tmp_path / "late.pt")


def test_every_parameter_learns() -> None:
    run = Pretraining(TINY, CPU)
    before = {name: value.clone() for name, value in run.sam.named_parameters()}
    run.advance()
    still = [name for name, value in run.sam.named_parameters() if torch.equal(value, before[name])]
    assert still == [], "no loss reaches these"
