"""Mutated updates: unsigned ones are refused by name; signed by an insider, they cannot break the cloud."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from flep_fl.contracts.errors import UpdateError
from flep_fl.model_security.profiles import ENCRYPTIONS, PROFILES
from flep_fl.model_security.seal import open_update

pytestmark = pytest.mark.he

LENGTH = 300
VARIANTS = [f"{name}-{kind}" for name in PROFILES for kind in ENCRYPTIONS]


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Flip, overwrite, insert, delete, duplicate or cut; half of it near the start, where structure is."""
    size = len(data)
    reach = size if rng.random() < 0.5 else min(size, 900)
    start, count = int(rng.integers(0, reach)), int(rng.integers(1, 9))
    kind = int(rng.integers(0, 7))
    if kind == 0:
        changed = bytearray(data)
        changed[start] ^= 1 << int(rng.integers(0, 8))
        return bytes(changed)
    if kind == 1:
        return data[:start] + rng.bytes(count) + data[start + count :]
    if kind == 2:
        return data[:start] + rng.bytes(count) + data[start:]
    if kind == 3:
        return data[:start] + data[start + count :]
    if kind == 4:
        return data[:start]
    if kind == 5:
        return data[: start + count] + data[start:]
    extreme = (b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0" * 7 + b"\x80")[int(rng.integers(0, 4))]
    return data[:start] + extreme + data[start + 8 :]


def refuse_unsigned(federation, payload: bytes, *, count: int) -> None:
    rng, keys = np.random.default_rng(11), federation.public
    genuine = federation.seal("a", payload)
    assert open_update(genuine, expected=federation.expected, public_keys=keys).payload == payload
    tried = 0
    while tried < count:
        bad = mutated(rng, genuine)
        if bad == genuine:
            continue
        tried += 1
        with pytest.raises(UpdateError):
            open_update(bad, expected=federation.expected, public_keys=keys)


def test_2000_unsigned_mutations_are_refused(federation, ciphers):
    refuse_unsigned(federation, ciphers["default"].encrypt(np.ones(LENGTH)), count=2000)


@pytest.mark.slow
def test_100000_unsigned_mutations_are_refused(federation, ciphers):
    refuse_unsigned(federation, ciphers["default"].encrypt(np.ones(LENGTH)), count=100_000)


INSIDER = """
import json, resource, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_fuzz_updates import LENGTH, mutated
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flep_fl.contracts.errors import FlepError
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security._parameters import seal_parameters
from flep_fl.model_security.cipher import CkksModelCipher
from flep_fl.model_security.keyring import ModelKey
from flep_fl.model_security.profiles import get_profile
from flep_fl.model_security.seal import Expectation, UpdateHeader, new_nonce, open_update, seal_update

folder, variants, count, seed = Path(sys.argv[2]), sys.argv[3].split(), int(sys.argv[4]), int(sys.argv[5])
signing = Ed25519PrivateKey.from_private_bytes((folder / "signing").read_bytes())
keys = {"a": signing.public_key()}
common = json.loads((folder / "common").read_text())
expected = Expectation(**common)
usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def well_formed(data, genuine, width, prime):
    "A second reading of the format: one ciphertext, with integers of Python's own."
    size = 4096 * width // 8
    polynomials = [data[8 : 8 + size]] if data[7:8] == b"s" else [data[8 : 8 + size], data[8 + size :]]
    rest = data[8 + size :]
    if data[:8] != genuine[:8] or len(rest) != (64 if len(polynomials) == 1 else size):
        return False
    for polynomial in polynomials:
        step = 1 << width
        for start in range(0, size, 15):
            pair = int.from_bytes(polynomial[start : start + 15], "little")
            while pair:
                pair, coefficient = divmod(pair, step)
                if coefficient >= prime:
                    return False
    return True

def fuzz(variant):
    profile, rng = get_profile(*variant.split("-")), np.random.default_rng(seed)
    key = ModelKey.from_bytes((folder / f"{profile.name}.key").read_bytes())
    cipher, (prime,) = CkksModelCipher(key, profile), seal_parameters(profile).primes
    width = 40 if profile.name == "compact" else 60
    payload = cipher.encrypt(np.ones(LENGTH))
    adder = KeylessAdder(key.public_context(), profile, LENGTH)
    adder.add(payload)
    untouched = adder.result()
    cipher.decrypt(payload, LENGTH)
    # what is running may grow by 256 MiB of address space; a decompression bomb asks for more
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (256 << 20), resource.RLIM_INFINITY))
    before, refused, added, codes = usage(), 0, 0, set()
    every = 1 + count // 20_000  # of those that are added, how many are looked into again
    for number in range(count):
        bad = mutated(rng, payload)
        header = UpdateHeader(**common, sender="a", nonce=new_nonce())
        update = open_update(seal_update(header, bad, signing), expected=expected, public_keys=keys)
        assert update.payload == bad
        try:
            adder.add(update.payload)
        except FlepError as exc:
            codes.add(exc.code)
            refused += 1
            if number % 10 == 0:
                assert untouched in (None, adder.result())
                untouched = adder.result()
            accepted = False
        else:
            added += 1
            untouched = None
            accepted = True
            if number % every:
                continue
            assert not profile.packed or well_formed(bad, payload, width, prime), number
        # the way down: an analyst opens what a cloud has signed as a sum
        try:
            cipher.decrypt(bad, LENGTH)
        except FlepError as exc:
            assert exc.code == ("model_key" if accepted else "ciphertext"), (number, exc)
        else:
            assert accepted, number
    return {"refused": refused, "added": added, "codes": sorted(codes), "grown_kb": usage() - before}

print(json.dumps({variant: fuzz(variant) for variant in variants}))
"""


def insider(tmp_path: Path, federation, model_keys, *, variants: list[str], count: int) -> None:
    """Let an insider sign mutated payloads in a process of its own, which must neither end nor grow."""
    e = federation.expected
    names = ("federation", "run", "round", "previous", "key_id", "layout", "profile", "config", "mode")
    common = {name: getattr(e, name) for name in names} | {"attempt": 1}
    signing = federation.signing["a"].private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    (tmp_path / "signing").write_bytes(signing)
    for name, key in model_keys.items():
        (tmp_path / f"{name}.key").write_bytes(key.to_bytes())
    (tmp_path / "common").write_text(json.dumps(common))
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", INSIDER, here, str(tmp_path), " ".join(variants), str(count), "3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=6000)
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    found = json.loads(result.stdout)
    assert set(found) == set(variants)
    for variant, figures in found.items():
        print(variant, figures)
        require_bounded(figures, count)


def require_bounded(figures: dict[str, object], count: int) -> None:
    assert figures["codes"] == ["ciphertext"]
    assert figures["refused"] + figures["added"] == count
    assert figures["refused"] > count / 3  # whatever changes the size, the head or a range
    assert figures["grown_kb"] < 64 << 10


def test_150_mutations_signed_by_an_insider_do_no_harm(tmp_path, federation, model_keys):
    insider(tmp_path, federation, model_keys, variants=list(VARIANTS), count=150)


@pytest.mark.slow
def test_100000_mutations_signed_by_an_insider_do_no_harm(tmp_path, federation, model_keys, variant):
    insider(tmp_path, federation, model_keys, variants=[variant], count=100_000)
