"""An optimiser's state at one site: in memory, on disk, and on its way to another analyst.

On disk it is sealed under a key that only analysts can derive, and says which sum it follows, so that a
file of another run, key or model is never taken for this one's.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flep_fl.contracts.errors import FlepError, KitError, OptimiserStateError, TransferError
from flep_fl.contracts.files import read_bytes, write_secret
from flep_fl.contracts.ports import Float64Vector
from flep_fl.model_security import optimiser
from flep_fl.model_security.keyring import NO_SECRET, CheckKey
from flep_fl.model_security.optimiser import OptimiserState
from flep_fl.model_security.optimiser_settings import OPTIMISERS, OptimiserSettings
from flep_fl.model_security.transfer import (
    Holding,
    Statement,
    commitment,
    new_challenge,
    open_state,
    seal_state,
)

STATE_FILE = "optimiser.bin"
"""Name of the state in a site's folder."""

_CHALLENGE = "challenge"


class HeldState:
    """The state that a site's model is the weights of.

    Parameters
    ----------
    settings
        The optimiser.
    state_key
        Seals and commits to states. None in an open federation, where
        :data:`~flep_fl.model_security.keyring.NO_SECRET` serves.
    folder
        The site's state folder.
    holding, weights
        Where the run starts: its first model, float64, shape ``(P,)``.
    """

    def __init__(
        self,
        settings: OptimiserSettings,
        state_key: CheckKey | None,
        folder: Path,
        holding: Holding,
        weights: Float64Vector,
    ) -> None:
        self._settings = settings
        self._key = state_key or NO_SECRET
        self._folder = folder
        self.holding = holding
        self.state = optimiser.start(settings, weights)
        self._next: tuple[Holding, OptimiserState] | None = None

    @property
    def weights(self) -> Float64Vector:
        """The global model, float64, shape ``(P,)``."""
        return self.state.weights

    def load(self) -> None:
        """Take the state on disk, where it is one of this run, key and model."""
        path = self._folder / STATE_FILE
        if not path.exists():
            return
        blob = read_bytes(path, what="The optimiser's state", error=KitError)
        try:
            holding, data = open_state(self._key, "kept", blob)
            if _belongs(holding, self.holding):
                self.holding, self.state = holding, self._read(data)
        except FlepError:
            return  # of earlier keys, or damaged: another analyst hands it over again

    def prepare(self, average: Float64Vector, holding: Holding) -> Float64Vector:
        """Take the step of a verified sum; :meth:`commit` makes it the state.

        Parameters
        ----------
        average
            The decrypted average, float64, shape ``(P,)``.
        holding
            Which sum that is.

        Returns
        -------
        float64, shape ``(P,)``
            The new global model.
        """
        new = optimiser.step(self._settings, self.state, average, holding.round)
        self._next = (holding, new)
        return new.weights

    def commit(self) -> None:
        """Write what :meth:`prepare` made, then believe it."""
        if self._next is not None:
            self._keep(*self._next)
            self._next = None

    def statement(
        self, site: str, challenge: str, signing_key: Ed25519PrivateKey, *, hand_over: bool
    ) -> tuple[bytes, bytes | None]:
        """Sign what this site holds; returned with the sealed state itself where it hands it over."""
        data = self.state.to_bytes()
        statement = Statement(site, challenge, self.holding, commitment(self._key, self.holding, data))
        if not hand_over:
            return statement.to_bytes(signing_key), None
        sealed = seal_state(self._key, "transfer", self.holding, data)
        statement = replace(statement, sealed=hashlib.sha256(sealed).hexdigest())
        return statement.to_bytes(signing_key), sealed

    def take_over(self, statement: Statement, sealed: bytes) -> None:
        """Take the state that the other analysts agree on.

        Raises
        ------
        TransferError
            It is not the one that they agree on, is of another run, key or model, or older than this site's.
        """
        holding, data = open_state(self._key, "transfer", sealed)
        named = commitment(self._key, holding, data)
        if holding != statement.holding or not hmac.compare_digest(named, statement.commitment):
            raise TransferError("The sealed state is not the one that its statements name")
        if not _belongs(holding, self.holding):
            raise TransferError(
                "The state belongs to another run, key, configuration or model",
                expected=f"run {self.holding.run}",
                found=f"run {holding.run}",
            )
        if holding.round < self.holding.round:
            raise TransferError(
                "The state is older than this site's",
                expected=f"round {self.holding.round} or later",
                found=holding.round,
            )
        try:
            state = self._read(data)
        except OptimiserStateError as exc:
            raise TransferError("The state does not fit this site's model or optimiser", found=exc) from exc
        self._keep(holding, state)

    def draw_challenge(self) -> str:
        """Draw the challenge that statements for this site must repeat; it survives a restart."""
        challenge = new_challenge()
        write_secret(self._folder / _CHALLENGE, challenge.encode())
        return challenge

    def challenge(self) -> str:
        """Return the challenge that was drawn last; empty where there is none."""
        path = self._folder / _CHALLENGE
        return path.read_text() if path.exists() else ""

    def _keep(self, holding: Holding, state: OptimiserState) -> None:
        sealed = seal_state(self._key, "kept", holding, state.to_bytes())
        write_secret(self._folder / STATE_FILE, sealed)
        self.holding, self.state = holding, state

    def _read(self, data: bytes) -> OptimiserState:
        state = OptimiserState.from_bytes(data)
        found = (state.weights.size, len(state.moments))
        expected = (self.weights.size, OPTIMISERS[self._settings.name])
        if found != expected:
            raise OptimiserStateError("The state is another optimiser's", expected=expected, found=found)
        return state


def _belongs(holding: Holding, here: Holding) -> bool:
    return replace(holding, round=here.round, accepted=here.accepted) == here
