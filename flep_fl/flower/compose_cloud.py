"""What the AI cloud is wired to in each trust mode. The only place that decides it.

An untrusted cloud gets a keyless adder and nothing else; only the branch of the trusted one imports the
code that can decrypt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from flep_fl.ai_cloud.checkpoint import FOLDER as CHECKPOINT
from flep_fl.ai_cloud.checkpoint import SavedRun
from flep_fl.ai_cloud.strategy import EncryptedFedAvg, Terms
from flep_fl.config import (
    Config,
    ckks_profile,
    effective_quorum,
    federated_optimiser,
    participants,
    update_mode,
)
from flep_fl.contracts.errors import FlepError
from flep_fl.contracts.ports import Adder
from flep_fl.contracts.records import CloudEvaluation, RoundRecord
from flep_fl.flower.consent import require_consent
from flep_fl.flower.models import write_model
from flep_fl.flower.runtime.traffic import message_bytes
from flep_fl.model_security.adder import KeylessAdder, PlainAdder
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.mixed import MixedAdder
from flep_fl.model_security.profiles import vector_length
from flep_fl.model_security.schemes import load_scheme
from flep_fl.provision.kits import CloudKit
from flep_fl.reporting.results import write_rounds


def cloud_strategy(
    kit: CloudKit,
    config: Config,
    out: Path,
    *,
    on_event: Callable[[str], None] | None = None,
    on_rounds: Callable[[], None] = lambda: None,
    resume: SavedRun | None = None,
    checkpoint: bool = True,
) -> EncryptedFedAvg:
    """Wire the strategy for the trust mode of the kit.

    Parameters
    ----------
    kit
        The cloud's kit.
    config
        The configuration after :func:`flep_fl.config.adopt_kit`.
    out
        The cloud's folder: one line per round, and with a trusted cloud the model.
    on_event
        Gets one line of progress at a time.
    on_rounds
        Called whenever the rounds' records have changed and are written.
    resume
        The run to go on with; a new one where None.
    checkpoint
        Whether to keep the run in ``out/checkpoint``, so that it can be resumed.
    """

    def on_change(rounds: Sequence[RoundRecord]) -> None:
        write_rounds(out / "rounds.jsonl", rounds)
        on_rounds()

    return EncryptedFedAvg(
        cloud_terms(kit, config),
        kit.signing_key,
        adder_factory(kit, config),
        message_bytes=message_bytes,
        on_sum=_model_writer(kit, config, out, on_event or (lambda _line: None)),
        on_change=on_change,
        on_event=on_event,
        checkpoint=out / CHECKPOINT if checkpoint else None,
        resume=resume,
    )


def cloud_terms(kit: CloudKit, config: Config) -> Terms:
    """Return what the cloud knows of its federation."""
    federation, encrypted = kit.federation, config.cloud.trust != "open"
    require_consent(federation, config)
    return Terms(
        federation=federation.federation,
        key_id=federation.key_id if encrypted else "open",
        profile=(load_scheme(config.ckks.scheme, config.allow_targets) or ckks_profile(config)).digest,
        mode=update_mode(config),
        shared=federation.agreement,
        digest=federation.digest,
        site_keys=federation.site_keys(),
        rounds=config.federation.rounds,
        participants=participants(config),
        quorum=effective_quorum(config),
        round_timeout=config.federation.round_timeout,
        every_sum=federated_optimiser(config).has_memory,
    )


def adder_factory(kit: CloudKit, config: Config) -> Callable[[int], Adder]:
    """Return what makes a fresh adder for sums over a model of a given number of weights."""
    profile, encrypted = ckks_profile(config), config.cloud.trust != "open"
    own = load_scheme(config.ckks.scheme, config.allow_targets)

    def make_adder(parameters: int) -> Adder:
        length = vector_length(parameters, checked=encrypted)
        if not encrypted:
            return PlainAdder(length)
        if own is not None:
            return own.scheme.adder(length)
        if config.cloud.trust == "mixed":
            return MixedAdder(kit.context, profile, length)
        return KeylessAdder(kit.context, profile, length)

    return make_adder


def cloud_app(strategy: EncryptedFedAvg) -> ServerApp:
    """Make the Flower ServerApp that runs ``strategy``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy.start(grid)

    return app


def average_opener(
    kit: CloudKit, config: Config
) -> Callable[[bytes, ModelLayout], NDArray[np.float64]] | None:
    """Return what opens a sum to its average, float64, flat; None for a cloud that holds no key.

    Parameters
    ----------
    kit, config
        As in :func:`cloud_strategy`.
    """
    if config.cloud.trust in ("untrusted", "mixed"):
        return None
    from flep_fl.model_security.contribution import average

    if config.cloud.trust == "open":

        def open_sum(payload: bytes, layout: ModelLayout) -> NDArray[np.float64]:
            return np.frombuffer(payload, dtype="<f8", count=layout.size + 1)

    else:
        from flep_fl.flower.sessions import analyst_cipher

        cipher = analyst_cipher(kit.model_key or b"", config)

        def open_sum(payload: bytes, layout: ModelLayout) -> NDArray[np.float64]:
            values = cipher.decrypt(payload, vector_length(layout.size, checked=True))
            return values[: layout.size + 1]

    return lambda payload, layout: average(open_sum(payload, layout))


def _model_writer(
    kit: CloudKit, config: Config, out: Path, say: Callable[[str], None]
) -> Callable[[int, bytes, ModelLayout], CloudEvaluation | None] | None:
    """Return what stores and evaluates the global model after each sum; None for a cloud without a key."""
    opened = average_opener(kit, config)
    if opened is None:
        return None
    if kit.federation.generation > 1 and federated_optimiser(config).has_memory:
        say(
            "the cloud stores and scores no model: after a rotation it does not know the one that "
            f"federation.optimizer={config.federation.optimizer} starts from"
        )
        return None
    from flep_fl.flower.global_model import evaluator, follower

    follow = follower(config, out / "optimiser.bin")
    score = evaluator(config) if config.cloud.eval_data is not None else None

    def write(number: int, payload: bytes, layout: ModelLayout) -> CloudEvaluation | None:
        model = follow(number, opened(payload, layout), layout)
        write_model(out / "model.npz", model)
        try:
            return score(model, layout) if score is not None else None
        except FlepError as exc:  # the sum is a good one all the same
            say(f"{type(exc).__name__}: {exc}")
            return None

    return write
