"""How a site that lacks the federation's state gets it from another analyst, through a cloud that is blind.

With FedAvg the next sum is the whole model. With an optimiser that remembers (FedAvgM, FedAdam), or with a
first model that was carried over from earlier keys, a site that was away cannot compute the model from a
sum alone. An analyst that has the state then seals it under a key that only analysts can derive, and every
analyst that has it signs a statement with a commitment to it. The site takes the state that most name.

What the cloud can do with a transfer is to lose it. It cannot read one, alter one, invent one, or pass off an
old one: the statements answer a challenge that the joining site has drawn.

A sealed state is ``magic (8 bytes) || u32 length of the head, big-endian || head (canonical JSON) || nonce
(12 bytes) || AES-256-GCM-SIV ciphertext``; the head says whose state it is and is authenticated with it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from flep_fl.contracts.errors import SignatureError, TransferError
from flep_fl.model_security import _canonical
from flep_fl.model_security.keyring import CheckKey
from flep_fl.model_security.seal import open_control, seal_control

Purpose = Literal["kept", "transfer"]
"""``kept`` on the site's own disk, or on the way to another analyst; neither passes for the other."""

_MAGIC: Final = b"FLEPST1\n"
_LENGTH: Final = struct.Struct(">I")
_NONCE_BYTES: Final = 12
_MAX_HEAD: Final = 1 << 12
_MAX_STATE: Final = (1 << 31) - 1  # what one AES-GCM-SIV message may hold in pyca/cryptography
_STATEMENT: Final = "flep-fl/state-statement/v1"
_HEX: Final = re.compile(r"[0-9a-f]*\Z")


@dataclass(frozen=True, slots=True)
class Holding:
    """Which state a site holds.

    Attributes
    ----------
    federation, run, key_id, config, layout
        As in :class:`~flep_fl.model_security.seal.UpdateHeader`.
    round, accepted
        Round and digest of the last sum in it; before the first, 0 and the digest of the first model (empty
        where that follows from the kit's seed).
    """

    federation: str
    run: str
    key_id: str
    config: str
    layout: str
    round: int
    accepted: str


@dataclass(frozen=True, slots=True)
class Statement:
    """What a site says of the state that it holds.

    Attributes
    ----------
    site
        Who says so.
    challenge
        The joining site's.
    holding
        Which state.
    commitment
        :func:`commitment` of it, 64 hex digits.
    sealed
        SHA-256 of the sealed state where this site hands it over; else empty.
    """

    site: str
    challenge: str
    holding: Holding
    commitment: str
    sealed: str = ""

    def to_bytes(self, signing_key: Ed25519PrivateKey) -> bytes:
        """Sign the statement."""
        return seal_control({"what": _STATEMENT, **asdict(self)}, signing_key)

    @classmethod
    def from_bytes(cls, blob: bytes, site_keys: Mapping[str, Ed25519PublicKey]) -> Statement:
        """Verify a statement.

        Raises
        ------
        TransferError
            It is not a statement of a site in the kit, or was altered.
        MalformedUpdateError
            It is no signed message at all.
        """
        for site, key in site_keys.items():
            try:
                text = open_control(blob, key)
            except SignatureError:
                continue  # whose it is, only the signature tells
            statement = _statement(text)
            if statement.site != site:
                raise TransferError(f"Site {site} signed a statement in the name of {statement.site!r}")
            return statement
        raise TransferError("A statement on the state was altered, or is of no site in the kit")


def commitment(check_key: CheckKey, holding: Holding, state: bytes) -> str:
    """Commit to a state: HMAC-SHA256 under a key that only analysts can derive, 64 hex digits.

    The cloud sees it and learns only whether two sites hold the same.
    """
    key = check_key.derive(b"flep-fl/state-commitment/v1", 32)
    digest = hmac.new(key, _canonical.dump(asdict(holding)) + b"\0", hashlib.sha256)
    digest.update(state)
    return digest.hexdigest()


def seal_state(check_key: CheckKey, purpose: Purpose, holding: Holding, state: bytes) -> bytes:
    """Encrypt a state.

    Raises
    ------
    TransferError
        It is larger than one message can hold (2 GiB).
    """
    if len(state) > _MAX_STATE:
        raise TransferError("The state is too large to be sealed", expected=f"at most {_MAX_STATE} bytes")
    head = _canonical.dump({"purpose": purpose, **asdict(holding)})
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = _cipher(check_key, purpose).encrypt(nonce, state, head)
    return b"".join((_MAGIC, _LENGTH.pack(len(head)), head, nonce, sealed))


