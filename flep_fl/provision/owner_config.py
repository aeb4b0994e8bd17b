"""What ``python -m scripts.owner`` may be told: its own small schema, beside that of the federation."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from flep_fl.config import CipherConfig, DataConfig, DenoiserConfig, NoiseConfig, RestoreConfig, TrainConfig
from flep_fl.contracts.errors import ConfigError

ACTIONS: dict[str, str] = {
    "keys": "flep_fl.provision.owner_keys:run_keys",
    "certificate": "flep_fl.provision.owner_keys:run_certificate",
    "dataset": "flep_fl.provision.owner_gateway:run_dataset",
    "serve": "flep_fl.provision.owner_gateway:run_serve",
    "openapi": "flep_fl.provision.owner_gateway:run_openapi",
    "device": "flep_fl.provision.owner_devices:run_device",
    "approve": "flep_fl.provision.owner_devices:run_approve",
    "enrol": "flep_fl.provision.owner_devices:run_enrol",
    "suspend": "flep_fl.provision.owner_devices:run_suspend",
    "devices": "flep_fl.provision.owner_devices:run_devices",
    "play": "flep_fl.provision.owner_devices:run_play",
    "status": "flep_fl.provision.owner_devices:run_status",
    "audit": "flep_fl.provision.owner_audit:run_audit",
    "rules": "flep_fl.provision.owner_audit:run_rules",
    "release": "flep_fl.provision.owner_store:run_release",
    "measure": "flep_fl.provision.owner_measure:run_measure",
    "grant": "flep_fl.provision.owner_store:run_grant",
    "grants": "flep_fl.provision.owner_store:run_grants",
    "revoke": "flep_fl.provision.owner_store:run_revoke",
    "rotate": "flep_fl.provision.owner_store:run_rotate",
    "rekey": "flep_fl.provision.owner_store:run_rekey",
    "backup": "flep_fl.provision.owner_store:run_backup",
    "restore": "flep_fl.provision.owner_store:run_restore",
    "retain": "flep_fl.provision.owner_store:run_retain",
    "delete": "flep_fl.provision.owner_store:run_delete",
    "accept_clock": "flep_fl.provision.owner_store:run_accept_clock",
}
"""Actions by name: where the function is that does it, imported when it is asked for."""


@dataclass
class ListenerConfig:
    """One listener of the gateway; rates are requests a second, times seconds."""

    address: str = MISSING
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
    client_ca: str | None = None


@dataclass
class CaptureConfig:
    """What a capture may be: ``max_pixels`` is height times width; times in seconds."""

    max_pixels: int = 64_000_000
    ahead_seconds: float = 120.0
    age_seconds: float = 30 * 86400.0


@dataclass
class AuditConfig:
    """When the audit log signs heads and calls fsync; see docs/data-owner.md."""

    head_entries: int = 1000
    head_seconds: float = 60.0
    fsync_seconds: float = 1.0


@dataclass
class OwnerConfig:
    """The options of all actions; each action uses some of them.

    ``database`` null is the embedded one in the home; ``tls`` false is for loopback alone. ``out`` is where
    an action writes, null prints. ``expires_days`` is the life of an approval. ``share``, INDEX and PARTS, is
    the part of a data set that is granted, or of the images that are played; ``seed`` draws the images of
    ``data.limit``. ``denoiser`` and ``restore`` are what ``action=measure`` takes the analysts to use.
    ``train`` comes with the choice of ``data`` and means nothing here.
    """

    action: str = MISSING
    home: str = "owner"
    database: str | None = None
    network: str | None = None
    tls: bool = True
    ingest: ListenerConfig = field(default_factory=ListenerConfig)
    release: ListenerConfig = field(default_factory=ListenerConfig)
    admin: ListenerConfig = field(default_factory=ListenerConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    administrators: list[str] = field(default_factory=lambda: ["admin"])
    threshold: int = 1
    hosts: list[str] = field(default_factory=lambda: ["localhost", "127.0.0.1"])
    administrator: str | None = None
    key: str | None = None
    device: str | None = None
    devices: str = "devices"
    device_key: str | None = None
    generation: int | None = None
    gateway: str | None = None
    ca: str | None = None
    approvals: list[str] = field(default_factory=list)
    expires_days: float = 365.0
    dataset: str | None = None
    classes: list[str] = field(default_factory=list)
    test_fraction: float = 0.2
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    images: str | None = None
    split: str | None = None
    rate: float = 20.0
    patience: float = 600.0
    log: str | None = None
    heads: list[str] = field(default_factory=list)
    audit_key: str | None = None
    group: str = "gateway"
    out: str | None = None
    cipher: CipherConfig = field(default_factory=CipherConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    restore: RestoreConfig = field(default_factory=RestoreConfig)
    seed: int = 0
    allow_targets: list[str] = field(default_factory=list)
    analyst: str | None = None
    kit: str | None = None
    verify_key: str | None = None
    encryption_key: str | None = None
    until: str | None = None
    share: list[int] = field(default_factory=lambda: [0, 1])
    grant: str | None = None
    backup: str | None = None
    records: list[str] = field(default_factory=list)
    max_age_days: float | None = None
    dry_run: bool = False


def register_owner() -> None:
    """Make the schema known to hydra under the name ``owner_schema``."""
    ConfigStore.instance().store(name="owner_schema", node=OwnerConfig)


def to_owner_config(cfg: DictConfig) -> OwnerConfig:
    """Turn hydra's config into an :class:`OwnerConfig` and check it.

    Raises
    ------
    ConfigError
        Naming the field, what it holds, and the remedy.
    """
    if OmegaConf.is_missing(cfg, "action"):
        raise ConfigError("action is not set", expected="one of " + ", ".join(ACTIONS))
    config = OmegaConf.to_object(cfg)
    if not isinstance(config, OwnerConfig):  # pragma: no cover - to_object returns the dataclass
        raise ConfigError("The configuration does not follow the schema")
    if config.action not in ACTIONS:
        close = difflib.get_close_matches(config.action, ACTIONS, n=1)
        raise ConfigError(
            f"action={config.action} is not known",
            expected="one of " + ", ".join(ACTIONS),
            remedy=f"Did you mean action={close[0]}" if close else None,
        )
    for name in ("ingest", "release", "admin", "capture", "audit"):
        _positive(name, getattr(config, name))
    for name, value in (("rate", config.rate), ("expires_days", config.expires_days)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}={value} is not positive", remedy=f"Set {name} above 0")
    if config.split not in (None, "train", "test"):
        raise ConfigError(f"split={config.split} is not known", expected="train or test, or null")
    if len(config.share) != 2 or not 0 <= config.share[0] < config.share[1]:
        raise ConfigError(
            f"share={config.share} is not a share", expected="[INDEX,PARTS] with INDEX below PARTS, as [0,2]"
        )
    return config


def _positive(section: str, config: Any) -> None:
    for one in fields(config):
        value = getattr(config, one.name)
        if type(value) in (int, float) and not (math.isfinite(value) and value > 0):
            zero_ok = one.name == "fsync_seconds" and value == 0
            if not zero_ok:
                raise ConfigError(
                    f"{section}.{one.name}={value} is not positive",
                    remedy=f"Set {section}.{one.name} above 0",
                )


def need(config: OwnerConfig, name: str, example: str) -> Any:
    """Return an option that an action cannot do without.

    Raises
    ------
    ConfigError
        It is not set.
    """
    value = getattr(config, name)
    if not value:
        raise ConfigError(
            f"action={config.action} needs {name}",
            expected=f"{name}={example}",
            remedy=f"Add {name}={example}",
        )
    return value
