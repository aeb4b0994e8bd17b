"""The cloud's Grid: Flower's HTTP grid that stops when asked to and notices when its SuperLink is gone."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import httpx
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.retry import RetryInvoker, constant
from flwr.superlink.grid import HttpGrid

from flep_fl.contracts.errors import RuntimeStartError
from flep_fl.flower.processes import Interrupted
from flep_fl.flower.runtime.clients import task_client
from flep_fl.flower.runtime.timing import REPLIES_POLL
from flep_fl.flower.runtime.wire import undecodable_reply

_LOG = logging.getLogger(__name__)

_RETRY_WAIT = 0.2
_RETRY_LIMIT = 10.0
_BUSY = frozenset({502, 503, 504})


class GuardedGrid(HttpGrid):
    """An HttpGrid whose every call first looks whether to go on.

    Upstream's grid retries for ever, and on a 401 signals its own process: a ServerApp whose SuperLink is
    gone hangs. Here a call raises ``Interrupted`` when ``stop`` is set, what ``check`` raises when the
    SuperLink is dead, and RuntimeStartError when it answers nothing for 10 s.

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
        Raises RuntimeStartError when the SuperLink's process has ended.
    """

    def __init__(
        self,
        address: str,
        token: str,
        *,
        admin_token: bytes,
        stop: threading.Event,
        check: Callable[[], None],
    ) -> None:
        super().__init__(runtime_api_address=address, insecure=True, token=token)
        self._stop = stop
        self._check = check
        self._client = task_client(address, token, admin_token, self._retries())

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the sites that are connected now."""
        with self._guard():
            return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the SuperLink; return their ids in order."""
        with self._guard():
            return super().push_messages(list(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are here now, without waiting; each reply is returned once.

        Replies are fetched one by one: one that does not decode becomes an error reply of its own and costs
        the others nothing.
        """
        replies: list[Message] = []
        for message_id in message_ids:
            with self._guard():
                try:
                    replies += super().pull_messages([message_id])
                except (httpx.HTTPError, RuntimeStartError):
                    raise
                except Exception as exc:
                    _LOG.warning("a reply does not decode (%s)", type(exc).__name__)
                    replies.append(undecodable_reply(message_id, self.run.run_id))
        return replies

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
