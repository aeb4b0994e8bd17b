"""Which arithmetic this machine does fast."""

from __future__ import annotations

from pathlib import Path

import torch

from flep_fl.contracts.errors import ConfigError

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, arm64


def read_cpuinfo() -> str:
    """Return the kernel's description of the processor, empty where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_has_bfloat16(cpuinfo: str) -> bool:
    """Say whether a processor multiplies bfloat16 in hardware (emulated, it is slower than float32)."""
    for line in cpuinfo.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return bool(_BFLOAT16_FLAGS & set(flags.split()))
    return False


def select_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that is there.

    Raises
    ------
    ConfigError
        Another name, or a CUDA device that this machine does not have.
    """
    kind, _, index = name.partition(":")
    if name not in {"auto", "cpu", "cuda"} and not (kind == "cuda" and index.isdecimal()):
        raise ConfigError("Unknown device", expected="auto, cpu, cuda or cuda:N", found=name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError("There is no such CUDA device here", found=name, remedy="Use device=cpu")
    return torch.device(name)


def select_dtype(device: torch.device, cpuinfo: str | None = None) -> torch.dtype:
    """Return bfloat16 where ``device`` has it in hardware, float32 elsewhere.

    Parameters
    ----------
    device
        Where the network runs.
    cpuinfo
        Text in the format of ``/proc/cpuinfo``; this machine's when None.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = cpu_has_bfloat16(read_cpuinfo() if cpuinfo is None else cpuinfo)
    return torch.bfloat16 if native else torch.float32
