"""Configuration: every check names the field and the remedy, before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from federations import make_config
from omegaconf import OmegaConf

from flep_fl.config import adopt_kit, differences, shared_digest, shared_part
from flep_fl.contracts.errors import ConfigError, ConfigMismatchError, ProfileError

BAD = [
    ("noise.std=-1", "noise.std", "25"),
    ("noise.std=nan", "noise.std", "25"),
    ("cipher.alpha=0", "cipher.alpha", "at most 1"),
    ("cipher.alpha=1.5", "cipher.alpha", "at most 1"),
    ("cipher.layers=[scramble,blur]", "cipher.layers", "scramble"),
    ("cipher.bits=12", "cipher.bits", "8 or 16"),
    ("ckks.bound=1e6", "ckks.bound", "Lower"),
    ("ckks.max_examples=100000000", "ckks.max_examples", "Lower"),
    ("ckks.profile=clasic", "ckks.profile", "classic"),
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
