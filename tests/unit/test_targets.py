from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flep_fl.contracts.errors import ConfigError, TargetError
from flep_fl.contracts.targets import import_target, is_allowed


@pytest.mark.parametrize(
    ("name", "prefixes", "allowed"),
    [
        ("my_package.Cipher", ["my_package."], True),
        ("my_package.Cipher", ["my_package"], True),
        ("my_package.sub.Cipher", ["other.", "my_package.sub."], True),
        ("my_package.Cipher", ["my_package.Cipher"], True),
        ("my_package_evil.Cipher", ["my_package"], False),
        ("my_package.Cipher2", ["my_package.Cipher"], False),
        ("my_package.Cipher", [], False),
        ("my_package.Cipher", [""], False),
        ("my_package.Cipher", ["."], False),
        ("os.system", ["my_package."], False),
    ],
)
def test_prefixes_cover_whole_parts(name: str, prefixes: list[str], allowed: bool) -> None:
    assert is_allowed(name, prefixes) == allowed


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``flep_marked`` that leaves a file behind when it is imported."""
    mark = tmp_path / "imported"
    (tmp_path / "flep_marked.py").write_text(f"open({str(mark)!r}, 'w').close()\nvalue = 3\n")
    (tmp_path / "flep_broken.py").write_text("raise RuntimeError('not today')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flep_marked", raising=False)
    return mark


def test_nothing_is_imported_without_permission(marked: Path) -> None:
    for prefixes in ([], ["my_package."], ["flep_mark"]):
        with pytest.raises(TargetError, match=r"allow_targets=\[flep_marked\.\]"):
            import_target("flep_marked.value", prefixes, field="cipher.name")
    assert not marked.exists()
    assert import_target("flep_marked.value", ["flep_marked."], field="cipher.name") == 3
    assert marked.exists()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("flep_marked.nothing", "AttributeError"),
        ("flep_missing.value", "ModuleNotFoundError"),
        ("flep_broken.value", "RuntimeError: not today"),
    ],
)
def test_what_does_not_import_is_named(marked: Path, name: str, found: str) -> None:
    with pytest.raises(TargetError, match=found):
        import_target(name, [name.partition(".")[0]], field="cipher.name")


@pytest.mark.parametrize(
    "name", ["value", "", ".value", "flep_marked.", "flep marked.value", "a..b", "a.b;c"]
)
def test_a_name_that_is_no_dotted_name(name: str) -> None:
    with pytest.raises(TargetError, match="not a dotted name"):
        import_target(name, [name], field="cipher.name")


def test_it_is_a_configuration_error() -> None:
    assert issubclass(TargetError, ConfigError)
