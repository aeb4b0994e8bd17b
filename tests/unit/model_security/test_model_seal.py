from __future__ import annotations

import json
import random
import struct
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flep_fl.contracts.errors import (
    ForeignUpdateError,
    MalformedUpdateError,
    SignatureError,
    StaleUpdateError,
    SumCheckError,
    TooFewContributorsError,
    UpdateError,
)
from flep_fl.model_security import _canonical, seal
from flep_fl.model_security.seal import (
    UpdateHeader,
    open_control,
    open_sum,
    open_update,
    seal_control,
    seal_sum,
    seal_update,
    signed_header,
    sum_digest,
    verify_kept_sum,
)

GOLDEN = Path(__file__).parents[2] / "golden"
PAYLOAD = b"\x00\x01payload" * 20


def opened(federation, blob, **changes):
    return open_update(blob, expected=replace(federation.expected, **changes), public_keys=federation.public)


@pytest.fixture
def updates(federation):
    return {name: opened(federation, federation.seal(name, PAYLOAD)) for name in federation.signing}


def open_signed_sum(federation, blob, **changes):
    settings = {
        "cloud_key": federation.cloud.public_key(),
        "site_keys": federation.public,
        "expected": federation.expected,
        "min_contributors": 3,
    }
    return open_sum(blob, **(settings | changes))


# --- the format ------------------------------------------------------------------------------------


def test_golden_envelope():
    golden = json.loads((GOLDEN / "update_envelope.json").read_text())
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(golden["signing_key"]))
    header = UpdateHeader(**golden["header"])
    payload = bytes.fromhex(golden["payload"])
    blob = seal_update(header, payload, key)
    assert header.tag_input().decode() == golden["tag_input"]
    assert signed_header(blob).decode() == golden["signed_header"]
    assert blob.hex() == golden["update"]
    update = open_update(
        blob,
        expected=seal.Expectation(
            **{k: v for k, v in golden["header"].items() if k not in ("sender", "nonce")}
        ),
        public_keys={header.sender: key.public_key()},
    )
    total = seal_sum([update], payload, key)
    assert total.hex() == golden["sum"] and sum_digest(total) == golden["sum_digest"]
    assert seal_control(golden["control_message"], key).hex() == golden["control"]


def test_a_sealed_update_opens(federation):
    blob = federation.seal("a", PAYLOAD)
    update = opened(federation, blob)
    assert update.payload == PAYLOAD and update.header.sender == "a"
    assert update.header.payload_bytes == len(PAYLOAD)
    assert signed_header(blob) == update.header_bytes == update.header.to_bytes()
    assert update.without_payload().payload == b""
    assert len(blob) - len(PAYLOAD) < 900


def test_the_tags_input_leaves_out_only_the_payload(federation):
    header = federation.header("a")
    later = replace(header, payload_sha256="0" * 64, payload_bytes=5)
    assert header.tag_input() == later.tag_input()
    for name in asdict(header).keys() - {"payload_sha256", "payload_bytes"}:
        assert f'"{name}":'.encode() in header.tag_input()
    assert federation.header("a").tag_input() != header.tag_input()  # a fresh nonce


# --- updates that must be refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("federation", "other", ForeignUpdateError),
        ("key_id", "0" * 32, ForeignUpdateError),
        ("layout", "9" * 64, ForeignUpdateError),
        ("profile", "9" * 64, ForeignUpdateError),
        ("config", "9" * 64, ForeignUpdateError),
        ("mode", "open", ForeignUpdateError),
        ("previous", "9" * 64, ForeignUpdateError),
        ("previous", "", ForeignUpdateError),
        ("run", "run-0", StaleUpdateError),
        ("round", 1, StaleUpdateError),
        ("round", 3, StaleUpdateError),
        ("attempt", 0, StaleUpdateError),
        ("attempt", 2, StaleUpdateError),
    ],
)
def test_updates_from_elsewhere_are_refused_by_field(federation, field, value, error):
    blob = federation.seal("a", PAYLOAD, **{field: value})
    with pytest.raises(error, match=f"another {field}"):
        opened(federation, blob)


def test_an_update_of_an_earlier_attempt_counts(federation):
    blob = federation.seal("a", PAYLOAD, attempt=2)
    for current in (2, 3, 9):
        assert opened(federation, blob, attempt=current).header.attempt == 2
    with pytest.raises(StaleUpdateError, match="another attempt"):
        opened(federation, blob, attempt=1)


