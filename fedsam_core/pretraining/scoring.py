"""How well a promptable SAM answers on scenes that it was not trained on: mean IoU by image size and kind of prompt."""

from dataclasses import dataclass

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from fedsam_core.hashing import derive_seed
from fedsam_core.pretraining.losses import iou
from fedsam_core.pretraining.promptable import decode, embed_prompts, encode, enlarge
from fedsam_core.pretraining.prompts import Prompts, corrected, first_prompts
from fedsam_core.pretraining.scenes import TARGETS, Scenes, draw_scenes

KINDS = ("point", "box", "box and point")


@dataclass(frozen=True)
class Answers:
    """What a SAM answered on a batch of scenes.

    Attributes:
        scenes: the batch.
        masks: bool [B, TARGETS, S, S] for each kind of prompt: of the three masks that which SAM thinks best for a
            point, the single mask for the others.
        prompts: those of each kind, for B * TARGETS masks.
    """

    scenes: Scenes
    masks: dict[str, Tensor]
    prompts: dict[str, Prompts]


def held_out(seed: int, number: int, count: int, size: int, device: torch.device) -> Scenes:
    """Scenes of another stream than the one of that seed."""
    return draw_scenes(derive_seed(seed, "held-out"), number, count, size, device)


@torch.no_grad()
def answer(sam: Sam, scenes: Scenes, seed: int) -> Answers:
    """Asks about every target: with a point, with a box, and with the box and a point in the error."""
    size, shape = scenes.images.shape[-1], scenes.masks.shape
    generator = torch.Generator(scenes.images.device).manual_seed(derive_seed(seed, "answers"))
    targets = scenes.masks.flatten(0, 1)
    embeddings = encode(sam, scenes.images).repeat_interleave(TARGETS, dim=0)
    every = torch.ones(len(targets), dtype=torch.bool, device=targets.device)

    def ask(prompts: Prompts, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        return decode(sam, embeddings, embed_prompts(sam, prompts.coordinates, prompts.labels, size), masks)

    prompts = {"point": first_prompts(targets, ~every, generator), "box": first_prompts(targets, every, generator)}
    low, quality = ask(prompts["point"], None)
    best = 1 + quality[:, 1:].argmax(dim=1)
    masks = {"point": enlarge(low[torch.arange(len(low)), best, None], size)[:, 0] > 0}
    low, _ = ask(prompts["box"], None)
    masks["box"] = enlarge(low[:, :1], size)[:, 0] > 0
    prompts["box and point"] = corrected(prompts["box"], masks["box"], targets, generator)
    low, _ = ask(prompts["box and point"], low[:, :1])
    masks["box and point"] = enlarge(low[:, :1], size)[:, 0] > 0
    return Answers(scenes, {kind: found.view(shape) for kind, found in masks.items()}, prompts)


def mean_iou(sam: Sam, size: int, seed: int, batches: int, count: int, device: torch.device) -> dict[str, float]:
    """Mean IoU over all targets of `batches` times `count` scenes, by kind of prompt."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for number in range(batches):
        answers = answer(sam, held_out(seed, number, count, size, device), seed)
        for kind in KINDS:
            found[kind].append(iou(answers.masks[kind], answers.scenes.masks)[answers.scenes.real])
    return {kind: torch.cat(values).mean().item() for kind, values in found.items()}
