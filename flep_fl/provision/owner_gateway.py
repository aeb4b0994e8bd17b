"""``action=serve``: wire the database to the gateway's three listeners and run them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import fields
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flep_fl.config import CONFIG_DIR
from flep_fl.contracts.errors import ConfigError, OwnerHomeError
from flep_fl.contracts.files import write_atomic
from flep_fl.data_owner.audit import AuditLog
from flep_fl.data_owner.certificates import TlsFiles, server_context
from flep_fl.data_owner.enrolment import DeviceRegistry
from flep_fl.data_owner.home import OwnerHome, load_home
from flep_fl.data_owner.network import NetworkRules, PeerFilter, load_rules, parse_address
from flep_fl.provision.owner_config import ListenerConfig, OwnerConfig, need
from flep_fl.reporting.console import say

LISTENERS = ("ingest", "release", "admin")
_FILES = 256
"""File descriptors beside those of connections: database, logs, libraries."""


def run_dataset(config: OwnerConfig) -> None:
    """Add a data set to the database: ``dataset=NAME classes=[...]``, or the classes of ``data=``."""
    from flep_fl.config import Config
    from flep_fl.data_owner.sources import source_classes
    from flep_fl.data_security.keys import ImageKeyBundle
    from flep_fl.provision.owner import cipher_parameters, noise_parameters, secret_images
    from flep_fl.provision.owner_store import open_database

    settings = Config(cipher=config.cipher, noise=config.noise, allow_targets=list(config.allow_targets))
    classes, name = list(config.classes), config.dataset
    if not classes:
        folder = Path(config.images) if config.images else None
        classes = list(source_classes("folder" if folder else config.data.name, folder))
        name = name or (folder.resolve().name if folder else config.data.name)
    if not name:
        raise ConfigError(
            "action=dataset needs a name", expected="dataset=NAME classes=[A,B], or data=digits"
        )
    home = load_home(Path(config.home))
    with open_database(config, home) as database:
        bundle = ImageKeyBundle.generate(
            cipher_parameters(settings),
            noise_parameters(settings),
            cipher_name=config.cipher.name,
            secret_images=secret_images(settings),
        )
        database.add_dataset(name, classes, test_fraction=config.test_fraction, bundle=bundle)
    say(f"data set {name}: {len(classes)} classes")


def run_serve(config: OwnerConfig) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises
    ------
    FlepError
        A setting, a key, an address or the database does not fit; nothing is served then.
    """
    home = load_home(Path(config.home))
    rules = network_rules(config)
    peers = {
        name: PeerFilter(rules, name, parse_address(getattr(config, name).address)[1]) for name in LISTENERS
    }
    check_exposure(config)
    raise_file_limit(sum(getattr(config, name).connections for name in LISTENERS))
    # Only now what is heavy: a wrong setting is answered before it loads.
    from flep_fl.data_owner.gateway.server import bind, serve

    with ExitStack() as stack:
        if not stack.enter_context(home.exclusive("serves")):
            raise OwnerHomeError(
                f"another process serves this home, or changes it: {home.folder}", remedy="Stop it first"
            )
        # Sockets first: a taken port must not cost a migration, a log entry or a key in memory.
        sockets = {name: bind(getattr(config, name).address, name=name) for name in LISTENERS}
        for bound in sockets.values():
            stack.callback(bound.close)
        audit = audit_log(config, home, background=True)
        stack.callback(audit.close)
        _serve_all(config, home, audit, peers, sockets, stack, serve)


