"""The analyst's keystore: key bundles, grants and owners' keys, sealed in a small SQLite file of their own.

Everything is sealed with AES-256-GCM-SIV under a key that comes from a key file (32 bytes, 0600) or from a
passphrase (scrypt, RFC 7914). The file shows how many entries there are and how long they are.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sqlite3
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from flep_fl.contracts.errors import GrantError, GrantExpiredError, KeystoreError, OwnerPinError
from flep_fl.contracts.files import create_secret, read_bytes
from flep_fl.contracts.grants import GrantDocument
from flep_fl.data_security.keys import ImageKeyBundle

KEY_BYTES = 32
VERSION = 1
SCRYPT_COST = 1 << 17
"""n of scrypt (r = 8, p = 1): 128 MiB and about half a second for every guess."""

_LABEL = b"flep keystore, version 1"
_NONCE_BYTES = 12
_KINDS = {"key file": 0, "passphrase": 1}


@dataclass(frozen=True, slots=True)
class HeldGrant:
    """A grant with its key bundle.

    Attributes
    ----------
    document
        What the owner signed.
    bundle
        The key bundle; keep it in memory only.
    """

    document: GrantDocument
    bundle: ImageKeyBundle = field(repr=False)


class Keystore:
    """An open keystore; a context manager.

    Parameters
    ----------
    path
        The file; made (0600) where it does not exist.
    key_file
        File with 32 random bytes; made (0600) together with a new keystore.
    passphrase
        Instead of a key file.
    clock
        Seconds since 1970, for expiry.

    Raises
    ------
    KeystoreError
        Neither or both of key file and passphrase are given, the file is no keystore or damaged, or key or
        passphrase are wrong.
    """

    def __init__(
        self,
        path: Path,
        *,
        key_file: Path | None = None,
        passphrase: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path, self._clock = path, clock
        self._lock = threading.RLock()
        if (key_file is None) == (passphrase is None):
            raise KeystoreError("a keystore is opened with a key file or with a passphrase")
        if not path.exists():
            if key_file is not None:
                create_secret(key_file, secrets.token_bytes(KEY_BYTES))
            create_secret(path, b"")
        path.chmod(0o600)
        with self._named():
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=30
            )
        try:
            with self._named():
                self._prepare(key_file, passphrase)
        except KeystoreError:
            self._connection.close()
            raise

    def __repr__(self) -> str:
        return f"Keystore({str(self.path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # --- owners --------------------------------------------------------------------------------------

    def pin(self, address: str, verify_key: bytes, *, replace: bool = False) -> bool:
        """Remember an owner's key at the first use of an address, and compare it ever after.

        Parameters
        ----------
        address
            The owner's address.
        verify_key
            The raw Ed25519 key (32 bytes) that it shows now.
        replace
            The user has named this very key: it takes the place of another one.

        Returns
        -------
        bool
            Whether the key was seen for the first time.

        Raises
        ------
        OwnerPinError
            The address showed another key before.
        """
        with self._writing():
            known = self.pinned(address)
            if known is None or (replace and known != verify_key):
                self._put("owner", address, {"verify_key": verify_key.hex()})
                return True
        if not hmac.compare_digest(known, verify_key):
            raise OwnerPinError(
                f"the data owner at {address} shows another key than before",
                expected=known.hex(),
                found=verify_key.hex(),
                remedy="Ask the owner by another way. If the change is genuine, name the new key: "
                f"data.owners=[{address}#KEY]",
            )
        return False

    def pinned(self, address: str) -> bytes | None:
        """Return the key that an address showed first, or None."""
        found = self._get("owner", address)
        return None if found is None else bytes.fromhex(str(found["verify_key"]))

    def owners(self) -> dict[str, bytes]:
        """Return all pinned keys by address."""
        return {name: bytes.fromhex(str(entry["verify_key"])) for name, entry in self._all("owner")}

    def forget_owner(self, address: str) -> None:
        """Forget an owner's key, everything it granted, and how far its releases had come."""
        with self._writing():
            key = self.pinned(address)
            if key is None:
                raise KeystoreError("the keystore does not know this owner", found=address)
            for held in self.grants(expired=True):
                if held.document.owner == key.hex():
                    self.forget(held.document.owner, held.document.dataset)
            for name, _ in self._all("seen"):
                if json.loads(name)[0] == key.hex():
                    self._delete("seen", name)
            self._delete("owner", address)

    # --- grants --------------------------------------------------------------------------------------

    def store(self, document: GrantDocument, bundle: ImageKeyBundle) -> None:
        """Keep a grant and its bundle, in place of an earlier one for the same data set of the same owner.

        The caller has verified the owner's signature and that the bundle is the one that the grant names.

        Raises
        ------
        GrantError
            An older epoch or release than the one that is held: somebody plays back an old answer.
        """
        if (bundle.key_id, bundle.epoch) != (document.key_id, document.epoch):
            raise GrantError("the key bundle is not the one that the grant names")
        name = _place(document.owner, document.dataset)
        entry = {
            "document": b64encode(document.to_bytes()).decode("ascii"),
            "bundle": b64encode(bundle.to_bytes()).decode("ascii"),
        }
        with self._writing():
            before = self._seen(name)
            if (document.epoch, document.release_number) < before:
                raise GrantError(
                    f"the grant for {document.dataset} is older than one that was seen before",
                    expected=f"epoch {before[0]} release {before[1]} or later",
                    found=f"epoch {document.epoch} release {document.release_number}",
                    remedy="Ask the data owner; somebody may be playing back an old answer",
                )
            self._put("grant", name, entry)

    def _seen(self, name: str) -> tuple[int, int]:
        """Return epoch and number of the latest release of a data set that was ever held here."""
        held, seen = self._get("grant", name), self._get("seen", name)
        latest = (0, 0)
        if held is not None:
            document = GrantDocument.from_bytes(b64decode(str(held["document"])))
            latest = (document.epoch, document.release_number)
        return latest if seen is None else max(latest, (int(seen["epoch"]), int(seen["release"])))

    def held(self, owner: str, dataset: str) -> HeldGrant:
        """Return the grant and bundle of a data set.

        Parameters
        ----------
        owner
            The owner's Ed25519 key, 64 hex digits.
        dataset
            Name of the data set.

        Raises
        ------
        KeystoreError
            There is none.
        GrantExpiredError
            It has ended.
        """
        entry = self._get("grant", _place(owner, dataset))
        if entry is None:
            raise KeystoreError(
                f"the keystore holds no key for {dataset}", remedy="Fetch it from the data owner first"
            )
        held = _held(entry)
        if self._clock() > held.document.not_after:
            raise GrantExpiredError(f"the grant for {dataset} has ended", remedy="Ask the data owner")
        return held

    def grants(self, *, expired: bool = False) -> list[HeldGrant]:
        """Return all grants that have not ended, or really all."""
        found = [_held(entry) for _, entry in self._all("grant")]
        now = self._clock()
        return [held for held in found if expired or now <= held.document.not_after]

    def forget(self, owner: str, dataset: str) -> None:
        """Destroy a grant and its bundle, if they are held; the file's bytes are overwritten.

        Epoch and number of the release stay behind, so that it cannot be played back later.
        """
        name = _place(owner, dataset)
        with self._writing():
            epoch, number = self._seen(name)
            if number:
                self._put("seen", name, {"epoch": str(epoch), "release": str(number)})
            self._delete("grant", name)

    def forget_expired(self) -> int:
        """Destroy all grants that have ended; returns how many."""
        now = self._clock()
        with self._writing():
            ended = [held for held in self.grants(expired=True) if now > held.document.not_after]
            for held in ended:
                self.forget(held.document.owner, held.document.dataset)
        return len(ended)

    # --- the file ------------------------------------------------------------------------------------

    def _prepare(self, key_file: Path | None, passphrase: str | None) -> None:
        for pragma in ("journal_mode=DELETE", "synchronous=FULL", "secure_delete=ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        with self._writing():
            tables = {row[0] for row in self._connection.execute("SELECT name FROM sqlite_master")}
            if not tables:
                self._create("key file" if passphrase is None else "passphrase")
            elif "head" not in tables:
                raise KeystoreError(f"this is not a keystore: {self.path}")
            row = self._connection.execute("SELECT version, kind, salt, cost, probe FROM head").fetchone()
            if row is None or row[0] != VERSION:
                raise KeystoreError(
                    f"the keystore has a format that this release does not read: {self.path}",
                    expected=f"version {VERSION}",
                    found=None if row is None else f"version {row[0]}",
                )
            _, kind, salt, cost, probe = row
            if (kind == _KINDS["passphrase"]) != (passphrase is not None):
                words = {number: word for word, number in _KINDS.items()}
                raise KeystoreError(
                    f"the keystore is opened another way: {self.path}", expected=f"a {words.get(kind, '?')}"
                )
            self._key = _derive(salt, cost, key_file, passphrase)
            if probe is None:
                sealed = self._seal(b"keystore", "head")
                self._connection.execute("UPDATE head SET probe = ?", (sealed,))
            else:
                try:
                    self._unseal(probe, "head")
                except KeystoreError as exc:
                    raise KeystoreError(
                        f"the key or passphrase does not open the keystore: {self.path}",
                        remedy="Use the one that it was made with",
                    ) from exc

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Open a transaction, or go on in the one that is open; committed at the end, undone on any error.

        It takes the write lock at once, so that what is read here is still true when something is written:
        another process would otherwise put an older release, or another owner's key, in a newer one's place.
        """
        with self._lock, self._named():
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite may have rolled back already (a full disk), and what it says now would hide why.
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def _create(self, kind: str) -> None:
        self._connection.execute(
            "CREATE TABLE head (version INTEGER, kind INTEGER, salt BLOB, cost INTEGER, probe BLOB)"
        )
        self._connection.execute("CREATE TABLE entries (name BLOB PRIMARY KEY, kind BLOB, sealed BLOB)")
        self._connection.execute(
            "INSERT INTO head VALUES (?, ?, ?, ?, NULL)",
            (VERSION, _KINDS[kind], secrets.token_bytes(KEY_BYTES), SCRYPT_COST),
        )

    def _name(self, kind: str, place: str) -> bytes:
        return hmac.digest(self._key, json.dumps([kind, place]).encode(), "sha256")

    def _put(self, kind: str, place: str, entry: dict[str, str]) -> None:
        name = self._name(kind, place)
        sealed = self._seal(json.dumps([place, entry]).encode(), name.hex())
        with self._named():
            self._connection.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", (name, self._name("kind", kind), sealed)
            )

    def _get(self, kind: str, place: str) -> dict[str, str] | None:
        name = self._name(kind, place)
        with self._named():
            row = self._connection.execute("SELECT sealed FROM entries WHERE name = ?", (name,)).fetchone()
        return None if row is None else self._opened(name, row[0])[1]

    def _all(self, kind: str) -> list[tuple[str, dict[str, str]]]:
        with self._named():
            rows = self._connection.execute(
                "SELECT name, sealed FROM entries WHERE kind = ? ORDER BY rowid", (self._name("kind", kind),)
            ).fetchall()
        return [self._opened(name, sealed) for name, sealed in rows]

    def _delete(self, kind: str, place: str) -> None:
        with self._named():
            self._connection.execute("DELETE FROM entries WHERE name = ?", (self._name(kind, place),))

    def _opened(self, name: bytes, sealed: bytes) -> tuple[str, dict[str, str]]:
        place, entry = json.loads(self._unseal(sealed, name.hex()))
        return place, entry

    def _seal(self, plain: bytes, place: str) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + AESGCMSIV(self._key).encrypt(nonce, plain, _LABEL + place.encode())

    def _unseal(self, sealed: bytes, place: str) -> bytes:
        nonce, body = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return AESGCMSIV(self._key).decrypt(nonce, body, _LABEL + place.encode())
        except (InvalidTag, ValueError) as exc:
            raise KeystoreError(
                f"an entry of the keystore was altered: {self.path}", remedy="Restore it, or fetch again"
            ) from exc

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise KeystoreError(
                f"the keystore cannot be used: {self.path} ({exc})",
                remedy="Check that it is a keystore, undamaged and writable",
            ) from exc


def _derive(salt: Any, cost: Any, key_file: Path | None, passphrase: str | None) -> bytes:
    plain = isinstance(salt, bytes) and isinstance(cost, int)
    if not (plain and 2 <= cost <= 1 << 22 and cost & (cost - 1) == 0):
        raise KeystoreError("the keystore's head is damaged", remedy="Restore it, or fetch again")
    if passphrase is not None:
        if not passphrase:
            raise KeystoreError("the passphrase is empty")
        return Scrypt(salt=salt, length=KEY_BYTES, n=cost, r=8, p=1).derive(passphrase.encode())
    if key_file is None:  # pragma: no cover - one of the two is given
        raise KeystoreError("a keystore is opened with a key file or with a passphrase")
    raw = read_bytes(key_file, what="the keystore's key", error=KeystoreError)
    if len(raw) != KEY_BYTES:
        raise KeystoreError(
            f"the keystore's key has a wrong length: {key_file}",
            expected="32 bytes",
            found=f"{len(raw)} bytes",
        )
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=_LABEL).derive(raw)


def _held(entry: dict[str, str]) -> HeldGrant:
    document = GrantDocument.from_bytes(b64decode(entry["document"]))
    return HeldGrant(document, ImageKeyBundle.from_bytes(b64decode(entry["bundle"])))


def _place(owner: str, dataset: str) -> str:
    return json.dumps([owner, dataset])
