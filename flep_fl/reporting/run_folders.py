"""Read what runs have left: federation runs and attacks, found below a folder, checked before use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flep_fl.contracts.errors import DamagedResultsError, MixedResultsError, ResultsError
from flep_fl.reporting.redaction import redacted
from flep_fl.reporting.results import REPORT_DATA

RESULTS = "results.json"
NAMED = 5
"""Files that an error names."""

LARGEST_PICTURE = 8_000_000
"""Bytes; pictures of attacks are far smaller."""

_PNG = b"\x89PNG\r\n\x1a\n"
_SECONDS = ("train", "encrypt", "aggregate", "decrypt")


@dataclass(frozen=True, slots=True)
class Run:
    """One federation run.

    Attributes
    ----------
    name
        Its folder, seen from the folder that was searched; "." for that folder itself.
    folder
        The folder.
    results
        Content of ``results.json``, checked.
    settings
        Its configuration, nested, secrets hidden; empty where the run left none.
    """

    name: str
    folder: Path
    results: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AttackRun:
    """One attack: its folder and its ``results.json``, checked."""

    name: str
    folder: Path
    results: Mapping[str, Any]

    def pictures(self) -> list[tuple[str, bytes]]:
        """Return names and contents of its pictures.

        Raises
        ------
        DamagedResultsError
            When a picture is missing, no PNG, too large, or outside of the folder.
        """
        return [(name, _picture(self.folder, name)) for name in self.results["pictures"]]


@dataclass(frozen=True, slots=True)
class Found:
    """What lies below a folder.

    Attributes
    ----------
    runs, attacks
        In the order of their folders' names; numbers in names count as numbers.
    unfinished
        Folders of jobs that were started and left no results.
    """

    runs: Sequence[Run]
    attacks: Sequence[AttackRun]
    unfinished: Sequence[str] = ()


def find_runs(root: Path) -> Found:
    """Find and check all results below a folder.

    Raises
    ------
    ResultsError
        There is no such folder, or neither a federation run nor an attack below it.
    MixedResultsError
        There are results of other commands among them.
    DamagedResultsError
        A file is not JSON, or not of the form that a run writes.
    """
    if not root.is_dir():
        raise ResultsError(f"{root} is no folder", remedy="Name the output folder of a run or of a sweep")
    runs: list[Run] = []
    attacks: list[AttackRun] = []
    others: list[str] = []
    for path in sorted(root.rglob(RESULTS), key=lambda path: _order(path.relative_to(root))):
        content, name = read_json(path), str(path.parent.relative_to(root))
        if "attack" in content:
            attacks.append(AttackRun(name, path.parent, _checked(path, content, _check_attack)))
        elif "cloud" in content and "rounds" in content:
            results = _checked(path, content, _check_run)
            runs.append(Run(name, path.parent, results, read_settings(path.parent)))
        else:
            others.append(str(path))
    listed = ", ".join(others[:NAMED]) + (" and more" if len(others) > NAMED else "")
    if not runs and not attacks:
        raise ResultsError(
            f"{root} holds no federation run and no attack",
            expected=f"{RESULTS} of scripts.simulate, scripts.demo, the server or scripts.attack",
            found=listed or f"no {RESULTS} at all",
            remedy="Name the folder that such a command has printed",
        )
    if others:
        raise MixedResultsError(
            f"{root} holds results of other commands beside those of runs",
            found=listed,
            remedy="Name a folder that holds runs and attacks only",
        )
    return Found(runs, attacks, _unfinished(root))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    DamagedResultsError
        When the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise DamagedResultsError(
            f"{path} cannot be read as JSON ({exc})", remedy="Run that job again, or take its folder away"
        ) from exc
    if not isinstance(content, dict):
        raise DamagedResultsError(f"{path} is not of the form that a run writes", expected="a JSON object")
    return content


def read_settings(folder: Path) -> dict[str, Any]:
    """Return a run's configuration with secrets hidden; empty where it left none.

    Raises
    ------
    DamagedResultsError
        When a file is there and cannot be read.
    """
    hydra = folder / ".hydra" / "config.yaml"
    if hydra.is_file():
        try:
            settings = yaml.safe_load(hydra.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as exc:
            raise DamagedResultsError(f"{hydra} cannot be read as YAML ({exc})") from exc
    elif (folder / REPORT_DATA).is_file():
        settings = read_json(folder / REPORT_DATA).get("settings")
    else:
        return {}
    if not isinstance(settings, dict):
        raise DamagedResultsError(f"The settings of the run in {folder} are not a mapping")
    return redacted(settings)


# --- checks ---------------------------------------------------------------------------------------


class _WrongError(Exception):
    """Names the field and what was expected there."""


def _checked(path: Path, content: dict[str, Any], check: Any) -> dict[str, Any]:
    try:
        check(content)
    except _WrongError as exc:
        raise DamagedResultsError(
            f"{path} is not of the form that a run writes: {exc}",
            remedy="Run that job again, or take its folder away",
        ) from exc
    return content


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _WrongError(what)


def _is_number(value: Any, *, none: bool = False) -> bool:
    if value is None:
        return none
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _check_failures(value: Any, what: str) -> None:
    _require(
        isinstance(value, list)
        and all(isinstance(f, dict) and _texts([f.get("site"), f.get("reason")]) for f in value),
        f"{what} should hold site and reason of each",
    )


def _check_run(content: dict[str, Any]) -> None:
    _require(isinstance(content["cloud"], str), "cloud should be a trust mode")
    _require(_texts(content.get("sites")), "sites should be names")
    _require(_is_number(content.get("parameters")), "parameters should be a number")
    _require(isinstance(content.get("final"), dict), "final is missing")
    for name in ("accuracy", "majority_accuracy", "cloud_accuracy"):
        _require(
            _is_number(content["final"].get(name), none=True), f"final.{name} should be a number or null"
        )
    _require(isinstance(content.get("versions"), dict), "versions are missing")
    _require(isinstance(content.get("config_digest"), str), "config_digest is missing")
    restore = content.get("restore") or {}
    _require(isinstance(restore, dict), "restore should hold figures")
    _require(all(_is_number(v, none=True) for v in restore.values()), "restore should hold figures")
    _check_failures(content.get("closing_failures", []), "closing_failures")
    _require(isinstance(content["rounds"], list), "rounds should be a list")
    for index, entry in enumerate(content["rounds"]):
        what = f"rounds[{index}]"
        _require(isinstance(entry, dict), f"{what} should be an object")
        for name in ("round", "bytes_up", "bytes_down"):
            _require(_is_number(entry.get(name)), f"{what}.{name} should be a number")
        for name in ("accuracy", "loss", "cloud_accuracy", "cloud_loss"):
            _require(_is_number(entry.get(name), none=True), f"{what}.{name} should be a number or null")
        seconds = entry.get("seconds")
        _require(
            isinstance(seconds, dict) and all(_is_number(seconds.get(name)) for name in _SECONDS),
            f"{what}.seconds should hold {', '.join(_SECONDS)}",
        )
        _require(_texts(entry.get("replied")), f"{what}.replied should be names")
        _check_failures(entry.get("failed"), f"{what}.failed")


def _check_attack(content: dict[str, Any]) -> None:
    _require(isinstance(content["attack"], str), "attack should be a name")
    threat = content.get("threat_model")
    _require(isinstance(threat, dict), "threat_model is missing")
    _require(isinstance(content.get("configuration"), dict), "configuration is missing")
    for name in ("success", "baseline"):
        figures = content.get(name)
        _require(
            isinstance(figures, dict) and all(_is_number(v, none=True) for v in figures.values()),
            f"{name} should hold figures",
        )
    _require(isinstance(content.get("falls"), bool), "falls should be true or false")
    _require(_texts(content.get("pictures", [])), "pictures should be file names")
    content.setdefault("pictures", [])


def _picture(folder: Path, name: str) -> bytes:
    path = folder / name
    if Path(name).name != name or not name.lower().endswith(".png"):
        raise DamagedResultsError(f"{folder / RESULTS} names a picture outside of its folder: {name!r}")
    try:
        if path.stat().st_size > LARGEST_PICTURE:
            raise DamagedResultsError(f"The picture {path} is larger than {LARGEST_PICTURE} bytes")
        data = path.read_bytes()
    except OSError as exc:
        raise DamagedResultsError(f"The picture {path} cannot be read ({exc.strerror})") from exc
    if not data.startswith(_PNG):
        raise DamagedResultsError(f"{path} is no PNG file")
    return data


def _unfinished(root: Path) -> list[str]:
    folders = [path.parent.parent for path in root.rglob(".hydra/config.yaml")]
    missing = [folder.relative_to(root) for folder in folders if not (folder / RESULTS).exists()]
    return [str(name) for name in sorted(missing, key=_order)]


def _order(path: Path) -> list[tuple[int, int, str]]:
    """Sort job 10 after job 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.parts]
