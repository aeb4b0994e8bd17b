"""Rotation: several epochs of one owner, each with a key of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.contracts.errors import (
    CipherParameterError,
    EnvelopeError,
    EnvelopeVersionError,
    FlepError,
    ImageKeyError,
    WrongImageKeyError,
)
from flep_fl.contracts.ports import ImageCipher
from flep_fl.data_security.envelope import parse_header
from flep_fl.data_security.epochs import BundleRing, load_ring, save_ring
from flep_fl.data_security.keys import LAST_EPOCH, CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.labels import open_label, seal_label
from flep_fl.data_security.presets import build_cipher
from flep_fl.data_security.ring_cipher import RingCipher, decrypt_any
from flep_fl.data_security.wrapping import unwrap_bundle, unwrap_ring, wrap_bundle, wrap_ring

SECRET = np.arange(16, dtype=np.uint8).reshape(4, 4)
NOISE_SECRET = b"owner's noise secret, 32 bytes.."


def first(entropy, **parameters: object) -> ImageKeyBundle:
    return ImageKeyBundle.generate(
        CipherParameters(**parameters), NoiseParameters(), entropy=entropy(1), secret_images=[SECRET]
    )


@pytest.fixture
def ring(entropy) -> BundleRing:
    """Epochs 1, 2 and 3."""
    stream = entropy(2)
    ring = BundleRing((first(entropy),))
    return ring.rotate(entropy=stream, secret_images=[SECRET]).rotate(entropy=stream, secret_images=[SECRET])


# --- rotation --------------------------------------------------------------------------------------------


def test_rotation_keeps_the_parameters_and_changes_every_key(entropy) -> None:
    old = ImageKeyBundle.generate(
        CipherParameters(alpha=0.3), NoiseParameters(std=9), epoch=4, entropy=entropy(1), cipher_name="paper"
    )
    new = old.rotate()
    assert (new.epoch, new.cipher, new.noise, new.cipher_name) == (5, old.cipher, old.noise, "paper")
    assert new.master_key != old.master_key
    assert new.key_id != old.key_id
    assert not any(np.array_equal(a, b) for a, b in zip(new.secret_images, old.secret_images, strict=True))


def test_rotation_may_change_the_group_keys_of_the_paper(entropy) -> None:
    """The pair (sequence key, b): both belong to an epoch."""
    old = first(entropy)
    new = old.rotate(params=CipherParameters(block_side=4), noise=NoiseParameters(std=3))
    assert (old.cipher.block_side, new.cipher.block_side) == (2, 4)
    assert new.noise.std == 3
    assert old.layer_keys(bytes(16)).scramble != new.layer_keys(bytes(16)).scramble


def test_a_new_master_key_does_not_depend_on_the_old_one(entropy) -> None:
    """It is a function of fresh randomness alone: the holder of an epoch can compute no other epoch's."""
    one, two = first(entropy), first(entropy).rotate(entropy=entropy(50))
    assert one.rotate(entropy=entropy(3)).master_key == two.rotate(entropy=entropy(3)).master_key
    assert one.rotate(entropy=entropy(3)).master_key != one.rotate(entropy=entropy(4)).master_key


def test_a_fresh_key_is_32_bytes_of_the_operating_systems_randomness(entropy) -> None:
    asked: list[int] = []
    bundle = first(entropy).rotate(entropy=lambda count: asked.append(count) or bytes(range(count)))
    assert bundle.master_key == bytes(range(asked[0])) == bytes(range(32))
    for method in (ImageKeyBundle.rotate, BundleRing.rotate):
        assert method.__kwdefaults__["entropy"] is secrets.token_bytes


def test_there_is_a_last_epoch(entropy) -> None:
    last = dataclasses.replace(first(entropy), epoch=LAST_EPOCH)
    with pytest.raises(CipherParameterError, match="epoch is out of range"):
        last.rotate()


# --- one epoch opens itself alone ------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, ("scramble", "encode", "envelope"), ("envelope",)])
def test_a_stolen_bundle_opens_its_own_epoch_alone(layers, entropy, natural) -> None:
    parameters = {} if layers is None else {"layers": layers}
    ring = BundleRing((first(entropy, **parameters),)).rotate().rotate()
    image = natural(1, 8, 8)
    sealed = {bundle.epoch: build_cipher(bundle).encrypt(image)[0] for bundle in ring.bundles}
    stolen = ring.get(ring.bundles[1].key_id, 2)
    thief = build_cipher(stolen)
    assert np.abs(thief.decrypt([sealed[2]])[0] - image[0]).max() <= 4
    for epoch in (1, 3):
        with pytest.raises(WrongImageKeyError):
            thief.decrypt([sealed[epoch]])
        # A thief does not play by the rules: it writes its own key id and epoch into the header, ...
        header = parse_header(sealed[epoch])
        forged = dataclasses.replace(header, key_id=stolen.key_id, epoch=2).to_bytes()
        with pytest.raises(EnvelopeError, match="altered"):
            thief.decrypt([forged + sealed[epoch][len(forged) :]])
        # ... or the epoch's number into its bundle.
        disguised = dataclasses.replace(stolen, epoch=epoch)
        assert disguised.key_id != header.key_id
        with pytest.raises(WrongImageKeyError):
            build_cipher(disguised).decrypt([sealed[epoch]])


