"""kill -9 at every step that touches a file: the kits are the old ones, the new ones, or refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federations import make_config

from flep_fl.config import shared_part
from flep_fl.contracts.errors import ConfigError, KitError, ProvisionInterruptedError
from flep_fl.provision import loading, transaction
from flep_fl.provision.kits import (
    add_sites,
    create_kits,
    load_cloud_kit,
    load_owner_kit,
    load_site_kit,
    revoke_sites,
    rotate_keys,
)
from flep_fl.provision.manifest import NAME, read_manifest

ADDRESS = "127.0.0.1:9092"
SITES = ("a", "b", "c")
SHARED = ("federation.sites=3", "federation.min_contributors=2")
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def create(out: Path) -> None:
    create_kits(shared_part(make_config(*SHARED)), SITES, out, address=ADDRESS)


ACTIONS: dict[str, Callable[[Path], Any]] = {
    "create": create,
    "add": lambda out: add_sites(out, ["d"]),
    "revoke": lambda out: revoke_sites(out, ["c"]),
    "rotate": rotate_keys,
}
AFTER = {"create": (1, 0), "add": (1, 1), "revoke": (2, 0), "rotate": (2, 0)}
PARTIES = {"create": SITES, "add": (*SITES, "d"), "revoke": ("a", "b"), "rotate": SITES}


def killed_at(number: int, action: Callable[[Path], Any], out: Path) -> bool:
    """Run ``action`` in a child that is killed before its ``number``-th change of a file below ``out``.

    Returns whether it was killed, rather than at its end before.
    """
    pid = os.fork()
    if pid == 0:
        left = number

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event not in CHANGES or not str(arguments[0]).startswith(str(out)):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            action(out)
        except BaseException:
            os._exit(3)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"the {number}th step made the command fail"
    return False


def refused_at(number: int, action: Callable[[Path], Any], out: Path) -> str:
    """Run ``action`` in a child whose disk is full from its ``number``-th change of a file on.

    Returns what it said, or nothing where it came to its end before.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        left = number

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event not in {"open", "os.rename", "os.mkdir"} or not str(arguments[0]).startswith(str(out)):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            left -= 1
            if left <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        try:
            sys.addaudithook(hook)
            action(out)
        except KitError as exc:
            os.write(writing, str(exc).encode())
        except BaseException as exc:
            os.write(writing, f"not named: {exc!r}".encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode()


def seen(out: Path, parties: tuple[str, ...]) -> set[tuple[int, int] | str]:
    """Return which states the parties see: (generation, revision), or why they refuse their kits."""
    found: set[tuple[int, int] | str] = set()
    for party in ("cloud", "owner", *parties):
        load = {"cloud": load_cloud_kit, "owner": load_owner_kit}.get(party, load_site_kit)
        try:
            federation = load(out / party).federation
            found.add((federation.generation, federation.revision))
        except ProvisionInterruptedError as exc:
            assert "Run the same command again" in str(exc)
            found.add("interrupted")
        except KitError as exc:
            found.add(f"{type(exc).__name__}: {exc.problem[:40]}")
    return found


def check_full_disk(name: str, number: int, made: Path | None, out: Path) -> bool:
    """Fill the disk at one step: the command says so, and what it says of the kits is true."""
    if made is not None:
        shutil.copytree(made, out)
    before = seen(out, SITES)
    said = refused_at(number, ACTIONS[name], out)
    new, parties = AFTER[name], PARTIES[name]
    if said:
        assert "No space left on device" in said, f"step {number}: {said}"
        begun, nowhere = "had begun" in said, "There can be no kits" in said
        assert nowhere or "the same command again" in said, f"step {number}: {said}"
        assert begun or nowhere or "nothing was changed" in said, f"step {number}: {said}"
        assert seen(out, SITES) == ({"interrupted"} if begun else before), f"step {number}: {said}"
        ACTIONS[name](out)
    assert seen(out, parties) == {new}, f"step {number}: done once, not twice"
    rest = [path for path in out.rglob("*") if path.name.startswith((".", "pending"))]
    assert rest == [], f"step {number}"
    return bool(said)


Check = Callable[[str, int, Path | None, Path], bool]


def check_kill(name: str, number: int, made: Path | None, out: Path) -> bool:
    """Kill at one step, look, run the same command again, look again."""
    if made is not None:
        shutil.copytree(made, out)
    killed = killed_at(number, ACTIONS[name], out)
    new, parties = AFTER[name], PARTIES[name]
    if not killed:
        assert seen(out, parties) == {new}
        return False
    old_parties = parties if name != "add" else SITES
    states = seen(out, old_parties)
    if name == "create":
        whole = states == {new}
        assert states in ({new}, {"interrupted"}) or all("no startup kit" in str(state) for state in states)
    else:
        whole = states == {new}
        assert states in ({(1, 0)}, {new}, {"interrupted"}), f"step {number}: {states}"
    identifier = read_manifest(out / "a").federation if (out / "a" / NAME).exists() else ""
    try:
        ACTIONS[name](out)
        expected = (new[0] + 1, 0) if whole and name == "rotate" else new
    except ConfigError as exc:
        assert whole, f"step {number}: {exc}"  # it had been done, and cannot be done twice
        expected = new
    assert seen(out, parties) == {expected}, f"step {number}: done once, not twice"
    if name != "create":
        assert read_manifest(out / "a").federation == identifier
    rest = [path for path in out.rglob("*") if path.name.startswith((".", "pending"))]
    assert rest == [], f"step {number}"
    return True


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "kits"
    create(folder)
    return folder


def run(name: str, made: Path, folder: Path, numbers: range, check: Check = check_kill) -> int:
    """Check many steps; return how many were checked before the command came to its end."""
    for count, number in enumerate(numbers):
        out = folder / f"kits-{number}"
        stopped = check(name, number, None if name == "create" else made, out)
        shutil.rmtree(out)
        if not stopped:
            return count
    raise AssertionError("the command has more steps than were tried")


@pytest.mark.parametrize("name", ["create", "add", "revoke", "rotate"])
@pytest.mark.slow
def test_a_kill_at_any_step_leaves_the_old_state_or_the_new_one(
    name: str, made: Path, tmp_path: Path
) -> None:
    assert run(name, made, tmp_path, range(1, 400)) > 40


@pytest.mark.parametrize("name", ["create", "rotate"])
def test_a_kill_at_some_steps_leaves_the_old_state_or_the_new_one(
    name: str, made: Path, tmp_path: Path
) -> None:
    """The same for a few steps: before, at and after the moment of change."""
    assert run(name, made, tmp_path, range(1, 400, 12)) > 4


@pytest.mark.parametrize("name", ["create", "add", "revoke", "rotate"])
@pytest.mark.slow
def test_a_full_disk_at_any_step_is_named_and_mended_by_the_same_command(
    name: str, made: Path, tmp_path: Path
) -> None:
    assert run(name, made, tmp_path, range(1, 400), check_full_disk) > 30


@pytest.mark.parametrize("name", ["create", "rotate"])
def test_a_full_disk_at_some_steps_is_named_and_mended_by_the_same_command(
    name: str, made: Path, tmp_path: Path
) -> None:
    assert run(name, made, tmp_path, range(1, 400, 25), check_full_disk) > 1


def test_what_lay_in_a_folder_before_is_not_touched(tmp_path: Path) -> None:
    """Neither by a creation there nor by one that ends what an interrupted one had begun."""
    out = tmp_path / "out"
    for party in ("a", "cloud", "dealer"):
        (out / party).mkdir(parents=True)
        (out / party / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match=f"{party} holds other files"):
            create(out)
        assert [path.name for path in out.rglob("*")] == [party, "notes.txt"]
        shutil.rmtree(out / party)
    create(out)
    (out / "d").mkdir()
    (out / "d" / "signing.key").write_text("mine")
    with pytest.raises(ConfigError, match="d holds other files"):
        add_sites(out, ["d"])
    assert (out / "d" / "signing.key").read_text() == "mine"


def test_an_interrupted_creation_leaves_no_key_of_a_site_that_is_left_out_the_second_time(
    tmp_path: Path,
) -> None:
    """The stage of a kit holds its secrets; another list of sites the second time must not leave it there."""
    out = tmp_path / "kits"
    for folder in (".c.new", "c"):
        (out / folder).mkdir(parents=True)
        (out / folder / "signing.key").write_bytes(b"secret")
    (out / ".creating").write_text(json.dumps(["cloud", "owner", *SITES]))
    shared = shared_part(make_config("federation.sites=2", "federation.min_contributors=2"))
    create_kits(shared, ["a", "b"], out, address=ADDRESS)
    assert not list(out.rglob(".*")) and not list(out.glob("c/*"))


def test_nothing_is_changed_where_the_creation_was_interrupted(tmp_path: Path) -> None:
    create(tmp_path / "kits")
    (tmp_path / "kits" / ".creating").write_text(json.dumps(["cloud", "owner", *SITES]))
    for action in (rotate_keys, lambda out: add_sites(out, ["d"]), lambda out: revoke_sites(out, ["c"])):
        with pytest.raises(ProvisionInterruptedError, match="action=create again"):
            action(tmp_path / "kits")
    (tmp_path / "kits" / ".creating").write_text("{")
    with pytest.raises(KitError, match="damaged"):
        create(tmp_path / "kits")


def test_an_interrupted_change_does_not_swallow_another_one(made: Path, tmp_path: Path) -> None:
    """The same action for another address is another change: the first is finished, then it is done too."""
    out = tmp_path / "kits"
    shutil.copytree(made, out)
    for number in range(60, 400, 4):
        assert killed_at(number, lambda out: rotate_keys(out, address="127.0.0.1:1111"), out)
        if (out / "dealer" / "pending").exists():
            break
        shutil.rmtree(out)
        shutil.copytree(made, out)
    change = rotate_keys(out, address="127.0.0.1:2222")
    assert (change.resumed, change.federation.address) == (False, "127.0.0.1:2222")
    assert change.federation.generation == 3


def with_rounds(rounds: int, **others: int) -> Callable[[Any], Any]:
    return lambda shared: {**shared, "federation": {**shared["federation"], "rounds": rounds, **others}}


def stopped_after_its_moment_of_change(
    out: Path, monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]
) -> None:
    class Stop(BaseException):
        pass

    def stop(_out: Path) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(transaction, "resume", stop)
        action()
    assert (out / "dealer" / "pending").exists()


