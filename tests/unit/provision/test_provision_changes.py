"""Adding, revoking and rotating: who can open what afterwards, and what people are told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from federations import make_config

from flep_fl.config import shared_part
from flep_fl.contracts.errors import (
    ConfigError,
    ConfigMismatchError,
    KitDealerError,
    KitError,
    KitMismatchError,
    KitOutdatedError,
    KitPermissionError,
    ProvisionInterruptedError,
)
from flep_fl.model_security.keyring import ModelKey
from flep_fl.provision import command
from flep_fl.provision.dealer import load_dealer
from flep_fl.provision.fingerprints import fingerprints
from flep_fl.provision.kits import (
    add_sites,
    create_kits,
    forget_previous,
    load_cloud_kit,
    load_owner_kit,
    load_site_kit,
    revoke_sites,
    rotate_keys,
)
from flep_fl.provision.manifest import read_manifest
from flep_fl.provision.wrapped_keys import unwrap_keys

SITES = ("a", "b", "c", "d")
ADDRESS = "127.0.0.1:9092"
UPDATE = ("kit.json", "manifest.json", "keys.wrapped")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of four that nobody has used yet."""
    folder = tmp_path_factory.mktemp("made") / "kits"
    config = make_config("federation.sites=4")
    create_kits(shared_part(config), SITES, folder, address=ADDRESS)
    return folder


@pytest.fixture
def kits(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "kits"))


@pytest.fixture(scope="module")
def without_c(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same federation after c was revoked; c's folder is as it was."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("revoked") / "kits"))
    revoke_sites(folder, ["c"])
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "state" not in path.relative_to(folder).parts[1:-1]
    }


# --- rotate --------------------------------------------------------------------------------------


def test_a_rotation_replaces_both_keys_and_keeps_the_old_ones_until_they_are_forgotten(kits: Path) -> None:
    old = load_site_kit(kits / "a")
    assert old.previous == ()
    change = rotate_keys(kits)
    new = load_site_kit(kits / "a")
    assert (new.federation.generation, new.federation.revision) == (2, 0)
    assert new.model_key != old.model_key
    assert new.check_key != old.check_key
    assert ModelKey.from_bytes(new.model_key or b"").key_id == new.federation.key_id != old.federation.key_id
    (kept,) = new.previous
    assert (kept.generation, kept.key_id) == (1, old.federation.key_id)
    assert (kept.model_key, kept.check_key) == (old.model_key, old.check_key)
    assert new.federation.digest != old.federation.digest, "parties of two generations refuse each other"
    secret = {"signing.key", "decryption.key", "node.key", "server.key"}
    assert not [name for names in change.files.values() for name in names if name in secret]
    assert (
        load_cloud_kit(kits / "cloud").context == ModelKey.from_bytes(new.model_key or b"").public_context()
    )
    assert load_owner_kit(kits / "owner").federation == new.federation

    forget_previous(new)
    assert load_site_kit(kits / "a").previous == ()
    assert not list((kits / "a").glob("previous-*"))
    assert load_site_kit(kits / "b").previous != (), "each site forgets for itself"
    forget_previous(load_site_kit(kits / "a"))


def test_forgotten_keys_do_not_come_back_with_the_dealers_files(kits: Path, tmp_path: Path) -> None:
    rotate_keys(kits)
    shipped = Path(shutil.copytree(kits / "a", tmp_path / "shipped"))
    forget_previous(load_site_kit(kits / "a"))
    for path in shipped.iterdir():
        shutil.copy2(path, kits / "a")
    assert (kits / "a" / "previous-1.wrapped").exists()
    assert load_site_kit(kits / "a").previous == ()
    assert not (kits / "a" / "previous-1.wrapped").exists()
    rotate_keys(kits)
    assert [keys.generation for keys in load_site_kit(kits / "a").previous] == [2]
    assert [keys.generation for keys in load_site_kit(kits / "b").previous] == [2, 1]


