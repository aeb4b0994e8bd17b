"""``results.json`` and the per-round lines: the record that every run leaves."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flep_fl.contracts.files import write_atomic
from flep_fl.contracts.records import RoundRecord, SiteFailure

REPORT = "report.html"
"""The page that every run leaves."""

REPORT_DATA = "report_data.json"
"""What the page shows beyond ``results.json``: settings, pictures. Private, as the page is."""

_PACKAGES = ("flep-fl", "flwr", "torch", "torchvision", "tenseal", "pywavelets", "numpy", "cryptography")


@dataclass(frozen=True, slots=True)
class RestoreQuality:
    """PSNR in dB (peak 255), mean over a sample; None where it is infinite. Only the owner can know it.

    Attributes
    ----------
    psnr_db
        After decryption and denoising.
    noisy_psnr_db
        After decryption alone.
    """

    psnr_db: float | None
    noisy_psnr_db: float | None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def build_results(
    *,
    cloud: str,
    sites: Sequence[str],
    parameters: int,
    rounds: Sequence[RoundRecord],
    config_digest: str,
    closing_failures: Sequence[SiteFailure] = (),
    restore: RestoreQuality | None = None,
) -> dict[str, Any]:
    """Assemble the content of ``results.json``.

    Parameters
    ----------
    cloud
        Trust mode.
    sites
        Names of the sites.
    parameters
        Number of weights of the model.
    rounds
        One record per round.
    config_digest
        Digest of the shared settings.
    closing_failures
        Sites that did not close in order; written as ``closing_failures`` where there are any.
    restore
        Restoration quality where it is known, else null is written.
    """
    good = [record for record in rounds if not record.error]
    last = good[-1] if good else None
    results: dict[str, Any] = {
        "cloud": cloud,
        "sites": list(sites),
        "parameters": parameters,
        "rounds": [round_entry(record) for record in rounds],
        "final": {
            "accuracy": last.accuracy if last else None,
            "majority_accuracy": last.majority_accuracy if last else None,
        },
        "restore": {
            "psnr_db": restore.psnr_db if restore else None,
            "noisy_psnr_db": restore.noisy_psnr_db if restore else None,
        },
        "config_digest": config_digest,
        "versions": versions(),
    }
    if last is not None and last.cloud_accuracy is not None:
        results["final"]["cloud_accuracy"] = last.cloud_accuracy
    if closing_failures:
        results["closing_failures"] = [dataclasses.asdict(failure) for failure in closing_failures]
    return results


def round_entry(record: RoundRecord) -> dict[str, Any]:
    """Return one round as plain JSON values."""
    entry = dataclasses.asdict(record)
    del entry["majority_accuracy"]
    for name in ("cloud_accuracy", "cloud_loss"):
        if entry[name] is None:
            del entry[name]
    if not entry["error"]:
        del entry["error"]
    if entry["attempts"] == 1:
        del entry["attempts"]
    return entry


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, json.dumps(value, indent=2).encode() + b"\n")


def write_rounds(path: Path, rounds: Sequence[RoundRecord]) -> None:
    """Write one JSON line per round, atomically; a round's line changes until its model was evaluated."""
    lines = [json.dumps(round_entry(record)) + "\n" for record in rounds]
    write_atomic(path, "".join(lines).encode())
