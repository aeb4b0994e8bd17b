"""The model that outlives a rotation of the keys.

A site that accepted a sum under earlier keys opens it once more with them, and starts the first run under the
new keys from that model. Sites without it (new ones, or ones that missed the last sum) get it as they get an
optimiser's state: sealed by an analyst, and signed for by the others (``transfer``).
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flep_fl.contracts.errors import FlepError, KitError
from flep_fl.contracts.files import read_bytes
from flep_fl.contracts.ports import Float64Vector, ModelCipher
from flep_fl.model_security.contribution import average
from flep_fl.model_security.held_state import STATE_FILE
from flep_fl.model_security.keyring import NO_SECRET, CheckKey
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.ledger import SUM_FILE
from flep_fl.model_security.optimiser import OptimiserState
from flep_fl.model_security.profiles import vector_length
from flep_fl.model_security.seal import kept_payload
from flep_fl.model_security.transfer import open_state

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EarlierKeys:
    """The keys of an earlier generation, as far as this site still has them."""

    cipher: ModelCipher = field(repr=False)
    state_key: CheckKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class CarryOver:
    """What a session after a rotation needs.

    Attributes
    ----------
    folder
        The site's state folder.
    earlier
        Earlier generations' keys, the newest first; empty at a new site.
    done
        Deletes them; called once a sum was accepted under the current keys.
    """

    folder: Path
    earlier: Sequence[EarlierKeys]
    done: Callable[[], None]

    def weights(self, layout: ModelLayout) -> Float64Vector | None:
        """Return the last model under earlier keys, float64, shape ``(P,)``; None where there is none."""
        for keys in self.earlier:
            for read in (_from_state, _from_sum):
                try:
                    found = read(self.folder, keys, layout)
                except FlepError as exc:
                    _LOG.warning("a model under earlier keys is not used (%s): %s", type(exc).__name__, exc)
                    continue
                if found is not None:
                    return found
        return None


def start_digest(check_key: CheckKey | None, federation: str, layout: ModelLayout, weights: bytes) -> str:
    """Name a first model that was carried over, 64 hex digits: analysts compare it, the cloud learns nothing.

    Parameters
    ----------
    check_key
        The current one.
    federation, layout
        Whose model it is.
    weights
        Its weights, float64 little-endian.
    """
    key = (check_key or NO_SECRET).derive(b"flep-fl/carried-model/v1", 32)
    head = f"{federation}/{layout.digest}/".encode()
    return hmac.digest(key, head + weights, "sha256").hex()


def _from_state(folder: Path, keys: EarlierKeys, layout: ModelLayout) -> Float64Vector | None:
    """Read the weights out of the optimiser's state, where the optimiser has one."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    blob = read_bytes(path, what="The optimiser's state", error=KitError)
    holding, data = open_state(keys.state_key, "kept", blob)
    if holding.round == 0 or (holding.key_id, holding.layout) != (keys.cipher.key_id, layout.digest):
        return None
    return OptimiserState.from_bytes(data).weights


def _from_sum(folder: Path, keys: EarlierKeys, layout: ModelLayout) -> Float64Vector | None:
    """Open the last accepted sum; it was verified before it was kept."""
    path = folder / SUM_FILE
    if not path.exists():
        return None
    header, payload = kept_payload(read_bytes(path, what="The last accepted sum", error=KitError))
    if (header.key_id, header.layout) != (keys.cipher.key_id, layout.digest):
        return None
    length = vector_length(layout.size, checked=header.mode != "open")
    return average(keys.cipher.decrypt(payload, length)[: layout.size + 1])