def test_a_crash_while_forgetting_forgets_all_the_same(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate_keys(kits)
    kit = load_site_kit(kits / "a")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_a, **_k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            forget_previous(kit)
    assert (kits / "a" / "previous-1.wrapped").exists()
    assert load_site_kit(kits / "a").previous == ()
    assert not (kits / "a" / "previous-1.wrapped").exists()


def test_rotations_without_a_sum_between_them_keep_a_bounded_number_of_old_keys(kits: Path) -> None:
    for _ in range(5):
        rotate_keys(kits)
    # before any party reads its kit, which removes what the manifest does not name
    assert sorted(path.name for path in (kits / "b").glob("previous-*")) == [
        f"previous-{number}.wrapped" for number in (3, 4, 5)
    ]
    kit = load_site_kit(kits / "b")
    assert [keys.generation for keys in kit.previous] == [5, 4, 3]


def test_a_rotation_renews_the_clouds_certificate_for_the_key_that_it_has(kits: Path) -> None:
    from cryptography import x509

    paths = [kits / "cloud" / name for name in ("server.crt", "server.key", "ca.crt")]
    before = [path.read_bytes() for path in paths]
    rotate_keys(kits, address="10.1.2.3:9092", hosts=["fl.example.org"])
    after = [path.read_bytes() for path in paths]
    assert after[0] != before[0]
    assert after[1:] == before[1:]
    old, new = (x509.load_pem_x509_certificate(pem) for pem in (before[0], after[0]))
    assert new.public_key() == old.public_key()
    names = new.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "10.1.2.3" in map(str, names.get_values_for_type(x509.IPAddress))
    assert "fl.example.org" in names.get_values_for_type(x509.DNSName)
    federation = load_site_kit(kits / "a").federation
    assert (federation.address, federation.tls) == ("10.1.2.3:9092", True)


def names_of(certificate: Path) -> set[str]:
    from cryptography import x509

    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*map(str, names.get_values_for_type(x509.IPAddress)), *names.get_values_for_type(x509.DNSName)}


def test_an_addition_renews_the_certificate_where_the_cloud_moves_and_only_there(kits: Path) -> None:
    """The names that sites dial today stay good, beside the new one."""
    certificate = kits / "cloud" / "server.crt"
    rotate_keys(kits, hosts=["fl.example.org"])
    first = certificate.read_bytes()
    add_sites(kits, ["e"], address="fl.example.org:9443")
    assert certificate.read_bytes() == first, "it is good for that name already"
    change = add_sites(kits, ["f"], address="10.1.2.3:9092")
    assert certificate.read_bytes() != first
    assert "server.crt" in change.files["cloud"]
    assert {"10.1.2.3", "fl.example.org", "localhost"} <= names_of(certificate)
    load_cloud_kit(kits / "cloud")
    assert load_site_kit(kits / "a").federation.address == "10.1.2.3:9092"


def test_old_keys_that_the_dealer_has_dropped_are_deleted_at_the_site_too(kits: Path, tmp_path: Path) -> None:
    """A site gets new files by copying: what is too old is still there, but the manifest names it no more."""
    rotate_keys(kits)
    theirs = Path(shutil.copytree(kits / "a", tmp_path / "machine-a"))
    for _ in range(3):
        rotate_keys(kits)
    for path in (kits / "a").iterdir():
        shutil.copy2(path, theirs)
    assert (theirs / "previous-1.wrapped").exists()
    assert [keys.generation for keys in load_site_kit(theirs).previous] == [4, 3, 2]
    assert not (theirs / "previous-1.wrapped").exists()


# --- revoke --------------------------------------------------------------------------------------


