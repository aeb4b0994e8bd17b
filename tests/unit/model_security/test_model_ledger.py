"""What a site remembers: one upload a round, and no way back to a past run, round or sum."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from flep_fl.contracts.errors import KitError, StaleUpdateError
from flep_fl.model_security import ledger as ledger_module
from flep_fl.model_security.ledger import SUM_FILE, Ledger
from flep_fl.model_security.seal import open_update, seal_sum, signed_header, sum_digest


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def ledger(folder):
    made = Ledger(folder)
    made.enter("run-1")
    yield made
    made.close()


def again(ledger, folder):
    """The next process of the same site."""
    ledger.close()
    other = Ledger(folder)
    ledger._lock = other._lock  # the fixture closes this one
    return other


def sealed_sum(federation, number, **changes):
    expected = replace(federation.expected, round=number, **changes)
    updates = [
        open_update(
            federation.seal(name, b"update", round=number, **changes),
            expected=expected,
            public_keys=federation.public,
        )
        for name in federation.signing
    ]
    return seal_sum(updates, b"the sum", federation.cloud)


def test_an_upload_is_kept_as_it_was_sent(ledger, folder, federation):
    blob = federation.seal("a", b"weights", round=1)
    assert ledger.upload_of(1) is None
    ledger.record_upload(1, blob)
    assert ledger.upload_of(1) == blob
    later = again(ledger, folder)
    assert later.upload_of(1) == blob and later.signed_round == 1
    assert later.upload_of(2) is None
    later.record_upload(2, federation.seal("a", b"more", round=2))
    with pytest.raises(StaleUpdateError, match="past round"):
        later.upload_of(1)


def test_an_upload_of_another_run_is_not_sent_in_this_one(ledger, federation):
    """The same round number in the next run is another round: its upload has not been made yet."""
    ledger.record_upload(1, federation.seal("a", b"weights", round=1))
    assert ledger.enter("run-2") and not ledger.enter("run-2")
    assert ledger.upload_of(1) is None
    assert ledger.signed_round == 0
    with pytest.raises(StaleUpdateError, match="past run"):
        ledger.enter("run-1")


@pytest.mark.parametrize("lost", ["upload.bin", "ledger.json"])
def test_what_is_on_disk_when_a_write_fails(ledger, folder, federation, monkeypatch, lost):
    """The upload first, then the ledger: the next process either has neither, or sends the same bytes."""
    blob, original = federation.seal("a", b"weights", round=1), ledger_module.write_secret

    def write(path, data):
        if path.name == lost:
            raise OSError(28, "No space left on device")
        original(path, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(ledger_module, "write_secret", write)
        ledger.record_upload(1, blob)
    assert ledger.signed_round == 0, "what is not written is not believed"
    later = again(ledger, folder)
    assert later.upload_of(1) == (None if lost == "upload.bin" else blob)
    assert later.entries.headers == ({} if lost == "upload.bin" else {1: signed_header(blob).hex()})


def test_a_sum_is_kept_until_a_newer_one_is_accepted(ledger, folder, federation):
    assert ledger.kept_sum() is None
    first, second = (sealed_sum(federation, number) for number in (1, 2))
    ledger.record_sum(first)
    assert ledger.kept_sum() == first
    assert (ledger.entries.accepted, ledger.entries.accepted_round) == (sum_digest(first), 1)
    # The process ended between the two writes: the sum is one step ahead of the ledger.
    (folder / SUM_FILE).write_bytes(second)
    later = again(ledger, folder)
    assert later.kept_sum() == second
    later.confirm_sum(second)
    assert (later.entries.accepted, later.entries.accepted_round) == (sum_digest(second), 2)
    (folder / SUM_FILE).write_bytes(first)
    assert later.kept_sum() is None, "an older one is not what was accepted last"
    (folder / SUM_FILE).write_bytes(sealed_sum(federation, 2))
    assert later.kept_sum() is None, "nor is another one of the same round"


def test_a_sum_of_another_run_is_not_this_ones(ledger, folder, federation):
    ledger.record_sum(sealed_sum(federation, 1))
    ledger.enter("run-2")
    assert ledger.kept_sum() is None
    (folder / SUM_FILE).write_bytes(sealed_sum(federation, 3, run="run-3"))
    assert ledger.kept_sum() is None


def test_a_state_that_was_taken_over_is_remembered_without_its_sum(ledger, folder, federation):
    ledger.record_sum(sealed_sum(federation, 1))
    ledger.adopt("7" * 64, 4)
    later = again(ledger, folder)
    assert (later.entries.accepted, later.entries.accepted_round) == ("7" * 64, 4)
    assert later.kept_sum() is None


def test_one_process_uses_a_kit_at_a_time(ledger, folder):
    with pytest.raises(KitError, match="Another process"):
        Ledger(folder)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"run": "r", "past": 3}'])
def test_a_damaged_ledger_is_named(ledger, folder, damage):
    ledger.close()
    (folder / "ledger.json").write_bytes(damage)
    with pytest.raises(KitError, match="damaged"):
        Ledger(folder)
    (folder / "ledger.json").unlink()
    ledger._lock = Ledger(folder)._lock


def test_the_files_are_private(ledger, folder, federation):
    ledger.record_upload(1, federation.seal("a", b"weights", round=1))
    ledger.record_sum(sealed_sum(federation, 1))
    assert {path.name for path in folder.iterdir()} == {"ledger.json", "upload.bin", SUM_FILE, "lock"}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert json.loads((folder / "ledger.json").read_text())["accepted_round"] == 1
