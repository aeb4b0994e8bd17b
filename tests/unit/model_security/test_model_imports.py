"""What a module loads is part of its contract: the cloud's modules must not bring the key ring along."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import {modules}
print(json.dumps(sorted(sys.modules)))
"""


def loaded(*modules: str) -> set[str]:
    program = PROGRAM.format(modules=", ".join(f"flep_fl.model_security.{name}" for name in modules))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_the_cloud_loads_neither_the_key_ring_nor_the_cipher_nor_torch():
    names = loaded("adder", "seal", "layout", "profiles")
    for forbidden in ("keyring", "cipher", "authenticator", "contribution", "session"):
        assert f"flep_fl.model_security.{forbidden}" not in names
    assert not {"torch", "flwr", "hydra"} & names


@pytest.mark.parametrize("module", ["layout", "profiles", "seal", "contribution", "plain"])
def test_light_modules_stay_light(module):
    assert not {"torch", "flwr", "tenseal"} & loaded(module)


def test_the_analysts_side_needs_no_torch_and_no_flower():
    assert not {"torch", "flwr"} & loaded("keyring", "cipher", "authenticator")