def _serve_all(
    config: OwnerConfig,
    home: OwnerHome,
    audit: AuditLog,
    peers: dict[str, PeerFilter],
    sockets: dict[str, Any],
    stack: ExitStack,
    serve: Any,
) -> None:
    from flep_fl.data_owner.gateway.admin import Admin, admin_app
    from flep_fl.data_owner.gateway.guard import Listener
    from flep_fl.data_owner.gateway.ingest import CapturePolicy, Ingest, ingest_app
    from flep_fl.data_owner.gateway.limits import Limits
    from flep_fl.data_owner.gateway.release import Release, release_app
    from flep_fl.data_owner.gateway.server import Endpoint
    from flep_fl.private_database.releases import ReleaseBook
    from flep_fl.provision.owner_store import open_database

    database = stack.enter_context(open_database(config, home))
    registry = DeviceRegistry(home.devices, home.administrators, threshold=home.threshold)
    listeners: dict[str, Listener] = {}
    for name in LISTENERS:
        section: ListenerConfig = getattr(config, name)
        limits = Limits(**{one.name: getattr(section, one.name) for one in fields(Limits)})
        listeners[name] = Listener(name, limits, audit)
    policy = CapturePolicy(**{one.name: getattr(config.capture, one.name) for one in fields(CapturePolicy)})
    apps = {
        "ingest": ingest_app(Ingest(database, registry, listeners["ingest"], policy), listeners["ingest"]),
        "release": release_app(
            Release(
                ReleaseBook(database, home.signing_key()), listeners["release"], owner_key=home.owner_key
            ),
            listeners["release"],
        ),
        "admin": admin_app(
            Admin(
                database,
                registry,
                listeners["admin"],
                listeners=listeners,
                administrators={key.public_bytes_raw(): name for name, key in home.administrators.items()},
                owner_key=home.owner_key,
            ),
            listeners["admin"],
        ),
    }
    endpoints = []
    for name in LISTENERS:
        client_ca = getattr(config, name).client_ca
        tls = None
        if config.tls:
            files = TlsFiles(
                home.tls.certificate, home.tls.private_key, Path(client_ca) if client_ca else None
            )
            tls = server_context(files)
        endpoints.append(Endpoint(listeners[name], apps[name], sockets[name], peers[name], tls))

    def ready() -> None:
        addresses = {
            name: f"{bound.getsockname()[0]}:{bound.getsockname()[1]}" for name, bound in sockets.items()
        }
        audit.append("gateway.started", durable=True, tls=config.tls, **addresses)
        for name, address in addresses.items():
            say(f"{name} on {'https' if config.tls else 'http'}://{address}")
        say("ready; Ctrl-C or SIGTERM stops")

    serve(endpoints, audit, on_ready=ready)
    audit.append("gateway.stopped", durable=True)
    say("stopped")


def run_openapi(config: OwnerConfig) -> None:
    """Write the listeners' OpenAPI descriptions into the folder ``out=``."""
    out = Path(need(config, "out", "api"))
    for name, description in openapi_descriptions().items():
        write_atomic(out / f"{name}.json", json.dumps(description, indent=2).encode() + b"\n")
        say(f"wrote {out / name}.json")


def openapi_descriptions() -> dict[str, dict[str, Any]]:
    """Return the OpenAPI descriptions by listener; no handler is called for them."""
    from flep_fl.data_owner.gateway.admin import admin_api
    from flep_fl.data_owner.gateway.ingest import ingest_api
    from flep_fl.data_owner.gateway.release import release_api

    nobody: Any = SimpleNamespace(capture=None)
    apis: dict[str, Any] = {"ingest": ingest_api, "release": release_api, "admin": admin_api}
    return {name: api(nobody).openapi() for name, api in apis.items()}


def network_rules(config: OwnerConfig) -> NetworkRules:
    """Read the rules file, or the one for a single machine."""
    return load_rules(Path(config.network) if config.network else CONFIG_DIR / "network.yaml")


def audit_log(config: OwnerConfig, home: OwnerHome, *, background: bool = False) -> AuditLog:
    """Open the audit log."""
    return AuditLog(
        home.audit,
        home.audit_signing_key(),
        head_entries=config.audit.head_entries,
        head_seconds=config.audit.head_seconds,
        fsync_seconds=config.audit.fsync_seconds,
        background=background,
    )


def check_exposure(config: OwnerConfig) -> None:
    """Refuse plain HTTP, and administration, anywhere but on loopback.

    Raises
    ------
    ConfigError
        Naming the listener.
    """
    for name in LISTENERS:
        host, _ = parse_address(getattr(config, name).address)
        if is_loopback(host):
            continue
        if name == "admin":
            raise ConfigError(
                f"admin.address={config.admin.address} is not loopback",
                remedy="Administer on the gateway's own machine, or through a tunnel to it",
            )
        if not config.tls:
            raise ConfigError(
                f"tls=false with {name}.address={getattr(config, name).address} would show all to others",
                remedy="Leave tls=true, or listen on loopback",
            )


def raise_file_limit(connections: int) -> None:
    """Let this process have a file descriptor for each connection that it may have, and some for its files.

    Without it, peers who open connections could take those that database and audit log need.

    Raises
    ------
    ConfigError
        The system does not allow as many.
    """
    import resource

    needed = connections + _FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{connections} connections need {needed} open files, and this system allows {hard}",
            remedy="Lower ingest.connections, release.connections and admin.connections, or raise ulimit -n",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
