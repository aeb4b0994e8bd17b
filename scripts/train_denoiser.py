"""Train a denoiser: ``python -m scripts.train_denoiser images=FOLDER [validation=FOLDER] [noise_std=25]``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flep_fl.contracts.errors import ConfigError, FlepError
from flep_fl.data_security.denoise.settings import TrainSettings

_CONF = str(Path(__file__).resolve().parent.parent / "conf")

ConfigStore.instance().store(name="train_denoiser_schema", node=TrainSettings)


_jobs: list[DictConfig] = []


@hydra.main(version_base="1.3", config_path=_CONF, config_name="train_denoiser")
def compose(config: DictConfig) -> None:
    """Take the merged configuration (one per job of a sweep); it is used once hydra has returned."""
    _jobs.append(config)


def train(config: DictConfig) -> None:
    """Train with ``config`` and print the model card."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} is not set", remedy=f"Add {missing[0]}=FOLDER to the command")
    settings = OmegaConf.to_object(config)
    if not isinstance(settings, TrainSettings):
        raise ConfigError("This is not the configuration of train_denoiser")
    settings.check()
    # PyTorch takes seconds to load; help and configuration errors answer without it.
    from flep_fl.data_security.denoise.train import train_denoiser

    card = train_denoiser(settings)
    print(card.to_json().decode(), end="")


def main() -> int:
    """Run the command; 0, or 2 with one line on stderr for anything that the user can put right."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hydra then raises instead of printing and exiting
    try:
        compose()
        for config in _jobs:
            train(config)
    except FlepError as exc:
        return _refuse(exc.code, str(exc))
    except (HydraException, OmegaConfBaseException) as exc:
        return _refuse(ConfigError.code, f"{exc} {exc.__cause__ or ''}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _refuse(code: str, message: str) -> int:
    print(f"error [{code}]: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
