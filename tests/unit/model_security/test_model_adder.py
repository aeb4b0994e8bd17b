"""The structural check and the keyless adder: refused payloads cost nothing, whatever they hold."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tenseal as ts

from flep_fl.contracts.errors import CiphertextError, ModelKeyError
from flep_fl.model_security import _protobuf, _seal_blob
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.ciphertext_format import CheckedPayload, _message, assemble_vector
from flep_fl.model_security.mixed import MixedAdder
from flep_fl.model_security.packed_format import payload_bytes
from flep_fl.model_security.profiles import PROFILES, Profile, get_profile

pytestmark = pytest.mark.he

LENGTH = 5000
DEFAULT, CLASSIC = PROFILES["default"], PROFILES["classic"]


def check(payload: bytes, profile: Profile, length: int, *, allow_seeded: bool = True) -> list[bytes]:
    return list(CheckedPayload(payload, profile, length, allow_seeded=allow_seeded).check())


def message(blob: bytes) -> bytes:
    """TenSEAL's message of ten values in one ciphertext of the classic profile."""
    return _message([blob], [10], CLASSIC.scale)


def blobs_of(payload: bytes) -> list[bytes]:
    return [value for field, _, value in _protobuf.fields(payload) if field == 2]


def zstd_bomb(size: int) -> bytes:
    """A zstandard frame of 4-byte RLE blocks that expand to 128 KiB each."""
    block = (1 << 17) << 3 | 1 << 1
    blocks = [struct.pack("<I", block)[:3] + b"\0"] * (size >> 17)
    blocks[-1] = struct.pack("<I", block | 1)[:3] + b"\0"
    return b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([17 << 3]) + b"".join(blocks)  # 128 MiB window


def zlib_bomb(size: int) -> bytes:
    stream = zlib.compressobj(9)
    zeros = bytes(1 << 20)
    return b"".join([stream.compress(zeros) for _ in range(size >> 20)] + [stream.flush()])


def envelope(mode: int, packed: bytes) -> bytes:
    return _seal_blob.HEADER.pack(0xA15E, 16, 4, 3, mode, 0, 16 + len(packed)) + packed


def test_the_check_returns_what_was_sent(cipher, profile):
    payload = cipher.encrypt(np.arange(LENGTH) / LENGTH)
    checked = check(payload, profile, LENGTH, allow_seeded=profile.seeded_uploads)
    assert len(checked) == profile.ciphertexts(LENGTH)
    again = assemble_vector(checked, profile, LENGTH)
    assert np.array_equal(cipher.decrypt(again, LENGTH), cipher.decrypt(payload, LENGTH))
    # it is idempotent, and what it makes is uncompressed
    assert check(again, profile, LENGTH, allow_seeded=profile.seeded_uploads) == checked
    assert {blob[5] for blob in checked} == {_seal_blob.NONE}
    if profile.packed:
        assert again == payload  # one byte string for one ciphertext
        assert len(payload) == payload_bytes(profile, LENGTH, seeded=profile.seeded_uploads)


def test_a_seeded_ciphertext_is_no_sum(ciphers):
    payload = ciphers["default"].encrypt(np.ones(LENGTH))
    with pytest.raises(CiphertextError, match="half-size"):
        check(payload, DEFAULT, LENGTH, allow_seeded=False)


def test_under_a_public_key_no_upload_has_half_the_size(ciphers, model_keys):
    """Whoever sends one holds the model key and has another configuration than the federation."""
    half, full = (ciphers[name].encrypt(np.ones(10)) for name in ("default", "default-public"))
    for make in (KeylessAdder, MixedAdder):
        adder = make(model_keys["default"].public_context(), get_profile("default", "public"), 10)
        with pytest.raises(CiphertextError, match="half-size"):
            adder.add(half)
        adder.add(full)
        assert adder.count == 1


def test_a_payload_of_full_size_has_the_form_that_says_so(ciphers):
    payload = ciphers["default-public"].encrypt(np.ones(10))
    assert payload[7:8] == b"f" and check(payload, DEFAULT, 10)
    for form in (b"x", b"\0", b"F"):
        with pytest.raises(CiphertextError, match="does not begin"):
            check(payload[:7] + form + payload[8:], DEFAULT, 10)


def broken_payloads(payload: bytes, other: bytes) -> dict[str, bytes]:
    """What a packed payload of the default profile must not be."""
    first = slice(8, 8 + 15)  # a pair of coefficients
    return {
        "empty": b"",
        "head alone": payload[:8],
        "other magic": b"FLEPCV2" + payload[7:],
        "unknown form": payload[:7] + b"x" + payload[8:],
        "full form claimed": payload[:7] + b"f" + payload[8:],
        "truncated": payload[:-1],
        "trailing byte": payload + b"\0",
        "other length": other,
        "one ciphertext less": payload[: payload_bytes(DEFAULT, 10, seeded=True)],
        "coefficient not reduced": payload[: first.start] + b"\xff" * 15 + payload[first.stop :],
        "last coefficient not reduced": payload[:-79] + b"\xff" * 15 + payload[-64:],
        "TenSEAL's message": _message([payload[8:]], [LENGTH], DEFAULT.scale),
    }


