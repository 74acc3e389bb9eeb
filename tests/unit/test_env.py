"""What is asked of the C library's allocator, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

REPEATED = """
import resource, sys
import torch
from epmoe import env

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def steps(count):
    for _ in range(count):
        torch.empty(2**24).fill_(1.0)  # 64 MiB

kept = sys.argv[1] == "keep" and env.keep_freed_memory()
steps(10)  # until it has found its places
before = page_faults()
steps(3)
print(int(kept), page_faults() - before)
"""
PAGES = 3 * 2**26 // os.sysconf("SC_PAGE_SIZE")


def repeated(word, **variables):
    """Whether memory is kept, and the page faults of writing 64 MiB three times more."""
    ours = {
        k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "THP_", "LD_PRELOAD"))
    }
    command = [sys.executable, "-c", REPEATED, word]
    done = subprocess.run(
        command, env=ours | variables, capture_output=True, text=True, check=True, timeout=120
    )
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


@pytest.mark.parametrize("huge", ["0", "1"])
def test_memory_that_was_freed_is_used_again(huge):
    kept, faults = repeated("keep", THP_MEM_ALLOC_ENABLE=huge)
    assert kept
    assert faults < PAGES / 20
    assert repeated("leave")[1] > PAGES / 2, "nothing to be won: the test shows nothing"


@pytest.mark.parametrize(
    "variables", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]
)
def test_an_allocator_that_the_user_configured_is_left_alone(variables):
    kept, faults = repeated("keep", **variables)
    assert not kept
    assert faults > PAGES / 2
