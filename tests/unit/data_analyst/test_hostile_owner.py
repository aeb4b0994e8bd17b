"""An owner, or a gateway, that means harm; a second process; a disk that is full or has spoilt a file."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import sqlite3
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import httpx
import pytest
from owner_world import new_identity, pixels

from flep_fl.contracts import archive, owner_api
from flep_fl.contracts.errors import (
    ConfigError,
    FetchError,
    GrantError,
    KeystoreError,
    OwnerPinError,
    TamperedReleaseError,
)
from flep_fl.contracts.files import create_secret, lock_exclusively
from flep_fl.contracts.owner_records import IndexPage, RecordPage
from flep_fl.data_analyst import fetch as fetching
from flep_fl.data_analyst import keystore as keystores
from flep_fl.data_analyst import owner_client
from flep_fl.data_analyst.keystore import Keystore
from flep_fl.data_analyst.owner_client import OwnerClient, parse_address
from flep_fl.data_owner.certificates import TlsFiles, create_authority, issue_certificate, server_context
from flep_fl.reporting.console import say


def folder_of(fetched):
    return fetched.archive.path


# --- a hostile owner or gateway --------------------------------------------------------------------------


def test_an_index_that_never_ends_is_given_up(world):
    world.server.tamper = lambda path, answer: (
        IndexPage(b"", (answer.cursor or 20) + 1) if path == "index" else answer
    )
    with pytest.raises(FetchError, match="lead nowhere"):
        world.fetch()
    assert len(world.asked("index")) < 5


def test_an_index_that_never_ends_in_full_pages_is_given_up(world):
    def endless(path, answer):
        if path != "index":
            return answer
        if len(world.asked("index")) > 20:
            raise ConnectionError
        return IndexPage(bytes(8 * archive.ENTRY_BYTES), 1000 + len(world.asked("index")))

    world.server.tamper = endless
    with pytest.raises(TamperedReleaseError, match="index is not the one"):
        world.fetch()
    assert len(world.asked("index")) == 3  # 24 entries of 20


def test_an_index_that_holds_something_twice_is_refused(world):
    (fetched,) = world.fetch()
    head = fetched.archive.head
    entries = archive.unpack_index((folder_of(fetched) / archive.INDEX).read_bytes())
    # Of one split and length, so that nothing but the double shows.
    pair = [entry for entry in entries if entry.split == "train"][:2]
    place = entries.index(pair[1])
    for name, words in (("record_id", "names a record twice"), ("digest", "holds one record twice")):
        doubled = list(entries)
        doubled[place] = replace(pair[1], **{name: getattr(pair[0], name)})
        index = b"".join(entry.pack() for entry in doubled)
        signed = replace(head, index_sha256=hashlib.sha256(index).hexdigest())
        with pytest.raises(TamperedReleaseError, match=words):
            fetching._checked_index(index, signed)


def test_a_redirect_is_not_followed(world):
    class Elsewhere(BaseHTTPRequestHandler):
        def log_message(self, *_arguments):
            pass

        def do_GET(self):
            self.send_response(302)
            self.send_header("location", world.server.url + self.path)
            self.send_header("content-length", "0")
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        with pytest.raises(FetchError, match="refused"):
            world.fetch(address=f"http://127.0.0.1:{server.server_address[1]}")
        assert world.server.requests == []
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_owner_whose_certificate_does_not_verify_is_named_and_the_cache_is_no_way_out(world, tmp_path):
    root, own, other = (TlsFiles(tmp_path / f"{name}.crt", tmp_path / f"{name}.pem") for name in "roe")
    for authority in (root, other):
        create_authority(authority.certificate, authority.private_key, name="an owner")
    issue_certificate(root, own, name="gateway", hosts=["127.0.0.1"])
    listening = world.server._http
    listening.socket = server_context(own).wrap_socket(listening.socket, server_side=True)
    address = parse_address(world.server.url.replace("http:", "https:"))

    def fetch(ca):
        return fetching.fetch_owner(address, world.me, world.keystore, world.folder / "cache", ca=ca)

    (fetched,) = fetch(root.certificate)
    assert fetched.downloaded == 20
    for ca in (None, other.certificate):
        with pytest.raises(FetchError, match=r"cannot be verified.*data\.owner_ca=FILE"):
            fetch(ca)
    with pytest.raises(ConfigError, match="cannot be read as certificates"):
        fetch(tmp_path / "none.crt")


def answered(status, content=b"", headers=()):
    # A stream, as from a socket; ``content=`` would count as read already.
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(content))


def asking(answers, slept):
    """A client whose requests get these answers, in turn; gives it and the requests."""
    requests = []

    def answer(request):
        requests.append(request)
        return answers.pop(0)

    client = OwnerClient(parse_address("http://127.0.0.1:1"), new_identity(), sleep=slept.append)
    client._http = httpx.Client(transport=httpx.MockTransport(answer))
    client._audience = bytes(32)
    return client, requests


def test_a_busy_owner_is_asked_again_when_it_says_and_never_by_the_same_request():
    busy = [(429, {"retry-after": "3"}), (503, {"retry-after": "999"}), (502, {"retry-after": "soon"})]
    answers = [answered(status, headers=headers) for status, headers in busy]
    slept = []
    client, requests = asking([*answers, answered(200, b'{"grants": []}')], slept)
    assert client.grants() == []
    # The owner's wish (at most ten seconds), and a pause that grows.
    assert slept[0] == 3.0 and slept[2] == 10.0 and len(slept) == 5
    assert len({request.headers["signature-input"] for request in requests}) == 4
    client, requests = asking([answered(404, b"{}")], slept)
    with pytest.raises(FetchError, match="refused"):
        client.grants()
    assert len(requests) == 1


@pytest.mark.parametrize("cursor", ["x", "-1", "1" * 20, "1.0", "\u00b2"])
def test_a_cursor_that_is_no_number_is_named(cursor):
    headers = [(owner_api.CURSOR_HEADER.encode(), cursor.encode("latin-1"))]
    client, _ = asking([answered(200, headers=headers)], [])
    with pytest.raises(FetchError, match="cursor that is no number"):
        client.index("1" * 32, "2" * 32, 0, 10)


def test_no_proxy_of_the_environment_stands_between(world, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    (fetched,) = world.fetch()
    assert fetched.downloaded == 20


def test_records_that_never_come_are_given_up(world):
    def empty(path, answer):
        if path != "records":
            return answer
        if len(world.asked("records")) > 20:
            raise ConnectionError
        return RecordPage((), 100 + len(world.asked("records")))  # a cursor that leads on, without end

    world.server.tamper = empty
    with pytest.raises(TamperedReleaseError, match="dropped"):
        world.fetch()
    assert len(world.asked("records")) == 1


def test_more_records_than_a_machine_can_hold_are_refused(world, monkeypatch):
    monkeypatch.setattr(fetching, "MAX_INDEX_BYTES", 19 * archive.ENTRY_BYTES)
    with pytest.raises(FetchError, match="more records than can be fetched") as caught:
        world.fetch()
    assert "at most 19" in str(caught.value) and not world.asked("index")


@pytest.mark.parametrize("change", [{"train": 16}, {"test": 4}, {"train": 14, "test": 6}])
def test_an_index_that_does_not_fit_the_manifest_is_found_before_the_download(world, change):
    (fetched,) = world.fetch()
    index = (folder_of(fetched) / archive.INDEX).read_bytes()
    head = fetched.archive.head
    assert len(fetching._checked_index(index, head)) == 20
    wrong = replace(head, manifest=replace(head.manifest, **change))
    with pytest.raises(TamperedReleaseError, match="does not fit its manifest"):
        fetching._checked_index(index, wrong)
    with pytest.raises(TamperedReleaseError, match="does not fit its manifest"):
        fetching._checked_index(index, replace(head, records_bytes=head.records_bytes + 1))


def test_an_answer_is_not_unpacked(world):
    bomb = gzip.compress(bytes(1 << 20))
    answer = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(bomb))
    assert owner_client._read(answer, 1 << 16) == bomb


def test_an_answer_that_is_too_large_is_not_read_to_its_end():
    sent = []

    def endless():
        while True:
            sent.append(1)
            yield bytes(1000)

    with pytest.raises(FetchError, match="too large"):
        owner_client._read(SimpleNamespace(iter_raw=endless), 10_000)
    assert len(sent) == 11


def test_an_answer_that_drips_is_given_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(owner_client.time, "monotonic", lambda: now[0])

    def drip(size, seconds, parts):
        for _ in range(parts):
            now[0] += seconds
            yield bytes(size)

    slow = SimpleNamespace(iter_raw=lambda: drip(1, 50.0, 1000))
    with pytest.raises(FetchError, match="too slowly"):
        owner_client._read(slow, 10_000)
    assert now[0] < 200
    steady = SimpleNamespace(iter_raw=lambda: drip(owner_client.SLOWEST, 1.0, 300))
    assert len(owner_client._read(steady, 1 << 30)) == 300 * owner_client.SLOWEST


def test_names_and_reasons_of_others_do_not_steer_the_terminal(capsys):
    say("cells\x1b[2J\x9b0m\u202e: 3 records\tfetched é")
    assert capsys.readouterr().out == "cells?[2J?0m?: 3 records\tfetched é\n"


# --- what was seen once cannot be played back ------------------------------------------------------------


def test_an_old_release_is_refused_even_after_its_key_was_destroyed(world):
    (first,) = world.fetch()
    world.fill(4, start=100)
    world.book.release()
    (second,) = world.fetch()
    owner, dataset = second.document.owner, second.document.dataset
    assert (first.document.release_number, second.document.release_number) == (1, 2)
    for _ in range(2):
        world.keystore.forget(owner, dataset)
        assert world.keystore.grants(expired=True) == []
        with pytest.raises(GrantError, match="older than one that was seen"):
            world.keystore.store(first.document, first.bundle)
    world.keystore.store(second.document, second.bundle)
    # Forgetting the owner is the user's word that all of it is over.
    world.keystore.forget_owner(world.server.url)
    world.keystore.store(first.document, first.bundle)


# --- two processes, and files that are not what they were ------------------------------------------------


def test_two_processes_do_not_fill_one_folder(world):
    (fetched,) = world.fetch()
    folder = folder_of(fetched)
    shutil.rmtree(folder)
    held = lock_exclusively(folder.with_name(folder.name + ".lock"))
    with pytest.raises(FetchError, match="another process is fetching cells"):
        world.fetch()
    os.close(held)
    assert not folder.exists()
    (again,) = world.fetch()
    assert again.downloaded == 20


def test_a_record_that_the_disk_spoilt_is_fetched_again(world):
    (fetched,) = world.fetch()
    records = folder_of(fetched) / archive.RECORDS
    data = bytearray(records.read_bytes())
    data[len(data) // 2] ^= 1
    records.write_bytes(data)
    (again,) = world.fetch()
    assert again.downloaded > 0
    assert [len(split) for split in pixels(again)] == [15, 5]


@pytest.mark.parametrize("damage", ["claims more", "index cut", "index shorter", "index gone"])
def test_a_half_written_download_is_not_taken_for_more_than_it_is(world, damage):
    (fetched,) = world.fetch()
    folder = folder_of(fetched)
    part = folder.with_name(folder.name + ".part")
    folder.rename(part)
    (part / archive.MANIFEST).unlink()
    state = json.loads((part / "fetch.json").read_bytes())
    size = (part / archive.RECORDS).stat().st_size
    if damage == "claims more":
        # What a second process, or a power failure, may leave: the state of records that are not here.
        with (part / archive.RECORDS).open("r+b") as file:
            file.truncate(size // 2)
        (part / "fetch.json").write_text(json.dumps(state | {"records": 18}))
    elif damage == "index cut":
        (part / archive.INDEX).write_bytes((part / archive.INDEX).read_bytes()[:-5])
    elif damage == "index shorter":
        (part / archive.INDEX).write_bytes((part / archive.INDEX).read_bytes()[: 5 * archive.ENTRY_BYTES])
    else:
        (part / archive.INDEX).unlink()
    (again,) = world.fetch()
    assert [len(split) for split in pixels(again)] == [15, 5]


def test_a_disk_without_room_is_named_before_anything_is_fetched(world, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _path: SimpleNamespace(free=100))
    with pytest.raises(FetchError, match="does not fit on the disk"):
        world.fetch()
    assert not world.asked("records")


# --- the keystore ----------------------------------------------------------------------------------------


def test_processes_that_make_a_keystore_at_once_make_one(tmp_path):
    path, key = tmp_path / "keystore.db", tmp_path / "keystore.key"
    barrier, errors = threading.Barrier(8), []

    def work(number):
        barrier.wait()
        try:
            with Keystore(path, key_file=key) as opened:
                opened.pin(f"https://owner-{number}", bytes([number]) * 32)
        except KeystoreError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with Keystore(path, key_file=key) as opened:
        assert len(opened.owners()) == 8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["keystore.db", "keystore.key"]


def in_between(monkeypatch, method, mine, act):
    """Let ``act`` run in another thread, on a connection of its own, right after ``mine`` has read."""
    thread = threading.Thread(target=act)
    original = getattr(Keystore, method)

    def reading(store, *given):
        found = original(store, *given)
        if store is mine and thread.ident is None:
            thread.start()
            thread.join(0.3)  # where it has to wait for this one, it goes on afterwards
        return found

    monkeypatch.setattr(Keystore, method, reading)
    return thread


@pytest.mark.parametrize("action", ["store", "forget"])
def test_a_process_does_not_put_an_older_release_in_a_newer_ones_place(world, monkeypatch, action):
    (first,) = world.fetch()
    world.fill(4, start=100)
    world.book.release()
    (second,) = world.fetch()
    owner, dataset = second.document.owner, second.document.dataset
    mine = world.keystore
    mine.forget_owner(world.server.url)
    with Keystore(mine.path, key_file=world.folder / "keys" / "keystore.key") as other:
        if action == "forget":
            mine.store(first.document, first.bundle)
        thread = in_between(monkeypatch, "_seen", mine, lambda: other.store(second.document, second.bundle))
        if action == "store":
            mine.store(first.document, first.bundle)
        else:
            mine.forget(owner, dataset)
        thread.join()
    assert mine.held(owner, dataset).document == second.document
    with pytest.raises(GrantError, match="older than one that was seen"):
        mine.store(first.document, first.bundle)


def test_two_processes_that_see_an_owner_first_do_not_pin_two_keys(tmp_path, monkeypatch):
    path, key, errors = tmp_path / "keystore.db", tmp_path / "keystore.key", []

    def act():
        try:
            other.pin("https://owner", b"2" * 32)
        except OwnerPinError as error:
            errors.append(error)

    with Keystore(path, key_file=key) as mine, Keystore(path, key_file=key) as other:
        thread = in_between(monkeypatch, "pinned", mine, act)
        assert mine.pin("https://owner", b"1" * 32)
        thread.join()
        assert len(errors) == 1 and other.pinned("https://owner") == b"1" * 32


def test_a_keystore_is_made_by_one_of_two_processes_at_once(tmp_path, monkeypatch):
    path, key, errors, made = tmp_path / "keystore.db", tmp_path / "keystore.key", [], []
    second_reads = threading.Event()
    create = Keystore._create

    def creating(store, kind):
        made.append(store)
        if len(made) == 1:
            thread.start()
            second_reads.wait(0.3)  # it cannot read before this one has made its tables
        else:
            second_reads.set()
        create(store, kind)

    def work():
        try:
            Keystore(path, key_file=key).close()
        except KeystoreError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    monkeypatch.setattr(Keystore, "_create", creating)
    work()
    thread.join()
    assert errors == [] and len(made) == 1


def test_what_fails_within_a_change_of_the_keystore_undoes_all_of_it(world, monkeypatch):
    (fetched,) = world.fetch()
    owner, dataset = fetched.document.owner, fetched.document.dataset
    monkeypatch.setattr(Keystore, "_delete", lambda *_given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.keystore.forget(owner, dataset)
    monkeypatch.undo()
    assert world.keystore._all("seen") == []
    assert world.keystore.held(owner, dataset).document == fetched.document
    world.keystore.forget(owner, dataset)
    assert world.keystore.grants(expired=True) == [] and len(world.keystore._all("seen")) == 1


def test_no_build_of_sqlite_makes_the_keystore_less_safe(tmp_path, monkeypatch):
    connect = sqlite3.connect

    def careless(*given, **settings):
        made = connect(*given, **settings)
        for pragma in ("secure_delete=OFF", "synchronous=OFF", "journal_mode=MEMORY"):
            made.execute(f"PRAGMA {pragma}")
        return made

    monkeypatch.setattr(sqlite3, "connect", careless)
    with Keystore(tmp_path / "k.db", key_file=tmp_path / "k.key") as opened:
        pragmas = ("secure_delete", "synchronous", "journal_mode")
        found = [opened._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]
    assert found == [1, 2, "delete"]  # 2 is FULL: a change is on the disk


def test_a_secret_is_made_once(tmp_path):
    assert create_secret(tmp_path / "new" / "key", b"first")
    assert not create_secret(tmp_path / "new" / "key", b"second")
    assert (tmp_path / "new" / "key").read_bytes() == b"first"
    assert (tmp_path / "new" / "key").stat().st_mode & 0o777 == 0o600
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_a_full_disk_costs_the_keystore_nothing_that_it_held(world):
    (fetched,) = world.fetch()
    pages = world.keystore._connection.execute("PRAGMA page_count").fetchone()[0]
    world.keystore._connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(KeystoreError, match="full"):
        for number in range(100):
            world.keystore.pin(f"https://{number}" + "x" * 500, bytes(32))
    held = world.keystore.held(fetched.document.owner, "cells")
    assert held.bundle.key_id == fetched.bundle.key_id


@pytest.mark.parametrize("change", ["salt = NULL", "cost = 3", "cost = 'x'", "cost = 1 << 40", "salt = 7"])
def test_a_damaged_head_is_named(tmp_path, monkeypatch, change):
    monkeypatch.setattr(keystores, "SCRYPT_COST", 2)
    path = tmp_path / "keystore.db"
    with Keystore(path, passphrase="long enough") as opened:
        opened._connection.execute(f"UPDATE head SET {change}")
    with pytest.raises(KeystoreError, match="damaged"):
        Keystore(path, passphrase="long enough")


def test_a_folder_in_the_keystores_place_is_named(tmp_path):
    (tmp_path / "keystore.db").mkdir()
    with pytest.raises(KeystoreError, match="cannot be used"):
        Keystore(tmp_path / "keystore.db", key_file=tmp_path / "key")
