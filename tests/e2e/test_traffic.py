"""What crosses the wire: sealed under the analysts' key, and nothing that was not agreed."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from flep_fl.model_security.session import AnalystSession
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


SENT: dict[int, np.ndarray] = {}
"""What each session trained last, flat, by the session's id."""


def run(folder: Path, *overrides: str) -> tuple[Federation, TappedGrid]:
    federation = make_federation(folder, "federation.rounds=1", *overrides, grid=TappedGrid)
    for session in (site.session for site in federation.sites.values()):

        def spy(
            arrays: Any, n: int, i: Any, session: AnalystSession = session, seal: Any = session.seal
        ) -> bytes:
            SENT[id(session)] = session.layout.flatten(arrays)
            return bytes(seal(arrays, n, i))

        session.seal = spy  # type: ignore[method-assign]
    federation.run()
    assert isinstance(federation.grid, TappedGrid)
    return federation, federation.grid


@pytest.fixture(scope="module")
def untrusted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, TappedGrid]:
    return run(tmp_path_factory.mktemp("untrusted"))


def traces_of(federation: Federation) -> list[bytes]:
    """Return pieces of what each site trained, holds and sends: plain and weighted, float32 and float64."""
    pieces = []
    for session in (site.session for site in federation.sites.values()):
        for flat in (SENT[id(session)], session.layout.flatten(dict(session.model))):
            for start in range(0, flat.size - 8, flat.size // 40):
                part = flat[start : start + 8]
                if np.abs(part).min() > 0:
                    pieces += [part.astype("<f4").tobytes(), part.astype("<f8").tobytes()]
    assert len(pieces) > 100
    return pieces


def test_no_weight_is_in_the_traffic_of_an_untrusted_run(untrusted: tuple[Federation, TappedGrid]) -> None:
    federation, grid = untrusted
    traffic = b"".join(grid.bytes)
    assert len(traffic) > 1_000_000
    assert not [piece for piece in traces_of(federation) if piece in traffic]


def test_the_same_search_finds_the_weights_of_an_open_run(tmp_path: Path) -> None:
    federation, grid = run(tmp_path, "cloud=open")
    traffic = b"".join(grid.bytes)
    found = [piece for piece in traces_of(federation) if piece in traffic]
    assert len(found) > 30, "the search would not notice weights in the clear"


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


def forms(secret: bytes) -> list[bytes]:
    return [secret, secret.hex().encode(), base64.b64encode(secret)]


def test_secrets_of_the_kits_are_not_in_the_traffic(untrusted: tuple[Federation, TappedGrid]) -> None:
    federation, grid = untrusted
    traffic = b"".join(grid.bytes)
    for path in (federation.folder / "kits").rglob("*.key"):
        data = path.read_bytes()
        secret = data[300:332] if path.name == "model.key" else data
        assert not [form for form in forms(secret) if form in traffic], path
    public = federation.cloud_kit.federation.cloud_verify_key
    assert public not in traffic
    nonce = federation.strategy.run.encode()
    assert nonce in traffic, "the search must find what is there"
