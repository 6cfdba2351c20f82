"""SAM's losses on masks: 20 focal + dice, and the error of the predicted quality (arXiv 2304.02643, appendix A)."""

import torch
from torch import Tensor
from torch.nn import functional as F

FOCAL_WEIGHT = 20.0
_ALPHA, _GAMMA = 0.25, 2.0  # Lin et al. 2017 (arXiv 1708.02002)


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """20 focal + dice of every mask: logits [..., S, S] against masks [..., S, S] from 0 to 1, spread, to [...]."""
    logits, masks = torch.broadcast_tensors(logits, masks.to(logits.dtype))  # type: ignore[no-untyped-call]
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    missing = probability + masks - 2 * probability * masks  # 1 - the probability of the truth
    focal = (_ALPHA * masks + (1 - _ALPHA) * (1 - masks)) * missing**_GAMMA * entropy
    overlap = (probability * masks).sum(dim=(-2, -1))
    sizes = probability.sum(dim=(-2, -1)) + masks.sum(dim=(-2, -1))
    return FOCAL_WEIGHT * focal.mean(dim=(-2, -1)) + 1 - (2 * overlap + 1) / (sizes + 1)


def iou(predicted: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of bool masks [..., S, S]: float32 [...]; 0 where both are empty."""
    both = (predicted & masks).sum(dim=(-2, -1))
    either = (predicted | masks).sum(dim=(-2, -1))
    return both / either.clamp(min=1)