def test_a_sum_may_hold_updates_of_several_attempts(federation):
    tries = {"a": 1, "b": 3, "c": 2}
    later = {
        name: opened(federation, federation.seal(name, PAYLOAD, attempt=number), attempt=3)
        for name, number in tries.items()
    }
    total = seal_sum(list(later.values()), b"s", federation.cloud)
    signed = open_signed_sum(federation, total, expected=replace(federation.expected, attempt=None))
    assert {header.sender: header.attempt for header in signed.headers} == tries
    with pytest.raises(StaleUpdateError, match="another attempt"):
        open_signed_sum(federation, total, expected=replace(federation.expected, attempt=2))


def test_attempt_and_previous_may_be_left_open(federation):
    blob = federation.seal("a", PAYLOAD, previous="9" * 64, attempt=7)
    assert opened(federation, blob, previous=None, attempt=None).header.attempt == 7


def test_strangers_and_impostors_are_refused(federation):
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(SignatureError, match=r"'mallory'.*not in the kit"):
        opened(federation, seal_update(federation.header("mallory"), PAYLOAD, stranger))
    for key in (stranger, federation.signing["b"], federation.cloud):
        with pytest.raises(SignatureError, match="'a'"):
            opened(federation, seal_update(federation.header("a"), PAYLOAD, key))


