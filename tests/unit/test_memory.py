"""Freed memory stays with the process for the next tensors."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from flep_fl.contracts.memory import keep_freed_memory

_THRESHOLDS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")

_COUNT_FAULTS = """
import resource
import numpy as np
from flep_fl.contracts.memory import keep_freed_memory
from flep_fl.data_security.denoise.inference import network_denoiser
from flep_fl.data_security.denoise.network import DnCNN

denoise = network_denoiser(DnCNN(), device="cpu")
image = np.zeros((1, 192, 192), np.float32)
for _ in range(3):
    denoise(image)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    denoise(image)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(keep_freed_memory()), faults // 5)
"""


def _faults(**environment: str) -> tuple[bool, int]:
    """Page faults of a call of the paper's network in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if name not in _THRESHOLDS}
    run = subprocess.run(
        [sys.executable, "-c", _COUNT_FAULTS],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = run.stdout.split()
    return kept == "1", int(faults)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_a_repeated_call_needs_no_new_pages():
    kept, faults = _faults()
    assert kept
    assert faults < 500
    # glibc's first values, set by the user: they are left alone, and every layer pays.
    kept, paid = _faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert paid > 20 + 5 * faults  # tens of thousands, or tens where the kernel gives huge pages


@pytest.mark.parametrize("trouble", [OSError, TypeError, AttributeError])
def test_another_c_library_is_left_alone(monkeypatch, trouble):
    def missing(name: None) -> object:
        raise trouble

    for name in _THRESHOLDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not keep_freed_memory.__wrapped__()
