"""The test plays the cloud against bare sessions: every profile, either encryption, every trust mode.

``test_cheating_cloud.py`` plays it against a whole federation, in a few variants; here a model has one weight
and a round takes milliseconds, so that no variant is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cheating import REAL_SPLITTER, SPLITTER, SPLITTER_STEP, CheatingCloud, polynomial_slots
from flwr.app import Message
from numpy.typing import NDArray
from sessions import Analyst, Sessions, cipher_of, make_sessions

from flep_fl.ai_cloud.exchange import exchange
from flep_fl.ai_cloud.strategy import _SealedSum
from flep_fl.contracts import files
from flep_fl.contracts.errors import HaltedError
from flep_fl.model_security.cipher import CkksModelCipher
from flep_fl.model_security.keyring import ModelKey
from flep_fl.model_security.profiles import ENCRYPTIONS, PROFILES, Profile, get_profile, vector_length
from flep_fl.model_security.seal import Expectation, SealedUpdate, open_update, seal_sum, sum_digest
from flep_fl.model_security.session import AnalystSession

pytestmark = [pytest.mark.e2e, pytest.mark.he]

SIZE = 1  # with one weight all values lie in the first slots, where the polynomial tells them apart
LENGTH = vector_length(SIZE, checked=True)
WORDS = ("untrusted", "mixed", "trusted")


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is about a loss of power."""
    monkeypatch.setattr(files.os, "fsync", lambda _descriptor: None)


OFTEN = ("default-symmetric", "compact-public", "classic-symmetric")
VARIANTS = [
    pytest.param(variant, marks=() if variant in OFTEN else pytest.mark.slow)
    for variant in (f"{name}-{kind}" for name in PROFILES for kind in ENCRYPTIONS)
]


@pytest.fixture(scope="module", params=VARIANTS)
def profile(request: pytest.FixtureRequest) -> Profile:
    return get_profile(*request.param.split("-"))


@pytest.fixture(params=WORDS)
def trust(request: pytest.FixtureRequest) -> str:
    """The trust mode. A trusted cloud's sites do what an untrusted one's do; the cloud has the model key."""
    return request.param


class Cloud:
    """A cloud that does what the test wants: it opens rounds, and signs whatever sum it likes."""

    def __init__(self, folder: Path, profile: Profile, trust: str, names: str = "abc") -> None:
        self.profile, self.trust = profile, trust
        self.federation: Sessions = make_sessions(
            folder, names, rounds=3, size=SIZE, profile=profile, trusting="a" if trust == "mixed" else ""
        )
        self.strategy = self.federation.strategy()
        self.tools = CheatingCloud(profile)
        self.strategy.members.gather(self.federation.grid, quorum=len(names), timeout=10)

    def session(self, name: str) -> AnalystSession:
        return self.federation.analysts[name].open()

    def ask(self, number: int, names: str) -> dict[str, Message]:
        """Order a round from some sites, each with the last sum that the strategy names where it lacks it."""
        nodes = {self.federation.node(name): name for name in names}
        members = {node: self.strategy.members.present[node] for node in nodes}
        messages = self.strategy._messages("round", number, members)
        found = exchange(self.federation.grid, messages, timeout=20)
        return {nodes[node]: reply for node, reply, _ in found if reply is not None}

    def codes(self, number: int, names: str) -> set[str]:
        """Order a round; return what the cloud gets to see of every answer: a code, or a status."""
        nodes = {self.federation.node(name) for name in names}
        members = {node: self.strategy.members.present[node] for node in nodes}
        messages = self.strategy._messages("round", number, members)
        found = exchange(self.federation.grid, messages, timeout=20)
        return {
            reason or str(reply.content["flep"]["status"]) for _, reply, reason in found if reply or reason
        }

    def updates(self, number: int, names: str = "abc") -> list[SealedUpdate]:
        """Order a round and open its updates, whatever they name as the sum before."""
        terms = self.strategy.terms
        expected = Expectation(
            federation=terms.federation, run=self.strategy.run, round=number, key_id=terms.key_id,
            layout=self.strategy.members.layout.digest, profile=terms.profile, config=terms.digest,
            mode=terms.mode,
        )  # fmt: skip
        replies = self.ask(number, names)
        assert set(replies) == set(names)
        return [
            open_update(
                bytes(replies[name].content["payload"]["sealed"].data),
                expected=expected,
                public_keys=terms.site_keys,
            )
            for name in names
        ]

    def total(self, payloads: list[bytes]) -> bytes:
        adder = self.strategy._make_adder(SIZE)
        for payload in payloads:
            adder.add(payload)
        return adder.result()

    def show(self, number: int, updates: list[SealedUpdate], payload: bytes) -> None:
        """Sign a sum, and let it be the one that the next orders carry."""
        blob = seal_sum(updates, payload, self.federation.cloud_key)
        self.strategy._sum = _SealedSum(blob, sum_digest(blob), number)
        for member in self.strategy.members.present.values():
            member.has_sum = ""

    def honest(self, number: int, names: str = "abc") -> list[SealedUpdate]:
        updates = self.updates(number, names)
        self.show(number, updates, self.total([update.payload for update in updates]))
        return updates