@pytest.mark.parametrize("name", [
    "empty", "head alone", "other magic", "unknown form", "full form claimed", "truncated", "trailing byte",
    "other length", "one ciphertext less", "coefficient not reduced", "last coefficient not reduced",
    "TenSEAL's message",
])  # fmt: skip
def test_broken_payloads_are_refused_and_leave_the_sum_exact(ciphers, model_keys, name):
    cipher = ciphers["default"]
    vectors = np.random.default_rng(2).normal(size=(2, LENGTH))
    first, second = (cipher.encrypt(vector) for vector in vectors)
    broken = broken_payloads(second, cipher.encrypt(np.ones(2 * LENGTH)))
    adder = KeylessAdder(model_keys["default"].public_context(), DEFAULT, LENGTH)
    adder.add(first)
    before = adder.result()
    with pytest.raises(CiphertextError, match=r"profile 'default' with 5000 values"):
        adder.add(broken[name])
    assert adder.count == 1 and adder.result() == before
    adder.add(second)
    error = cipher.decrypt(adder.result(), LENGTH) - vectors.sum(axis=0)
    assert np.abs(error).max() < DEFAULT.tolerance(2)


def test_what_seal_refuses_half_way_is_taken_back(ciphers, model_keys, monkeypatch):
    cipher = ciphers["default"]
    adder = KeylessAdder(model_keys["default"].public_context(), DEFAULT, LENGTH)
    adder.add(cipher.encrypt(np.ones(LENGTH)))
    before, load, calls = adder.result(), adder._load, []

    def refuse_the_second(blob: bytes) -> object:
        calls.append(blob)
        if len(calls) == 2:
            raise RuntimeError("ciphertext data is invalid")
        return load(blob)

    monkeypatch.setattr(adder, "_load", refuse_the_second)
    with pytest.raises(CiphertextError, match="SEAL refuses"):
        adder.add(cipher.encrypt(np.ones(LENGTH)))
    monkeypatch.undo()
    assert adder.count == 1 and adder.result() == before


