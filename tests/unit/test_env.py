"""What is asked of the C library's allocator, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.patience import HANGS_S

REPEATED = """
import ctypes, os, resource, sys
import torch
from epmoe import env

if os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: also where the system prefers large pages

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
FREED_AT_ONCE = """
import ctypes
from epmoe import env

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
env.keep_freed_memory()
block = libc.malloc(ctypes.c_size_t(5 * 2**29))  # untouched, it takes no memory
libc.free(ctypes.c_void_p(block))
[heap] = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.strip().endswith("[heap]")]
print(int(block is not None), int(heap[1], 16) - int(heap[0], 16))
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def numbers(code, *words, **variables):
    """What the program prints where the environment says nothing else about the allocator."""
    configured = ("MALLOC_", "GLIBC_", "THP_", "LD_PRELOAD")
    ours = {key: value for key, value in os.environ.items() if not key.startswith(configured)}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, env=ours | variables, capture_output=True, text=True, check=True, timeout=HANGS_S
    )
    return tuple(map(int, done.stdout.split()))


@pytest.mark.parametrize("huge", ["0", "1"])
def test_memory_that_was_freed_is_used_again(huge):
    kept, faults = numbers(REPEATED, "keep", THP_MEM_ALLOC_ENABLE=huge)
    assert kept
    assert faults < PAGES / 20


def test_without_it_every_page_is_new():
    assert numbers(REPEATED, "leave")[1] > PAGES / 2, "nothing to be won: the other tests show nothing"


def test_gibibytes_at_once_stay_too():
    there, size = numbers(FREED_AT_ONCE)
    assert there
    assert size >= 5 * 2**29


@pytest.mark.parametrize(
    "variables", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]
)
def test_an_allocator_that_the_user_configured_is_left_alone(variables):
    kept, faults = numbers(REPEATED, "keep", **variables)
    assert not kept
    assert faults > PAGES / 2