def test_no_sub_key_is_shared_between_epochs(ring: BundleRing) -> None:
    keys = []
    for bundle in ring.bundles:
        layer = bundle.layer_keys(bytes(16))
        keys += [bundle.master_key, *(bundle.subkey(label) for label in ("mac", "envelope", "label", "blob"))]
        keys += [layer.scramble, layer.encode, layer.noise, layer.mask]
    assert len(set(keys)) == len(keys)


# --- the ring --------------------------------------------------------------------------------------------


def test_the_newest_seals_and_each_opens_its_own(ring: BundleRing, natural) -> None:
    images = natural(6, 8, 8)
    envelopes = []
    for count in (1, 2, 3):
        cipher = RingCipher(BundleRing(ring.bundles[:count]))
        envelopes += cipher.encrypt(images[2 * count - 2 : 2 * count])
    assert [parse_header(envelope).epoch for envelope in envelopes] == [1, 1, 2, 2, 3, 3]
    shuffled = [4, 0, 3, 1, 5, 2]
    restored = decrypt_any(ring, [envelopes[i] for i in shuffled])
    assert np.abs(np.stack(restored) - images[shuffled]).max() < 3


def test_old_records_stay_readable_with_the_old_bundle_and_the_rotated_ring(ring, natural) -> None:
    image = natural(1, 8, 8)
    envelope = build_cipher(ring.bundles[0]).encrypt(image)
    label = seal_label(ring.bundles[0], "r", "train", 7)
    rotated = ring.rotate().rotate()
    assert np.array_equal(
        build_cipher(ring.bundles[0]).decrypt(envelope)[0], RingCipher(rotated).decrypt(envelope)[0]
    )
    assert open_label(rotated.for_label(label), "r", "train", label) == 7


def test_a_ring_is_an_image_cipher(ring: BundleRing, natural) -> None:
    cipher: ImageCipher = RingCipher(ring)
    (image,) = cipher.decrypt(cipher.encrypt(natural(1, 5, 7)))
    assert image.shape == (5, 7)
    assert cipher.decrypt([]) == []


def test_one_bad_envelope_gives_no_image_at_all(ring: BundleRing, natural) -> None:
    good = RingCipher(ring).encrypt(natural(1, 8, 8))[0]
    with pytest.raises(EnvelopeError):
        decrypt_any(ring, [good, good[:-1] + bytes([good[-1] ^ 1])])


def test_what_is_not_in_the_ring_is_named(ring: BundleRing, natural) -> None:
    foreign = ring.newest.rotate(secret_images=[SECRET])
    (envelope,) = build_cipher(foreign).encrypt(natural(1, 8, 8))
    with pytest.raises(WrongImageKeyError, match=r"an epoch out of 1, 2, 3\. Found key \w+ epoch 4"):
        decrypt_any(ring, [envelope])
    with pytest.raises(WrongImageKeyError, match="epoch 3"):  # the right epoch of somebody else
        ring.get(foreign.key_id, 3)
    with pytest.raises(WrongImageKeyError, match="epoch 1"):  # the right key in another epoch
        ring.get(ring.bundles[0].key_id, 2)
    with pytest.raises(EnvelopeError, match="not an image envelope"):
        ring.for_envelope(b"something else")
    with pytest.raises(EnvelopeVersionError):
        ring.for_envelope(envelope[:4] + b"\x63" + envelope[5:])
    with pytest.raises(EnvelopeError):
        ring.for_label(b"something else")


def test_one_denoiser_fits_one_noise_level(entropy, natural) -> None:
    old = ImageKeyBundle.generate(CipherParameters(), NoiseParameters(std=10), entropy=entropy(1))
    ring = BundleRing((old,)).rotate(noise=NoiseParameters(std=20))
    envelopes = [
        build_cipher(bundle, noise_secret=NOISE_SECRET).encrypt(natural(1, 8, 8))[0]
        for bundle in ring.bundles
    ]
    cipher = RingCipher(ring, noise_secret=NOISE_SECRET)
    assert len(cipher.decrypt(envelopes)) == 2
    with pytest.raises(CipherParameterError, match="gaussian 10 in epoch 1, gaussian 20 in epoch 2"):
        cipher.decrypt(envelopes, denoise=lambda batch: batch)
    assert np.all(cipher.decrypt(envelopes[:1], denoise=lambda batch: batch * 0)[0] == 0)


