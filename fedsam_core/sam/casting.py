"""Frozen weights in the dtype that they are multiplied in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, linear and convolution layers hold their frozen parameters in `dtype`; afterwards what they held before.

    Autocast would bring them to it anew in every step, to the same values: it keeps the casts of trained parameters
    only. Costs the memory of the copies, half the frozen weights. Not for two threads at once on one model.

    Args:
        model: its trained parameters, norms, tables and tokens are left alone.
        dtype: of the forward pass's autocast; None, for fp32, does nothing.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    frozen = [one for layer in layers for one in layer.parameters(recurse=False) if not one.requires_grad]
    before = [parameter.data for parameter in frozen] if dtype is not None else []
    try:
        for parameter, data in zip(frozen, before, strict=False):
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in zip(frozen, before, strict=False):
            parameter.data = data
