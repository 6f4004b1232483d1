"""What a process frees stays with it for its next tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys
import numpy as np
if sys.argv[1] == "kept":
    import pipeline.__main__
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(100 * 2**20, np.uint8).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(how: str) -> int:
    answer = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(answer.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is set, which only Linux has")
def test_a_large_array_is_not_mapped_anew() -> None:
    assert faults("kept") < 10 < faults("given back")
