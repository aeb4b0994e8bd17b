"""HTTP clients of the SuperLink's and the SuperNode's local ports."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker
from flwr.supercore.runtime import RuntimeHttpClient

ADMIN_HEADER = "x-flep-admin"
FORGET_PATH = "/flep/forget-messages"
"""Route of the SuperLink's loopback port that drops messages; see :func:`forget_messages`."""

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_FORGET_LIMIT = 10.0
_BEAT_INTERVAL = 15.0
"""Seconds between heartbeats of a task; Flower gives a task up after 60."""


class AdminInterceptor:
    """Shows the admin token, without which the SuperLink's loopback port serves nothing."""

    def __init__(self, token: bytes) -> None:
        self._token = token.decode()

    def __repr__(self) -> str:
        return "AdminInterceptor(<secret>)"

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the header, then send."""
        context.request.headers[ADMIN_HEADER] = self._token
        return call_next(context)


def _admin(token: bytes | None) -> list[ProtobufClientInterceptor]:
    return [] if token is None else [AdminInterceptor(token)]


def control_client(address: str, admin_token: bytes) -> ControlHttpClient:
    """Return a client of the SuperLink's control routes."""
    return ControlHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[*_admin(admin_token), RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )


def acquiring_client(address: str, secret: bytes, admin_token: bytes | None = None) -> RuntimeHttpClient:
    """Return a client that may acquire tasks, and nothing else."""
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[
            *_admin(admin_token),
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE})),
        ],
    )


def task_client(
    address: str, token: str, admin_token: bytes | None = None, retry: RetryInvoker | None = None
) -> RuntimeHttpClient:
    """Return a client for one acquired task."""
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[
            *_admin(admin_token),
            RuntimeVersionHttpInterceptor(component_name="flep-fl"),
            RuntimeTokenHttpInterceptor(token),
        ],
        retry_invoker=retry,
    )


def forget_messages(address: str, admin_token: bytes, message_ids: Iterable[str]) -> None:
    """Tell the SuperLink that nobody waits for the replies to these messages any more."""
    response = httpx.post(
        f"http://{address}{FORGET_PATH}",
        content=json.dumps(sorted(message_ids)),
        headers={ADMIN_HEADER: admin_token.decode()},
        timeout=_FORGET_LIMIT,
        trust_env=False,
    )
    response.raise_for_status()


def acquire_task(client: RuntimeHttpClient, task_type: str) -> str | None:
    """Ask for the next task; return its token, or None where there is none (or nobody answers)."""
    request = AcquireTaskRequest(supported_task_types=[task_type], agentapp_fab_hashes=[])
    try:
        token: str = client.AcquireTask(request).token
    except httpx.HTTPError:
        return None
    return token or None


@contextlib.contextmanager
def task_heartbeat(make_client: Callable[[], RuntimeHttpClient]) -> Iterator[None]:
    """Keep a task alive for as long as the block runs.

    Upstream's sender raises SIGINT in this process when the task is lost; here a lost task shows when its
    result is pushed.
    """
    done = threading.Event()

    def beat() -> None:
        with make_client() as client:
            while not done.is_set():
                with contextlib.suppress(httpx.HTTPError):
                    client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
                done.wait(_BEAT_INTERVAL)

    thread = threading.Thread(target=beat, name="task-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=2.0)
