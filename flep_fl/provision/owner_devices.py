"""Devices and their administrators: make a device, approve, enrol, suspend, list, play."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flep_fl.contracts.errors import ConfigError, EnrolmentError, FlepError, GatewayError
from flep_fl.contracts.files import read_bytes, write_atomic
from flep_fl.contracts.owner_api import read_error
from flep_fl.contracts.request_signing import sign_request
from flep_fl.data_owner.certificates import client_context
from flep_fl.data_owner.enrolment import Action, Approval, Device, DeviceRegistry, approve, audited
from flep_fl.data_owner.home import OwnerHome, load_home
from flep_fl.data_owner.simulator import Device as DeviceFolder
from flep_fl.data_owner.simulator import Shot, play
from flep_fl.provision.owner_config import OwnerConfig, need
from flep_fl.provision.owner_gateway import audit_log
from flep_fl.reporting.console import Progress, say

_DAY = 86400.0
_APPROVALS, _DEVICES, _STATUS = "/v1/approvals", "/v1/devices", "/v1/status"


def run_device(config: OwnerConfig) -> None:
    """Make a device's folder and key, on the device: ``device= gateway=https://HOST:PORT ca=ca.crt``."""
    name = need(config, "device", "cam-1")
    gateway = need(config, "gateway", "https://HOST:8441")
    ca = read_bytes(Path(config.ca), what="the owner's root", error=ConfigError) if config.ca else None
    device = DeviceFolder.create(Path(config.devices) / name, name=name, gateway=gateway.rstrip("/"), ca=ca)
    say(f"made {device.folder}; its key for the administrators:")
    say(device.public_key)


def run_approve(config: OwnerConfig) -> None:
    """Sign an approval into a file: ``device= device_key= dataset= administrator= [key=FILE] out=FILE``."""
    home = load_home(Path(config.home))
    key = config.device_key or _folder(config).public_key
    approval = _sign(config, home, "enrol", key=key)
    out = Path(need(config, "out", "approval.json"))
    write_atomic(out, approval.to_bytes() + b"\n")
    say(f"{approval.administrator} approves {approval.device} for {', '.join(approval.datasets)}: {out}")


def run_enrol(config: OwnerConfig) -> None:
    """Hand in approvals: those of ``approvals=[...]``, or one that is signed here and now."""
    home = load_home(Path(config.home))
    if config.approvals:
        approvals = [
            Approval.from_bytes(read_bytes(Path(n), what="the approval", error=EnrolmentError).strip())
            for n in config.approvals
        ]
    else:
        key = config.device_key or _own_device(config, home).public_key
        approvals = [_sign(config, home, "enrol", key=key)]
    for approval in approvals:
        _report(_hand_in(config, home, approval))


def run_suspend(config: OwnerConfig) -> None:
    """Suspend a device, by one administrator: ``device= administrator=``."""
    home = load_home(Path(config.home))
    name = need(config, "device", "cam-1")
    found = {device["device"]: device for device in _devices(config, home)}
    if name not in found:
        raise EnrolmentError(f"no device of the name {name} is on file")
    generation = found[name]["generation"] if config.generation is None else config.generation
    approval = _sign(config, home, "suspend", key=found[name]["key"], generation=generation)
    _report(_hand_in(config, home, approval))


def run_devices(config: OwnerConfig) -> None:
    """List the devices."""
    for device in _devices(config, load_home(Path(config.home))):
        _report(device)


def run_status(config: OwnerConfig) -> None:
    """Ask the running gateway how it does."""
    say(json.dumps(_ask(config, load_home(Path(config.home)), _STATUS), indent=2))