REPEATED: dict[str, Callable[..., Any]] = {
    "add": lambda out, **more: add_sites(out, ["d"], **more),
    "revoke": lambda out, **more: revoke_sites(out, ["c"], **more),
}


@pytest.mark.parametrize("name", ["add", "revoke"])
@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"revise": with_rounds(8)}, r"federation.rounds=7.*Found.*federation.rounds=8"),
        ({}, r"federation.rounds=7.*Found.*federation.rounds=3"),
        ({"revise": with_rounds(7, round_timeout=9)}, r"Found.*federation.round_timeout=9"),
        ({"revise": with_rounds(7), "address": "127.0.0.1:2"}, r"Found.*runtime.address='127.0.0.1:2'"),
        ({"revise": with_rounds(7), "hosts": ["localhost"]}, r"Found.*provision.hosts=\['localhost'\]"),
    ],
    ids=["another-value", "left-out", "one-more", "address", "hosts"],
)
def test_an_interrupted_command_is_not_given_again_with_other_settings(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    other: dict[str, Any],
    told: str,
) -> None:
    out = tmp_path / "kits"
    shutil.copytree(made, out)
    action, parties = REPEATED[name], PARTIES[name]
    stopped_after_its_moment_of_change(out, monkeypatch, lambda: action(out, revise=with_rounds(7)))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ProvisionInterruptedError, match=f"was interrupted.*other settings.*{told}"):
        action(out, **other)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    change = action(out, revise=with_rounds(7))
    assert change.resumed
    assert {NAME, "kit.json", "keys.wrapped"} <= set(change.files["a"]), (
        "whoever copies these has a whole kit"
    )
    assert seen(out, parties) == {AFTER[name]}
    assert load_site_kit(out / "a").federation.shared["federation"]["rounds"] == 7


