"""The demo: two data owners with cameras and gateways, the analysts they grant to, one untrusted cloud.

Every party is a process of its own that speaks to the others over loopback, started by the commands that the
README prints. This process only plays the dealer, tells the story, and watches: when one party fails, it
says which and why, and ends all the others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flep_fl.config import Config, shared_part
from flep_fl.contracts.errors import DataError, RuntimeStartError
from flep_fl.contracts.files import write_atomic
from flep_fl.data_owner.home import load_home
from flep_fl.data_owner.sources import require_source
from flep_fl.entry import output_dir
from flep_fl.flower.children import Children, option
from flep_fl.flower.processes import stop_on_signals
from flep_fl.flower.run_report import Invert, load_sample, write_run_report
from flep_fl.flower.runtime.environment import LOOPBACK, bind
from flep_fl.provision.kits import CLOUD, create_kits
from flep_fl.reporting.console import Progress, say, warn_few_contributors
from flep_fl.reporting.results import write_json
from flep_fl.reporting.tracking import require_tracking

TITLE = "Two data owners, their analysts, one cloud"
"""Of the report."""

OWNERS = ("plant-north", "plant-south")

_LISTENERS = ("ingest", "release", "admin")
_ROLES = {"ingest": "device", "release": "analyst", "admin": "operator"}
_SITES_AFTER_CLOUD_SECONDS = 60.0
_GATEWAY_SECONDS = 90.0
_GRANT_DAYS = 30
_CAMERA_RATE = 250.0
"""Images a second; a real camera takes fewer."""


@dataclass(frozen=True, slots=True)
class Owner:
    """One data owner of the demo: its folder and where its gateway listens."""

    name: str
    folder: Path
    ports: Mapping[str, int]

    @property
    def gateway(self) -> str:
        """Name of the gateway's process."""
        return f"{self.name}-gateway"

    @property
    def camera(self) -> str:
        """Name of its camera, the device and the process."""
        return f"{self.name}-cam"

    @property
    def home(self) -> Path:
        """The owner's home."""
        return self.folder / self.name

    def arguments(self, action: str, *options: str) -> list[str]:
        """Return the options of ``python -m scripts.owner``."""
        addresses = [f"{name}.address={LOOPBACK}:{self.ports[name]}" for name in _LISTENERS]
        rules = option("network", self.folder / f"{self.name}-network.yaml")
        return [f"action={action}", option("home", self.home), rules, *addresses, *options]

    def write_rules(self) -> None:
        """Write the network rules: this machine alone may knock, at this owner's three ports."""
        listeners = [
            {"direction": "in", "role": _ROLES[name], "cidr": ["127.0.0.0/8"], "port": name}
            for name in _LISTENERS
        ]
        rules = {"ports": dict(self.ports), "groups": {"gateway": listeners}}  # JSON is YAML
        write_atomic(self.folder / f"{self.name}-network.yaml", json.dumps(rules, indent=1).encode())

    def url(self) -> str:
        """Return what an analyst is told: the address and the key to expect there."""
        return f"https://{LOOPBACK}:{self.ports['release']}#{load_home(self.home).owner_key.hex()}"


def run_demo(config: Config, *, invert: Invert | None = None) -> None:
    """Run the whole story as processes on this machine; see the module's docstring.

    Parameters
    ----------
    config
        The whole configuration.
    invert
        As :func:`.write_run_report` takes it.

    Raises
    ------
    FlepError
        By name; a party that fails is named with the last lines of its log.
    """
    out = output_dir()
    analysts = config.sites or [f"lab-{number + 1}" for number in range(config.federation.sites)]
    require_source(config.data.name)
    require_tracking(config.tracking.name)
    progress = Progress("demo")
    warn_few_contributors(config.federation.min_contributors, progress)
    started = time.monotonic()
    with stop_on_signals() as stop, Children(out / "logs", stop) as children:
        *ports, cloud_port = _free_ports(len(OWNERS) * len(_LISTENERS) + 1)
        owners = [
            Owner(name, out / "owners", dict(zip(_LISTENERS, ports[3 * number :], strict=False)))
            for number, name in enumerate(OWNERS)
        ]
        progress(f"data owners {_names(OWNERS)} make their keys and empty databases")
        _each(children, owners, "keys")
        create_kits(shared_part(config), analysts, out / "kits", address=f"{LOOPBACK}:{cloud_port}")
        progress(f"the dealer has made kits for the cloud and the analysts {_names(analysts)}")
        children.wait(OWNERS)
        _owners_open(config, children, owners, progress)
        _cameras_play(config, children, owners, progress)
        _owners_grant(config, children, owners, analysts, out / "kits", progress)
        _owners_release(config, children, owners, progress)
        _federate(config, children, owners, analysts, out, progress)
        children.end([owner.gateway for owner in owners])
        progress("the gateways have stopped; the owners verify their audit logs")
        _each(children, owners, "audit")
        children.wait(OWNERS)
    results = json.loads((out / "results.json").read_text())
    results |= {"restore": _restore(owners), "owners": {owner.name: _measured(owner) for owner in owners}}
    write_json(out / "results.json", results)
    progress("drawing the report")
    report = write_run_report(
        out, config, results, lambda: load_sample(config), invert=invert, title=TITLE, on_event=progress
    )
    _summary(results, out, time.monotonic() - started)
    if report is not None:
        say(f"report: {report}")


