"""Configuration: every check names the field and the remedy, before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from federations import make_config
from omegaconf import OmegaConf
from PIL import Image

from flep_fl.config import (
    adopt_kit,
    ckks_bound,
    ckks_line,
    ckks_max_examples,
    differences,
    shared_digest,
    shared_part,
)
from flep_fl.contracts.errors import (
    ConfigError,
    ConfigMismatchError,
    EmptyDatasetError,
    ImageFormatError,
    ProfileError,
)
from flep_fl.provision.owner import secret_images

BAD = [
    ("noise.std=-1", "noise.std", "25"),
    ("noise.std=nan", "noise.std", "25"),
    ("cipher.alpha=0", "cipher.alpha", "at most 1"),
    ("cipher.alpha=1.5", "cipher.alpha", "at most 1"),
    ("cipher.layers=[scramble,blur]", "cipher.layers", "scramble"),
    ("cipher.bits=9", "cipher.bits", "8 or 16"),
    ("cipher.bits=[8,6,6]", "cipher.bits", "LL,LH,HL,HH"),
    ("cipher.bits=[8,6,6,1]", "cipher.bits", "8 or 16"),
    ("cipher.bits=many", "cipher.bits", "8 or 16"),
    ("cipher.alpha=[.5,.5,.5,0]", "cipher.alpha", "at most 1"),
    ("cipher.alpha=[.5]", "cipher.alpha", "LL,LH,HL,HH"),
    ("cipher.alpha=half", "cipher.alpha", "at most 1"),
    ("noise.family=cauchy", "noise.family", "laplacian"),
    ("noise.gain=0", "noise.gain", "photon"),
    ("noise.units=volts", "noise.units", "image"),
    ("noise.amount=2", "noise.amount", "between 0 and 1"),
    ("noise.salt=-1", "noise.salt", "between 0 and 1"),
    ("ckks.bound=1e6", "ckks.bound", "Lower"),
    ("ckks.max_examples=100000000", "ckks.max_examples", "Lower"),
    ("ckks.profile=clasic", "ckks.profile", "classic"),
    ("ckks.encryption=asymmetric", "ckks.encryption", "symmetric"),
    ("ckks.out_of_range=wrap", "ckks.out_of_range", "clip"),
    ("ckks.scheme=bfv", "ckks.scheme", "ckks"),
    ("ckks.contribute_only=[a]", "ckks.contribute_only", "ckks.encryption=public"),
    ("federation.sites=2", "federation.sites", "min_contributors"),
    ("federation.min_contributors=1", "federation.min_contributors", "3"),
    ("federation.quorum=5", "federation.quorum", "Lower"),
    ("federation.quorum=2", "federation.quorum", "min_contributors"),
    ("federation.fraction=0.5", "federation.quorum", "fraction"),
    ("federation.rounds=0", "federation.rounds", "1 or more"),
    ("data.name=elvp", "data", "elpv"),
    ("data=folder", "data.path", "sub-folder"),
    ("data.limit=0", "data.limit", "null"),
    ("train.lr=0", "train.lr", "0.001"),
    ("train.proximal_mu=-1", "train.proximal_mu", "FedAvg"),
    ("cloud.eval_data=digits", "cloud.eval_data", "sites evaluate"),
    ("cloud.trusting=[a]", "cloud.trusting", "cloud=mixed"),
    ("federation.optimizer=fedadm", "federation.optimizer", "fedadam"),
    ("federation.optimizer_lr=0", "federation.optimizer_lr", "positive"),
    ("federation.momentum=1", "federation.momentum", "0.9"),
    ("federation.beta_2=1", "federation.beta_2", "0.9"),
    ("federation.tau=0", "federation.tau", "positive"),
    ("partition.alpha=0", "partition.alpha", "above 0"),
    ("runtime.address=here", "runtime.address", "127.0.0.1"),
    ("runtime.idle_timeout=-1", "runtime.idle_timeout", "for ever"),
    ("restore.order=backwards", "restore.order", "denoise_first"),
    ("denoiser.name=bm3d", "denoiser", "dncnn9"),
]


@pytest.mark.parametrize(("override", "field", "remedy"), BAD)
def test_bad_value_names_field_and_remedy(override: str, field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(override)
    assert field in str(caught.value)
    assert remedy in str(caught.value)


def test_keyed_recovery_of_signal_dependent_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"noise\.recovery=keyed cannot be supported.*rician.*laplacian"):
        make_config("noise.family=rician", "noise.recovery=keyed")


def test_numbers_per_sub_band_reach_the_cipher() -> None:
    from flep_fl.provision.owner import cipher_parameters, noise_parameters

    config = make_config(
        "cipher.bits=[8,6,6,5]", "cipher.alpha=[.5,.4,.3,.2]", "noise.family=poisson_gaussian", "noise.gain=2"
    )
    assert cipher_parameters(config).band_bits == (8, 6, 6, 5)
    assert cipher_parameters(config).band_alphas == (0.5, 0.4, 0.3, 0.2)
    assert noise_parameters(config).gain == 2
    assert cipher_parameters(config).noise_units == "image"
    assert cipher_parameters(make_config("noise.units=wire")).noise_units == "wire"
    assert cipher_parameters(make_config("cipher=paper")).noise_units == "wire"


def test_bits_are_those_of_the_preset_until_told_otherwise() -> None:
    from flep_fl.provision.owner import cipher_parameters

    assert cipher_parameters(make_config()).bits == (8, 6, 6, 6)
    assert cipher_parameters(make_config("cipher=paper")).bits == 8
    assert cipher_parameters(make_config("cipher.bits=16")).bits == 16
    assert cipher_parameters(make_config("cipher.layers=[mask,envelope]")).bits == 8


def test_the_schema_knows_what_the_cipher_knows() -> None:
    """Written twice, because the schema may not load NumPy."""
    from flep_fl import config
    from flep_fl.data_security import noise, parameters

    assert config.WIRE_BITS == parameters.BITS
    assert set(config.NOISE_FAMILIES) == set(noise.NOISE_FAMILIES)
    additive = {name for name, family in noise.NOISE_FAMILIES.items() if family.additive}
    assert set(config.ADDITIVE_NOISE) == additive


def test_bound_and_cap_come_from_the_profile_where_they_are_not_set() -> None:
    for profile, bound, largest in (("default", 64.0, 16384), ("compact", 8.0, 4096)):
        for overrides in ([f"ckks.profile={profile}"], [f"ckks={profile}"]):
            config = make_config(*overrides)
            assert (ckks_bound(config), ckks_max_examples(config)) == (bound, largest)
            assert f"profile {profile}, symmetric" in ckks_line(config)
    config = make_config("ckks=compact", "ckks.bound=2", "ckks.max_examples=100")
    assert (ckks_bound(config), ckks_max_examples(config)) == (2.0, 100)
    assert "not encrypted" in ckks_line(make_config("cloud=open"))


def test_contribute_only_names_sites_and_leaves_an_analyst() -> None:
    public = ("ckks.encryption=public", "sites=[a,b,c]")
    make_config(*public, "ckks.contribute_only=[c]")
    for bad in ("[d]", "[c,c]", "[a,b,c]"):
        with pytest.raises(ConfigError, match=r"ckks\.contribute_only"):
            make_config(*public, f"ckks.contribute_only={bad}")
    with pytest.raises(ConfigError, match="encrypted federation"):
        make_config(*public, "ckks.contribute_only=[c]", "cloud=open")


def test_headroom_counts_sites_times_bound() -> None:
    make_config("ckks.bound=64", "federation.sites=3")
    with pytest.raises(ProfileError, match=r"federation\.sites"):
        make_config("ckks.bound=64", "federation.sites=20000")


def test_a_lowered_minimum_allows_two_sites() -> None:
    assert make_config("federation.sites=2", "federation.min_contributors=2").federation.sites == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["noise.std=-1"], "noise.std"),
        (["noise.sdt=1"], "noise.sdt"),
        (["cloud=sky"], "cloud/sky"),
        (["data.limit=many"], "data.limit"),
    ],
)
def test_the_command_line_answers_at_once_without_torch(arguments: list[str], expected: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['simulate', *{arguments!r}]\n"
        "try: runpy.run_module('scripts.simulate', run_name='__main__')\n"
        "except SystemExit as exc: print('exit', exc.code)\n"
        "print('heavy', [m for m in ('torch', 'flwr', 'tenseal') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "exit 2" in done.stdout
    assert "heavy []" in done.stdout
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_shared_digest_changes_with_shared_fields_alone() -> None:
    base = shared_digest(shared_part(make_config()))
    assert shared_digest(shared_part(make_config("data.limit=10", "noise.std=10"))) == base
    assert shared_digest(shared_part(make_config("train.lr=0.5"))) != base
    assert shared_digest(shared_part(make_config("cloud=open"))) != base


def test_differences_names_the_leaves() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == [("a.c", 2, 3)]
    assert differences({"a": 1}, {"a": 1}) == []


@pytest.mark.parametrize(
    ("override", "named"),
    [("train.lr=0.5", "train.lr"), ("cloud=trusted", "cloud.trust"), ("seed=7", "seed")],
)
def test_an_override_against_the_kit_is_refused_by_name(override: str, named: str) -> None:
    kit = shared_part(make_config())
    ours = OmegaConf.structured(make_config(override))
    with pytest.raises(ConfigMismatchError, match=named):
        adopt_kit(ours, kit, [override])


def test_an_equal_or_private_override_is_fine_and_the_kit_wins() -> None:
    kit = shared_part(make_config("train.lr=0.5"))
    ours = OmegaConf.structured(make_config("runtime.threads=2"))
    merged = adopt_kit(ours, kit, ["runtime.threads=2", "train.lr=0.5"][:1])
    assert merged.train.lr == 0.5
    assert merged.runtime.threads == 2


def test_the_owner_may_choose_the_secret_images(tmp_path: Path) -> None:
    pixels = np.arange(300 * 200, dtype=np.uint32).reshape(300, 200) % 256
    for name in ("one.png", "two.png"):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
    found = secret_images(make_config(f"cipher.secret_images={tmp_path}"))
    assert found is not None
    assert [(image.shape, image.dtype) for image in found] == [((256, 256), np.dtype(np.uint8))] * 2
    assert secret_images(make_config()) is None
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ImageFormatError, match=r"notes\.txt"):
        secret_images(make_config(f"cipher.secret_images={tmp_path}"))
    with pytest.raises(EmptyDatasetError, match=r"cipher\.secret_images"):
        secret_images(make_config(f"cipher.secret_images={tmp_path / 'none'}"))
