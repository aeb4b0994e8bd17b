"""The cloud's Grid: Flower's HTTP grid that stops when asked to and notices when its SuperLink is gone."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

import httpx
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.retry import RetryInvoker, constant
from flwr.superlink.grid import HttpGrid

from flep_fl.contracts.errors import RuntimeStartError
from flep_fl.flower.processes import Interrupted
from flep_fl.flower.runtime.clients import forget_messages, task_client
from flep_fl.flower.runtime.timing import REPLIES_POLL
from flep_fl.flower.runtime.wire import undecodable_reply

_LOG = logging.getLogger(__name__)

_RETRY_WAIT = 0.2
_RETRY_LIMIT = 10.0
_BUSY = frozenset({502, 503, 504})


class SuperLinkEndedError(RuntimeStartError):
    """The SuperLink's process has ended."""


class GuardedGrid(HttpGrid):
    """An HttpGrid whose every call first looks whether to go on.

    Upstream's grid retries for ever, and on a 401 signals its own process: a ServerApp whose SuperLink is
    gone hangs. Here a call raises ``Interrupted`` when ``stop`` is set, what ``recover`` raises when the
    SuperLink is dead (SuperLinkLostError: it was started again, the messages on their way are lost), and
    RuntimeStartError when it answers nothing for 10 s.

    Parameters
    ----------
    address
        The SuperLink's loopback port, ``host:port``.
    token
        The acquired task's token.
    admin_token
        The loopback port's token.
    stop
        Set when the user asked to stop.
    check
        Raises SuperLinkEndedError when the SuperLink's process has ended.
    recover
        Gets that error in the thread of the caller, and raises what the caller is told; None: the error
        itself.
    """

    def __init__(
        self,
        address: str,
        token: str,
        *,
        admin_token: bytes,
        stop: threading.Event,
        check: Callable[[], None],
        recover: Callable[[SuperLinkEndedError], NoReturn] | None = None,
    ) -> None:
        super().__init__(runtime_api_address=address, insecure=True, token=token)
        self._stop = stop
        self._check = check
        self._recover = recover
        self._owner = threading.get_ident()
        self.connect_to(address, token, admin_token)

    def connect_to(self, address: str, token: str, admin_token: bytes) -> None:
        """Talk to this SuperLink from now on."""
        if self._client is not None:
            self._client.close()
        self._addr, self._token, self._admin_token = address, token, admin_token
        self._client = task_client(address, token, admin_token, self._retries())

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the sites that are connected now."""
        with self._guard():
            return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the SuperLink one by one; return their ids in order.

        What several messages have in common (the sum) travels once.
        """
        ids: list[str] = []
        with self._guard():  # also when there is nothing to send
            pass
        for message in messages:
            with self._guard():
                ids += super().push_messages([message])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies that are here now, without waiting; each reply is returned once.

        A reply is fetched when the one before has been dealt with, so that memory holds one at a time. One
        that does not decode becomes an error reply of its own and costs the others nothing.
        """
        for message_id in list(message_ids):
            yield from self._pull(message_id)

    def forget_messages(self, message_ids: Iterable[str]) -> None:
        """Drop messages whose replies nobody waits for any more, and what has come of these replies."""
        if ids := list(message_ids):
            with self._guard():
                forget_messages(self._addr, self._admin_token, ids)

    def _pull(self, message_id: str) -> list[Message]:
        with self._guard():
            try:
                return list(super().pull_messages([message_id]))
            except (httpx.HTTPError, RuntimeStartError):
                raise
            except Exception as exc:
                _LOG.warning("a reply does not decode (%s)", type(exc).__name__)
                return [undecodable_reply(message_id, self.run.run_id)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies that came within ``timeout`` seconds (None: all of them)."""
        waiting = set(self.push_messages(messages))
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            arrived = list(self.pull_messages(waiting))
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if waiting and not arrived:
                self._stop.wait(REPLIES_POLL)
        return replies

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            self._raise_if_over()
            try:
                yield
            except httpx.HTTPError as exc:
                self._raise_if_over()
                raise RuntimeStartError(
                    "The SuperLink does not answer",
                    found=type(exc).__name__,
                    remedy="See superlink.log in the run's folder",
                ) from exc
        except SuperLinkEndedError as ended:
            # A child lives as long as the thread that started it: no other thread may start the next one.
            if self._recover is None or threading.get_ident() != self._owner:
                raise
            self._recover(ended)

    def _raise_if_over(self) -> None:
        if self._stop.is_set():
            raise Interrupted
        self._check()

    def _retries(self) -> RetryInvoker:
        def give_up(exc: Exception) -> bool:
            if isinstance(exc, httpx.HTTPStatusError) and exc.response.status_code not in _BUSY:
                return True
            self._raise_if_over()
            return False

        return RetryInvoker(
            wait_gen_factory=lambda: constant(_RETRY_WAIT),
            recoverable_exceptions=(httpx.HTTPStatusError, httpx.TransportError),
            max_tries=None,
            max_time=_RETRY_LIMIT,
            jitter=None,
            should_giveup=give_up,
        )
