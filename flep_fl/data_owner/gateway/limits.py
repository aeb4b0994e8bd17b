"""Limits on rate and concurrency: what does not fit is refused at once, nothing waits in a growing queue."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flep_fl.data_owner.gateway.refusals import RETRY_SECONDS, Refusal

MAX_IDENTITIES = 10_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one listener.

    Attributes
    ----------
    body_bytes
        Largest request body.
    in_flight
        Requests that are worked on at once; one more gets 503.
    connections, connections_per_peer
        Open connections; one more is closed at once.
    rate, burst
        Requests per second of one identity (a device, an analyst, an administrator) in the long run, and how
        many of them may come at once.
    peer_rate, peer_burst
        The same for one address, before anybody has proved an identity.
    header_seconds, body_seconds
        Longest time for a request's head, and for its body.
    idle_seconds
        How long an idle connection is kept.
    """

    body_bytes: int = 16 << 20
    in_flight: int = 64
    connections: int = 512
    connections_per_peer: int = 128
    rate: float = 100.0
    burst: int = 200
    peer_rate: float = 5000.0
    peer_burst: int = 10_000
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

    def __len__(self) -> int:
        return len(self._buckets)


class Admission:
    """A bounded number of places; whoever finds none is refused, never queued."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._taken = 0
        self.most = 0
        """The most places that were ever taken at once."""

    @property
    def taken(self) -> int:
        """Places that are taken now."""
        return self._taken

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for the block.

        Raises
        ------
        Refusal
            503 where none is free.
        """
        if self._taken >= self._places:
            raise Refusal(503, "busy", "the gateway is busy; try again", retry_after=RETRY_SECONDS)
        self._taken += 1
        self.most = max(self.most, self._taken)
        try:
            yield
        finally:
            self._taken -= 1