def test_altered_payloads_and_headers_are_refused(federation):
    blob = federation.seal("a", PAYLOAD)
    with pytest.raises(SignatureError, match="payload"):
        opened(federation, blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(SignatureError):
        opened(federation, blob.replace(b'"round":2', b'"round":3'))
    # the payload of another update, under a header that is genuine
    other = federation.seal("a", b"\x01" * len(PAYLOAD))
    with pytest.raises(SignatureError, match="payload"):
        opened(federation, blob[: -len(PAYLOAD)] + other[-len(PAYLOAD) :])


def test_truncated_and_padded_updates_are_malformed(federation):
    blob = federation.seal("a", PAYLOAD)
    for size in (0, 1, 8, 11, 12, 200, len(blob) - len(PAYLOAD) - 1, len(blob) - 1):
        with pytest.raises(MalformedUpdateError):
            opened(federation, blob[:size])
    for bad in (blob + b"\0", b"x" + blob, blob[:8] + b"\xff" * 4 + blob[12:]):
        with pytest.raises(MalformedUpdateError):
            opened(federation, bad)


def test_a_header_that_is_too_large_is_not_even_read(federation):
    blob = federation.seal("a", b"payload")
    huge = (1 << 12) + 1
    for padding in (b" " * huge, b""):
        with pytest.raises(MalformedUpdateError, match="truncated, or its header is too large"):
            open_update(
                blob[:8] + huge.to_bytes(4, "big") + padding + blob[12:],
                expected=federation.expected,
                public_keys=federation.public,
            )


def test_300_random_mutations_are_all_refused(federation):
    blob = federation.seal("a", PAYLOAD)
    rng = random.Random(3)
    for _ in range(300):
        bad = bytearray(blob)
        position = rng.randrange(len(bad))
        bad[position] ^= rng.randrange(1, 256)
        with pytest.raises(UpdateError):
            opened(federation, bytes(bad))


def signed_document(federation, document: object, *, dump=_canonical.dump) -> bytes:
    header = dump(document)
    signature = federation.signing["a"].sign(b"flep-fl/update/v1\0" + header)
    return b"FLEPUP1\n" + struct.pack(">I", len(header)) + header + signature + PAYLOAD


def test_a_genuine_signature_does_not_excuse_a_bad_header(federation):
    good = asdict(opened(federation, federation.seal("a", PAYLOAD)).header)
    assert opened(federation, signed_document(federation, good)).payload == PAYLOAD
    changes = [
        {"extra": 1}, {"round": True}, {"round": -1}, {"round": 2.0}, {"round": "2"}, {"mode": "none"},
        {"sender": ""}, {"sender": "a\n"}, {"sender": "../a"}, {"nonce": "A" * 32}, {"nonce": "0" * 31},
        {"previous": "x"}, {"previous": None}, {"layout": []}, {"payload_bytes": 1 << 60}, {"key_id": "ab"},
        {"federation": "f" * 65},
    ]  # fmt: skip
    documents = [good | change for change in changes]
    documents += [{k: v for k, v in good.items() if k != name} for name in good]
    for document in [*documents, [], "text", None, 3]:
        with pytest.raises(MalformedUpdateError):
            opened(federation, signed_document(federation, document))
    for dump in (
        lambda d: json.dumps(d).encode(),  # spaces
        lambda d: _canonical.dump(d)[:-1] + b',"round":2}',  # a repeated key
        lambda _: b"[" * 3000,
        lambda _: b"\xff\xfe",
        lambda _: b'{"round":' + b"9" * 4050 + b"}",
        lambda _: b'{"round":NaN}',
    ):
        with pytest.raises(MalformedUpdateError):
            opened(federation, signed_document(federation, good, dump=dump))
    with pytest.raises(MalformedUpdateError):  # nor can such a header be made by accident
        seal_update(federation.header("no spaces please"), PAYLOAD, federation.signing["a"])


def test_kinds_of_envelope_do_not_pass_for_each_other(federation, updates):
    update = federation.seal("a", PAYLOAD)
    total = seal_sum(list(updates.values()), PAYLOAD, federation.cloud)
    control = seal_control({"kind": "close"}, federation.cloud)
    for blob in (total, control):
        with pytest.raises(MalformedUpdateError):
            opened(federation, blob)
    for blob in (update, control):
        with pytest.raises(MalformedUpdateError):
            open_signed_sum(federation, blob)
    # with the other kind's marker the signature's label still differs
    with pytest.raises(SignatureError):
        open_control(b"FLEPCT1\n" + total[8 : -len(PAYLOAD)], federation.cloud.public_key())


# --- sums --------------------------------------------------------------------------------------------


def test_a_kept_sum_is_whole_and_its_clouds_own(federation, updates):
    blob = seal_sum(list(updates.values()), b"the sum", federation.cloud)
    key = federation.cloud.public_key()
    assert verify_kept_sum(blob, key) == sum_digest(blob)
    with pytest.raises(SignatureError, match="not signed by the cloud"):
        verify_kept_sum(blob, Ed25519PrivateKey.generate().public_key())
    with pytest.raises(SignatureError, match="payload"):
        verify_kept_sum(blob[:-1] + b"X", key)
    with pytest.raises(MalformedUpdateError):
        verify_kept_sum(blob[:-1], key)


def test_a_sum_opens_with_its_contributors(federation, updates):
    blob = seal_sum(list(reversed(updates.values())), b"the sum", federation.cloud)
    own = updates["b"].header_bytes
    total = open_signed_sum(federation, blob, own_sender="b", own_header=own)
    assert total.senders == ("a", "b", "c") and total.payload == b"the sum"
    assert (
        total.digest == sum_digest(blob) != sum_digest(seal_sum([*updates.values()], b"x", federation.cloud))
    )
    assert [h.tag_input() for h in total.headers] == [u.header.tag_input() for u in updates.values()]


def test_the_digest_is_that_of_the_order_free_set(federation, updates):
    forward = seal_sum(list(updates.values()), b"s", federation.cloud)
    assert forward == seal_sum(list(reversed(updates.values())), b"s", federation.cloud)


def test_sums_of_somebody_else_or_altered(federation, updates):
    blob = seal_sum(list(updates.values()), b"the sum", federation.cloud)
    with pytest.raises(SignatureError, match="cloud"):
        open_signed_sum(federation, seal_sum(list(updates.values()), b"the sum", federation.signing["a"]))
    with pytest.raises(SignatureError, match="payload"):
        open_signed_sum(federation, blob[:-1] + b"n")
    for bad in (b"", blob[:-1], blob + b"\0", blob[:100]):
        with pytest.raises(MalformedUpdateError):
            open_signed_sum(federation, bad)
    rng = random.Random(4)
    for _ in range(100):
        bad = bytearray(blob)
        bad[rng.randrange(len(bad))] ^= rng.randrange(1, 256)
        with pytest.raises(UpdateError):
            open_signed_sum(federation, bytes(bad))


def test_too_few_contributors(federation, updates):
    blob = seal_sum([updates["a"], updates["b"]], b"s", federation.cloud)
    with pytest.raises(TooFewContributorsError, match="min_contributors"):
        open_signed_sum(federation, blob)
    assert open_signed_sum(federation, blob, min_contributors=2).senders == ("a", "b")
    with pytest.raises(TooFewContributorsError):
        seal_sum([], b"s", federation.cloud)


def test_one_site_named_twice_is_not_two_contributors(federation, updates):
    again = opened(federation, federation.seal("a", PAYLOAD))
    for double in (updates["a"], again):
        blob = seal_sum([*updates.values(), double], b"s", federation.cloud)
        with pytest.raises(SumCheckError, match="twice"):
            open_signed_sum(federation, blob)


def test_a_site_is_named_with_what_it_sent_or_not_at_all(federation, updates):
    blob = seal_sum(list(updates.values()), b"s", federation.cloud)
    other = opened(federation, federation.seal("a", PAYLOAD)).header_bytes
    for own in (other, None):
        with pytest.raises(SumCheckError, match="did not send"):
            open_signed_sum(federation, blob, own_sender="a", own_header=own)
    without = seal_sum([updates["b"], updates["c"]], b"s", federation.cloud)
    open_signed_sum(federation, without, min_contributors=2, own_sender="a", own_header=other)


def forged_sum(federation, updates, payload=b"s"):
    return seal_sum([replace(u) for u in updates], payload, federation.cloud)


def test_contributors_whose_signature_is_not_theirs(federation, updates):
    swapped = replace(updates["a"], signature=updates["b"].signature)
    with pytest.raises(SignatureError, match="'a'"):
        open_signed_sum(federation, forged_sum(federation, [swapped, updates["b"], updates["c"]]))
    stranger = Ed25519PrivateKey.generate()
    keys = federation.public | {"mallory": stranger.public_key()}
    blob = seal_update(federation.header("mallory"), PAYLOAD, stranger)
    mallory = open_update(blob, expected=federation.expected, public_keys=keys)
    with pytest.raises(SignatureError, match="mallory"):
        open_signed_sum(federation, forged_sum(federation, [*updates.values(), mallory]))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"round": 1}, StaleUpdateError),
        ({"run": "run-0"}, StaleUpdateError),
        ({"attempt": 0}, StaleUpdateError),
        ({"layout": "9" * 64}, ForeignUpdateError),
        ({"config": "9" * 64}, ForeignUpdateError),
        ({"previous": "9" * 64}, ForeignUpdateError),
    ],
)
def test_a_replayed_or_foreign_contributor_is_found_in_the_sum(federation, updates, changes, error):
    blob = federation.seal("c", PAYLOAD, **changes)
    header_bytes = signed_header(blob)
    old = replace(
        updates["c"],
        header_bytes=header_bytes,
        signature=federation.signing["c"].sign(b"flep-fl/update/v1\0" + header_bytes),
    )
    total = forged_sum(federation, [updates["a"], updates["b"], old])
    open_expected = replace(federation.expected, attempt=None, previous=None)
    with pytest.raises(error):
        open_signed_sum(federation, total)
    # a site that knows neither attempt nor history still sees that the contributors disagree
    with pytest.raises(error):
        open_signed_sum(federation, total, expected=open_expected)


