"""k of n administrators let a device in, one keeps it out, and old statements never count again."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from flep_fl.contracts.errors import EnrolmentError
from flep_fl.data_owner.enrolment import Approval, DeviceRegistry, approve

NOW = 1_790_000_000
DAY = 86400
ADMINS = {name: Ed25519PrivateKey.generate() for name in ("alice", "bob", "carol")}
PUBLIC = {name: key.public_key() for name, key in ADMINS.items()}
KEY, OTHER = "ab" * 32, "cd" * 32


def statement(who: str = "alice", action: str = "enrol", **fields: object) -> Approval:
    values: dict[str, object] = {
        "administrator": who,
        "action": action,
        "device": "cam-1",
        "key": KEY,
        "generation": 0,
        "datasets": ["plates"],
        "lifetime": DAY,
        "now": NOW,
    }
    return approve(ADMINS[who], **(values | fields))  # type: ignore[arg-type]


def registry(folder: Path, threshold: int = 1) -> DeviceRegistry:
    return DeviceRegistry(folder / "devices.jsonl", PUBLIC, threshold=threshold)


def standing(found: DeviceRegistry, now: float = NOW) -> str:
    return found.device("cam-1", now=now).standing


def test_one_of_one_is_the_default(tmp_path: Path) -> None:
    found = registry(tmp_path)
    assert found.find("cam-1") is None
    device, new = found.apply(statement(), now=NOW)
    assert new and device.standing == "enrolled" and device.datasets == ("plates",)
    assert device.expires == NOW + DAY


def test_a_statement_that_cannot_be_logged_does_not_count(tmp_path: Path) -> None:
    found, logged = registry(tmp_path), []

    def full(_approval: Approval) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        found.apply(statement(), now=NOW, before=full)
    assert found.names() == [] and registry(tmp_path).names() == []
    for _ in range(2):
        found.apply(statement(), now=NOW, before=lambda one: logged.append(one.device))
    with pytest.raises(EnrolmentError, match="generation"):
        found.apply(statement(generation=5), now=NOW, before=full)
    assert logged == ["cam-1"], "once, and only what counts"


def test_a_suspension_names_the_key_that_it_suspends(tmp_path: Path) -> None:
    """It was signed about another device of this name; the administrator must look again."""
    found = registry(tmp_path)
    with pytest.raises(EnrolmentError, match="no device of the name"):
        found.apply(statement(action="suspend"), now=NOW)
    found.apply(statement(), now=NOW)
    with pytest.raises(EnrolmentError, match="another key"):
        found.apply(statement(action="suspend", key=OTHER), now=NOW)
    assert standing(found) == "enrolled"


def test_an_old_approval_behind_a_suspension_on_file_does_not_bring_a_device_back(tmp_path: Path) -> None:
    """Whoever can write the file copies a line that was signed; its turn is over."""
    found = registry(tmp_path)
    found.apply(statement(), now=NOW)
    found.apply(statement(action="suspend"), now=NOW)
    file = tmp_path / "devices.jsonl"
    first = file.read_bytes().splitlines(keepends=True)[0]
    file.write_bytes(file.read_bytes() + first)
    with pytest.raises(EnrolmentError, match="line 3 of the registry"):
        registry(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"administrator": "../x"},
        {"action": "remove"},
        {"action": ["enrol"]},
        {"device": ""},
        {"key": "AB" * 32},
        {"generation": -1},
        {"generation": True},
        {"datasets": []},
        {"datasets": "plates"},
        {"datasets": ["plates", "plates"]},
        {"datasets": [f"d{number}" for number in range(100)]},
        {"issued": 1.5},
        {"expires": NOW},
        {"signature": "00"},
    ],
)
def test_a_statement_with_a_field_out_of_range_is_refused_when_it_is_read(change: dict[str, object]) -> None:
    fields = json.loads(statement().to_bytes()) | change
    with pytest.raises(EnrolmentError, match="wrong"):
        Approval.from_bytes(json.dumps(fields).encode())


def test_fewer_than_k_do_not_enrol(tmp_path: Path) -> None:
    found = registry(tmp_path, threshold=2)
    found.apply(statement("alice"), now=NOW)
    assert standing(found) == "pending"
    found.apply(statement("alice", now=NOW + 1, lifetime=2 * DAY), now=NOW + 1)
    assert standing(found) == "pending", "one administrator has one voice"
    found.apply(statement("bob"), now=NOW)
    assert standing(found) == "enrolled"


def test_approvals_of_two_keys_do_not_add_up(tmp_path: Path) -> None:
    found = registry(tmp_path, threshold=2)
    found.apply(statement("alice"), now=NOW)
    found.apply(statement("bob", key=OTHER), now=NOW)
    assert standing(found) == "pending"


def test_a_device_may_feed_what_k_of_them_name(tmp_path: Path) -> None:
    found = registry(tmp_path, threshold=2)
    found.apply(statement("alice", datasets=["plates", "welds"]), now=NOW)
    device, _ = found.apply(statement("bob", datasets=["plates"]), now=NOW)
    assert device.datasets == ("plates",)


def test_an_enrolment_ends_with_its_approvals(tmp_path: Path) -> None:
    found = registry(tmp_path, threshold=2)
    found.apply(statement("alice", lifetime=DAY), now=NOW)
    device, _ = found.apply(statement("bob", lifetime=9 * DAY), now=NOW)
    assert device.expires == NOW + DAY
    assert standing(found, NOW + DAY - 1) == "enrolled"
    assert standing(found, NOW + DAY + 1) == "pending"
    assert standing(found, NOW + 9 * DAY + 1) == "expired"


def test_one_suspends_and_old_approvals_stay_void(tmp_path: Path) -> None:
    found = registry(tmp_path, threshold=2)
    old = [statement("alice"), statement("bob"), statement("carol")]
    for approval in old[:2]:
        found.apply(approval, now=NOW)
    device, _ = found.apply(statement("carol", "suspend"), now=NOW)
    assert (device.standing, device.generation, device.key) == ("suspended", 1, KEY)
    for approval in old[:2]:
        assert found.apply(approval, now=NOW) == (device, False)
    with pytest.raises(EnrolmentError, match="generation=1"):
        found.apply(old[2], now=NOW)
    for who in ("alice", "bob"):
        found.apply(statement(who, generation=1), now=NOW)
    assert standing(found) == "enrolled"


def test_a_repeated_suspension_changes_nothing(tmp_path: Path) -> None:
    found = registry(tmp_path)
    found.apply(statement(), now=NOW)
    suspension = statement("bob", "suspend")
    found.apply(suspension, now=NOW)
    found.apply(statement(generation=1), now=NOW)
    assert found.apply(suspension, now=NOW)[1] is False
    assert standing(found) == "enrolled"


def test_it_survives_a_restart(tmp_path: Path) -> None:
    found = registry(tmp_path)
    found.apply(statement(), now=NOW)
    found.apply(statement("bob", "suspend"), now=NOW)
    found.apply(statement(device="cam-2", key=OTHER), now=NOW)
    again = registry(tmp_path)
    assert standing(again) == "suspended"
    assert again.device("cam-2", now=NOW).standing == "enrolled"


def test_a_torn_last_line_is_forgotten_and_others_are_not(tmp_path: Path) -> None:
    found = registry(tmp_path)
    found.apply(statement(), now=NOW)
    with (tmp_path / "devices.jsonl").open("ab") as file:
        file.write(statement("bob", "suspend").to_bytes()[:80])
    again = registry(tmp_path)
    assert standing(again) == "enrolled"
    again.apply(statement("bob", "suspend"), now=NOW)
    assert standing(registry(tmp_path)) == "suspended"


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cam-9"},
        {"key": OTHER},
        {"action": "suspend", "datasets": ()},
        {"generation": 1},
        {"datasets": ("plates", "welds")},
        {"expires": NOW + 99 * DAY},
        {"issued": NOW - 1},
        {"administrator": "bob"},
        {"administrator": "mallory"},
        {"signature": "00" * 64},
    ],
)
def test_every_field_of_an_approval_is_signed(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(EnrolmentError, match="not signed by one of the owner's administrators"):
        registry(tmp_path).apply(replace(statement(), **change), now=NOW)
    assert not (tmp_path / "devices.jsonl").exists()


def test_a_line_that_somebody_wrote_into_the_file_does_not_count(tmp_path: Path) -> None:
    registry(tmp_path).apply(statement(), now=NOW)
    forged = replace(statement(), device="cam-2", key=OTHER)
    with (tmp_path / "devices.jsonl").open("ab") as file:
        file.write(forged.to_bytes() + b"\n")
    with pytest.raises(EnrolmentError, match="line 2"):
        registry(tmp_path)


@pytest.mark.parametrize(
    ("approval", "message"),
    [
        (statement(now=NOW - 2 * DAY), "has expired"),
        (statement(now=NOW + 3600), "in the future"),
        (statement(generation=3), "generation=0"),
        (statement("alice", "suspend", device="cam-7"), "on file"),
    ],
)
def test_what_is_out_of_turn_is_named(tmp_path: Path, approval: Approval, message: str) -> None:
    with pytest.raises(EnrolmentError, match=message):
        registry(tmp_path).apply(approval, now=NOW)


def test_a_key_belongs_to_one_device_and_a_device_to_one_key(tmp_path: Path) -> None:
    found = registry(tmp_path)
    found.apply(statement(), now=NOW)
    with pytest.raises(EnrolmentError, match="another device"):
        found.apply(statement(device="cam-2"), now=NOW)
    with pytest.raises(EnrolmentError, match="another key"):
        found.apply(statement(key=OTHER), now=NOW)


@pytest.mark.parametrize("threshold", [0, 4])
def test_a_threshold_that_cannot_be_reached_is_refused(tmp_path: Path, threshold: int) -> None:
    with pytest.raises(EnrolmentError, match=r"1\.\.3"):
        registry(tmp_path, threshold)


@settings(max_examples=40, deadline=None)
@given(st.permutations(list(itertools.product(("alice", "bob", "carol"), (0, 1)))))
def test_in_whatever_order_statements_come_k_of_one_generation_are_needed(
    tmp_path_factory: pytest.TempPathFactory, order: list[tuple[str, int]]
) -> None:
    found = registry(tmp_path_factory.mktemp("order"), threshold=2)
    counted: set[str] = set()
    for who, generation in order:
        try:
            found.apply(statement(who, generation=generation), now=NOW)
        except EnrolmentError:
            assert generation == 1
            continue
        counted.add(who)
        assert (standing(found) == "enrolled") == (len(counted) >= 2)


@given(st.binary(max_size=400))
def test_no_bytes_end_in_another_error(data: bytes) -> None:
    with pytest.raises(EnrolmentError):
        Approval.from_bytes(data)
