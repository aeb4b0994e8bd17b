"""Where Flower's processes live: environment, sockets, secrets and logs. Imports no flwr."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from flep_fl.contracts.errors import ConfigError, PortInUseError, RuntimeStartError
from flep_fl.contracts.files import write_secret

LOOPBACK = "127.0.0.1"
_BACKLOG = 128


def flower_environment(home: Path) -> dict[str, str]:
    """Return the variables that keep Flower to itself: no telemetry, no update check, no ``~/.flwr``."""
    return {
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


@contextlib.contextmanager
def use_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for as long as the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def child_environment(home: Path) -> dict[str, str]:
    """Return the whole environment of a child process whose Flower home is ``home``."""
    environment = {**os.environ, **flower_environment(home), "PYTHONUNBUFFERED": "1"}
    # Flower looks its own commands up through PATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    package_root = str(Path(__file__).resolve().parents[3])
    if package_root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        # A source tree that is not installed: the child must find it from any working directory.
        known = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([package_root, *([known] if known else [])])
    return environment


def parse_address(address: str) -> tuple[str, int]:
    """Split ``host:port`` (``[::1]:8000`` for IPv6).

    Raises
    ------
    ConfigError
        When it is not an address with a port in 0..65535.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError("The address is not valid", expected="host:port", found=address)
    return host.removeprefix("[").removesuffix("]"), int(port)


def bind(address: str) -> socket.socket:
    """Listen on a TCP port for a child to serve, so that nobody can take it in between.

    Parameters
    ----------
    address
        ``host:port``; port 0 lets the system choose one.

    Raises
    ------
    PortInUseError
        When another process has the port.
    RuntimeStartError
        When the address cannot be used on this machine.
    """
    host, port = parse_address(address)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as exc:
        raise RuntimeStartError(f"The host of {address} is unknown", found=exc.strerror) from exc
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target)
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"The address {address} is taken by another process",
                remedy="End that process, or choose another port",
            ) from exc
        raise RuntimeStartError(
            f"The address {address} cannot be used",
            found=exc.strerror,
            remedy="Choose an address of this machine and a port above 1023",
        ) from exc
    return sock


def new_secret(path: Path) -> bytes:
    """Write a fresh random secret (0600) and return it."""
    secret = secrets.token_hex(32).encode()
    write_secret(path, secret)
    return secret


def log_tail(path: Path, lines: int = 12) -> str:
    """Return the last lines of a child's log, for an error message."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.rstrip().splitlines()[-lines:]) or "(empty log)"