def test_a_revoked_site_opens_nothing_of_the_next_generation(without_c: Path) -> None:
    revoked = X25519PrivateKey.from_private_bytes((without_c / "c" / "decryption.key").read_bytes())
    dealer = read_manifest(without_c / "a").dealer
    federation = load_site_kit(without_c / "a").federation
    assert "c" not in federation.sites
    assert federation.generation == 2
    assert federation.shared["federation"]["sites"] == 3
    wrapped = sorted(without_c.glob("[abd]/*.wrapped"))
    assert {path.name for path in wrapped} == {"keys.wrapped", "previous-1.wrapped"}
    for path in wrapped:
        with pytest.raises(KitMismatchError):
            unwrap_keys(
                path.read_bytes(),
                name=path.name,
                federation=federation.federation,
                party=path.parent.name,
                private_key=revoked,
                dealer=dealer,
            )
    with pytest.raises(KitMismatchError):
        unwrap_keys(
            (without_c / "a" / "keys.wrapped").read_bytes(),
            name="keys.wrapped",
            federation=federation.federation,
            party="c",
            private_key=revoked,
            dealer=dealer,
        )
    for party in ("cloud", "owner", "a", "b", "d"):
        kit = read_manifest(without_c / party)
        assert kit.generation == 2
    cloud = load_cloud_kit(without_c / "cloud").federation
    assert "c" not in cloud.node_keys()
    assert "c" not in cloud.site_keys()
    assert load_dealer(without_c).ledger.revoked == {"c": 2}


def test_the_revoked_sites_new_files_cannot_be_made_up_from_another_sites(without_c: Path) -> None:
    for name in UPDATE:
        shutil.copy2(without_c / "a" / name, without_c / "c" / name)
    with pytest.raises(KitError):
        load_site_kit(without_c / "c")


def test_too_few_sites_or_unknown_ones_are_refused_and_change_nothing(kits: Path) -> None:
    before = everything(kits)
    with pytest.raises(ConfigError, match="min_contributors"):
        revoke_sites(kits, ["a", "b"])
    with pytest.raises(ConfigError, match="does not have"):
        revoke_sites(kits, ["x"])
    with pytest.raises(ConfigError, match="there is such a site"):
        add_sites(kits, ["a"])
    with pytest.raises(ConfigError, match="sites"):
        add_sites(kits, ["../x"])
    with pytest.raises(ConfigError, match="neither a host name nor"):
        rotate_keys(kits, hosts=["not a name"])
    assert everything(kits) == before


# --- add -----------------------------------------------------------------------------------------


def test_an_added_site_gets_todays_keys_and_no_older_ones(kits: Path) -> None:
    rotate_keys(kits)
    old = load_site_kit(kits / "a")
    before = everything(kits)
    change = add_sites(kits, ["e"])
    new, added = load_site_kit(kits / "a"), load_site_kit(kits / "e")
    assert (new.federation.generation, new.federation.revision) == (2, 1)
    assert new.federation == added.federation == load_cloud_kit(kits / "cloud").federation
    assert sorted(new.federation.sites) == ["a", "b", "c", "d", "e"]
    assert (added.model_key, added.check_key) == (old.model_key, old.check_key)
    assert added.previous == ()
    assert new.previous == old.previous, "an addition makes nobody forget"
    changed = {name for name, data in everything(kits).items() if before.get(name) != data}
    assert {name for name in changed if name[0] in "abcd" and "/" in name and "dealer" not in name} == {
        f"{party}/{name}" for party in ("a", "b", "c", "d", "cloud") for name in ("kit.json", "manifest.json")
    }
    assert list(change.files["a"]) == ["kit.json", "manifest.json"]
    rotate_keys(kits)
    assert [keys.generation for keys in load_site_kit(kits / "e").previous] == [2]