def test_a_sum_that_is_not_encrypted_is_refused(ciphers, model_keys):
    adder = KeylessAdder(model_keys["default"].public_context(), DEFAULT, 10)
    adder.add(ciphers["default"].encrypt(np.ones(10)))
    total = adder.result()
    bare = total[: -len(total[8:]) // 2] + bytes(len(total[8:]) // 2)
    with pytest.raises(CiphertextError, match="not encrypted"):
        ciphers["default"].decrypt(bare, 10)


def broken_messages(payload: bytes, other: bytes) -> dict[str, bytes]:
    blobs = blobs_of(payload)
    sizes, scale = [2048, 2048, 904], 2.0**40

    def message(sizes: list[int], blobs: list[bytes], scale: float) -> bytes:
        packed = b"".join(map(_protobuf.varint, sizes))
        parts = [_protobuf.length_delimited(1, packed)]
        parts += [_protobuf.length_delimited(2, blob) for blob in blobs]
        return b"".join([*parts, _protobuf.key(3, 1), struct.pack("<d", scale)])

    assert message(sizes, blobs, scale) == payload
    return {
        "empty": b"",
        "without scale": payload[:-9],
        "truncated": payload[: len(payload) // 2],
        "trailing byte": payload + b"\0",
        "trailing field": payload + _protobuf.length_delimited(4, b"x"),
        "second scale": payload + payload[-9:],
        "no sizes": message([], blobs, scale),
        "huge size": message([2**26, 2048, 904], blobs, scale),
        "fewer ciphertexts": message(sizes, blobs[:1], scale),
        "more ciphertexts": message(sizes, [*blobs, blobs[0]], scale),
        "other scale": message(sizes, blobs, 2.0**39),
        "nan scale": message(sizes, blobs, float("nan")),
        "other length": other,
        "empty ciphertext": message(sizes, [*blobs[:2], b""], scale),
        "group wire type": b"\x0b" + payload,
        "endless varint": b"\xff" * 40,
    }


@pytest.mark.parametrize("name", [
    "empty", "without scale", "truncated", "trailing byte", "trailing field", "second scale", "no sizes",
    "huge size", "fewer ciphertexts", "more ciphertexts", "other scale", "nan scale", "other length",
    "empty ciphertext", "group wire type", "endless varint",
])  # fmt: skip
def test_broken_messages_are_refused_and_leave_the_sum_exact(ciphers, model_keys, name):
    cipher = ciphers["classic"]
    vectors = np.random.default_rng(2).normal(size=(2, LENGTH))
    first, second = (cipher.encrypt(vector) for vector in vectors)
    adder = KeylessAdder(model_keys["classic"].public_context(), CLASSIC, LENGTH)
    adder.add(first)
    before = adder.result()
    with pytest.raises(CiphertextError, match=r"profile 'classic' with 5000 values"):
        adder.add(broken_messages(second, cipher.encrypt(np.ones(LENGTH + 2)))[name])
    assert adder.count == 1 and adder.result() == before
    adder.add(second)
    error = cipher.decrypt(adder.result(), LENGTH) - vectors.sum(axis=0)
    assert np.abs(error).max() < CLASSIC.tolerance(2)


# offsets into an uncompressed SEAL ciphertext: its envelope is 16 bytes, then the body's fields
@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (0, b"\0\0", "header"),
        (2, b"\x11", "header"),
        (3, b"\x03", "SEAL 3"),
        (5, b"\x07", "compression mode 7"),
        (6, b"\x01\0", "header"),
        (8, struct.pack("<Q", 1 << 60), "declares"),
        (16, bytes(32), "inner scale"),  # parms_id
        (48, b"\0", "inner scale"),  # not NTT
        (49, struct.pack("<Q", 3), "inner scale"),  # three polynomials
        (57, struct.pack("<Q", 8192), "inner scale"),
        (65, struct.pack("<Q", 2), "inner scale"),
        (73, struct.pack("<d", 2.0**41), "inner scale"),
        (81, struct.pack("<Q", 2), "inner scale"),  # correction factor
        (94, b"\x02", "compressed on its own"),
        (97, struct.pack("<Q", 1 << 40), "declares"),
        (105, struct.pack("<Q", 1 << 40), "number of coefficients"),
        (113, b"\xff" * 8, "not reduced"),
    ],
)
def test_every_field_inside_a_ciphertext_is_compared(ciphers, offset, data, words):
    good = check(ciphers["classic"].encrypt(np.ones(10)), CLASSIC, 10)[0]
    bad = good[:offset] + data + good[offset + len(data) :]
    with pytest.raises(CiphertextError, match=words):
        check(message(bad), CLASSIC, 10)


def test_reading_ends_at_the_first_ciphertext_too_many():
    """A million empty ciphertexts are not collected before they are counted."""
    with pytest.raises(CiphertextError, match="more than 1 ciphertexts"):
        check(_message([b""] * 1000, [10], CLASSIC.scale), CLASSIC, 10)


