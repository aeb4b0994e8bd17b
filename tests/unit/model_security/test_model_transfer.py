"""Sealed states and the statements on them: nothing forged, old, foreign or outvoted gets through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from flep_fl.contracts.errors import TransferError, UpdateError
from flep_fl.model_security import optimiser
from flep_fl.model_security.held_state import HeldState
from flep_fl.model_security.keyring import CheckKey
from flep_fl.model_security.optimiser_settings import OptimiserSettings
from flep_fl.model_security.seal import seal_control
from flep_fl.model_security.transfer import (
    Holding,
    Statement,
    agreed,
    commitment,
    new_challenge,
    open_state,
    seal_state,
)

KEY = CheckKey.generate()
SIGNING = {name: Ed25519PrivateKey.generate() for name in "abcd"}
PUBLIC = {name: key.public_key() for name, key in SIGNING.items()}
HOLDING = Holding("plant", "run-1", "1" * 32, "2" * 64, "3" * 64, 4, "5" * 64)
STATE = np.arange(300.0).tobytes()
SEALED = seal_state(KEY, "transfer", HOLDING, STATE)
OTHER = seal_state(KEY, "transfer", HOLDING, b"x")
CHALLENGE = new_challenge()


def says(site: str, *, signer: str | None = None, **changes: Any) -> bytes:
    statement = Statement(site, CHALLENGE, HOLDING, commitment(KEY, HOLDING, STATE))
    if site == "a":
        statement = replace(statement, sealed=hashlib.sha256(SEALED).hexdigest())
    return replace(statement, **changes).to_bytes(SIGNING[signer or site])


def decide(statements: list[bytes], sealed: bytes = SEALED, **changes: Any) -> Statement:
    options = {"site_keys": PUBLIC, "joiner": "d", "challenge": CHALLENGE, "others": 2, **changes}
    return agreed(statements, sealed, **options)


def test_an_honest_transfer_is_taken() -> None:
    chosen = decide([says("a"), says("b"), says("c")])
    assert (chosen.site, chosen.holding) == ("a", HOLDING)
    holding, state = open_state(KEY, "transfer", SEALED)
    assert (holding, state) == (HOLDING, STATE)
    assert chosen.commitment == commitment(KEY, holding, state)


def test_one_dissenter_is_outvoted_wherever_it_stands() -> None:
    other = {"commitment": "0" * 64}
    for statements in (
        [says("b", **other), says("a"), says("c")],
        [says("a"), says("c"), says("b", **other)],
    ):
        assert decide(statements).site == "a"


REFUSED: dict[str, Callable[[], Any]] = {
    "no statement": lambda: decide([]),
    "one too few": lambda: decide([says("a")]),
    "no majority": lambda: decide([says("a"), says("b", commitment="0" * 64)]),
    "half is no majority": lambda: decide(
        [says("a"), says("b"), says("c", commitment="0" * 64), says("d", commitment="0" * 64)], joiner="e"
    ),
    "another state by the majority": lambda: decide(
        [says("a"), says("b", commitment="0" * 64), says("c", commitment="0" * 64)]
    ),
    "other rounds": lambda: decide([says("a"), says("b", holding=replace(HOLDING, round=3))]),
    "an old statement": lambda: decide([says("a"), says("b", challenge=new_challenge())]),
    "an old transfer": lambda: decide([says("a"), says("b"), says("c")], challenge=new_challenge()),
    "no challenge was drawn": lambda: decide(
        [says("a", challenge=""), says("b", challenge="")], challenge=""
    ),
    "one site counted twice": lambda: decide([says("a"), says("a")]),
    "the joiner's own word": lambda: decide([says("a"), says("d")]),
    "in another's name": lambda: decide([says("a"), says("b", signer="c")]),
    "a stranger": lambda: decide([says("a"), says("b")], site_keys={"a": PUBLIC["a"]}),
    "another sealed state": lambda: decide(
        [says("a"), says("b")], seal_state(KEY, "transfer", HOLDING, b"x")
    ),
    "a state that nobody of the majority sealed": lambda: decide([says("a", sealed=""), says("b")]),
    "an introduction in place of a statement": lambda: decide(
        [says("a"), seal_control({"site": "b", "challenge": CHALLENGE}, SIGNING["b"])]
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_a_cloud_could_relay_instead_is_refused(case: str) -> None:
    with pytest.raises(TransferError):
        REFUSED[case]()


def test_another_message_that_a_site_signed_is_no_statement() -> None:
    key = Ed25519PrivateKey.generate()
    words = ("federation", "run", "key_id", "config", "layout", "accepted")
    holding = {**dict.fromkeys(words, "x"), "round": 1}
    fields = {"site": "a", "challenge": "00", "holding": holding, "commitment": "00", "sealed": ""}
    keys = {"a": key.public_key()}
    good = seal_control({"what": "flep-fl/state-statement/v1", **fields}, key)
    assert Statement.from_bytes(good, keys).site == "a"
    for other in ({"what": "flep-fl/something/v1", **fields}, fields, {"what": "", "extra": 1, **fields}):
        with pytest.raises(TransferError, match="not in the format"):
            Statement.from_bytes(seal_control(other, key), keys)


def test_an_altered_statement_is_refused() -> None:
    good = says("b")
    for index in range(0, len(good), 7):
        bad = bytearray(good)
        bad[index] ^= 1
        with pytest.raises(UpdateError):
            decide([says("a"), bytes(bad)])


def test_every_altered_byte_of_a_sealed_state_is_noticed() -> None:
    for index in [*range(0, 200), *range(200, len(SEALED), 41)]:
        bad = bytearray(SEALED)
        bad[index] ^= 1
        with pytest.raises(TransferError):
            open_state(KEY, "transfer", bytes(bad))
    for cut in (0, 7, 11, 40, len(SEALED) - 1):
        with pytest.raises(TransferError):
            open_state(KEY, "transfer", SEALED[:cut])


@given(data=st.binary(max_size=300))
def test_other_bytes_are_no_sealed_state(data: bytes) -> None:
    for blob in (data, SEALED[:12] + data, SEALED[:8] + data):
        with pytest.raises(TransferError):
            open_state(KEY, "transfer", blob)


def test_a_state_opens_for_its_purpose_and_under_its_key_alone() -> None:
    kept = seal_state(KEY, "kept", HOLDING, STATE)
    assert open_state(KEY, "kept", kept) == (HOLDING, STATE)
    for key, purpose, blob in ((KEY, "transfer", kept), (KEY, "kept", SEALED)):
        with pytest.raises(TransferError):
            open_state(key, purpose, blob)  # type: ignore[arg-type]
    with pytest.raises(TransferError):
        open_state(CheckKey.generate(), "kept", kept)


def test_the_cloud_sees_no_value_and_no_repetition() -> None:
    again = seal_state(KEY, "transfer", HOLDING, STATE)
    assert again != SEALED
    for blob in (SEALED, says("a")):
        assert not any(STATE[i : i + 8] in blob for i in range(8, len(STATE), 8))


def test_a_commitment_depends_on_the_key_the_state_and_whose_it_is() -> None:
    first = commitment(KEY, HOLDING, STATE)
    assert first == commitment(KEY, HOLDING, STATE)
    others = {
        commitment(CheckKey.generate(), HOLDING, STATE),
        commitment(KEY, replace(HOLDING, round=5), STATE),
        commitment(KEY, replace(HOLDING, run="run-2"), STATE),
        commitment(KEY, HOLDING, STATE[:-1] + b"\1"),
    }
    assert len(others) == 4 and first not in others


def test_a_donor_hands_over_the_state_that_it_committed_to(tmp_path: Path) -> None:
    """The others vouch for the commitment, and for nothing else that the donor sends."""
    key, settings = CheckKey.generate(), OptimiserSettings("fedadam", 0.1)
    words = ("federation", "run", "key_id", "config", "layout", "accepted")
    holding = Holding(**dict.fromkeys(words, "x"), round=2)
    first, second = (optimiser.start(settings, np.full(3, value)).to_bytes() for value in (1.0, 2.0))
    sealed = seal_state(key, "transfer", holding, first)
    here = HeldState(settings, key, tmp_path, replace(holding, round=0), np.zeros(3))
    earlier = replace(holding, round=1)
    for named, state in ((holding, second), (earlier, first)):
        with pytest.raises(TransferError, match="not the one that its statements name"):
            here.take_over(Statement("a", "00", named, commitment(key, holding, state)), sealed)
    assert not here.weights.any()
    here.take_over(Statement("a", "00", holding, commitment(key, holding, first)), sealed)
    assert np.array_equal(here.weights, np.ones(3))


def test_a_state_on_disk_is_taken_again_by_its_own_run_key_and_model_alone(tmp_path: Path) -> None:
    key, settings = CheckKey.generate(), OptimiserSettings("fedadam", 0.1)
    start = replace(HOLDING, round=0, accepted="")

    def held(holding: Holding = start, key: CheckKey = key, size: int = 3) -> HeldState:
        state = HeldState(settings, key, tmp_path, holding, np.zeros(size))
        state.load()
        return state

    here = held()
    assert here.holding == start, "nothing is on disk yet"
    here.prepare(np.ones(3), HOLDING)
    assert not held().weights.any(), "prepared is not committed"
    here.commit()
    again = held()
    assert again.holding == HOLDING
    assert again.state.to_bytes() == here.state.to_bytes() != held(size=2).state.to_bytes()
    for field in ("federation", "run", "key_id", "config", "layout"):
        foreign = replace(start, **{field: "other"})
        assert held(foreign).holding == foreign, field
    assert held(key=CheckKey.generate()).holding == start
    (tmp_path / "optimiser.bin").write_bytes(b"damaged")
    assert held().holding == start, "another analyst hands it over again"
