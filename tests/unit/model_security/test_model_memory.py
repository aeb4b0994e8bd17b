"""What encrypting, adding and decrypting take beside the vector, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.he, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")]

CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.cipher import CkksModelCipher
from flep_fl.model_security.keyring import ModelKey
from flep_fl.model_security.profiles import get_profile

def kilobytes(name):
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name))

def grown(function):
    "Bytes a weight by which a call raises the peak above what is held before it."
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    result = function()
    return (kilobytes("VmHWM") - before) * 1024 / LENGTH, result

name, LENGTH, sites = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
profile = get_profile(name)
key = ModelKey.generate(profile)
cipher = CkksModelCipher(key, profile)
small = cipher.encrypt(np.zeros(5000))
cipher.decrypt(small, 5000)
vector = np.random.default_rng(0).normal(0, 0.05, LENGTH)
out = {}
out["encrypt"], payload = grown(lambda: cipher.encrypt(vector))
adder = KeylessAdder(key.public_context(), profile, LENGTH)
out["add"], _ = grown(lambda: [adder.add(payload) for _ in range(sites)])
out["result"], total = grown(adder.result)
del adder, payload
out["decrypt"], values = grown(lambda: cipher.decrypt(total, LENGTH))
assert np.abs(values - sites * vector).max() < profile.tolerance(sites) * sites
print(json.dumps(out))
"""


def measure(profile: str, length: int, sites: int) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, profile, str(length), str(sites)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def require_streaming(figures: dict[str, float], up: float) -> None:
    # the payload as it grows (twice, where it is moved); the sum, 16 bytes a weight; the values, 8
    assert figures["encrypt"] < 2.3 * up + 2
    assert figures["add"] < 20, "the sum and nothing that grows with the payload"
    assert figures["result"] < 1.5 * 2 * up + 4
    assert figures["decrypt"] < 12


@pytest.mark.parametrize(("profile", "up"), [("default", 7.6), ("compact", 5.1)])
def test_nothing_is_held_but_the_vector_the_payload_and_the_sum(profile: str, up: float) -> None:
    require_streaming(measure(profile, 1_000_000, 3), up)


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "up"), [("default", 7.6), ("compact", 5.1)])
def test_11_million_weights_and_50_sites(profile: str, up: float) -> None:
    few, many = measure(profile, 11_000_000, 2), measure(profile, 11_000_000, 50)
    require_streaming(many, up)
    assert many["add"] == pytest.approx(few["add"], rel=0.05)
