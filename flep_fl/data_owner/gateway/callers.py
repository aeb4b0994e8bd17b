"""Who signed a request: analysts and administrators, by one profile of RFC 9421.

The signature covers method, path, query, the body's digest, the owner's key, the time and a nonce
(:mod:`flep_fl.contracts.request_signing`). A request older or newer than five minutes is refused, and a nonce
is remembered for as long as its request could be accepted.

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
from flep_fl.contracts.request_signing import MAX_AGE_SECONDS, read_signature
from flep_fl.data_owner.gateway.guard import Exchange
from flep_fl.data_owner.gateway.refusals import Refusal, unauthorised

MAX_NONCES = 200_000


class NonceMemory:
    """Nonces of the last minutes, a bounded number of them."""

    def __init__(self, *, limit: int = MAX_NONCES, seconds: float = 2 * MAX_AGE_SECONDS) -> None:
        self._limit, self._seconds = limit, seconds
        self._seen: OrderedDict[tuple[bytes, str], float] = OrderedDict()

    def knows(self, key: bytes, nonce: str) -> bool:
        """Say whether a nonce is remembered."""
        return (key, nonce) in self._seen

    def use(self, key: bytes, nonce: str, now: float) -> bool:
        """Remember a nonce; say whether it is new.

        Raises
        ------
        Refusal
            503 where no more can be remembered: forgetting one too early would let it be used again.
        """
        while self._seen:
            oldest = next(iter(self._seen))
            if self._seen[oldest] > now:
                break
            del self._seen[oldest]
        if (key, nonce) in self._seen:
            return False
        if len(self._seen) >= self._limit:
            raise Refusal(503, "busy", "too many requests in the last minutes; try again", retry_after=10)
        self._seen[key, nonce] = now + self._seconds
        return True


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

    def signer(self, exchange: Exchange, body: bytes) -> tuple[bytes, str]:
        """Verify a request's signature and age; return the signer's raw public key and the nonce.

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
        return signed.key, signed.nonce

    def spend(self, key: bytes, nonce: str, *, charge: Callable[[], None]) -> None:
        """Charge a caller who is known here for a request, and use up its nonce.

        A repetition costs its caller nothing (anybody may have made it), and what the rate refuses leaves no
        nonce behind: all callers share that memory, and nobody may fill it faster than the rate.

        Parameters
        ----------
        key, nonce
            As :meth:`signer` returned them.
        charge
            Takes one token of the caller's rate.

        Raises
        ------
        Refusal
            401 where the nonce was used before; 429 of ``charge``.
        """
        now = self._clock()
        if not self._nonces.knows(key, nonce):
            charge()
        if not self._nonces.use(key, nonce, now):
            raise Refusal(401, "request_signature", "the request was made before", detail=key.hex())
