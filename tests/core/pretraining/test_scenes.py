"""The stream of scenes: repeatable, endless, and what it says of itself is so."""

import pytest
import torch

from fedsam_core.pretraining.scenes import TARGETS, draw_scenes

CPU = torch.device("cpu")


def test_a_batch_depends_on_its_number_alone() -> None:
    torch.manual_seed(1)
    first = draw_scenes(3, 5, 4, 48, CPU)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, next_one, other = (draw_scenes(*which, 4, 48, CPU) for which in ((3, 5), (3, 6), (4, 5)))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("images", "masks", "real", "clean", "outlines"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.images, next_one.images)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("size", [32, 64])
def test_images_and_masks_are_what_a_model_may_be_given(size: int) -> None:
    scenes = draw_scenes(0, 0, 16, size, CPU)
    assert scenes.images.shape == (16, 3, size, size)
    assert scenes.masks.shape == (16, TARGETS, size, size)
    assert torch.equal(scenes.images, scenes.images.clamp(0, 1))
    assert scenes.images.std(dim=(1, 2, 3)).min() > 0.01, "an image shows nothing"
    areas = scenes.masks.float().mean(dim=(2, 3))[scenes.real]
    assert areas.min() > 0.004
    assert areas.max() < 0.7
    assert scenes.real.float().mean() > 0.9, "hardly a scene may lack targets"
    alike = (scenes.images - scenes.images[:, 1:2]).abs().amax(dim=(1, 2, 3)) < 0.01
    assert 0 < alike.sum() < 12, "a quarter of the scenes stands there three times, the others have neighbours"


def test_outlines_are_where_masks_end() -> None:
    scenes = draw_scenes(0, 1, 16, 64, CPU)
    ends = scenes.masks[..., 1:] != scenes.masks[..., :-1]
    inside = (scenes.images.amax(dim=1) > 0)[:, None, :, :-1] & (scenes.images.amax(dim=1) > 0)[:, None, :, 1:]
    explained = scenes.outlines[:, None, :, :-1] & inside
    assert (ends & inside & ~explained).sum() == 0
