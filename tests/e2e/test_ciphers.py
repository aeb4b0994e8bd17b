"""The federation runs with every image cipher, a user's own among them, and a lossless one costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import own_ciphers
import pytest
from federations import SMALL, make_config
from own_ciphers import ChaChaCipher

from flep_fl.config import shared_part
from flep_fl.contracts.errors import CipherParameterError, ConfigError, DenoiserError, TargetError
from flep_fl.data_analyst.source import LocalArchive, unlock
from flep_fl.flower.compose_site import prepare_site
from flep_fl.flower.simulation import seeded_entropy, simulate
from flep_fl.provision.kits import create_kits, load_owner_kit, load_site_kit
from flep_fl.provision.owner import release_data_set

pytestmark = pytest.mark.e2e

ONE_ROUND = (*SMALL, "federation.rounds=1")
OWN = ("cipher.name=own_ciphers.ChaChaCipher", "allow_targets=[own_ciphers.]")
CIPHERS = {
    "flep": ("cipher=flep",),
    "paper": ("cipher=paper",),
    "aead": ("cipher=aead",),
    "none": ("cipher=none",),
    "own": OWN,
    "layers": ("cipher.layers=[scramble,envelope]",),
    "own layers": ("cipher.name=own_ciphers.unscrambled", "allow_targets=[own_ciphers.]"),
    "keyed": ("noise.recovery=keyed", "cipher.bits=16"),
    "keyed db2": ("noise.recovery=keyed", "cipher.bits=16", "cipher.wavelet=db2", "cipher.alpha=0.3"),
}
LOSSLESS = ("aead", "own", "layers", "keyed", "keyed db2")
"""Those that must give what ``none`` gives: a noise of 25 grey levels is on in all of them."""

Outcome = tuple[dict[str, Any], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Result and model of one round with each cipher, at one seed and without encryption of the model."""
    found: dict[str, Outcome] = {}
    for name, overrides in CIPHERS.items():
        folder = tmp_path_factory.mktemp("cipher")
        before = ChaChaCipher.opened
        result = simulate(make_config(*ONE_ROUND, "cloud=open", *overrides), folder)
        assert (ChaChaCipher.opened > before) == (name == "own"), "the analysts used another cipher"
        with np.load(folder / "sites" / "site-0" / "model.npz") as file:
            found[name] = (result, dict(file))
    return found


@pytest.mark.parametrize("name", CIPHERS)
def test_the_federation_runs_with(name: str, outcomes: dict[str, Outcome]) -> None:
    (entry,) = outcomes[name][0]["rounds"]
    assert entry["failed"] == []
    assert entry["replied"] == ["site-0", "site-1", "site-2"]
    assert 0 < entry["accuracy"] <= 1


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_cipher_gives_the_very_result_of_none(name: str, outcomes: dict[str, Outcome]) -> None:
    result, model = outcomes[name]
    plain, reference = outcomes["none"]
    for metric in ("accuracy", "loss"):
        assert result["rounds"][0][metric] == plain["rounds"][0][metric]
    assert all(np.array_equal(model[key], reference[key]) for key in reference)
    assert result["restore"] == plain["restore"] == {"psnr_db": None, "noisy_psnr_db": None}


@pytest.mark.parametrize("name", ["flep", "paper"])
def test_noise_that_nobody_can_subtract_leaves_a_trace(name: str, outcomes: dict[str, Outcome]) -> None:
    """Otherwise the comparison above could not fail."""
    result, model = outcomes[name]
    assert result["rounds"][0]["loss"] != outcomes["none"][0]["rounds"][0]["loss"]
    assert any(not np.array_equal(model[key], value) for key, value in outcomes["none"][1].items())
    assert 10 < result["restore"]["noisy_psnr_db"] < 23


