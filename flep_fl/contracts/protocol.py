"""What the cloud and the analysts say to each other, apart from the sealed payloads.

One Flower message carries at most three records: ``flep`` (a signed instruction, or a status),
``payload`` (one opaque array: a sealed update upwards, a sealed sum downwards) and ``metrics``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flep_fl.contracts.errors import MalformedUpdateError

FLEP_RECORD = "flep"
PAYLOAD_RECORD = "payload"
INITIAL_RECORD = "initial"
APP_METRICS_RECORD = "app-metrics"
METRICS_RECORD = "metrics"
PAYLOAD_STYPE = "flep.sealed.v1"

HELLO = "train"
CLOSE = "train"
"""Flower message types of the handshake and of the last word of a run.

They travel as ``train``, which every ClientApp routes; the signed instruction says what they are, and the mod
answers them without calling the app.
"""

STATEMENTS = "statements"
"""Field of the ``flep`` record with which a state travels: what the other sites say of it."""

OK = "ok"
ERROR = "error"

PUBLIC_METRICS = (
    "accuracy",
    "loss",
    "majority_accuracy",
    "seconds_train",
    "seconds_encrypt",
    "seconds_decrypt",
)
"""All that a site tells the cloud in figures: unweighted metrics and times, never example counts."""

Kind = Literal["hello", "round", "evaluate", "close", "transfer"]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One signed instruction of the cloud.

    Attributes
    ----------
    kind
        ``hello`` (who are you, do we agree), ``round`` (train), ``evaluate`` (the sum of this round; call the
        app's evaluate function), ``close`` (the run is over), ``transfer`` (say which state you hold, or take
        one: see ``model_security.transfer``).
    federation, run
        Which federation, and which run of it (32 hex digits each); a run's number is used once.
    round, rounds
        The round that this instruction opens (0 for hello; the last one for close), and their number.
    attempt
        1, or more where a resumed cloud repeats a round.
    previous, sum_round
        Digest and round of the last sum that the cloud accepted; ``first`` and 0 before the first.
    config
        Digest of the shared settings.
    layout
        Digest of the model's layout; empty in hello.
    shared
        The shared settings themselves (hello only), so that a difference can be named.
    challenge
        Random; the answer repeats it, so that a recorded one is of no use. In hello the cloud's, in transfer
        that of the site which lacks the state.
    donor
        In transfer: the site that is to hand the state over.
    first
        Digest of the first model where the cloud brings it (it travels with hello); empty where every site
        makes it from the seed in its kit.
    app
        Record names and configuration for the wrapped app (:class:`.app_settings.AppSettings`); may be empty.
    """

    kind: Kind
    federation: str
    run: str
    round: int
    rounds: int
    attempt: int
    previous: str
    sum_round: int
    config: str
    layout: str = ""
    shared: Mapping[str, Any] = field(default_factory=dict)
    challenge: str = ""
    donor: str = ""
    first: str = ""
    app: Mapping[str, Any] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Instruction:
        """Type-check the fields of a message whose signature has been verified.

        Raises
        ------
        MalformedUpdateError
            When a field is missing, unknown or of another type.
        """
        try:
            instruction = cls(**values)
        except TypeError as exc:
            raise MalformedUpdateError(
                "An instruction of the cloud is not in the format of this release"
            ) from exc
        text = (
            instruction.kind,
            instruction.federation,
            instruction.run,
            instruction.previous,
            instruction.config,
            instruction.layout,
            instruction.challenge,
            instruction.donor,
            instruction.first,
        )
        numbers = (instruction.round, instruction.rounds, instruction.attempt, instruction.sum_round)
        if (
            not all(isinstance(value, str) for value in text)
            or any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in numbers)
            or instruction.kind not in ("hello", "round", "evaluate", "close", "transfer")
            or not isinstance(instruction.shared, dict)
            or not isinstance(instruction.app, dict)
        ):
            raise MalformedUpdateError("An instruction of the cloud holds a field of the wrong type")
        return instruction