# --- wrong sums ----------------------------------------------------------------------------------

Payloads = list[bytes]
Cheat = Callable[[Cloud, Payloads, Payloads], bytes]
"""Makes the sum's payload out of this round's payloads and those of the round before."""


def drop(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    return cloud.total(now[:2])


def duplicate(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    return cloud.total([*now, now[1]])


def duplicate_the_plain(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    return cloud.total([now[0], *now])


def swap(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    return cloud.total([now[0], now[1], now[1]])


def replay(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    return cloud.total([now[0], now[1], before[2]])


def replay_the_whole_sum(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    return cloud.total(before)


def scale(factor: int) -> Cheat:
    def cheat(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
        total = [cloud.tools.times(ciphertext, factor) for ciphertext in cloud.tools.load(now[1], LENGTH)]
        rest = cloud.tools.load(cloud.total([now[0], now[2]]), LENGTH)
        return cloud.tools.sum([total, rest], LENGTH)

    cheat.__name__ = f"scale by {factor}"
    return cheat


def scale_the_whole_sum(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    total = cloud.tools.load(cloud.total(now), LENGTH)
    return cloud.tools.payload([cloud.tools.times(ciphertext, 2) for ciphertext in total], LENGTH)


def shift(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    total = cloud.tools.load(cloud.total(now), LENGTH)
    return cloud.tools.payload([cloud.tools.shift(total[0], [complex(0.01, 0.0)])], LENGTH)


def split(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    """Double one site's payload, and leave its check values as they are."""
    slots = polynomial_slots(SPLITTER_STEP, SPLITTER if cloud.profile.complex_packing else REAL_SPLITTER)
    total = [cloud.tools.times(ciphertext, slots) for ciphertext in cloud.tools.load(now[1], LENGTH)]
    rest = cloud.tools.load(cloud.total([now[0], now[2]]), LENGTH)
    return cloud.tools.sum([total, rest], LENGTH)


CHEATS: list[Cheat] = [
    drop, duplicate, duplicate_the_plain, swap, replay, replay_the_whole_sum, scale(2), scale(-1), scale(5),
    scale_the_whole_sum, shift, split,
]  # fmt: skip


def alter_the_plain(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    """``cloud=mixed``: twice the weights of the site that trusts the cloud with them, and its share."""
    assert now[0].startswith(b"FLEPMX1\n")
    values = 2 * np.frombuffer(now[0], "<f8", LENGTH - 8, 16)
    return cloud.total([now[0][:16] + values.tobytes() + now[0][16 + values.nbytes :], *now[1:]])


def alter_and_encrypt_again(cloud: Cloud, now: Payloads, before: Payloads) -> bytes:
    """``cloud=trusted``: the cloud opens the sum, changes a weight, and encrypts it again."""
    cipher = cipher_of(cloud.profile)
    values = cipher.decrypt(cloud.total(now), LENGTH)
    values[0] += 0.01
    return cipher.encrypt(values)


def cheats_of(trust: str) -> list[Cheat]:
    """Return what a cloud of this mode can do; without its key a trusted one can do what any other can."""
    if trust == "trusted":
        return [drop, alter_and_encrypt_again]
    return CHEATS + [alter_the_plain] * (trust == "mixed")


def test_every_wrong_sum_is_caught_and_tells_the_cloud_one_code(
    tmp_path: Path, profile: Profile, trust: str
) -> None:
    seen: set[tuple[str, ...]] = set()
    for number, cheat in enumerate(cheats_of(trust)):
        cloud = Cloud(tmp_path / str(number), profile, trust)
        before = [update.payload for update in cloud.honest(1)]
        updates = cloud.updates(2)
        models = {name: np.array(cloud.session(name).model["w"]) for name in "abc"}
        cloud.show(2, updates, cheat(cloud, [update.payload for update in updates], before))
        seen |= {(code,) for code in cloud.codes(3, "abc")}
        for name in "abc":
            session = cloud.session(name)
            assert session.halted, f"{cheat.__name__}: site {name} accepted the sum"
            assert np.array_equal(session.model["w"], models[name]), "a wrong sum never becomes the model"
            assert 3 not in session.ledger.entries.headers, "nor does anybody train on it"
        assert cloud.codes(3, "abc") == {"halted"}, "whatever comes next is answered with one code too"
    assert seen == {("sum_rejected",)}, "the cloud must not learn in which way a sum was wrong"


def test_the_same_rounds_with_an_honest_sum_are_accepted(
    tmp_path: Path, profile: Profile, trust: str
) -> None:
    cloud = Cloud(tmp_path, profile, trust)
    for number in (1, 2):
        cloud.honest(number)
    assert cloud.codes(3, "abc") == {"ok"}
    expected = cloud.federation.expected({1: "abc", 2: "abc"}, 2)
    for name in "abc":
        assert np.abs(cloud.session(name).model["w"] - expected).max() < 1e-4


# --- what a cloud may not ask for ----------------------------------------------------------------


def test_a_second_order_gets_the_same_bytes(tmp_path: Path, profile: Profile, trust: str) -> None:
    cloud = Cloud(tmp_path, profile, trust)
    cloud.honest(1)
    first = cloud.updates(2)
    for attempt in (1, 2, 7):
        cloud.strategy.attempt = attempt
        assert cloud.updates(2) == first, "two uploads under one round would cancel the check values"
    for name in "abc":
        cloud.federation.restart(name)  # a new process is asked
    assert cloud.updates(2) == first
    # ... also where the cloud claims another past, in which the round started from the first model
    cloud.strategy._sum = None
    assert cloud.codes(2, "abc") == {"stale"}
    assert all(cloud.federation.analysts[name].trained == [1, 2] for name in "abc")


def test_an_older_sum_is_not_accepted_again(tmp_path: Path, profile: Profile, trust: str) -> None:
    cloud = Cloud(tmp_path, profile, trust)
    sums = []
    for number in (1, 2):
        cloud.honest(number)
        sums.append(cloud.strategy._sum)
    assert cloud.codes(3, "abc") == {"ok"}
    models = {name: np.array(cloud.session(name).model["w"]) for name in "abc"}
    for restart in (False, True):
        for name in "abc" if restart else "":
            cloud.federation.restart(name)
        cloud.strategy._sum = sums[0]
        for member in cloud.strategy.members.present.values():
            member.has_sum = ""
        assert cloud.codes(3, "abc") == {"stale"}
        for name in "abc":
            assert cloud.session(name).accepted_round == 2
            assert np.array_equal(cloud.session(name).model["w"], models[name])


def test_a_sum_comes_under_its_own_name_and_after_its_round(
    tmp_path: Path, profile: Profile, trust: str
) -> None:
    cloud = Cloud(tmp_path, profile, trust)
    cloud.honest(1)
    good = cloud.strategy._sum
    assert good is not None
    assert cloud.codes(1, "abc") == {"stale"}, "nobody trains in a round on that round's own sum"
    cloud.strategy._sum = replace(good, digest="5" * 64)
    assert cloud.codes(2, "abc") == {"stale"}
    assert {cloud.session(name).accepted_round for name in "abc"} == {0}
    cloud.strategy._sum = good
    assert cloud.codes(2, "abc") == {"ok"}


def test_sites_that_were_shown_two_sums_cannot_be_added_up(
    tmp_path: Path, profile: Profile, trust: str
) -> None:
    """Five sites; a and b see the sum of abc, the others that of cde; each of these sums is a good one."""
    cloud = Cloud(tmp_path, profile, trust, names="abcde")
    updates = cloud.updates(1, "abcde")

    def fails(site: str, number: int, weights: NDArray[Any]) -> NDArray[Any]:
        raise RuntimeError("no training today")

    cloud.show(1, updates[:3], cloud.total([update.payload for update in updates[:3]]))
    cloud.federation.analysts["b"].train = fails  # it accepts the sum, and signs nothing
    assert cloud.codes(2, "b") == {"error"}
    first = cloud.updates(2, "a")
    cloud.show(1, updates[2:], cloud.total([update.payload for update in updates[2:]]))
    second = cloud.updates(2, "cde")
    other = cloud.strategy._sum
    together = [*first, *second]
    assert len({update.header.previous for update in together}) == 2
    cloud.show(2, together, cloud.total([update.payload for update in together]))
    assert cloud.codes(3, "abcde") == {"foreign"}
    assert {cloud.session(name).accepted_round for name in "abcde"} == {1}
    # those who were shown the same go on without the others, who take no sum that follows another past
    cloud.show(2, second, cloud.total([update.payload for update in second]))
    assert cloud.codes(3, "a") == {"foreign"}, "it signed that round itself, on another sum"
    assert cloud.codes(3, "b") == {"foreign"}, "it signed nothing, but has accepted another sum"
    assert cloud.codes(3, "cde") == {"ok"}
    # a site that has accepted one sum of a round takes no other one of it
    cloud.strategy._sum = other
    for member in cloud.strategy.members.present.values():
        member.has_sum = ""
    assert cloud.codes(2, "a") == {"sum_rejected"}
    assert cloud.session("a").halted and not cloud.session("c").halted


def test_one_site_alone_is_not_opened(tmp_path: Path, profile: Profile, trust: str) -> None:
    cloud = Cloud(tmp_path, profile, trust)
    updates = cloud.updates(1)
    for named in ([updates[1]], updates[:2]):
        cloud.show(1, named, cloud.total([update.payload for update in named]))
        assert cloud.codes(2, "abc") == {"too_few_contributors"}
    # names of others do not help: the sum is that of the named updates, or it is wrong
    twice = [updates[0], updates[1], updates[1]]
    cloud.show(1, twice, cloud.total([update.payload for update in twice]))
    assert cloud.codes(2, "c") == {"sum_rejected"}
    cloud.show(1, updates, updates[1].payload if trust != "mixed" else cloud.total([updates[1].payload]))
    assert cloud.codes(2, "ab") == {"sum_rejected"}
    assert {cloud.session(name).accepted_round for name in "abc"} == {0}


# --- after a failed check ------------------------------------------------------------------------


def another_key(analyst: Analyst, profile: Profile) -> None:
    analyst.end()
    analyst.cipher = CkksModelCipher(ModelKey.generate(profile), profile)


def test_a_site_that_has_stopped_stays_so_until_the_keys_are_rotated(
    tmp_path: Path, profile: Profile, trust: str
) -> None:
    cloud = Cloud(tmp_path, profile, trust)
    updates = cloud.updates(1)
    cloud.show(1, updates, cloud.total([update.payload for update in updates[:2]]))
    assert cloud.codes(2, "a") == {"sum_rejected"}
    cloud.show(1, updates, cloud.total([update.payload for update in updates]))
    assert cloud.codes(2, "abc") == {"halted", "ok"}, "the right sum comes too late for a"
    analyst = cloud.federation.analysts["a"]
    analyst.end()
    with pytest.raises(HaltedError, match="provision new kits"):
        analyst.open()
    another_key(analyst, profile)
    assert not analyst.open().halted
