"""The demo: provision, seal, then one cloud and several sites, each an operating-system process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flep_fl.config import Config, shared_part
from flep_fl.contracts.errors import RuntimeStartError
from flep_fl.entry import output_dir
from flep_fl.flower.processes import spawn_child, stop_on_signals, terminate
from flep_fl.flower.runtime.environment import LOOPBACK, bind, log_tail
from flep_fl.provision.kits import CLOUD, OWNER, create_kits, load_owner_kit
from flep_fl.provision.owner import Release, release_data_set
from flep_fl.reporting.console import Progress, say, warn_few_contributors
from flep_fl.reporting.results import write_json

_POLL_SECONDS = 0.2
_SITES_AFTER_CLOUD_SECONDS = 60.0


def run_demo(config: Config) -> None:
    """Run the whole federation as processes on this machine; see the module's docstring.

    Raises
    ------
    FlepError
        By name; a party that fails is named with the last lines of its log.
    """
    out = output_dir()
    names = config.sites
    progress = Progress("demo")
    warn_few_contributors(config.federation.min_contributors, progress)
    started = time.monotonic()
    with bind(f"{LOOPBACK}:0") as free:
        address = f"{LOOPBACK}:{free.getsockname()[1]}"
    create_kits(shared_part(config), names, out / "kits", address=address)
    progress(f"made kits for the cloud and {len(names)} sites")
    release = release_data_set(
        config, load_owner_kit(out / "kits" / OWNER), out / "archives", on_event=progress
    )
    commands = {CLOUD: ["server", _option("kit", out / "kits" / CLOUD)]}
    for name in names:
        archive = _option("archive", out / "archives" / name)
        commands[name] = ["clients", _option("kit", out / "kits" / name), archive]
    _run_parties(config, commands, out, progress)
    results = _with_restore(out, release)
    write_json(out / "results.json", results)
    _summary(results, out, time.monotonic() - started)


def _run_parties(
    config: Config, commands: Mapping[str, Sequence[str]], out: Path, progress: Progress
) -> None:
    """Start every party as its own process, show what they say, and wait until all have ended."""
    threads = max(1, (config.runtime.threads or 1))
    children: dict[str, subprocess.Popen[bytes]] = {}
    logs = {name: out / "logs" / f"{name}.log" for name in commands}
    shown = dict.fromkeys(commands, 0)
    with stop_on_signals() as stop:
        try:
            for name, command in commands.items():
                arguments = [
                    _option("hydra.run.dir", out),
                    f"hydra.job.name={name}",
                    "hydra.output_subdir=null",
                    f"runtime.threads={threads}",
                    f"runtime.device={config.runtime.device}",
                    f"allow_targets=[{','.join(config.allow_targets)}]",
                ]
                children[name] = spawn_child([sys.executable, "-m", *command, *arguments], log=logs[name])
            progress("started " + ", ".join(f"{name} (pid {child.pid})" for name, child in children.items()))
            patience = Patience(children[CLOUD])
            while any(child.poll() is None for child in children.values()) and not stop.is_set():
                patience.check([name for name, child in children.items() if child.poll() is None])
                for name in commands:
                    shown[name] = _relay(logs[name], shown[name])
                _require_success(children, logs)
                stop.wait(_POLL_SECONDS)
        finally:
            for child in children.values():
                terminate(child, grace=10.0)
            for name in commands:
                shown[name] = _relay(logs[name], shown[name])
        if stop.is_set():
            raise KeyboardInterrupt
        _require_success(children, logs)


def _option(name: str, value: Path) -> str:
    """Return an override for hydra; a path may hold characters that mean something in its grammar."""
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"{name}='{escaped}'"


class Patience:
    """Allows the sites some time to end once the cloud has."""

    def __init__(self, cloud: subprocess.Popen[bytes]) -> None:
        self._cloud = cloud
        self._deadline: float | None = None

    def check(self, running: Sequence[str]) -> None:
        """Raise :class:`RuntimeStartError` when sites go on long after the cloud has ended."""
        if self._cloud.poll() is None:
            return
        now = time.monotonic()
        self._deadline = self._deadline or now + _SITES_AFTER_CLOUD_SECONDS
        if now > self._deadline:
            raise RuntimeStartError(f"The cloud has ended and these sites have not: {', '.join(running)}")


def _require_success(children: Mapping[str, subprocess.Popen[bytes]], logs: Mapping[str, Path]) -> None:
    """Name the first party that ended with an error; the cloud's own word comes first."""
    for name, child in children.items():
        status = child.poll()
        if status not in (None, 0):
            raise RuntimeStartError(
                f"{name} ended with status {status}; its last lines: {log_tail(logs[name], 6)}"
            )


def _relay(log: Path, position: int) -> int:
    """Print what a party has said since ``position``; return the new position."""
    if not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        news = file.read()
    whole = news[: news.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        say(line)
    return position + len(whole)


def _with_restore(out: Path, release: Release) -> dict[str, Any]:
    """Add the owner's restoration figures to what the cloud wrote, which cannot know them."""
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    results["restore"] = {"psnr_db": release.restore.psnr_db, "noisy_psnr_db": release.restore.noisy_psnr_db}
    return results


def _summary(results: Mapping[str, Any], out: Path, seconds: float) -> None:
    final, restore = results["final"], results["restore"]
    if final["accuracy"] is not None:
        say(
            f"accuracy on held-out images {100 * final['accuracy']:.1f} %, "
            f"always the most frequent class {100 * final['majority_accuracy']:.1f} %"
        )
    if restore["psnr_db"] is not None:
        say(
            f"restored images {restore['psnr_db']:.1f} dB PSNR, "
            f"before denoising {restore['noisy_psnr_db']:.1f} dB"
        )
    if results["cloud"] == "untrusted":
        say(f"the cloud held no key and wrote no model: {out / CLOUD}")
    say(f"done in {seconds:.0f} s; results: {out / 'results.json'}")
