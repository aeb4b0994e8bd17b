"""A federation of bare analyst sessions: real keys, real CKKS, a model of a few numbers, no images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from flep_fl.ai_cloud.strategy import EncryptedFedAvg, Terms
from flep_fl.contracts.ports import Adder, ModelCipher
from flep_fl.flower.local_grid import LocalGrid
from flep_fl.flower.runtime.traffic import message_bytes
from flep_fl.model_security.adder import KeylessAdder
from flep_fl.model_security.cipher import CkksModelCipher
from flep_fl.model_security.keyring import CheckKey, ModelKey
from flep_fl.model_security.mixed import MixedAdder, TrustingModelCipher
from flep_fl.model_security.mod import ckks_mod
from flep_fl.model_security.profiles import Profile, get_profile, vector_length
from flep_fl.model_security.session import AnalystSession, Membership


@cache
def model_key(name: str) -> ModelKey:
    """Return the model key of a profile, made once for all tests of a process."""
    return ModelKey.generate(get_profile(name))


@cache
def cipher_of(profile: Profile) -> CkksModelCipher:
    """Return the analysts' cipher of a profile."""
    return CkksModelCipher(model_key(profile.name), profile)


PROFILE = get_profile("default")
MODEL_KEY = model_key("default")
CHECK_KEY = CheckKey.generate()
CIPHER = cipher_of(PROFILE)
CONFIG = "c" * 64
FEDERATION = "fe" * 16

Train = Callable[[str, int, NDArray[Any]], NDArray[Any]]
"""``train(site, round, weights)`` returns the trained weights."""


def step(site: str, number: int, weights: NDArray[Any]) -> NDArray[Any]:
    """Stand for a local training: deterministic, different at each site and in each round."""
    noise = np.random.default_rng([ord(site[0]), number]).normal(size=weights.shape)
    return (0.5 * weights + noise).astype(weights.dtype)


def examples_of(site: str) -> int:
    """Number of training examples of a site; all different."""
    return 100 + 10 * (ord(site[0]) - ord("a"))


@dataclass
class Analyst:
    """One site; every message may be answered by a new session on the same state folder."""

    membership: Membership
    signing_key: Ed25519PrivateKey
    state: Path
    train: Train = step
    size: int = 50
    cipher: ModelCipher = CIPHER
    session: AnalystSession | None = None
    trained: list[int] = field(default_factory=list)
    models: list[NDArray[Any]] = field(default_factory=list)
    evaluated: int = 0

    def open(self) -> AnalystSession:
        """Return the session; a new one where there is none."""
        if self.session is None:
            first = {"w": np.linspace(-1, 1, self.size, dtype=np.float32)}
            self.session = AnalystSession(
                self.membership, self.signing_key, self.cipher, CHECK_KEY, lambda: first, self.state
            )
        return self.session

    def end(self) -> None:
        """End the process: nothing stays but the state folder."""
        if self.session is not None:
            self.session.ledger.close()
            self.session = None

    def app(self, *, new_process_for_every_message: bool = False) -> ClientApp:
        """Make the ClientApp."""

        def evaluate(message: Message, context: Context) -> Message:
            self.evaluated += 1
            accuracy = 0.5 + 0.01 * (ord(self.membership.site[0]) - ord("a"))
            metrics = MetricRecord({"accuracy": accuracy, "loss": 1.0, "majority_accuracy": 0.4})
            return Message(RecordDict({"m": metrics}), reply_to=message)

        def train(message: Message, context: Context) -> Message:
            number = int(message.content["config"]["server-round"])
            weights = message.content["arrays"]["w"].numpy()
            self.trained.append(number)
            result = self.train(self.membership.site, number, weights)
            metrics = MetricRecord({"num-examples": examples_of(self.membership.site)})
            content = RecordDict({"arrays": ArrayRecord({"w": Array(result)}), "m": metrics})
            return Message(content, reply_to=message)

        def mod(message: Message, context: Context, call_next: Any) -> Message:
            try:
                session = self.open()
                inner = ckks_mod(
                    session, evaluate=evaluate, on_model=lambda m: self.models.append(np.array(m["w"]))
                )
                return inner(message, context, call_next)
            finally:
                if new_process_for_every_message:
                    self.end()

        app = ClientApp(mods=[mod])
        app.train()(train)
        for kind in ("hello", "close"):
            app.query(kind)(lambda message, context: Message(RecordDict(), reply_to=message))
        return app