def test_sites_that_were_shown_different_sums_do_not_add_up(federation, updates):
    """Equivocation: the cloud signs two sums of one round and shows one to a, another to b and c."""
    one = seal_sum(list(updates.values()), b"one", federation.cloud)
    two = seal_sum(list(updates.values()), b"two", federation.cloud)
    shown = {"a": sum_digest(one), "b": sum_digest(two), "c": sum_digest(two)}
    later = {
        name: opened(
            federation, federation.seal(name, PAYLOAD, round=3, previous=digest), round=3, previous=digest
        )
        for name, digest in shown.items()
    }
    total = seal_sum(list(later.values()), b"s", federation.cloud)
    for name, digest in shown.items():
        with pytest.raises(ForeignUpdateError, match="previous"):
            open_signed_sum(
                federation, total, expected=replace(federation.expected, round=3, previous=digest),
                own_sender=name, own_header=later[name].header_bytes,
            )  # fmt: skip


def test_a_sum_header_that_contradicts_its_contributors(federation, updates):
    def forge(**changes: object) -> bytes:
        blob = seal_sum(list(updates.values()), b"s", federation.cloud)
        (size,) = struct.unpack(">I", blob[8:12])
        header = _canonical.dump(json.loads(blob[12 : 12 + size]) | changes)
        signature = federation.cloud.sign(b"flep-fl/sum/v1\0" + header)
        return blob[:8] + struct.pack(">I", len(header)) + header + signature + b"s"

    open_signed_sum(federation, forge())
    for changes in ({"round": 1}, {"attempt": 2}, {"run": "x"}, {"federation": "x"}):
        with pytest.raises(StaleUpdateError):
            open_signed_sum(federation, forge(**changes))
    for changes in (
        {"contributors": {}}, {"contributors": [["a"]]}, {"contributors": [[1, 2]]}, {"extra": 1},
        {"contributors": [["@", "@"]]}, {"contributors": [["", ""]]}, {"round": None},
        {"payload_sha256": "0"},
    ):  # fmt: skip
        with pytest.raises(MalformedUpdateError):
            open_signed_sum(federation, forge(**changes))
    with pytest.raises(TooFewContributorsError):
        open_signed_sum(federation, forge(contributors=[]), min_contributors=0)


# --- instructions ------------------------------------------------------------------------------------


def test_instructions(federation):
    message = {"kind": "close", "round": 3, "shared": {"seed": 1}}
    blob = seal_control(message, federation.cloud)
    key = federation.cloud.public_key()
    assert open_control(blob, key) == message
    with pytest.raises(SignatureError):
        open_control(seal_control(message, federation.signing["a"]), key)
    with pytest.raises(SignatureError):
        open_control(blob.replace(b"close", b"round"), key)
    for bad in (b"", blob[:-1], blob + b"x", blob[:20]):
        with pytest.raises(MalformedUpdateError):
            open_control(bad, key)