def test_bundles_that_do_not_fit_together_are_refused(ring: BundleRing) -> None:
    one = ring.bundles[0]
    with pytest.raises(CipherParameterError, match="empty"):
        BundleRing(())
    with pytest.raises(CipherParameterError, match="twice"):
        BundleRing((one, dataclasses.replace(one.rotate(), epoch=1)))
    with pytest.raises(CipherParameterError, match="share a master key"):
        BundleRing((one, dataclasses.replace(one, epoch=2)))
    with pytest.raises(CipherParameterError, match="share a master key"):
        BundleRing((one, dataclasses.replace(one, epoch=2, noise=NoiseParameters(std=1))))


def test_the_order_of_bundles_does_not_matter(ring: BundleRing) -> None:
    assert BundleRing(ring.bundles[::-1]) == ring
    assert ring.epochs == (1, 2, 3)
    assert ring.newest.epoch == 3


def test_repr_hides_secrets(ring: BundleRing) -> None:
    text = repr(ring) + repr(RingCipher(ring))
    for bundle in ring.bundles:
        assert bundle.key_id in text
        assert bundle.master_key.hex() not in text
        assert repr(bundle.master_key)[2:-1] not in text


# --- files and recipients --------------------------------------------------------------------------------


def test_round_trip(ring: BundleRing) -> None:
    assert BundleRing.from_bytes(ring.to_bytes()) == ring


def test_a_ring_file_is_for_its_owner_alone(ring: BundleRing, tmp_path: Path) -> None:
    path = tmp_path / "owner" / "ring.key"
    save_ring(path, ring)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_ring(path) == ring
    save_ring(path, ring.rotate())
    assert load_ring(path).epochs == (1, 2, 3, 4)
    assert [entry.name for entry in path.parent.iterdir()] == ["ring.key"]


def test_saving_loses_no_bundle(ring: BundleRing, tmp_path: Path) -> None:
    path = tmp_path / "ring.key"
    save_ring(path, ring.rotate())
    for poorer in (ring, ring.rotate()):  # the second gives epoch 4 another key
        with pytest.raises(ImageKeyError, match="epoch 4"):
            save_ring(path, poorer)
    path.write_bytes(b"something else")
    with pytest.raises(ImageKeyError, match="not a ring"):
        save_ring(path, ring)
    with pytest.raises(ImageKeyError, match="cannot be read"):
        load_ring(tmp_path / "missing")


def test_a_recipient_gets_the_epochs_it_may_read(ring: BundleRing) -> None:
    analyst = X25519PrivateKey.generate()
    wrapped = wrap_ring(ring.only(1, 3).to_bytes(), analyst.public_key(), context=b"site a")
    opened = BundleRing.from_bytes(unwrap_ring(wrapped, analyst, context=b"site a"))
    assert opened.epochs == (1, 3)
    assert ring.bundles[1].master_key not in opened.to_bytes()
    with pytest.raises(ImageKeyError, match="epoch 9"):
        ring.only(1, 9)


def test_a_ring_and_a_bundle_are_not_taken_for_one_another(ring: BundleRing) -> None:
    analyst = X25519PrivateKey.generate()
    public = analyst.public_key()
    with pytest.raises(EnvelopeError, match="ring"):
        unwrap_ring(wrap_bundle(ring.newest.to_bytes(), public, context=b""), analyst, context=b"")
    with pytest.raises(EnvelopeError, match="key bundle"):
        unwrap_bundle(wrap_ring(ring.to_bytes(), public, context=b""), analyst, context=b"")
    with pytest.raises(ImageKeyError):
        BundleRing.from_bytes(ring.newest.to_bytes())
    with pytest.raises(ImageKeyError):
        ImageKeyBundle.from_bytes(ring.to_bytes())


def test_every_flipped_or_missing_byte_is_refused(ring: BundleRing) -> None:
    data = ring.to_bytes()
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 0x04
        with pytest.raises(ImageKeyError):
            BundleRing.from_bytes(bytes(altered))
        with pytest.raises(ImageKeyError):
            BundleRing.from_bytes(data[:position])


def test_a_forged_ring_is_refused(ring: BundleRing) -> None:
    """The checksum is no protection: whoever writes the file also writes the checksum."""
    head = struct.Struct(">8sBI")
    packed = [bundle.to_bytes() for bundle in ring.bundles]

    def forge(count: int, bundles: list[bytes], tail: bytes = b"") -> bytes:
        body = head.pack(b"FLEPRING", 1, count)
        body += b"".join(struct.pack(">I", len(data)) + data for data in bundles) + tail
        return body + hashlib.sha256(body).digest()

    assert BundleRing.from_bytes(forge(3, packed)) == ring
    for forged in (
        forge(2, packed),
        forge(3, packed[:2]),
        forge(3, packed[::-1]),
        forge(2, [packed[0], packed[0]]),
        forge(0, []),
        forge(3, packed, b"\0"),
        forge(4, packed, b"\xff\xff\xff\xff"),
    ):
        with pytest.raises(FlepError):
            BundleRing.from_bytes(forged)
    with pytest.raises(ImageKeyError, match="unknown version"):
        BundleRing.from_bytes(ring.to_bytes()[:8] + b"\x02" + ring.to_bytes()[9:])
