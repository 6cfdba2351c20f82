"""The device a site really has, and the precision it computes in."""

from typing import Literal

import torch

from fedsam_core.sam.onednn import multiplies_bf16


def pick_device() -> torch.device:
    """The GPU at hand where torch sees one, else the CPU. Ray's bookkeeping of (possibly fake) GPUs is not asked."""
    # By its number: other threads of the process, which make batches, may have another GPU at hand.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """The device in words, as it is written into a run's tags: "cpu" or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def autocast_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype | None:
    """The dtype to autocast the forward pass to, or None for plain fp32.

    "auto" takes bf16 where the device multiplies it natively: GPUs that say so, CPUs with AMX or AVX512-BF16.
    Elsewhere bf16 is emulated and slower than fp32.
    """
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if multiplies_bf16() else None
