"""Limits on rate and concurrency: what does not fit is refused at once, nothing waits in a growing queue.

Two kinds of callers are told apart. Whoever has not proved an identity yet counts by address
(:func:`peer_key`) and never holds a place while the gateway waits for him; whoever has, counts by that
identity. So one address cannot take the places of others, and a device's or an analyst's rate is his alone.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network, ip_address

from flep_fl.data_owner.gateway.refusals import RETRY_SECONDS, Refusal

MAX_IDENTITIES = 10_000
SLOWEST_READER = 32_768
"""Bytes per second at which an answer must be read at least, after ``body_seconds`` of grace."""

_IPV6_SITE = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one listener.

    Attributes
    ----------
    body_bytes
        Largest request body.
    in_flight, in_flight_per_caller
        Requests that are worked on at once, of all and of one caller: an address until an identity is proved,
        that identity from then on. One more gets 503.
    connections, connections_per_peer
        Open connections, of all and of one address; one more is closed at once.
    connection_rate
        New connections per second of one address in the long run; twice ``connections_per_peer`` may come at
        once. A handshake costs a signature, so it is not free to begin one.
    rate, burst
        Requests per second of one identity (a device, an analyst, an administrator) in the long run, and how
        many of them may come at once.
    peer_rate, peer_burst
        The same for one address, of requests that prove no identity.
    header_seconds, body_seconds
        Longest time for a request's head, and for its body. An answer may be read as slowly as
        ``body_seconds`` and :data:`SLOWEST_READER` allow.
    idle_seconds
        How long an idle connection is kept.
    """

    body_bytes: int = 16 << 20
    in_flight: int = 64
    in_flight_per_caller: int = 8
    connections: int = 512
    connections_per_peer: int = 128
    connection_rate: float = 50.0
    rate: float = 100.0
    burst: int = 200
    peer_rate: float = 100.0
    peer_burst: int = 500
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 30.0


class TokenBuckets:
    """One token bucket per identity, for at most ``limit`` identities; the longest unused is forgotten.

    Forgetting gives somebody a full bucket, so whoever is not yet known must not be able to make identities
    up: buckets of devices and analysts are charged only after their signature was verified.

    Parameters
    ----------
    rate
        Tokens per second.
    burst
        Size of a bucket, >= 1.
    clock
        Seconds, monotonic.
    limit
        Number of buckets in memory.
    """

    def __init__(
        self,
        rate: float,
        burst: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        limit: int = MAX_IDENTITIES,
    ) -> None:
        self._rate, self._burst, self._clock, self._limit = rate, burst, clock, limit
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, identity: str) -> None:
        """Take one token.

        Raises
        ------
        Refusal
            429 with the seconds until there is one.
        """
        now = self._clock()
        tokens, since = self._buckets.get(identity, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        enough = tokens >= 1
        self._buckets[identity] = (tokens - 1 if enough else tokens, now)
        self._buckets.move_to_end(identity)
        while len(self._buckets) > self._limit:
            self._buckets.popitem(last=False)
        if not enough:
            wait = max(RETRY_SECONDS, math.ceil((1 - tokens) / self._rate))
            raise Refusal(429, "rate", "too many requests; try again later", retry_after=wait)

    def give_back(self, identity: str) -> None:
        """Put one token back, up to a full bucket."""
        if identity in self._buckets:
            tokens, since = self._buckets[identity]
            self._buckets[identity] = (min(self._burst, tokens + 1), since)

    def __len__(self) -> int:
        return len(self._buckets)


class Admission:
    """A bounded number of places; whoever finds none is refused, never queued.

    Parameters
    ----------
    places
        Places of all callers together.
    per_caller
        Places of one caller.
    """

    def __init__(self, places: int, per_caller: int) -> None:
        self._places, self._per_caller = places, per_caller
        self._callers: Counter[str] = Counter()
        self._taken = 0
        self.most = 0
        """The most places that were ever taken at once."""

    @property
    def taken(self) -> int:
        """Places that are taken now."""
        return self._taken

    def enter(self, caller: str) -> Place:
        """Take a place for a caller.

        Raises
        ------
        Refusal
            503 where none is free, or the caller has as many as he may have.
        """
        if self._taken >= self._places or self._callers[caller] >= self._per_caller:
            raise Refusal(503, "busy", "the gateway is busy; try again", retry_after=RETRY_SECONDS)
        self._taken += 1
        self.most = max(self.most, self._taken)
        self._callers[caller] += 1
        return Place(self, caller)

    def _leave(self, caller: str) -> None:
        self._taken -= 1
        self._uncount(caller)

    def _uncount(self, caller: str) -> None:
        self._callers[caller] -= 1
        if not self._callers[caller]:
            del self._callers[caller]


class Place:
    """One place that is taken, until it is left."""

    def __init__(self, admission: Admission, caller: str) -> None:
        self._admission, self._caller = admission, caller
        self._left = False

    def belongs_to(self, caller: str) -> None:
        """Count the place for another caller: the identity that an address has proved.

        Raises
        ------
        Refusal
            503 where that caller has as many places as he may have.
        """
        if self._left:
            return
        admission = self._admission
        if admission._callers[caller] >= admission._per_caller:
            reason = "too many of your requests at once; try again"
            raise Refusal(503, "busy", reason, retry_after=RETRY_SECONDS)
        admission._callers[caller] += 1
        admission._uncount(self._caller)
        self._caller = caller

    def leave(self) -> None:
        """Give the place back; once is enough."""
        if not self._left:
            self._left = True
            self._admission._leave(self._caller)


def peer_key(address: str) -> str:
    """Return what an address counts as: itself, and an IPv6 address as its /64, which one host can fill."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(IPv6Network((found, _IPV6_SITE), strict=False))
    return str(found)
