"""Random mutations of everything that is sealed: none is accepted, none crashes, each has a named error."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.contracts.errors import EnvelopeError, FlepError
from flep_fl.data_security.envelope import parse_header
from flep_fl.data_security.epochs import BundleRing
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.labels import open_blob, open_label, seal_blob, seal_label
from flep_fl.data_security.pipeline import ThreeLayerCipher
from flep_fl.data_security.ring_cipher import RingCipher
from flep_fl.data_security.wrapping import unwrap_bundle, unwrap_ring, wrap_bundle, wrap_ring

NOISE_SECRET = b"owner's noise secret, 32 bytes.."
SECRET = np.arange(16, dtype=np.uint8).reshape(4, 4)

MUTATIONS = 3000
"""Of each cipher's envelopes: 18,000 in all."""

CIPHERS = {
    "flep": ({}, {}),
    "noise": ({"alpha": 0.3}, {"std": 25.0}),
    "keyed16": ({"bits": 16, "block_side": 3}, {"std": 25.0, "recovery": "keyed"}),
    "paper": ({"layers": ("scramble", "encode", "noise", "envelope"), "noise_units": "wire"}, {"std": 5.0}),
    "aead": ({"layers": ("envelope",)}, {}),
    "packed": ({"bits": (8, 5, 5, 4), "wavelet": "db2"}, {}),
}


def make_bundle(entropy, seed: int = 1, noise: dict | None = None, **parameters: object) -> ImageKeyBundle:
    return ImageKeyBundle.generate(
        CipherParameters(**parameters),
        NoiseParameters(**(noise or {})),
        entropy=entropy(seed),
        secret_images=[SECRET],
    )


# --- mutations -------------------------------------------------------------------------------------------


def flip_bits(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    altered = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        altered[rng.randrange(len(altered))] ^= 1 << rng.randrange(8)
    return bytes(altered)


def truncate(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data))]


