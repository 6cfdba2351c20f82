"""Batches through our calls, one image at a time through `segment_anything`'s own: the same answers."""

import pytest
import torch
from segment_anything.modeling import Sam

from fedsam_core.pretraining.promptable import decode, embed_prompts, encode
from fedsam_core.pretraining.prompts import corrected, first_prompts
from fedsam_core.pretraining.scenes import draw_scenes
from fedsam_core.pretraining.trainer import new_sam
from fedsam_core.sam.adapters import BuiltModel
from fedsam_core.sam.checkpoints import resize_table
from fedsam_core.sam.official import official_sam


def stock(trained: Sam, size: int) -> Sam:
    """The same weights in a `Sam` that was built for that image size, tables resized as on loading."""
    built = official_sam(
        BuiltModel(backbone="vit_t", image_size=size, classes=1, head="pretrained", weights="random(seed=0)", seed=0)
    )
    own, state = built.state_dict(), trained.state_dict()
    built.load_state_dict(
        {k: v if v.shape == own[k].shape else resize_table(v, own[k].shape) for k, v in state.items()}
    )
    return built


@pytest.fixture(scope="module")
def sam() -> Sam:
    made = new_sam(0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():  # zero tables would hide how they are resized
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("size", [64, 160])
@torch.no_grad()
def test_a_batch_is_answered_as_by_sam_itself(sam: Sam, size: int) -> None:
    scenes = draw_scenes(0, 0, 2, size, torch.device("cpu"))
    targets, generator = scenes.masks.flatten(0, 1), torch.Generator().manual_seed(0)
    embeddings = encode(sam, scenes.images).repeat_interleave(4, dim=0)
    reference = stock(sam, size)
    earlier = torch.randn(len(targets), 1, size // 4, size // 4, generator=generator)
    for boxed in (False, True):
        prompts = first_prompts(targets, torch.full((len(targets),), boxed), generator)
        more = corrected(prompts, torch.zeros_like(targets), targets, generator)
        for asked, masks in ((prompts, None), (more, earlier)):
            logits, quality = decode(sam, embeddings, embed_prompts(sam, asked.coordinates, asked.labels, size), masks)
            for image in range(2):
                rows = slice(4 * image, 4 * image + 4)
                own = {"image": 255 * scenes.images[image], "original_size": (size, size)}
                places, labels = asked.coordinates[rows], asked.labels[rows]
                points = [0, 2] if boxed else [0]  # the others are corners, or nothing
                if boxed:
                    own["boxes"] = places[:, :2].reshape(4, 4)
                    points = [2] if masks is not None else []
                elif masks is not None:
                    points = [0, 2]
                if points:
                    own |= {"point_coords": places[:, points], "point_labels": labels[:, points]}
                if masks is not None:
                    own["mask_inputs"] = masks[rows]
                (many,), (one,) = reference([own], multimask_output=True), reference([own], multimask_output=False)
                expected = torch.cat([one["low_res_logits"], many["low_res_logits"]], dim=1)
                torch.testing.assert_close(logits[rows], expected, atol=2e-4, rtol=1e-4)
                said = torch.cat([one["iou_predictions"], many["iou_predictions"]], dim=1)
                torch.testing.assert_close(quality[rows], said, atol=2e-4, rtol=1e-4)


def test_prompts_are_where_they_should_be() -> None:
    masks = draw_scenes(1, 0, 8, 64, torch.device("cpu")).masks.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    boxed = torch.arange(len(masks)) % 2 == 0
    prompts = first_prompts(masks, boxed, generator)
    predicted = masks.roll(9, dims=2)
    more = corrected(prompts, predicted, masks, generator)
    assert more.labels.shape == (len(masks), 3)
    for mask, wrong, points, labels, box in zip(
        masks, predicted ^ masks, more.coordinates.long(), more.labels, boxed, strict=True
    ):
        x, y = points[2]
        assert wrong[y, x]
        assert labels[2] == int(mask[y, x])
        if box:
            rows, columns = mask.nonzero().T
            assert labels[:2].tolist() == [2, 3]
            reach = 0.5 * max(rows.max() - rows.min(), columns.max() - columns.min()) + 1  # five deviations
            assert (points[0] - torch.stack([columns.min(), rows.min()])).abs().max() <= reach
            assert (points[1] - torch.stack([columns.max(), rows.max()])).abs().max() <= reach
        else:
            assert labels[:2].tolist() == [1, -1]
            assert mask[points[0, 1], points[0, 0]]