def test_an_interrupted_rotation_with_other_settings_is_finished_and_the_new_one_done_too(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotation can be done again: the settings given last hold, and what was finished first is said."""
    out = tmp_path / "kits"
    shutil.copytree(made, out)
    stopped_after_its_moment_of_change(out, monkeypatch, lambda: rotate_keys(out, revise=with_rounds(7)))
    change = rotate_keys(out, revise=with_rounds(8))
    assert (change.resumed, change.finished) == (False, "action=rotate federation.rounds=7")
    assert seen(out, SITES) == {(3, 0)}
    assert load_site_kit(out / "a").federation.shared["federation"]["rounds"] == 8


def test_another_command_after_an_interrupted_one_names_it_and_all_files(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first command wrote has reached nobody yet: it is on the list of files as well."""
    out = tmp_path / "kits"
    shutil.copytree(made, out)
    stopped_after_its_moment_of_change(out, monkeypatch, lambda: add_sites(out, ["d"]))
    change = rotate_keys(out)
    assert (change.resumed, change.finished) == (False, "action=add sites=[d]")
    assert change.new == ("d",), "which needs its whole kit"
    assert {"signing.key", "ca.crt", "keys.wrapped", NAME} <= set(change.files["d"])
    assert seen(out, PARTIES["add"]) == {(2, 0)}
    assert rotate_keys(out).finished == ""


def test_commands_at_the_same_time_are_done_one_by_one_or_refused(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "kits"
    shutil.copytree(made, out)
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                rotate_keys(out)
            except KitError as exc:
                os._exit(7 if "at work" in str(exc) else 3)
            except BaseException:
                os._exit(4)
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert set(codes) <= {0, 7} and 0 in codes, codes
    assert seen(out, SITES) == {(1 + codes.count(0), 0)}


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_place_that_can_hold_no_kits_is_named(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KitError, match="There can be no kits"):
        create(tmp_path / out)


def test_the_search_sees_a_mix_where_nobody_refuses_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the refusal, some step shows old and new kits side by side: the check above can fail."""
    monkeypatch.setattr(loading, "interrupted", lambda _out: False)
    for number in range(55, 200, 6):
        out = tmp_path / f"kits-{number}"
        shutil.copytree(made, out)
        if not killed_at(number, rotate_keys, out):
            break
        if len(seen(out, SITES)) > 1:
            return
    raise AssertionError("no mix was found")
