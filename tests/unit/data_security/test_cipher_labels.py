from __future__ import annotations

import pytest

from flep_fl.contracts.errors import EnvelopeError, EnvelopeVersionError, RecordError, WrongImageKeyError
from flep_fl.data_security.keys import CipherParameters, ImageKeyBundle, NoiseParameters
from flep_fl.data_security.labels import open_blob, open_label, seal_blob, seal_label


def make(entropy, seed: int = 0, epoch: int = 1) -> ImageKeyBundle:
    return ImageKeyBundle.generate(CipherParameters(), NoiseParameters(), epoch=epoch, entropy=entropy(seed))


def test_round_trip_and_constant_length(entropy) -> None:
    bundle = make(entropy)
    sealed = [seal_label(bundle, "r1", "train", label) for label in (0, 1, 9, 2**62)]
    assert [open_label(bundle, "r1", "train", item) for item in sealed] == [0, 1, 9, 2**62]
    assert {len(item) for item in sealed} == {61}


def test_equal_labels_look_different(entropy) -> None:
    bundle = make(entropy)
    assert seal_label(bundle, "r1", "train", 1)[37:] != seal_label(bundle, "r1", "train", 1)[37:]


def test_a_label_is_bound_to_record_and_split(entropy) -> None:
    bundle = make(entropy)
    sealed = seal_label(bundle, "r1", "train", 1)
    for record, split in (("r2", "train"), ("r1", "test"), ("r1t", "rain")):
        with pytest.raises(EnvelopeError):
            open_label(bundle, record, split, sealed)


def test_every_flipped_or_missing_byte_is_refused(entropy) -> None:
    bundle = make(entropy)
    sealed = seal_label(bundle, "r1", "train", 1)
    for position in range(len(sealed)):
        altered = bytearray(sealed)
        altered[position] ^= 0x80
        with pytest.raises(EnvelopeError):
            open_label(bundle, "r1", "train", bytes(altered))
        with pytest.raises(EnvelopeError):
            open_label(bundle, "r1", "train", sealed[:position])


def test_other_key_epoch_and_version_are_named(entropy) -> None:
    bundle = make(entropy)
    sealed = seal_label(bundle, "r1", "train", 1)
    other = make(entropy, 1)
    with pytest.raises(WrongImageKeyError) as caught:
        open_label(other, "r1", "train", sealed)
    assert bundle.key_id in str(caught.value) and other.key_id in str(caught.value)
    with pytest.raises(WrongImageKeyError, match="epoch 2"):
        open_label(make(entropy, 0, epoch=2), "r1", "train", sealed)
    with pytest.raises(EnvelopeVersionError):
        open_label(bundle, "r1", "train", sealed[:4] + b"\x02" + sealed[5:])


@pytest.mark.parametrize("label", [-1, 2**63, True, 1.0, "1"])
def test_unusable_labels_are_named(entropy, label: object) -> None:
    with pytest.raises(RecordError):
        seal_label(make(entropy), "r1", "train", label)  # type: ignore[arg-type]


def test_blobs_are_bound_to_their_purpose(entropy) -> None:
    bundle = make(entropy)
    sealed = seal_blob(bundle, "manifest", b"data")
    assert open_blob(bundle, "manifest", sealed) == b"data"
    assert open_blob(bundle, "empty", seal_blob(bundle, "empty", b"")) == b""
    with pytest.raises(EnvelopeError):
        open_blob(bundle, "other", sealed)
    with pytest.raises(EnvelopeError):
        open_label(bundle, "manifest", "", sealed)