def lengthen(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    tail = rng.choice((rng.randbytes(rng.randrange(1, 40)), bytes(rng.randrange(1, 40)), rng.choice(others)))
    return data + tail


def splice(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Head of one, tail of another."""
    other = rng.choice(others)
    cut = rng.randrange(1, len(data))
    return data[:cut] + other[rng.choice((cut, rng.randrange(len(other)))) :]


def delete(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    start = rng.randrange(len(data) - 1)
    return data[:start] + data[rng.randrange(start + 1, len(data)) :]


def swap_blocks(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    """Exchange two stretches of one length: every byte is still there."""
    size = rng.randrange(1, max(2, len(data) // 4))
    first = rng.randrange(len(data) - 2 * size)
    second = rng.randrange(first + size, len(data) - size + 1)
    middle = data[first + size : second]
    return (
        data[:first]
        + data[second : second + size]
        + middle
        + data[first : first + size]
        + data[second + size :]
    )


def overwrite(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    """Extreme values where a length, a count or a number may be."""
    value = rng.choice((b"\0" * 4, b"\xff" * 4, struct.pack(">I", 1 << 16), struct.pack(">I", 1), b"\x7f"))
    at = rng.randrange(len(data) - len(value))
    return data[:at] + value + data[at + len(value) :]


def garbage(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    kept = rng.choice((0, 4, 5, len(data) // 4))
    return data[:kept] + rng.randbytes(rng.randrange(2 * len(data)))


ANYWHERE = (flip_bits, truncate, lengthen, splice, delete, swap_blocks, overwrite, garbage)
Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def in_the_header(size: int) -> tuple[Mutation, ...]:
    """Mutations that touch the first ``size`` bytes alone, and exchange whole headers."""

    def edit(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
        return rng.choice((flip_bits, overwrite))(rng, data[:size], others) + data[size:]

    def swap(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
        return rng.choice(others)[:size] + data[size:]

    def graft(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
        """Put a stretch of another header, in its place, into this one."""
        start = rng.randrange(size)
        end = rng.randrange(start + 1, size + 1)
        return data[:start] + rng.choice(others)[start:end] + data[end:]

    return edit, swap, graft


def mutants(
    seed: str, count: int, originals: Sequence[bytes], mutations: Sequence[Mutation], others: Sequence[bytes]
) -> Iterator[bytes]:
    """Yield ``count`` mutants, none of them an original; every kind of mutation gets its share."""
    rng, known, made = random.Random(seed), set(originals), 0
    pool = [*originals, *others]
    while made < count:
        mutant = mutations[made % len(mutations)](rng, rng.choice(originals), pool)
        if mutant not in known:
            made += 1
            yield mutant


def refused(attempts: Iterator[bytes], attempt: Callable[[bytes], object]) -> Counter[str]:
    """Try every mutant; count the errors by name. Anything but a FlepError comes out as it is."""
    errors: Counter[str] = Counter()
    for mutant in attempts:
        try:
            attempt(mutant)
        except FlepError as error:
            assert str(error)
            errors[type(error).__name__] += 1
        else:
            pytest.fail(f"accepted: {mutant.hex()}")
    return errors


# --- images ----------------------------------------------------------------------------------------------


def header_bytes(envelope: bytes) -> int:
    return len(parse_header(envelope).to_bytes())


@pytest.mark.parametrize("name", CIPHERS)
def test_mutated_envelopes(name: str, entropy, natural) -> None:
    parameters, noise = CIPHERS[name]
    bundle = make_bundle(entropy, noise=noise, **parameters)
    cipher = ThreeLayerCipher(bundle, noise_secret=NOISE_SECRET)
    originals = cipher.encrypt(natural(3, 8, 8)) + cipher.encrypt(natural(1, 5, 12))
    originals += cipher.encrypt(natural(1, 8, 8).astype(np.uint16) * 257)
    originals += cipher.encrypt(natural(3, 8, 8)[None])  # colour
    ring = BundleRing((bundle,)).rotate(secret_images=[SECRET])
    foreign = ThreeLayerCipher(ring.newest, noise_secret=NOISE_SECRET).encrypt(natural(2, 8, 8))
    opener = RingCipher(ring)  # holds the keys of the foreign ones too
    assert [len(image) for image in opener.decrypt([*originals, *foreign])] == [8, 8, 8, 5, 8, 3, 8, 8]
    mutations = ANYWHERE + in_the_header(header_bytes(originals[0]))
    attempts = mutants(name, MUTATIONS, [*originals, *foreign], mutations, ())
    errors = refused(attempts, lambda mutant: opener.decrypt([mutant]))
    assert errors.total() == MUTATIONS
    assert set(errors) == {"EnvelopeError", "EnvelopeVersionError", "WrongImageKeyError"}
    assert min(errors.values()) > 10


def test_a_mutant_among_good_envelopes_gives_no_image(entropy, natural) -> None:
    cipher = ThreeLayerCipher(make_bundle(entropy))
    good = cipher.encrypt(natural(3, 8, 8))
    errors = refused(
        mutants("batch", 200, good, ANYWHERE, ()), lambda mutant: cipher.decrypt([good[0], mutant, good[1]])
    )
    assert errors.total() == 200


def test_an_accident_is_noticed_without_the_envelope_layer_too(entropy, natural) -> None:
    """``cipher=none`` has a checksum alone: it finds accidents; whoever means harm computes a new one."""
    cipher = ThreeLayerCipher(make_bundle(entropy, layers=()))
    originals = cipher.encrypt(natural(3, 8, 8))
    mutations = ANYWHERE + in_the_header(header_bytes(originals[0]))
    errors = refused(mutants("none", 600, originals, mutations, ()), lambda mutant: cipher.decrypt([mutant]))
    assert errors.total() == 600


@pytest.mark.parametrize("layers", [("envelope",), ()])
def test_an_impossible_size_costs_no_memory(layers: tuple[str, ...], entropy, natural) -> None:
    """The header is believed only after the length of the whole envelope has been compared with it."""
    cipher = ThreeLayerCipher(make_bundle(entropy, layers=layers, bits=16))
    (envelope,) = cipher.encrypt(natural(1, 8, 8))
    at = envelope.index(struct.pack(">II", 8, 8))
    tracemalloc.start()
    for height, width in ((65536, 65536), (65535, 1), (1, 65536), (0, 8), (2**32 - 1, 2**32 - 1), (9, 8)):
        huge = envelope[:at] + struct.pack(">II", height, width) + envelope[at + 8 :]
        with pytest.raises(EnvelopeError):
            cipher.decrypt([huge])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


# --- labels, blobs, bundles, rings -----------------------------------------------------------------------


def test_mutated_labels(entropy) -> None:
    bundle, other = make_bundle(entropy), make_bundle(entropy, seed=2)
    labels = [seal_label(bundle, "r", "train", number) for number in range(4)]
    foreign = [seal_label(bundle, "s", "train", 1), seal_label(other, "r", "train", 1)]
    foreign += [seal_blob(bundle, "label", bytes(8))]
    attempts = mutants("label", 1500, labels, ANYWHERE + in_the_header(37), foreign)
    errors = refused(attempts, lambda mutant: open_label(bundle, "r", "train", mutant))
    assert set(errors) == {"EnvelopeError", "EnvelopeVersionError", "WrongImageKeyError"}


def test_mutated_blobs(entropy) -> None:
    bundle = make_bundle(entropy)
    blobs = [seal_blob(bundle, "archive", bytes([number]) * 40) for number in range(4)]
    foreign = [seal_blob(bundle, "another", bytes(40)), seal_label(bundle, "r", "train", 0)]
    attempts = mutants("blob", 500, blobs, ANYWHERE + in_the_header(37), foreign)
    assert refused(attempts, lambda mutant: open_blob(bundle, "archive", mutant)).total() == 500


def test_mutated_bundles(entropy) -> None:
    packed = [make_bundle(entropy, seed).to_bytes() for seed in range(3)]
    errors = refused(mutants("bundle", 600, packed, ANYWHERE, ()), ImageKeyBundle.from_bytes)
    assert set(errors) == {"ImageKeyError"}


def test_mutated_rings(entropy) -> None:
    ring = BundleRing((make_bundle(entropy),)).rotate(secret_images=[SECRET])
    packed = [ring.to_bytes(), ring.rotate(secret_images=[SECRET]).to_bytes(), ring.only(2).to_bytes()]
    errors = refused(mutants("ring", 600, packed, ANYWHERE, ()), BundleRing.from_bytes)
    assert set(errors) == {"ImageKeyError"}


def test_mutated_wrappings(entropy) -> None:
    analyst, stranger = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    bundle = make_bundle(entropy)
    data, ring = bundle.to_bytes(), BundleRing((bundle,)).to_bytes()
    public = analyst.public_key()
    wrapped = [wrap_bundle(data, public, context=b"a") for _ in range(3)]
    foreign = [
        wrap_bundle(data, public, context=b"b"),
        wrap_bundle(data, stranger.public_key(), context=b"a"),
        wrap_ring(ring, public, context=b"a"),
    ]
    mutations = ANYWHERE + in_the_header(22)
    attempts = mutants("wrap", 600, wrapped, mutations, foreign)
    errors = refused(attempts, lambda mutant: unwrap_bundle(mutant, analyst, context=b"a"))
    assert set(errors) == {"EnvelopeError", "EnvelopeVersionError", "WrongImageKeyError"}
    attempts = mutants("wrapped ring", 200, foreign[2:], mutations, wrapped)
    refused(attempts, lambda mutant: unwrap_ring(mutant, analyst, context=b"a"))
