"""What crosses the wire: sealed under the analysts' key, and nothing that was not agreed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from federations import Federation, make_federation
from flwr.app import Message

from flep_fl.contracts.errors import FlepError
from flep_fl.contracts.protocol import FLEP_RECORD, PUBLIC_METRICS
from flep_fl.flower.local_grid import LocalGrid
from flep_fl.flower.runtime.wire import to_wire
from flep_fl.model_security.cipher import CkksModelCipher
from flep_fl.model_security.keyring import ModelKey
from flep_fl.model_security.profiles import CHECK_SLOTS, get_profile
from flep_fl.provision.kits import load_site_kit

pytestmark = [pytest.mark.e2e, pytest.mark.he]

MAGIC_BYTES = 12  # marker and header length of an envelope
SIGNATURE_BYTES = 64


class TappedGrid(LocalGrid):
    """An in-process grid that keeps all that passes, as bytes and as messages."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.bytes: list[bytes] = []
        self.replies: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        for message in batch:
            self.bytes.extend(to_wire(message).objects.values())
        return super().push_messages(batch)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            self.bytes.extend(to_wire(reply).objects.values())
            self.replies.append(reply)
        return replies

    def uploads(self) -> list[bytes]:
        """Return the encrypted payloads of all updates."""
        found = []
        for reply in self.replies:
            if "payload" in reply.content:
                blob = bytes(reply.content["payload"]["sealed"].data)
                header = int.from_bytes(blob[8:12], "big")
                found.append(blob[MAGIC_BYTES + header + SIGNATURE_BYTES :])
        return found


def run(folder: Path, *overrides: str) -> tuple[Federation, TappedGrid]:
    federation = make_federation(folder, "federation.rounds=1", *overrides, grid=TappedGrid)
    federation.run()
    assert isinstance(federation.grid, TappedGrid)
    return federation, federation.grid


@pytest.fixture(scope="module")
def untrusted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, TappedGrid]:
    return run(tmp_path_factory.mktemp("untrusted"))


def traces_of(federation: Federation) -> list[bytes]:
    """Return pieces of every model that a site holds or sent, as float32 and float64."""
    pieces = []
    for site in federation.sites.values():
        for value in site.session.model.values():
            flat = np.ascontiguousarray(value).reshape(-1)
            if flat.size >= 64 and np.abs(flat).min() > 0:
                pieces += [flat[:8].astype("<f4").tobytes(), flat[8:12].astype("<f8").tobytes()]
    assert pieces
    return pieces


def test_no_weight_is_in_the_traffic(untrusted: tuple[Federation, TappedGrid]) -> None:
    federation, grid = untrusted
    traffic = b"".join(grid.bytes)
    assert len(traffic) > 1_000_000
    assert not [piece for piece in traces_of(federation) if piece in traffic]


def test_an_open_run_shows_its_weights_to_the_same_search(tmp_path: Path) -> None:
    federation, grid = run(tmp_path, "cloud=open")
    vectors = [np.frombuffer(payload, "<f4") for payload in grid.uploads()]
    assert len(vectors) == 3
    share = vectors[0][-1]
    assert 0 < share < 1
    assert all(np.isfinite(vector).all() for vector in vectors)
    layout = federation.sites["a"].session.layout
    layout.unflatten(vectors[0][:-1].astype(np.float64) / share)


def test_updates_decrypt_with_the_analysts_key_alone(untrusted: tuple[Federation, TappedGrid]) -> None:
    federation, grid = untrusted
    profile = get_profile("default")
    length = federation.strategy.parameters + 1 + CHECK_SLOTS
    analysts = CkksModelCipher(
        ModelKey.from_bytes(load_site_kit(federation.folder / "kits" / "a").model_key), profile
    )
    stranger = CkksModelCipher(ModelKey.generate(profile), profile)
    uploads = grid.uploads()
    assert len(uploads) == 3
    for payload in uploads:
        opened = analysts.decrypt(payload, length)
        assert np.abs(opened[: -CHECK_SLOTS - 1]).max() < 10
        assert 0 < opened[-CHECK_SLOTS - 1] < 1, "the site's share of the examples"
        try:
            wrong = stranger.decrypt(payload, length)
        except FlepError:
            continue
        # Close to nothing of the model may be left: the values are those of a random polynomial.
        assert np.abs(wrong).min() > 10
        assert abs(np.corrcoef(wrong[:-20], opened[:-20])[0, 1]) < 0.02


def test_replies_hold_only_what_was_agreed(untrusted: tuple[Federation, TappedGrid]) -> None:
    _, grid = untrusted
    for reply in grid.replies:
        assert set(reply.content) <= {FLEP_RECORD, "payload", "metrics"}
        assert set(reply.content[FLEP_RECORD]) <= {"status", "site", "identity"}
        if "metrics" in reply.content:
            assert set(reply.content["metrics"]) <= set(PUBLIC_METRICS)
    assert b"num-examples" not in b"".join(grid.bytes)


def test_secrets_of_the_kits_are_not_in_the_traffic(untrusted: tuple[Federation, TappedGrid]) -> None:
    federation, grid = untrusted
    traffic = b"".join(grid.bytes)
    for path in (federation.folder / "kits").rglob("*.key"):
        if path.name != "model.key":
            assert path.read_bytes() not in traffic
        else:
            assert path.read_bytes()[300:340] not in traffic