def _owners_open(
    config: Config, children: Children, owners: Sequence[Owner], progress: Callable[[str], None]
) -> None:
    """Add the data sets, and open the gateways."""
    progress("they start their gateways (TLS) and add a data set with keys of its own")
    for owner in owners:
        owner.write_rules()
        children.start(owner.gateway, "scripts.owner", *owner.arguments("serve"), lasting=True)
    settings = [
        *_section("cipher", config.cipher),
        *_section("noise", config.noise),
        option("test_fraction", config.data.test_fraction),
    ]
    _each(children, owners, "dataset", *_images(config), *settings)
    children.wait(OWNERS)
    for owner in owners:
        children.wait_for_line(owner.gateway, "ready", seconds=_GATEWAY_SECONDS)


def _cameras_play(
    config: Config, children: Children, owners: Sequence[Owner], progress: Callable[[str], None]
) -> None:
    """Enrol a camera at each owner, and start both; each has its half of the images before it."""
    progress("an administrator of each enrols a camera; the cameras sign what they see and send it")
    for owner in owners:
        devices = option("devices", owner.folder / "devices")
        arguments = owner.arguments("enrol", devices, f"device={owner.camera}", *_images(config))
        children.start(owner.name, "scripts.owner", *arguments)
    children.wait(OWNERS)
    for number, owner in enumerate(owners):
        # A camera has a folder of its own: key, gateway's address and root. The owner's home it never sees.
        children.start(
            owner.camera,
            "scripts.owner",
            "action=play",
            option("devices", owner.folder / "devices"),
            f"device={owner.camera}",
            f"share=[{number},{len(owners)}]",
            f"rate={_CAMERA_RATE}",
            *_images(config),
            *_section("data", config.data, only=("image_size", "limit", "mode")),
            f"seed={config.seed}",
        )


def _owners_grant(
    config: Config,
    children: Children,
    owners: Sequence[Owner],
    analysts: Sequence[str],
    kits: Path,
    progress: Callable[[str], None],
) -> None:
    """Grant every analyst an equal part of what an owner has, now and later."""
    dataset = option("dataset", config.data.name)
    until = (datetime.now(UTC) + timedelta(days=_GRANT_DAYS)).strftime("%Y-%m-%d")
    progress(f"meanwhile each grants every analyst a part of what it has, until {until}")
    for number, analyst in enumerate(analysts):
        share = option("share", [number, len(analysts)])
        kit = option("kit", kits / analyst)
        grant = (dataset, option("analyst", analyst), kit, option("until", until), share)
        _each(children, owners, "grant", *grant)
        children.wait(OWNERS)


def _owners_release(
    config: Config, children: Children, owners: Sequence[Owner], progress: Callable[[str], None]
) -> None:
    """Encrypt what came in once for all analysts, and release it."""
    children.wait([owner.camera for owner in owners])
    progress("the owners encrypt in three layers what came in, and release it")
    allowed = option("allow_targets", config.allow_targets)
    _each(children, owners, "release", option("dataset", config.data.name), allowed)
    children.wait(OWNERS)