def test_the_reader_of_messages_says_what_is_wrong():
    good = b"".join((_protobuf.length_delimited(1, b"abc"), b"\x10\x07", b"\x19" + bytes(8)))
    assert list(_protobuf.fields(good)) == [(1, 2, b"abc"), (2, 0, 7), (3, 1, bytes(8))]
    for data, words in (
        (b"\x0a\x05ab", "field 1 is truncated"), (b"\x19" + bytes(7), "field 3 is truncated"),
        (b"\x10\x80", "a number is truncated"), (b"\x10" + b"\x80" * 10 + b"\x01", "a number is too long"),
        (b"\x0d" + bytes(4), "field 1 has wire type 5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            list(_protobuf.fields(data))


def test_what_is_too_large_for_a_ciphertext_is_not_decompressed(ciphers):
    good = check(ciphers["classic"].encrypt(np.ones(10)), CLASSIC, 10)[0]
    for blob in (good + bytes(10_000), envelope(1, bytes(100_000)), good[:8]):
        with pytest.raises(CiphertextError, match="cannot be one of SEAL's objects"):
            check(message(blob), CLASSIC, 10)


def test_an_unencrypted_vector_is_refused(ciphers):
    good = check(ciphers["classic"].encrypt(np.ones(10)), CLASSIC, 10)[0]
    bare = good[: -4096 * 8] + bytes(4096 * 8)
    with pytest.raises(CiphertextError, match="not encrypted"):
        check(message(bare), CLASSIC, 10)


@pytest.mark.parametrize("mode", [_seal_blob.ZLIB, _seal_blob.ZSTD])
def test_compressed_bodies_are_read_but_not_beyond_their_size(mode):
    body = bytes(range(256)) * 16
    if mode == _seal_blob.ZLIB:
        packed = zlib.compress(body)
    else:
        header = struct.pack("<I", len(body) << 3 | 1)[:3]  # one stored block
        packed = b"\x28\xb5\x2f\xfd\x60" + struct.pack("<H", len(body) - 256) + header + body
    assert _seal_blob.unwrap(envelope(mode, packed), (len(body),)) == body
    assert _seal_blob.unwrap(envelope(mode, packed), (len(body), 9999)) == body
    for sizes in ((len(body) - 1,), (len(body) + 1,)):
        with pytest.raises(ValueError, match=r"body|decompresses"):
            _seal_blob.unwrap(envelope(mode, packed), sizes)
    for damaged in (packed[:-1], packed + b"\0", b"", b"\0" * 50):
        with pytest.raises(ValueError, match=r"body|decompresses|damaged|truncated"):
            _seal_blob.unwrap(envelope(mode, damaged), (len(body),))


BOMB = """
import sys
sys.path.insert(0, sys.argv[1])
import test_model_adder as t
from flep_fl.contracts.errors import CiphertextError
# all of them no larger than a genuine ciphertext
bombs = [t.envelope(1, t.zlib_bomb(128 << 20)[:60000]), t.envelope(1, t.zlib_bomb(48 << 20)),
         t.envelope(2, t.zstd_bomb(1 << 30)), t.envelope(2, t.zstd_bomb(1 << 25))]
def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
def check(blob):
    t.check(t.message(blob), t.CLASSIC, 10)
try:
    check(b"")  # loads everything that the check needs
except CiphertextError:
    pass
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from what is held now
before, refused = memory("VmRSS"), 0
for bomb in bombs:
    try:
        check(bomb)
    except CiphertextError as exc:
        refused += "decompresses to more" in str(exc)
print(refused, len(bombs), (memory("VmHWM") - before) // 1024)
"""


def test_decompression_bombs_are_refused_in_bounded_memory():
    here = __file__.rpartition("/")[0]
    result = subprocess.run([sys.executable, "-c", BOMB, here], capture_output=True, text=True, check=True)
    refused, bombs, grown_mb = map(int, result.stdout.split())
    assert refused == bombs == 4
    assert grown_mb < 8


MUTATIONS = """
import json, random, sys
import numpy as np
from flep_fl.contracts.errors import CiphertextError
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.profiles import get_profile
name, encryption, path = sys.argv[1:]
public, payload = open(path + "/context", "rb").read(), open(path + "/payload", "rb").read()
adder = KeylessAdder(public, get_profile(name, encryption), 5000)
adder.add(payload)
rng, refused = random.Random(7), 0
second = len(payload) // 2
for number in range(150):
    bad = bytearray(payload)
    # half of them where the structure is, the rest anywhere
    start = rng.choice((0, second - 8)) if number % 2 else rng.randrange(len(bad) - 160)
    for _ in range(rng.randrange(1, 4)):
        bad[start + rng.randrange(160)] = rng.randrange(256)
    if number % 10 == 0:
        del bad[rng.randrange(len(bad)):]
    before = adder.result() if number % 15 == 0 else None
    try:
        adder.add(bytes(bad))
    except CiphertextError:
        refused += 1
        assert before is None or adder.result() == before
print(json.dumps({"refused": refused, "added": adder.count}))
"""


def test_mutated_payloads_never_crash(tmp_path, cipher, key, profile):
    (tmp_path / "context").write_bytes(key.public_context())
    (tmp_path / "payload").write_bytes(cipher.encrypt(np.ones(LENGTH)))
    command = [sys.executable, "-c", MUTATIONS, profile.name, profile.encryption, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    assert counts["refused"] + counts["added"] == 151
    # in packed coefficients there is little but the head, the end and the range that could be wrong
    assert counts["refused"] > (15 if profile.packed else 50)


def test_contexts_that_an_adder_must_not_have(model_keys):
    key = model_keys["default"]
    with pytest.raises(ModelKeyError, match="secret key"):
        KeylessAdder(key.secret_context, DEFAULT, 10)
    public = key.public_context()
    for bad in (b"", public[:40], public[:-1], public + public, b"\xff" * 86):
        with pytest.raises(ModelKeyError):
            KeylessAdder(bad, DEFAULT, 10)
    other = Profile("other", 8192, (60, 40, 60), 40, complex_packing=True, seeded=True)
    with pytest.raises(ModelKeyError, match="other"):
        KeylessAdder(public, other, 10)


def test_an_empty_sum_is_an_error(model_keys):
    with pytest.raises(CiphertextError, match="no payload"):
        KeylessAdder(model_keys["default"].public_context(), DEFAULT, 10).result()


def test_a_ciphertext_of_other_parameters_is_refused(ciphers):
    context = ts.context(
        ts.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[58, 49], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC
    )
    context.global_scale = 2.0**40
    foreign = ts.ckks_vector(context, [0.5] * 10).serialize()
    with pytest.raises(CiphertextError):
        check(foreign, CLASSIC, 10)
