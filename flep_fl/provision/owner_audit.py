"""``action=audit`` (export or verify the audit log) and ``action=rules`` (compile the network rules)."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from flep_fl.contracts.errors import AuditError, ConfigError
from flep_fl.contracts.files import write_atomic
from flep_fl.data_owner.audit import HEADS_NAME, LOG_NAME, read_head, verify_log
from flep_fl.data_owner.home import load_home
from flep_fl.data_owner.network import compile_nftables
from flep_fl.provision.owner_config import OwnerConfig
from flep_fl.provision.owner_gateway import audit_log, network_rules
from flep_fl.reporting.console import say


def run_audit(config: OwnerConfig) -> None:
    """Export a signed head (``out=FILE``), or verify the log against its heads and those in ``heads=``.

    ``log=FILE audit_key=HEX`` verifies a copy anywhere, without the owner's home.

    Raises
    ------
    AuditError
        The log is not sound; every finding is printed first.
    """
    if config.out is not None:
        home = load_home(Path(config.home))
        log = audit_log(config, home, background=True)
        try:
            head = log.head()
        finally:
            log.close()
        write_atomic(Path(config.out), head.to_bytes() + b"\n")
        say(f"{head.entries} lines signed: {config.out}; keep it away from the gateway")
        return
    if config.log is None:
        home = load_home(Path(config.home))
        path, key = home.audit / LOG_NAME, Ed25519PublicKey.from_public_bytes(home.audit_key)
    else:
        path, key = Path(config.log), _public_key(config.audit_key)
    exported = [read_head(Path(name), key) for name in config.heads]
    report = verify_log(path, key, heads=path.with_name(HEADS_NAME), exported=exported)
    for finding in report.findings:
        say(f"not sound: {finding}")
    if not report.sound:
        raise AuditError(
            f"the audit log is not what was written: {path} ({len(report.findings)} findings)",
            remedy="Keep it as evidence, and compare it with a backup from before",
        )
    say(f"sound: {report.entries} lines, {report.covered} of them under {report.heads} signed heads")
    if not exported:
        say("no exported head was compared: a log that was cut off together with its heads would not show")


def run_rules(config: OwnerConfig) -> None:
    """Compile a group's rules for ``nft -f``, to ``out=`` or to standard output."""
    text = compile_nftables(network_rules(config), config.group)
    if config.out is None:
        say(text.rstrip("\n"))
        return
    write_atomic(Path(config.out), text.encode())
    say(f"wrote {config.out}; load it with: nft -f {config.out}")


def _public_key(text: str | None) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text or ""))
    except ValueError as exc:
        raise ConfigError(
            "audit_key is not a public key", expected="64 hex digits, as action=keys printed them"
        ) from exc
