"""No image makes a denoiser take a gigabyte."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource
import numpy as np
from flep_fl.data_security.denoise.families import denoiser_for
from flep_fl.data_security.restoring import ResidualNoise
denoise = denoiser_for({name!r}, ResidualNoise({family!r}, std={std}, gain=1.0, amount=0.05))
side = 4096
image = np.tile(np.arange(256, dtype=np.float32), (1, side, side // 256))
image[0, ::9, ::7] = 255
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clean = denoise(image)
assert clean.shape == image.shape and np.isfinite(clean).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "std"),
    [
        ("fast", "gaussian", 25.0),
        ("dncnn9", "gaussian", 25.0),
        ("fast", "poisson_gaussian", 5.0),
        ("fast", "salt_and_pepper", 0.0),
    ],
)
def test_4096_pixels_square(name, family, std):
    code = CHILD.format(name=name, family=family, std=std)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    peak, before = (int(value) / 1024 for value in done.stdout.split())
    print(f"{name}, {family}: {peak:.0f} MB at the peak, {before:.0f} MB before")
    assert peak < 1000
