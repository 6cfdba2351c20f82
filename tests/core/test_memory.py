"""Memory that is freed in a step is there for the next one, without the system's help."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from fedsam_core.learning.memory import keep_freed_memory

assert keep_freed_memory()

def step():
    held = [torch.ones(5_000_000) for _ in range(6)]

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT CHECKED: this is not glibc")
def test_steps_find_the_memory_of_those_before() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    pages = 6 * 5_000_000 * 4 // 4096  # of a step; without the call all ten ask for nearly all of them, most times
    assert int(done.stdout) < pages