def test_keyed_noise_costs_nothing_under_encryption_either(tmp_path: Path) -> None:
    """CKKS adds about 1e-9 of its own to each weight, so the loss may differ far behind the comma."""
    runs = [
        simulate(make_config(*ONE_ROUND, *overrides), tmp_path / str(number))["rounds"][0]
        for number, overrides in enumerate((CIPHERS["keyed"], CIPHERS["none"]))
    ]
    assert runs[0]["accuracy"] == runs[1]["accuracy"]
    assert runs[0]["loss"] == pytest.approx(runs[1]["loss"], rel=1e-6)


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    command = [
        sys.executable, "-c",
        f"import sys; sys.path.insert(0, {str(Path(own_ciphers.__file__).parent)!r})\n"
        "import runpy; runpy.run_module('scripts.simulate', run_name='__main__', alter_sys=True)",
        *ONE_ROUND, *OWN, f"hydra.run.dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    refused = [argument for argument in command if not argument.startswith("allow_targets")]
    done = subprocess.run(refused, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "cipher.name=own_ciphers.ChaChaCipher is not known" in done.stderr
    assert "Traceback" not in done.stderr


def sealed(folder: Path, *overrides: str) -> tuple[Path, Path]:
    """Return the kit and the archive of one site."""
    config = make_config(*SMALL, *overrides)
    create_kits(shared_part(config), ["a", "b", "c"], folder / "kits", address=config.runtime.address)
    release_data_set(
        config, load_owner_kit(folder / "kits" / "owner"), folder / "archives", entropy=seeded_entropy(0)
    )
    return folder / "kits" / "a", folder / "archives" / "a"


def test_an_analyst_imports_what_it_allows_and_not_what_an_archive_names(tmp_path: Path) -> None:
    folder, archive = sealed(tmp_path, *OWN)
    kit = load_site_kit(folder)
    source = LocalArchive(archive, site="a", owner_public_key=kit.federation.owner_verify_key)
    assert unlock(source, kit.decryption_key.private_bytes_raw()).cipher_name == "own_ciphers.ChaChaCipher"
    site = prepare_site(kit, make_config(*SMALL, "allow_targets=[own_ciphers.]"), archive, tmp_path / "out")
    assert not site.session.halted
    for config in (make_config(*SMALL), make_config(*SMALL, "allow_targets=[my_package.]")):
        with pytest.raises(TargetError, match="neither built in nor allowed here"):
            prepare_site(kit, config, archive, tmp_path / "out")


def test_the_papers_order_with_a_cipher_that_cannot(tmp_path: Path) -> None:
    with pytest.raises(CipherParameterError, match="denoise_first is not possible"):
        sealed(tmp_path / "owner", *OWN, "restore.order=denoise_first")
    assert not (tmp_path / "owner" / "archives").exists()
    folder, archive = sealed(tmp_path / "site", *OWN)
    config = make_config(*SMALL, "allow_targets=[own_ciphers.]", "restore.order=denoise_first")
    with pytest.raises(CipherParameterError, match="denoise_first is not possible"):
        prepare_site(load_site_kit(folder), config, archive, tmp_path / "out")


def test_noise_that_no_denoiser_fits(tmp_path: Path) -> None:
    """The paper's wire noise is four times as strong in the restored image; its own order asks for 25."""
    with pytest.raises(
        DenoiserError,
        match=r"family=gaussian, noise\.std=25 in wire units.*Found 100\..*keyed or denoiser=none",
    ):
        sealed(tmp_path, "cipher=paper", "restore.order=restore_first", "denoiser=fast")
    sealed(tmp_path / "without", "cipher=paper", "restore.order=restore_first", "denoiser=none")


def test_an_unknown_cipher_is_a_configuration_error() -> None:
    for overrides in (
        ["cipher.name=rot13"],
        OWN[:1],
        [*OWN[:1], "allow_targets=['']"],
        [*OWN[:1], "allow_targets=[own_cipher]"],
    ):
        with pytest.raises(ConfigError, match=r"cipher\.name"):
            make_config(*SMALL, *overrides)