def run_play(config: OwnerConfig) -> None:
    """Play ``images=FOLDER`` or ``data=digits|elpv`` as a device; with ``share=[0,2]`` every other image.

    Raises
    ------
    GatewayError
        The gateway refuses this device, or does not answer for ``patience`` seconds.
    """
    device = _folder(config)
    shots, dataset = _shots(config)
    progress = Progress(device.name)
    began = time.monotonic()
    with progress.live():
        played = play(
            device,
            shots,
            dataset=config.dataset or dataset,
            split=config.split,
            source=str(Path(config.images).resolve()) if config.images else config.data.name,
            rate=config.rate,
            patience=config.patience,
            on_event=progress,
        )
    seconds = time.monotonic() - began
    say(
        f"{device.name}: {played.stored} stored, {played.repeated} stored before, "
        f"{len(played.refused)} refused, {played.retries} retries in {seconds:.1f} s"
    )
    if played.refused:
        raise GatewayError(f"{len(played.refused)} images were refused", found=played.refused[0])


def _shots(config: OwnerConfig) -> tuple[list[Callable[[], Shot]], str]:
    """Return functions that read one image each, and the data set's name."""
    from flep_fl.data_owner.sources import load_source

    limit, (index, parts) = config.data.limit, config.share
    if config.images:
        folder = Path(config.images)
        if folder.is_dir() and not any(child.is_dir() for child in folder.iterdir()):
            files = sorted(child for child in folder.iterdir() if child.is_file())[:limit]
            if not files:
                raise ConfigError(f"images={folder} holds no image")
            return [_file_shot(path) for path in files[index::parts]], folder.resolve().name
    source = load_source(
        "folder" if config.images else config.data.name,
        path=Path(config.images) if config.images else None,
        image_size=config.data.image_size,
        limit=limit,
        seed=config.seed,
        mode=config.data.mode,
    )

    def shot(number: int) -> Callable[[], Shot]:
        def read() -> Shot:
            image = source.images[number]
            label = source.classes[source.labels[number]]
            wire = "raw-uint8" if image.dtype.itemsize == 1 else "raw-uint16"
            data = image.astype(image.dtype.newbyteorder("<"), copy=False).tobytes()
            return Shot(f"image {number + 1}", data, wire, image.shape, label)

        return read

    return [shot(number) for number in range(len(source.labels))[index::parts]], source.name


def _file_shot(path: Path) -> Callable[[], Shot]:
    def read() -> Shot:
        from flep_fl.data_owner.sources import decode_grey

        if path.suffix.lower() == ".png":
            return Shot(path.name, path.read_bytes(), "png", ())
        image = decode_grey(path)
        return Shot(path.name, image.tobytes(), "raw-uint8", image.shape)

    return read


def _folder(config: OwnerConfig) -> DeviceFolder:
    return DeviceFolder(Path(config.devices) / need(config, "device", "cam-1"))


def _own_device(config: OwnerConfig, home: OwnerHome) -> DeviceFolder:
    """Return the device's folder; where there is none, this machine is the device, and one is made."""
    name = need(config, "device", "cam-1")
    folder = Path(config.devices) / name
    if (folder / "device.key").exists():
        return DeviceFolder(folder)
    gateway = config.gateway or f"{'https' if config.tls else 'http'}://{config.ingest.address}"
    ca = home.root.certificate.read_bytes() if config.tls else None
    device = DeviceFolder.create(folder, name=name, gateway=gateway.rstrip("/"), ca=ca)
    say(f"made {folder}")
    return device


def _sign(
    config: OwnerConfig, home: OwnerHome, action: Action, *, key: str, generation: int | None = None
) -> Approval:
    name = config.administrator or _only_administrator(home)
    signing = home.administrator_key(name, Path(config.key) if config.key else None)
    chosen = generation if generation is not None else config.generation
    if chosen is None:
        chosen = _generation(home, need(config, "device", "cam-1"))
    datasets = [need(config, "dataset", "NAME")] if action == "enrol" else []
    return approve(
        signing,
        administrator=name,
        action=action,
        device=need(config, "device", "cam-1"),
        key=key,
        generation=chosen,
        datasets=[part for text in datasets for part in text.split(",")],
        lifetime=config.expires_days * _DAY,
    )