@dataclass
class Sessions:
    """The analysts, and what a cloud of theirs needs."""

    analysts: dict[str, Analyst]
    terms: Terms
    cloud_key: Ed25519PrivateKey
    grid: LocalGrid
    profile: Profile = PROFILE

    def strategy(self, **options: Any) -> EncryptedFedAvg:
        """Make a cloud."""
        return EncryptedFedAvg(self.terms, self.cloud_key, self.adder, message_bytes=message_bytes, **options)

    def adder(self, size: int) -> Adder:
        """Make what the cloud adds the updates of ``size`` weights with."""
        make = MixedAdder if self.terms.mode == "mixed" else KeylessAdder
        context = model_key(self.profile.name).public_context()
        return make(context, self.profile, vector_length(size, checked=True))

    def node(self, name: str) -> int:
        """Return the node of a site."""
        return 2 + sorted(self.analysts).index(name)

    def restart(self, name: str) -> None:
        """Restart a site on the same node: same state, nothing in memory."""
        self.analysts[name].end()

    def expected(self, contributors: Mapping[int, str], rounds: int) -> NDArray[np.float64]:
        """Return the model after plain federated averaging of ``contributors[round]`` in float64."""
        weights = np.linspace(-1, 1, next(iter(self.analysts.values())).size, dtype=np.float32)
        for number in range(1, rounds + 1):
            names = contributors[number]
            total = sum(examples_of(name) for name in names)
            mean = sum(
                examples_of(n) * self.analysts[n].train(n, number, weights).astype(np.float64) for n in names
            )
            weights = (mean / total).astype(np.float32)
        return weights.astype(np.float64)


def make_sessions(
    folder: Path,
    names: str = "abc",
    *,
    rounds: int = 3,
    quorum: int = 3,
    size: int = 50,
    train: Train = step,
    timeout: float = 5.0,
    new_process_for_every_message: bool = False,
    grid: type[LocalGrid] = LocalGrid,
    profile: Profile = PROFILE,
    trusting: str = "",
) -> Sessions:
    """Make a federation of sites ``a``, ``b``, ... with state folders below ``folder``.

    Sites in ``trusting`` send their weights in the clear; the federation is a mixed one where there are any.
    """
    mode, key, encrypting = "mixed" if trusting else "ckks", model_key(profile.name), cipher_of(profile)
    signing = {name: Ed25519PrivateKey.generate() for name in names}
    public = {name: key.public_key() for name, key in signing.items()}
    cloud = Ed25519PrivateKey.generate()
    membership = Membership(
        site="", federation=FEDERATION, config=CONFIG, shared={}, mode=mode, profile=profile,
        bound=profile.default_bound, max_examples=profile.default_max_examples, rounds=rounds,
        min_contributors=min(quorum, 3), site_keys=public,
        cloud_key=cloud.public_key(),
    )  # fmt: skip
    analysts = {
        name: Analyst(
            replace(membership, site=name), signing[name], folder / name, train, size,
            cipher=TrustingModelCipher(encrypting, profile) if name in trusting else encrypting,
        )
        for name in names
    }  # fmt: skip
    terms = Terms(
        federation=FEDERATION, key_id=key.key_id, profile=profile.digest, mode=mode, shared={},
        digest=CONFIG, site_keys=public, rounds=rounds, participants=len(names), quorum=quorum,
        round_timeout=timeout,
    )  # fmt: skip
    apps = {
        node: analysts[name].app(new_process_for_every_message=new_process_for_every_message)
        for node, name in enumerate(names, start=2)
    }
    return Sessions(analysts, terms, cloud, grid(apps), profile)