def open_state(check_key: CheckKey, purpose: Purpose, blob: bytes) -> tuple[Holding, bytes]:
    """Decrypt a state and say whose it is; whether that is the one wanted is the caller's to compare.

    Raises
    ------
    TransferError
        It was altered, truncated, sealed for another purpose or under another check key.
    """
    problem = TransferError(
        "A sealed state was altered, or sealed under other keys", remedy="Use kits of one provisioning"
    )
    start = len(_MAGIC) + _LENGTH.size
    if len(blob) < start or not blob.startswith(_MAGIC):
        raise problem
    (size,) = _LENGTH.unpack_from(blob, len(_MAGIC))
    body = start + size + _NONCE_BYTES
    if size > _MAX_HEAD or len(blob) < body + 16:
        raise problem
    head, nonce = blob[start : start + size], blob[start + size : body]
    try:
        state = _cipher(check_key, purpose).decrypt(nonce, memoryview(blob)[body:], head)
        text = _canonical.load(head)
        if not isinstance(text, dict):
            raise TypeError("the head is not an object")
        del text["purpose"]  # the key is derived from it, so it is the right one
        return _holding(text), state
    except (InvalidTag, ValueError, KeyError, TypeError, OverflowError):
        raise problem from None


def agreed(
    statements: Sequence[bytes],
    sealed: bytes,
    *,
    site_keys: Mapping[str, Ed25519PublicKey],
    joiner: str,
    challenge: str,
    others: int,
) -> Statement:
    """Decide which state a joining site may take.

    Parameters
    ----------
    statements
        What the cloud relays.
    sealed
        The sealed state that it relays with them.
    site_keys
        The sites' keys by name, from the kit.
    joiner, challenge
        The joining site, and the challenge that it has drawn.
    others
        How many other sites, at least one, must name the state (``federation.min_contributors`` less one).

    Returns
    -------
    Statement
        That of the site which hands the state over.

    Raises
    ------
    TransferError
        A statement is forged, of the joiner itself, or answers another challenge; no state has
        the majority; too few sites name it; or the sealed state is not the one named.
    """
    read: dict[str, Statement] = {}
    for blob in statements:
        statement = Statement.from_bytes(blob, site_keys)
        if statement.challenge != challenge or not challenge:
            raise TransferError("A statement on the state answers another challenge: it is an old one")
        if statement.site == joiner:
            raise TransferError("The cloud shows a statement of this site itself, which cannot count")
        read[statement.site] = statement
    votes = Counter((s.holding, s.commitment) for s in read.values())
    named, count = votes.most_common(1)[0] if votes else (None, 0)
    if 2 * count <= len(read) or count < max(others, 1):
        raise TransferError(
            "No state is named by enough sites",
            expected=f"more than half of those shown, and at least {others}",
            found=f"{count} of {len(read)}",
            remedy="Wait until more sites are connected; if they disagree, find out why before you go on",
        )
    found = hashlib.sha256(sealed).hexdigest()
    for statement in read.values():
        if (statement.holding, statement.commitment) == named and statement.sealed == found:
            return statement
    raise TransferError("The sealed state is not one that an analyst of the majority handed over")


def new_challenge() -> str:
    """Draw what the statements must repeat."""
    return secrets.token_hex(16)


def _cipher(check_key: CheckKey, purpose: Purpose) -> AESGCMSIV:
    return AESGCMSIV(check_key.derive(b"flep-fl/state-" + purpose.encode() + b"/v1", 32))


def _statement(text: Mapping[str, object]) -> Statement:
    try:
        if set(text) != {"what", *(entry.name for entry in fields(Statement))} or text["what"] != _STATEMENT:
            raise ValueError("other fields")
        site, challenge, word, sealed = (text[n] for n in ("site", "challenge", "commitment", "sealed"))
        holding = text["holding"]
        if not isinstance(holding, dict) or not isinstance(site, str):
            raise TypeError("a field has another type")
        for value in (challenge, word, sealed):
            if not isinstance(value, str) or not _HEX.match(value):
                raise ValueError("a field is not hexadecimal")
        return Statement(site, str(challenge), _holding(holding), str(word), str(sealed))
    except (ValueError, KeyError, TypeError) as exc:
        raise TransferError(
            "A statement on the state is not in the format of this release", found=exc
        ) from exc


def _holding(text: Mapping[str, object]) -> Holding:
    if set(text) != {entry.name for entry in fields(Holding)}:
        raise ValueError("other fields")
    number = text["round"]
    words = {name: value for name, value in text.items() if name != "round"}
    if type(number) is not int or number < 0 or not all(isinstance(value, str) for value in words.values()):
        raise TypeError("a field has another type")
    return Holding(**{name: str(value) for name, value in words.items()}, round=number)
