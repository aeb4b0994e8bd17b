"""The arrows between rooms, and what an untrusted cloud loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "flep_fl"

INNER = {"contracts"}
SECURITY = {"data_security", "model_security"}
ROOMS = {"data_owner", "private_database", "data_analyst", "ai_cloud"}
OUTER = {"flower", "provision", "reporting"}
ALLOWED = {
    "contracts": INNER,
    "data_security": INNER,
    "model_security": INNER,
    "data_owner": INNER | SECURITY,
    "private_database": INNER | SECURITY,
    "data_analyst": INNER | SECURITY,
    "ai_cloud": INNER | SECURITY,
    "flower": INNER | SECURITY | ROOMS | OUTER | {"config", "entry"},
    "provision": INNER | SECURITY | ROOMS | OUTER | {"config", "entry"},
    "reporting": INNER | SECURITY | ROOMS,
    "attacks": INNER | SECURITY | ROOMS | OUTER | {"config", "entry"},
}
CLOUD_MAY_USE = {"adder", "seal", "layout", "profiles"}


def imports_of(path: Path) -> set[str]:
    """Return the dotted names of our own modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("flep_fl.")}


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_arrows_point_inward(room: str) -> None:
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path):
            target = name.split(".")[1]
            assert target == room or target in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


def test_the_cloud_uses_four_modules_of_model_security() -> None:
    for path in (PACKAGE / "ai_cloud").rglob("*.py"):
        used = {n.split(".")[2] for n in imports_of(path) if n.startswith("flep_fl.model_security.")}
        assert used <= CLOUD_MAY_USE, f"{path.name} uses {used - CLOUD_MAY_USE}"


def test_only_the_runtime_touches_flowers_internals() -> None:
    inside = PACKAGE / "flower" / "runtime"
    public = ("flwr.app", "flwr.serverapp", "flwr.clientapp")
    for path in PACKAGE.rglob("*.py"):
        if inside in path.parents or path.name == "local_grid.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.startswith("flwr"):
                assert module.startswith(public), f"{path.relative_to(ROOT)} imports {module}"


def loaded_by(code: str) -> set[str]:
    """Run code in a fresh interpreter; return the modules that it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return set(done.stdout.split())


def test_an_untrusted_cloud_loads_neither_the_key_ring_nor_torch() -> None:
    loaded = loaded_by(
        "import server.app, flep_fl.flower.compose_cloud, flep_fl.flower.parties\n"
        "import flep_fl.flower.runtime.cloud"
    )
    assert "flep_fl.model_security.adder" in loaded
    forbidden = {"torch", "flep_fl.model_security.keyring", "flep_fl.model_security.cipher", "pywt"}
    assert not loaded & forbidden
    assert not {name for name in loaded if name.startswith("flep_fl.data_security")}


def test_the_configuration_loads_nothing_heavy() -> None:
    loaded = loaded_by("import flep_fl.config, flep_fl.entry, server.app, clients.app")
    assert not loaded & {"torch", "flwr", "tenseal", "numpy", "ray"}


def test_no_runtime_dependency_on_test_tools() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [d for d in project["dependencies"] if d.startswith(("pytest", "hypothesis", "ruff", "mypy"))]
