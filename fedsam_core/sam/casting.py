"""Frozen weights in the dtype that they are multiplied in."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from fedsam_core.sam.onednn import packed


@contextmanager
def frozen_in(model: nn.Module, dtype: torch.dtype | None, pack: bool = False) -> Iterator[None]:
    """Inside, linear and convolution layers have their frozen parameters in `dtype`; afterwards all is as before.

    Autocast would bring them to it anew in every step, to the same values: it keeps the casts of trained parameters
    only. Costs the memory of the copies, half the frozen weights. Not for two threads at once on one model.

    Args:
        model: its trained parameters, norms, tables and tokens are left alone.
        dtype: of the forward pass's autocast, which is on while the model is called; None, for fp32, does nothing.
        pack: frozen linear layers are packed instead, where that can be done (see `packed`).
    """
    if dtype is None:
        yield
        return
    with packed(model) if pack and dtype is torch.bfloat16 else nullcontext(set[nn.Module]()) as done:
        layers = {module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)} - done
        frozen = [one for layer in layers for one in layer.parameters(recurse=False) if not one.requires_grad]
        before = [parameter.data for parameter in frozen]
        try:
            for parameter, data in zip(frozen, before, strict=True):
                parameter.data = data.to(dtype)
            yield
        finally:
            for parameter, data in zip(frozen, before, strict=True):
                parameter.data = data