def test_kits_that_were_handed_over_need_not_lie_with_the_dealer(kits: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "machine-a"
    shutil.move(kits / "a", theirs)
    load_site_kit(theirs)
    rotate_keys(kits)
    assert not (kits / "a" / "signing.key").exists()
    for path in (kits / "a").iterdir():
        shutil.copy2(path, theirs)
    assert load_site_kit(theirs).federation.generation == 2
    add_sites(kits, ["e"])
    for path in (kits / "a").iterdir():
        shutil.copy2(path, theirs)
    assert load_site_kit(theirs).federation.revision == 1


# --- mixed up, edited, other generation, other dealer, readable -----------------------------------


@pytest.mark.parametrize("party", ["a", "cloud", "owner"])
def test_every_byte_of_every_file_counts(kits: Path, party: str) -> None:
    load = {"cloud": load_cloud_kit, "owner": load_owner_kit}.get(party, load_site_kit)
    for path in sorted((kits / party).iterdir()):
        if not path.is_file():
            continue
        whole = path.read_bytes()
        for damaged in (whole[:-3], whole + b"\0", bytes([whole[0] ^ 1]) + whole[1:], b""):
            path.write_bytes(damaged)
            with pytest.raises(KitError) as caught:
                load(kits / party)
            assert path.name in str(caught.value) or party in str(caught.value)
            assert caught.value.remedy
        path.write_bytes(whole)
    load(kits / party)


@pytest.mark.parametrize("name", UPDATE)
def test_half_a_copy_is_refused_whichever_half(kits: Path, tmp_path: Path, name: str) -> None:
    theirs = Path(shutil.copytree(kits / "a", tmp_path / "theirs"))
    rotate_keys(kits)
    shutil.copy2(kits / "a" / name, theirs)
    with pytest.raises(KitError, match=r"kit\.json|keys\.wrapped|manifest") as caught:
        load_site_kit(theirs)
    assert "run the same command again" in str(caught.value)
    for other in UPDATE:
        shutil.copy2(kits / "a" / other, theirs)
    assert load_site_kit(theirs).federation.generation == 2, "the previous keys may be missing"


@pytest.mark.parametrize("name", ["signing.key", "decryption.key", "node.key", "keys.wrapped", "kit.json"])
def test_another_sites_file_is_refused(kits: Path, name: str) -> None:
    shutil.copy2(kits / "b" / name, kits / "a" / name)
    with pytest.raises(KitMismatchError, match=name):
        load_site_kit(kits / "a")


def test_a_manifest_without_the_dealers_signature_is_refused(kits: Path) -> None:
    path = kits / "a" / "manifest.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({**text, "generation": 7}))
    with pytest.raises(KitMismatchError, match="signature does not fit"):
        load_site_kit(kits / "a")


def test_an_older_kit_is_refused_after_a_newer_one_was_used(kits: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(kits / "a", tmp_path / "old"))
    rotate_keys(kits)
    load_site_kit(kits / "a")
    for path in old.iterdir():
        shutil.copy2(path, kits / "a")
    with pytest.raises(KitOutdatedError, match="generation 2"):
        load_site_kit(kits / "a")


@pytest.mark.parametrize("party", ["a", "cloud", "owner"])
def test_another_dealers_kit_is_refused_where_one_was_used(kits: Path, tmp_path: Path, party: str) -> None:
    load = {"cloud": load_cloud_kit, "owner": load_owner_kit}.get(party, load_site_kit)
    load(kits / party)
    create_kits(shared_part(make_config("federation.sites=4")), SITES, tmp_path / "evil", address=ADDRESS)
    for path in (tmp_path / "evil" / party).iterdir():
        shutil.copy2(path, kits / party)
    with pytest.raises(KitDealerError, match="telephone"):
        load(kits / party)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"dealer": "zz"}'])
def test_a_damaged_record_of_the_last_kit_is_named(kits: Path, damage: bytes) -> None:
    load_site_kit(kits / "a")
    (kits / "a" / "state" / "provision.json").write_bytes(damage)
    with pytest.raises(KitError, match=r"provision\.json is damaged"):
        load_site_kit(kits / "a")


