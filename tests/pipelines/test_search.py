"""The greedy search, on trials whose Dice is a function of what they train."""

from collections.abc import Sequence

import pytest

from fedsam_core.errors import ConfigError
from fedsam_core.selection import LayerSelection
from pipelines.results import TrialResult
from pipelines.search import Step, grow
from pipelines.study import Search

WORTH = {"upscaling": 0.30, "hypernetworks": 0.25, "mask_tokens": 0.02, "encoder.norms": 0.0, "decoder": 0.5}
SIZE = {"upscaling": 10, "hypernetworks": 2, "mask_tokens": 1, "encoder.norms": 1, "decoder": 100}  # MB
CANDIDATES = [LayerSelection(name=name, train=(name,)) for name in WORTH]


def score(selections: Sequence[LayerSelection]) -> list[list[TrialResult]]:
    """Additive, with an offset a seed."""
    return [
        [
            TrialResult(
                id="0" * 16,
                group=one.name,
                selection=one.name,
                seed=seed,
                bytes_up=sum(SIZE[part] for part in one.train) * 500_000,
                bytes_down=sum(SIZE[part] for part in one.train) * 500_000,
                curve=((0, 0.1 + seed / 100), (1, 0.1 + seed / 100 + sum(WORTH[part] for part in one.train))),
            )
            for seed in (0, 1)
        ]
        for one in selections
    ]


def taken(steps: Sequence[Step]) -> list[str]:
    return [step.taken for step in steps]


def test_it_grows_by_what_brings_most_within_the_budget() -> None:
    steps = grow(Search(budget_mb=20), CANDIDATES, score)
    assert taken(steps) == ["upscaling", "hypernetworks", "mask_tokens"]
    assert [step.gain for step in steps] == pytest.approx([0.30, 0.25, 0.02])
    assert steps[-1].dice == pytest.approx(0.105 + 0.57)
    assert steps[-1].megabytes == 13
    assert steps[-1].selection.train == ("upscaling", "hypernetworks", "mask_tokens")
    assert {name for name, _, _ in steps[0].tried} == set(WORTH)


def test_by_megabyte_the_cheap_come_first() -> None:
    assert taken(grow(Search(budget_mb=20, by="gain_per_mb"), CANDIDATES, score))[0] == "hypernetworks"


def test_it_ends_with_the_budget_the_steps_or_the_gain() -> None:
    assert taken(grow(Search(budget_mb=11), CANDIDATES, score)) == ["upscaling", "mask_tokens"]
    assert taken(grow(Search(budget_mb=20, steps=1), CANDIDATES, score)) == ["upscaling"]
    assert taken(grow(Search(budget_mb=20, min_gain=0.1), CANDIDATES, score)) == ["upscaling", "hypernetworks"]
    with pytest.raises(ConfigError, match=r"budget_mb=0.5: the smallest run takes 1 MB"):
        grow(Search(budget_mb=0.5), CANDIDATES, score)


def test_without_validation_cases_it_cannot_choose() -> None:
    def blind(selections: Sequence[LayerSelection]) -> list[list[TrialResult]]:
        return [[r.model_copy(update={"curve": ()}) for r in results] for results in score(selections)]

    with pytest.raises(ConfigError, match="none has a validation Dice"):
        grow(Search(budget_mb=20), CANDIDATES, blind)
