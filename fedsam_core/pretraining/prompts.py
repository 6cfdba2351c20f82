"""Prompts as an annotator would give them: a point or a box first, then a point where the mask is wrong.

As SAM was trained (Kirillov et al. 2023, arXiv 2304.02643, appendix A): a first point lies anywhere in the object; a
box is off by a tenth of its side; a later point lies anywhere in the error, and says whether it is in the object.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsam_core.pretraining.promptable import INSIDE, LOWER_RIGHT, NOTHING, UPPER_LEFT

_BOX_JITTER = 0.1  # standard deviation, as a share of the box's side
_BOX_JITTER_LIMIT = 20  # pixels


@dataclass(frozen=True)
class Prompts:
    """Prompts for N masks: coordinates float32 [N, T, 2] and labels int64 [N, T] (see `promptable`)."""

    coordinates: Tensor
    labels: Tensor


def first_prompts(masks: Tensor, boxed: Tensor, generator: torch.Generator) -> Prompts:
    """A box where `boxed` (bool [N]), else a point, for masks bool [N, S, S]. Two tokens each."""
    points, _ = _anywhere(masks, generator)
    point = torch.stack([points, torch.zeros_like(points)], dim=1)
    boxes = _boxes(masks, generator)
    corners = torch.tensor([UPPER_LEFT, LOWER_RIGHT], device=masks.device)
    lone = torch.tensor([INSIDE, NOTHING], device=masks.device)
    return Prompts(torch.where(boxed[:, None, None], boxes, point), torch.where(boxed[:, None], corners, lone))


def corrected(prompts: Prompts, predicted: Tensor, masks: Tensor, generator: torch.Generator) -> Prompts:
    """The prompts and one point more, in the error of a prediction; in the object where there is no error.

    Args:
        predicted, masks: bool [N, S, S].
    """
    wrong = predicted ^ masks
    where = torch.where(wrong.any(dim=(1, 2), keepdim=True), wrong, masks)
    points, flat = _anywhere(where, generator)
    labels = masks.flatten(1).gather(1, flat[:, None]).long()
    return Prompts(torch.cat([prompts.coordinates, points[:, None]], 1), torch.cat([prompts.labels, labels], 1))


def _anywhere(areas: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A pixel of each area [N, S, S]: (x, y) [N, 2], and its number in the flat image [N]."""
    lots = torch.rand(areas.shape, generator=generator, device=areas.device)
    flat = (lots + areas).flatten(1).argmax(dim=1)
    return torch.stack([flat % areas.shape[2], flat // areas.shape[2]], dim=1).float(), flat


def _boxes(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Loose boxes around masks: corners [N, 2, 2]."""
    size = masks.shape[-1]
    spans = []
    for axis in (1, 2):  # over the rows: which columns; over the columns: which rows
        shown = masks.any(dim=axis)
        first = shown.float().argmax(dim=1)
        last = size - 1 - shown.flip(1).float().argmax(dim=1)
        spans.append(torch.stack([first, last], dim=1).float())
    tight = torch.stack(spans, dim=2)
    sides = tight[:, 1:] - tight[:, :1] + 1
    noise = torch.randn(tight.shape, generator=generator, device=masks.device) * _BOX_JITTER
    return (tight + (noise * sides).clamp(-_BOX_JITTER_LIMIT, _BOX_JITTER_LIMIT)).clamp(0, size - 1)