@pytest.mark.parametrize("name", ["signing.key", "decryption.key", "node.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_readable_secret_is_refused(kits: Path, name: str, mode: int) -> None:
    (kits / "a" / name).chmod(mode)
    with pytest.raises(KitPermissionError, match="chmod 600"):
        load_site_kit(kits / "a")


def test_a_folder_that_others_may_write_and_a_readable_server_key_are_refused(kits: Path) -> None:
    (kits / "a").chmod(0o770)
    with pytest.raises(KitPermissionError, match="chmod 700"):
        load_site_kit(kits / "a")
    (kits / "cloud" / "server.key").chmod(0o644)
    with pytest.raises(KitPermissionError, match="chmod 600"):
        load_cloud_kit(kits / "cloud")
    (kits / "dealer" / "dealer.key").chmod(0o644)
    with pytest.raises(KitPermissionError, match=r"dealer\.key"):
        rotate_keys(kits)


def test_all_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    import os

    before = os.umask(0)
    try:
        create_kits(shared_part(make_config()), ("a", "b", "c"), tmp_path / "kits", address=ADDRESS)
        add_sites(tmp_path / "kits", ["d"])
        rotate_keys(tmp_path / "kits")
        load_site_kit(tmp_path / "kits" / "a")
    finally:
        os.umask(before)
    for path in (tmp_path / "kits").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_without_the_dealers_folder_nothing_can_be_changed(kits: Path) -> None:
    shutil.move(kits / "dealer", kits.parent / "elsewhere")
    with pytest.raises(KitError, match="no dealer's folder"):
        rotate_keys(kits)


@pytest.mark.parametrize("name", ["state.json", "dealer.key", "ca.key", "generation-1.keys"])
def test_a_damaged_dealers_folder_is_named_and_nothing_changes(kits: Path, name: str) -> None:
    (kits / "dealer" / name).write_bytes(b"{}")
    before = everything(kits)
    with pytest.raises(KitError):
        rotate_keys(kits)
    assert everything(kits) == before


def test_a_second_command_at_the_same_time_is_refused(kits: Path) -> None:
    from flep_fl.provision.transaction import locked

    with locked(kits), pytest.raises(KitError, match="at work"):
        rotate_keys(kits)
    rotate_keys(kits)


# --- roles, consents, fingerprints ----------------------------------------------------------------


def test_consents_are_recorded_for_each_site(kits: Path, tmp_path: Path) -> None:
    site = load_site_kit(kits / "a")
    assert site.consents == ()
    assert site.federation.without_consent("mixed") == list(SITES)


def test_fingerprints_tell_every_party_and_key_apart(without_c: Path, made: Path) -> None:
    tables = []
    for folder in (made, without_c):
        dealer = load_dealer(folder)
        tables.append(dict(fingerprints(dealer.ledger.federation, dealer.public_key)))
    old, new = tables
    assert len(set(old.values())) == len(old)
    assert {f"site {name}" for name in SITES} | {"dealer", "cloud", "owner"} < set(old)
    assert old["site a"] == new["site a"]
    assert old["dealer"] == new["dealer"]
    assert old["cloud's certificate"] != new["cloud's certificate"]
    assert "site c" not in new
    changed = load_site_kit(made / "a").federation
    other = dict(fingerprints(changed, bytes(32)))
    assert other["dealer"] != old["dealer"]


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("cloud_verify_key", "cloud"),
        ("cloud_encryption_key", "cloud"),
        ("owner_verify_key", "owner"),
        ("ca_fingerprint", "certificate authority"),
        ("server_fingerprint", "cloud's certificate"),
        ("key_id", "model key, generation 1"),
        ("verify_key", "site b"),
        ("encryption_key", "site b"),
        ("node_key", "site b"),
    ],
)
def test_another_key_of_a_party_changes_its_fingerprint_and_no_other(made: Path, key: str, row: str) -> None:
    """Whoever swaps one key of a kit on its way is heard on the telephone."""
    dealer = load_dealer(made)
    federation = dealer.ledger.federation
    if row == "site b":
        swapped = replace(federation.sites["b"], **{key: getattr(federation.sites["c"], key)})
        changed = replace(federation, sites={**federation.sites, "b": swapped})
    else:
        old = getattr(federation, key)
        changed = replace(federation, **{key: "5" * len(old) if isinstance(old, str) else b"5" * 32})
    before, after = (dict(fingerprints(one, dealer.public_key)) for one in (federation, changed))
    assert {name for name in before if before[name] != after[name]} == {row}
    digits = {len(text.replace(" ", "")) for text in before.values()}
    assert digits == {32}, "128 bits: nobody finds another key with the same fingerprint"


