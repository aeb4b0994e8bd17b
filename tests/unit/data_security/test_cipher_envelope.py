from __future__ import annotations

import struct

import numpy as np
import pytest

from flep_fl.contracts.errors import EnvelopeError, EnvelopeVersionError, WrongImageKeyError
from flep_fl.data_security.envelope import HEADER_BYTES, KIND_PLAIN, Header, parse_header
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.pipeline import ThreeLayerCipher

LAYER_SETS = [
    ("scramble", "encode", "noise", "mask", "envelope"),
    ("envelope",),
    (),
]


@pytest.mark.parametrize("layers", LAYER_SETS)
def test_every_flipped_byte_is_refused(make_cipher, natural, layers: tuple[str, ...]) -> None:
    cipher = make_cipher(layers=layers)
    (envelope,) = cipher.encrypt(natural(1, 5, 7))
    for position in range(len(envelope)):
        for change in (0x01, 0x80):
            altered = bytearray(envelope)
            altered[position] ^= change
            with pytest.raises(EnvelopeError):
                cipher.decrypt([bytes(altered)])


@pytest.mark.parametrize("layers", LAYER_SETS)
def test_every_truncation_and_extension_is_refused(make_cipher, natural, layers: tuple[str, ...]) -> None:
    cipher = make_cipher(layers=layers)
    (envelope,) = cipher.encrypt(natural(1, 5, 7))
    for length in range(len(envelope)):
        with pytest.raises(EnvelopeError):
            cipher.decrypt([envelope[:length]])
    with pytest.raises(EnvelopeError):
        cipher.decrypt([envelope + b"\x00"])


def test_one_bad_envelope_stops_the_batch(make_cipher, natural) -> None:
    cipher = make_cipher()
    envelopes = cipher.encrypt(natural(3, 8, 8))
    with pytest.raises(EnvelopeError):
        cipher.decrypt([envelopes[0], envelopes[1][:-1] + b"\x00", envelopes[2]])


def test_other_key_is_named(make_cipher, natural) -> None:
    one, two = make_cipher(seed=1), make_cipher(seed=2)
    with pytest.raises(WrongImageKeyError) as caught:
        two.decrypt(one.encrypt(natural(1, 8, 8)))
    assert one.bundle.key_id in str(caught.value)
    assert two.bundle.key_id in str(caught.value)


def test_same_key_with_other_parameters_is_another_bundle(make_cipher, natural) -> None:
    """An analyst with a stale alpha must get an error, never a wrong image."""
    one, two = make_cipher(seed=1, alpha=0.5), make_cipher(seed=1, alpha=0.4)
    assert one.bundle.master_key == two.bundle.master_key
    with pytest.raises(WrongImageKeyError):
        two.decrypt(one.encrypt(natural(1, 8, 8)))


def test_other_epoch_is_named(entropy, natural) -> None:
    ciphers = [
        ThreeLayerCipher(
            ImageKeyBundle.generate(CipherParameters(), NoiseParameters(), epoch=epoch, entropy=entropy(1))
        )
        for epoch in (3, 4)
    ]
    with pytest.raises(WrongImageKeyError, match=r"epoch 4.*epoch 3"):
        ciphers[1].decrypt(ciphers[0].encrypt(natural(1, 8, 8)))


def test_a_changed_epoch_does_not_authenticate(entropy, natural) -> None:
    """The master key may be the same in both epochs; the header is authenticated anyway."""
    ciphers = [
        ThreeLayerCipher(
            ImageKeyBundle.generate(CipherParameters(), NoiseParameters(), epoch=epoch, entropy=entropy(1))
        )
        for epoch in (3, 4)
    ]
    (envelope,) = ciphers[0].encrypt(natural(1, 8, 8))
    forged = bytearray(envelope)
    forged[22:26] = struct.pack(">I", 4)
    assert parse_header(bytes(forged)).epoch == 4
    with pytest.raises(EnvelopeError, match="altered"):
        ciphers[1].decrypt([bytes(forged)])


def test_other_version_is_named(make_cipher, natural) -> None:
    cipher = make_cipher()
    (envelope,) = cipher.encrypt(natural(1, 8, 8))
    with pytest.raises(EnvelopeVersionError, match="version"):
        cipher.decrypt([envelope[:4] + b"\x02" + envelope[5:]])


def test_a_plain_container_never_passes_for_a_sealed_one(make_cipher, natural) -> None:
    cipher = make_cipher()
    (envelope,) = cipher.encrypt(natural(1, 8, 8))
    header = parse_header(envelope)
    plain = Header(
        KIND_PLAIN,
        header.key_id,
        header.epoch,
        header.bits,
        header.height,
        header.width,
        header.nonce,
        header.iv,
    )
    from flep_fl.data_security.envelope import seal

    with pytest.raises(EnvelopeError):
        cipher.decrypt([seal(plain, bytes(64), b"")])


def test_header_round_trip_and_content(make_cipher, natural) -> None:
    cipher = make_cipher(bits=16)
    (envelope,) = cipher.encrypt(natural(1, 5, 7))
    header = parse_header(envelope)
    assert (header.height, header.width, header.bits, header.epoch) == (5, 7, (16,) * 4, 1)
    assert header.key_id == cipher.bundle.key_id
    assert header.to_bytes() == envelope[:HEADER_BYTES]
    assert len(envelope) == HEADER_BYTES + 6 * 8 * 2 + 16


@pytest.mark.parametrize("junk", [b"", b"x", b"FLEI", b"\x89PNG" + bytes(200), bytes(1000), "text", None])
def test_junk_is_named(make_cipher, junk: object) -> None:
    with pytest.raises(EnvelopeError):
        make_cipher().decrypt([junk])


def test_equal_images_get_unrelated_envelopes(make_cipher, natural) -> None:
    cipher = make_cipher()
    image = natural(1, 64, 64)
    one, two = (np.frombuffer(cipher.encrypt(image)[0][HEADER_BYTES:], np.uint8) for _ in range(2))
    assert np.mean(one == two) < 0.02
