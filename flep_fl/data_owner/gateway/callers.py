"""Who signed a request: analysts and administrators, by one profile of RFC 9421.

The signature covers method, path, query, the body's digest, the owner's key, the time and a nonce
(:mod:`flep_fl.contracts.request_signing`). A request older or newer than five minutes is refused, and a nonce
is remembered for as long as its request could be accepted: each caller's for himself (:class:`NonceMemory`).

What a restart forgets are the nonces. A request that is replayed then does what it did before: all signed
requests are idempotent, and what they answer is of use to the holder of the caller's keys alone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from flep_fl.contracts.errors import RequestSignatureError
from flep_fl.contracts.request_signing import MAX_AGE_SECONDS, RequestSignature, read_signature
from flep_fl.data_owner.gateway.guard import Exchange
from flep_fl.data_owner.gateway.refusals import Refusal, unauthorised

NONCES_PER_CALLER = 4096
MAX_NONCES = 200_000


class _Caller:
    """One caller's nonces of the last minutes, oldest use first, and the time up to which none are taken."""

    __slots__ = ("floor", "seen")

    def __init__(self) -> None:
        self.seen: OrderedDict[str, int] = OrderedDict()
        self.floor = -1


class NonceMemory:
    """Nonces of the last minutes, a bounded number of them, of each caller for himself.

    Where there is room for no more, the oldest of the caller who has the most is dropped, and *his* floor
    rises to the time it was signed at: nothing that he signed up to then is taken any more. So a nonce is
    never taken twice, whatever others do; a caller who floods makes his own late requests fail and no one
    else's. Dropping a nonce because its time is over raises a floor of all callers, so that a clock that is
    set back brings no old request back.

    Parameters
    ----------
    per_caller
        Nonces of one caller.
    limit
        Nonces of all callers. Who calls this must know the callers: each of them costs memory by himself.
    seconds
        How long after it was signed a request is taken.
    """

    def __init__(
        self,
        *,
        per_caller: int = NONCES_PER_CALLER,
        limit: int = MAX_NONCES,
        seconds: float = MAX_AGE_SECONDS,
    ) -> None:
        self._per_caller, self._limit, self._seconds = per_caller, limit, seconds
        self._callers: OrderedDict[bytes, _Caller] = OrderedDict()
        self._floor = -1
        self._count = 0

    def knows(self, key: bytes, nonce: str, created: int) -> bool:
        """Say whether a nonce may have been used: it was, or it is from a time that is closed."""
        caller = self._callers.get(key)
        if created <= self._floor or (caller is not None and created <= caller.floor):
            return True
        return caller is not None and nonce in caller.seen

    def use(self, key: bytes, nonce: str, created: int, now: float) -> bool:
        """Remember a nonce; say whether it is new.

        Parameters
        ----------
        key, nonce
            The caller's, and the request's.
        created
            When it was signed, seconds since 1970.
        now
            Seconds since 1970.
        """
        self._forget_old(now)
        if self.knows(key, nonce, created):
            return False
        caller = self._callers.setdefault(key, _Caller())
        self._callers.move_to_end(key)
        caller.seen[nonce] = created
        self._count += 1
        if len(caller.seen) > self._per_caller:
            self._drop(caller)
        elif self._count > self._limit:
            self._drop(max(self._callers.values(), key=lambda one: len(one.seen)))
        return True

    def __len__(self) -> int:
        return self._count

    def _drop(self, caller: _Caller) -> None:
        _, created = caller.seen.popitem(last=False)
        caller.floor = max(caller.floor, created)
        self._count -= 1

    def _forget_old(self, now: float) -> None:
        """Forget what is too old to be taken again: of the caller who has been quiet for longest, first."""
        while self._callers:
            key = next(iter(self._callers))
            caller = self._callers[key]
            while caller.seen and next(iter(caller.seen.values())) + self._seconds < now:
                _, created = caller.seen.popitem(last=False)
                self._floor = max(self._floor, created)
                self._count -= 1
            if caller.seen or caller.floor + self._seconds >= now:
                return  # a floor that is not over yet is his alone: others must not come under it
            self._floor = max(self._floor, caller.floor)
            del self._callers[key]


class Callers:
    """Authenticates signed requests.

    Parameters
    ----------
    audience
        The owner's raw Ed25519 public key, 32 bytes.
    clock
        Seconds since 1970.
    """

    def __init__(self, audience: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._audience, self._clock = audience, clock
        self._nonces = NonceMemory()

    def signer(self, exchange: Exchange, body: bytes = b"") -> RequestSignature:
        """Verify a request's signature and age; return what it says, the signer's key and nonce among it.

        Whether this key may do anything, and whether the nonce is new (:meth:`spend`), is the next question.

        Raises
        ------
        Refusal
            401, in one wording whatever is wrong, except for the clock, which honest callers must learn.
        """
        try:
            signed = read_signature(
                exchange.scope["method"],
                exchange.target,
                exchange.text_headers(),
                body,
                audience=self._audience,
            )
            Ed25519PublicKey.from_public_bytes(signed.key).verify(signed.signature, signed.base)
        except (RequestSignatureError, InvalidSignature, ValueError) as exc:
            raise unauthorised(str(exc) or type(exc).__name__) from exc
        if abs(self._clock() - signed.created) > MAX_AGE_SECONDS:
            raise Refusal(
                401,
                "request_signature",
                f"the request's time is more than {MAX_AGE_SECONDS} s off; here it is {int(self._clock())}",
                detail=signed.key.hex(),
            )
        return signed

    def spend(self, exchange: Exchange, signed: RequestSignature, who: str) -> None:
        """Charge a caller who is known here for a request, and use up its nonce.

        A repetition costs its caller nothing (anybody may have made it), and what the rate refuses leaves no
        nonce behind.

        Parameters
        ----------
        exchange
            The request; it counts for ``who`` afterwards.
        signed
            As :meth:`signer` returned it.
        who
            The identity whose rate is charged.

        Raises
        ------
        Refusal
            401 where the nonce was used before; 429 or 503 where the caller asks for too much.
        """
        key, nonce, created = signed.key, signed.nonce, signed.created
        if not self._nonces.knows(key, nonce, created):
            exchange.listener.identities.take(who)
        if not self._nonces.use(key, nonce, created, self._clock()):
            raise Refusal(
                401,
                "request_signature",
                f"the request was made before, or is older than your last {NONCES_PER_CALLER}: sign it anew",
                detail=key.hex(),
            )
        exchange.proved(who)