# --- the command ---------------------------------------------------------------------------------


def provision(*overrides: str, capsys: pytest.CaptureFixture[str]) -> str:
    from hydra import compose, initialize_config_dir

    from flep_fl.config import CONFIG_DIR, register

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        cfg = compose("provision", overrides=list(overrides))
    command.run_provision(cfg, list(overrides))
    return capsys.readouterr().out


def test_the_command_changes_a_federation(kits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={kits}"
    printed = provision("action=add", "sites=[e]", out, "federation.rounds=9", capsys=capsys)
    assert "site e" in printed
    assert "the whole kit, over a safe channel" in printed
    assert load_site_kit(kits / "a").federation.shared["federation"]["rounds"] == 9
    printed = provision("action=revoke", "sites=[c]", out, capsys=capsys)
    assert "keys.wrapped" in printed
    assert "signing.key" not in printed
    printed = provision("action=rotate", out, "runtime.address=fl.example.org:9092", capsys=capsys)
    assert "generation 3" in printed
    shown = provision("action=show", f"kit={kits / 'a'}", capsys=capsys)
    assert shown.splitlines()[1:] == [line for line in printed.splitlines() if line in shown][1:]
    assert "fl.example.org:9092" in shown


@pytest.mark.parametrize(
    ("overrides", "error", "match"),
    [
        (["action=rot"], ConfigError, "action=rot"),
        (["action=add"], ConfigError, "sites is not set"),
        (["action=rotate", "sites=[a]"], ConfigError, "for all sites"),
        (["action=rotate", "ckks.profile=classic"], ConfigMismatchError, "ckks.profile"),
        (["action=rotate", "cloud=trusted"], ConfigMismatchError, "cloud.trust"),
        (["action=rotate", "federation.min_contributors=9"], ConfigError, "min_contributors"),
        (["action=rotate", "runtime.address=0.0.0.0:1"], ConfigError, "not what a site can dial"),
    ],
)
def test_a_wrong_command_is_refused_and_changes_nothing(
    kits: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    error: type[Exception],
    match: str,
) -> None:
    before = everything(kits)
    with pytest.raises(error, match=match):
        provision(*overrides, f"out={kits}", capsys=capsys)
    assert everything(kits) == before


def test_interrupted_kits_are_refused_by_name(kits: Path) -> None:
    (kits / "dealer" / "pending").mkdir()
    with pytest.raises(ProvisionInterruptedError, match="same command again"):
        load_site_kit(kits / "a")


@pytest.mark.parametrize("plan", [None, b"{", b"[]", b'{"request": {}}', b'{"request": 1, "files": 2}'])
def test_a_damaged_plan_is_named_and_nothing_is_made_of_it(kits: Path, plan: bytes | None) -> None:
    (kits / "dealer" / "pending").mkdir()
    if plan is not None:
        (kits / "dealer" / "pending" / "plan.json").write_bytes(plan)
    before = everything(kits)
    with pytest.raises(KitError, match=r"damaged|cannot be read"):
        rotate_keys(kits)
    assert everything(kits) == before


def test_a_federation_with_classes_of_its_own_can_be_changed(tmp_path: Path) -> None:
    own = make_config("ckks.scheme=own_schemes.Masks", "allow_targets=[own_schemes]", "federation.sites=4")
    create_kits(shared_part(own), SITES, tmp_path / "kits", address=ADDRESS)
    change = revoke_sites(tmp_path / "kits", ["d"])
    assert change.federation.shared["ckks"]["scheme"] == "own_schemes.Masks"

    def sneak(shared: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
        shared["ckks"]["scheme"] = "others.Scheme"
        return shared

    with pytest.raises(ConfigError, match=r"ckks\.scheme"):
        rotate_keys(tmp_path / "kits", revise=sneak)  # type: ignore[arg-type]
