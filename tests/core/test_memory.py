"""Memory that is freed in a step is there for the next one, without the system's help."""

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedsam_core.learning.memory import keep_freed_memory

STEPS = """
import ctypes, resource, sys
from fedsam_core.learning.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def step():
    held = [libc.malloc(20_000_000) for _ in range(6)]
    for one in held:
        libc.memset(one, 1, 20_000_000)
    for one in reversed(held):
        libc.free(one)

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT CHECKED: this is not glibc")
def test_steps_find_the_memory_of_those_before() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "not kept")
    }
    pages = 6 * 20_000_000 // 4096  # of a step
    assert faults["kept"] < pages / 10
    assert faults["not kept"] > 9 * pages


def test_another_thread_is_left_alone() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(keep_freed_memory).result() is False