def _federate(
    config: Config,
    children: Children,
    owners: Sequence[Owner],
    analysts: Sequence[str],
    out: Path,
    progress: Callable[[str], None],
) -> None:
    """Run the cloud and the analysts to their end; meanwhile the owners measure what they gave away."""
    roots = out / "owners" / "roots.crt"
    write_atomic(roots, b"".join(load_home(owner.home).root.certificate.read_bytes() for owner in owners))
    common = [
        option("hydra.run.dir", out),
        "hydra.output_subdir=null",
        f"runtime.threads={max(1, config.runtime.threads or 1)}",
        option("runtime.device", config.runtime.device),
        option("allow_targets", config.allow_targets),
        option("report.name", config.report.name),
    ]
    sources = [option("data.owners", [owner.url() for owner in owners]), option("data.owner_ca", roots)]
    pids = {}
    for name in (CLOUD, *analysts):
        tracking = _section("tracking", config.tracking)
        module, own = ("server", tracking) if name == CLOUD else ("clients", sources)
        kit = option("kit", out / "kits" / name)
        pids[name] = children.start(name, module, kit, *own, f"hydra.job.name={name}", *common)
    started = ", ".join(f"{name} (pid {pid})" for name, pid in pids.items())
    progress(f"started {started}; the analysts fetch from {_names(OWNERS)}, train, and send ciphertext")
    for owner in owners:
        measure = [
            option("dataset", config.data.name),
            *_section("denoiser", config.denoiser),
            *_section("restore", config.restore),
            option("allow_targets", config.allow_targets),
            option("out", _measurement(owner)),
        ]
        children.start(owner.name, "scripts.owner", *owner.arguments("measure", *measure))
    children.wait([*pids, *OWNERS], check=_Patience(children))


class _Patience:
    """Allows the analysts some time to end once the cloud has."""

    def __init__(self, children: Children) -> None:
        self._children = children
        self._deadline: float | None = None

    def __call__(self, left: Sequence[str]) -> None:
        """Raise :class:`RuntimeStartError` when somebody goes on long after the cloud has ended."""
        if self._children.running(CLOUD):
            return
        now = time.monotonic()
        self._deadline = self._deadline or now + _SITES_AFTER_CLOUD_SECONDS
        if now > self._deadline:
            raise RuntimeStartError(f"The cloud has ended and these have not: {', '.join(left)}")


def _each(children: Children, owners: Sequence[Owner], action: str, *options: str) -> None:
    """Start the same command at every owner, side by side; wait with :meth:`Children.wait`."""
    for owner in owners:
        children.start(owner.name, "scripts.owner", *owner.arguments(action, *options))


def _images(config: Config) -> list[str]:
    """Return the options that name the images and their data set."""
    dataset = option("dataset", config.data.name)
    if config.data.name != "folder":
        return [dataset, option("data.name", config.data.name)]
    if config.data.path is None:
        raise DataError("data=folder needs a folder", remedy="Set data.path=FOLDER_OF_CLASS_FOLDERS")
    return [dataset, option("images", Path(config.data.path).resolve())]


def _section(name: str, section: Any, only: Sequence[str] | None = None) -> list[str]:
    """Return a part of the configuration as overrides for a child."""
    chosen = [one.name for one in fields(section)] if only is None else only
    return [option(f"{name}.{one}", getattr(section, one)) for one in chosen]


def _free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody has now; held together, so that they differ."""
    with ExitStack() as held:
        return [held.enter_context(bind(f"{LOOPBACK}:0")).getsockname()[1] for _ in range(count)]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def _measurement(owner: Owner) -> Path:
    return owner.folder / f"{owner.name}-measured.json"


def _measured(owner: Owner) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_measurement(owner).read_text())
    return found


def _restore(owners: Sequence[Owner]) -> dict[str, float | None]:
    """Put together the owners' figures, which nobody else can know; each measured as many records."""
    found = [_measured(owner) for owner in owners]

    def mean(name: str) -> float | None:
        values = [one[name] for one in found]
        return None if None in values else sum(values) / len(values)

    return {name: mean(name) for name in ("psnr_db", "noisy_psnr_db")}


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
        say("what the noise costs in accuracy: docs/denoisers.md; the same without it: noise.std=0")
    if results["cloud"] == "untrusted":
        say(f"the cloud held no key and wrote no model: {out / CLOUD}")
    say(f"done in {seconds:.0f} s; results: {out / 'results.json'}")