def _only_administrator(home: OwnerHome) -> str:
    if len(home.administrators) != 1:
        raise ConfigError(
            "administrator is not set", expected="one of " + ", ".join(sorted(home.administrators))
        )
    return next(iter(home.administrators))


def _generation(home: OwnerHome, name: str) -> int:
    found = _registry(home).find(name)
    return 0 if found is None else found.generation


def _registry(home: OwnerHome) -> DeviceRegistry:
    return DeviceRegistry(home.devices, home.administrators, threshold=home.threshold)


def _hand_in(config: OwnerConfig, home: OwnerHome, approval: Approval) -> dict[str, Any]:
    """Give a statement to the running gateway, or write it down where none runs."""
    with home.exclusive("enrols") as alone:
        if not alone:
            return _request(config, home, "POST", _APPROVALS, approval.to_bytes(), {})
        registry = _registry(home)
        log = audit_log(config, home)
        try:
            device, new = registry.apply(
                approval,
                before=lambda one: log.append("device.statement", durable=True, **audited(one)),
            )
            shown = _shown(device)
            if new:
                word = "approved" if approval.action == "enrol" else "suspended"
                log.append(f"device.{word}", durable=True, administrator=approval.administrator, **shown)
        finally:
            log.close()
        return shown


def _devices(config: OwnerConfig, home: OwnerHome) -> list[dict[str, Any]]:
    with home.exclusive("lists") as alone:
        if alone:
            registry = _registry(home)
            return [_shown(registry.device(name)) for name in registry.names()]
    found: list[dict[str, Any]] = _ask(config, home, _DEVICES)["devices"]
    return found


def _ask(config: OwnerConfig, home: OwnerHome, path: str) -> dict[str, Any]:
    """Send a request that an administrator signs."""
    name = config.administrator or _only_administrator(home)
    key = home.administrator_key(name, Path(config.key) if config.key else None)
    headers = sign_request(
        "GET",
        path,
        b"",
        audience=home.owner_key,
        key=key.public_key().public_bytes_raw(),
        sign=key.sign,
        created=int(time.time()),
        nonce=secrets.token_hex(16),
    )
    return _request(config, home, "GET", path, b"", headers)


def _request(
    config: OwnerConfig, home: OwnerHome, method: str, path: str, body: bytes, headers: dict[str, str]
) -> dict[str, Any]:
    import httpx

    url = f"{'https' if config.tls else 'http'}://{config.admin.address}{path}"
    verify = client_context(home.root.certificate) if config.tls else True
    try:
        with httpx.Client(verify=verify, timeout=30, trust_env=False) as client:
            answer = client.request(method, url, content=body or None, headers=headers)
    except httpx.TransportError as exc:
        raise GatewayError(
            f"the gateway's administration does not answer: {url} ({exc})",
            remedy="Is `action=serve` running on this machine, at this admin.address?",
        ) from exc
    if answer.status_code != 200:
        code, reason = read_error(answer.content)
        kind: type[FlepError] = EnrolmentError if code == EnrolmentError.code else GatewayError
        raise kind(
            reason or f"the gateway answers {answer.status_code}", found=f"{answer.status_code} {code}"
        )
    found: dict[str, Any] = answer.json()
    return found


def _shown(device: Device) -> dict[str, Any]:
    return {
        "device": device.name,
        "standing": device.standing,
        "generation": device.generation,
        "key": device.key,
        "datasets": list(device.datasets),
        "approved_by": list(device.approved_by),
        "expires": device.expires,
    }


def _report(device: dict[str, Any]) -> None:
    until = ""
    if device["expires"]:
        until = ", until " + time.strftime("%Y-%m-%d", time.gmtime(device["expires"]))
    by = f", approved by {', '.join(device['approved_by'])}" if device["approved_by"] else ""
    what = f" for {', '.join(device['datasets'])}" if device["datasets"] else ""
    say(f"{device['device']}: {device['standing']}{what}{by}{until} (generation {device['generation']})")
