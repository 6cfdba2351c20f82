"""What a site's batches are made of: the stated share of empty slices, and augmentation by (round, site, case)."""

from typing import Any

import numpy as np
import pytest
import torch
from support.federations import small_cohort

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.data.slices import SliceConfig, SliceDataset
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.learner import Learner
from fedsam_core.sam.adapters import adapt
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.selection import preset


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedCohort:
    return small_cohort(tmp_path_factory.mktemp("cohort"))


def learner(dataset: SliceDataset, **settings: Any) -> Learner:
    selection = preset("partial-decoder")
    segmenter = build_segmenter(ModelConfig(backbone="vit_t", image_size=32), 2, selection, seed=0)
    manifest = adapt(segmenter, selection)
    return Learner("site-a", segmenter, manifest, dataset, LearningConfig(**settings), torch.device("cpu"))


def datasets(prepared: PreparedCohort) -> dict[str, SliceDataset]:
    """All training slices of a site, and only its slices with, or without a structure."""
    cases = [prepared.load(case.id) for case in prepared.cohort.select("site-a", "train")]
    found = {"both": SliceDataset(cases, 32, SliceConfig())}
    for name, shown in (("shown", True), ("bare", False)):
        parts = []
        for case in cases:
            keep = case.label.any(axis=(1, 2)) == shown
            parts.append(case.__class__(case.case, case.image[keep], case.label[keep], case.spacing, case.geometry))
        found[name] = SliceDataset([part for part in parts if len(part.image)], 32, SliceConfig())
    return found


@pytest.mark.parametrize("size", [3, 12])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_a_round_has_the_stated_share_of_empty_slices(prepared: PreparedCohort, share: float, size: int) -> None:
    dataset = datasets(prepared)["both"]
    shown = dataset.foreground_slices()
    assert 0 < shown.sum() < len(shown)
    site = learner(dataset, empty_share=share, batch_size=size, local_steps=20)
    batches = site._draw_batches(np.random.default_rng(0), site.steps)
    empty = [int((~shown[batch]).sum()) for batch in batches]
    assert [len(batch) for batch in batches] == [size] * 20
    assert sum(empty) == round(20 * size * share)
    assert max(empty) - min(empty) <= 1
    drawn = np.concatenate(batches)
    for pool in (np.flatnonzero(shown), np.flatnonzero(~shown)):
        times = np.bincount(drawn[np.isin(drawn, pool)], minlength=len(shown))[pool]
        assert times.max() - times.min() <= 1  # every slice of a kind once before any twice


@pytest.mark.parametrize("kind", ["shown", "bare"])
def test_a_site_with_slices_of_one_kind_uses_those(prepared: PreparedCohort, kind: str) -> None:
    dataset = datasets(prepared)[kind]
    site = learner(dataset, empty_share=0.25, batch_size=4, local_steps=5)
    batches = site._draw_batches(np.random.default_rng(0), site.steps)
    assert [len(batch) for batch in batches] == [min(4, len(dataset))] * 5


def test_augmentation_does_not_depend_on_the_sites_other_cases(prepared: PreparedCohort) -> None:
    cases = [prepared.load(case.id) for case in prepared.cohort.select("site-a", "train")]
    alone = SliceDataset(cases[1:2], 32, SliceConfig())
    among = SliceDataset(cases, 32, SliceConfig())
    first = len(cases[0].image)
    images, labels = alone.batch([0, 3], seed=5, train=True)
    others, masks = among.batch([first, first + 3], seed=5, train=True)
    assert torch.equal(images, others)
    assert torch.equal(labels, masks)
    assert not torch.equal(images, among.batch([0, 3], seed=5, train=True)[0])
