"""A Grid without sockets: the same ServerApp and ClientApps, one process, one site at a time."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from flep_fl.flower.runtime.wire import (
    WireMessage,
    describe,
    error_reply,
    from_wire,
    set_task_identity,
    to_wire,
    unavailable_reply,
)

Scalar = str | int | float | bool

_RUN_ID = 1
COLLECT_BYTES = 64_000_000
"""After messages of so many bytes the garbage collector runs: a run takes a second where sites are many."""


class LocalGrid(Grid):
    """An in-process Grid.

    Every message is serialised as for the network, so that the two sides never share an array. A pushed
    message waits in its bytes; a pull executes at most *one* of those asked for and returns its reply, so
    memory holds one site's work at a time.

    Parameters
    ----------
    apps
        The ClientApp of each node, by node id (2 or more: 1 is the cloud).
    node_configs
        What each app finds in ``context.node_config``.
    run_config
        What every app finds in ``context.run_config``.
    log
        Takes lines about failed apps; None drops them.
    """

    def __init__(
        self,
        apps: Mapping[int, ClientApp],
        node_configs: Mapping[int, Mapping[str, Scalar]] | None = None,
        *,
        run_config: Mapping[str, Scalar] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._apps = dict(apps)
        configs = node_configs or {}
        self._contexts = {
            node: Context(
                run_id=_RUN_ID,
                node_id=node,
                node_config=dict(configs.get(node, {})),
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node in self._apps
        }
        self._log = log or (lambda _line: None)
        self._run = Run.create_empty(_RUN_ID)
        self._pending: dict[str, WireMessage] = {}
        # What several waiting messages have in common (the sum) is held once, as a SuperLink does.
        self._objects: dict[str, bytes] = {}
        self._uses: Counter[str] = Counter()
        self._dead: set[int] = set()
        self._dealt_with = 0  # bytes of messages since the garbage collector ran
        set_task_identity(_RUN_ID)

    def kill(self, node: int) -> None:
        """Make a node disappear, as a killed process does: whatever it owes becomes an error reply."""
        self._dead.add(node)

    def revive(self, node: int) -> None:
        """Bring a killed node back, with the state that it had."""
        self._dead.discard(node)

    def set_run(self, run: Run) -> None:
        """Set the run that :attr:`run` describes."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run (mostly empty here)."""
        return Run(**vars(self._run))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message (Flower's older way; use ``Message`` itself)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are alive."""
        return [node for node in self._apps if node not in self._dead]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; return their ids in order. Nothing runs yet."""
        ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self._apps:
                raise ValueError(f"there is no node {message.metadata.dst_node_id}")
            ids.append(self._keep(to_wire(message)))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Execute the first waiting message among ``message_ids`` and return its reply, if there is one."""
        for message_id in message_ids:
            wire = self._take(message_id)
            if wire is not None:
                return [self._answered(wire)]
        return []

    def forget_messages(self, message_ids: Iterable[str]) -> None:
        """Drop messages that wait; nobody wants their replies any more."""
        for message_id in message_ids:
            self._take(message_id)

    def _answered(self, wire: WireMessage) -> Message:
        size = wire.size
        message = from_wire(wire)
        del wire
        reply = self._execute(message)
        del message
        self._dealt_with += size
        if self._dealt_with >= COLLECT_BYTES:
            # flwr's views of a message (``content.array_records``) are reference cycles that hold it.
            self._dealt_with = 0
            gc.collect()
        return reply

    def _keep(self, wire: WireMessage) -> str:
        shared = {one: self._objects.setdefault(one, content) for one, content in wire.objects.items()}
        self._uses.update(list(shared))
        self._pending[wire.message_id] = WireMessage(wire.message_id, shared)
        return wire.message_id

    def _take(self, message_id: str) -> WireMessage | None:
        wire = self._pending.pop(message_id, None)
        for one in () if wire is None else wire.objects:
            self._uses[one] -= 1
            if not self._uses[one]:
                del self._uses[one], self._objects[one]
        return wire

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull one by one; ``timeout`` has no meaning here."""
        waiting = list(self.push_messages(messages))
        return [reply for _ in waiting for reply in self.pull_messages(waiting)]

    def _execute(self, message: Message) -> Message:
        """Run one node's app on its copy of a message; return the cloud's copy of the reply."""
        node = message.metadata.dst_node_id
        if node in self._dead:
            return unavailable_reply(message)
        try:
            reply = self._apps[node](message, self._contexts[node])
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned {type(reply).__name__}, not a Message")
            wire = to_wire(reply)
        except Exception as exc:
            self._log(f"node {node}: {describe(exc)}")
            wire = to_wire(error_reply(message, exc))
        if node in self._dead:
            return unavailable_reply(message)
        return from_wire(wire)


def run_server_app(app: ServerApp, grid: Grid, run_config: Mapping[str, Scalar]) -> Context:
    """Execute a ServerApp in this process; return its context.

    Parameters
    ----------
    app
        The ServerApp.
    grid
        Its grid, usually a :class:`LocalGrid`.
    run_config
        What it finds in ``context.run_config``.
    """
    set_task_identity(_RUN_ID)
    context = Context(
        run_id=_RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    app(grid, context)
    return context
