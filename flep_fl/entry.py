"""What every entry point shares: hydra, one-line errors, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from flep_fl.config import CONFIG_DIR, Config, adopt_kit, register, to_config
from flep_fl.contracts.errors import ConfigError, ConfigMismatchError, FlepError
from flep_fl.reporting.console import printable

EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130


def hydra_entry(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], NoReturn]]:
    """Make a hydra script of ``function(cfg)`` that ends in an exit code, never in a library's traceback.

    Parameters
    ----------
    config_name
        The primary config in ``conf/``.

    Returns
    -------
    Callable
        A decorator; the decorated function takes no argument, reads ``sys.argv`` and exits with 0
        (done), 1 (a named error), 2 (a wrong configuration) or 130 (interrupted).
    """

    def decorate(function: Callable[[DictConfig], None]) -> Callable[[], NoReturn]:
        def entry() -> NoReturn:
            sys.exit(run_entry(function, config_name))

        return entry

    return decorate


class _JobError(Exception):
    """A job of a sweep failed in a process of its own, and has said why; carries the exit code."""


def run_entry(function: Callable[[DictConfig], None], config_name: str) -> int:
    """Run ``function`` under hydra, once per job of a sweep, and return the exit code.

    A job of a sweep that fails is reported and the others go on; the exit code is that of the first.
    """
    codes: list[int] = []
    here = os.getpid()

    def job(cfg: DictConfig) -> None:
        # Reported here: what leaves the job would get hydra's own line on top of ours.
        try:
            function(cfg)
            return
        except FlepError as exc:
            code = _report(exc)
        except OmegaConfBaseException as exc:
            code = _report(_as_config_error(exc))
        except OSError as exc:
            code = _report(_as_file_error(exc))
        codes.append(code)
        if os.getpid() != here:  # a launcher's worker: its list is not ours, an exception comes back
            raise _JobError(code)

    # hydra prints and exits on its own unless told to raise; we want our one-line errors.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register()
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(job)()
    except _JobError as exc:
        return int(exc.args[0])
    except (HydraException, OmegaConfBaseException) as exc:
        return _report(_as_config_error(exc))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    return codes[0] if codes else 0


def _report(error: FlepError) -> int:
    """Print one line on standard error; return the exit code."""
    sys.stdout.flush()
    print(f"error ({type(error).__name__}): {printable(str(error))}", file=sys.stderr)  # noqa: T201
    return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED


def _as_file_error(exc: OSError) -> FlepError:
    """Name the file; a disk that is full or a folder that may not be written ends in one line too."""
    return FlepError(
        f"{exc.filename or 'A file or socket'}: {exc.strerror or exc}",
        remedy="Check the path, its permissions and the free space",
    )


def _as_config_error(exc: Exception) -> ConfigError:
    """Keep hydra's first line, which names the key or the group, and say where the names are."""
    text = str(exc) if exc.__cause__ is None else f"{exc} {exc.__cause__}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if "use +" not in line and not line.startswith(("object_type", "See "))]
    missing = "'hydra/launcher/joblib'" in text
    return ConfigError(
        "The configuration is not valid: " + ", ".join(kept)[:400].replace(":, ", ": ").replace(".,", "."),
        remedy="Run: pip install -e '.[joblib]'"
        if missing
        else "Run the command with --help to see every option and its value",
    )


def require(cfg: DictConfig, name: str, example: str) -> None:
    """Refuse to go on without an option.

    Raises
    ------
    ConfigError
        ``name`` is not set, or is empty.
    """
    if not cfg[name]:
        raise ConfigError(f"{name} is not set", remedy=f"Add {name}={example}")


def output_dir() -> Path:
    """Return hydra's output directory of the current job, an absolute path."""
    return Path(HydraConfig.get().runtime.output_dir)


def kit_config(cfg: DictConfig, shared: Mapping[str, Any], address: str) -> Config:
    """Merge the command line with a kit: what all parties share, and the cloud's address, come from the kit.

    Parameters
    ----------
    cfg
        What hydra composed.
    shared, address
        The kit's shared settings and address.

    Raises
    ------
    ConfigMismatchError
        When the command line contradicts the kit.
    """
    overrides = list(HydraConfig.get().overrides.task)
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    if "experiment" in given:
        raise ConfigMismatchError(
            "experiment= sets what all parties share, and that is fixed by the kit",
            remedy="Give experiment= to `python -m scripts.provision`",
        )
    if "cipher" in given and cfg.restore.order != shared["restore"]["order"]:
        raise ConfigMismatchError(
            f"cipher={cfg.cipher.name} is restored in the order {cfg.restore.order}, and the kits say "
            f"{shared['restore']['order']}",
            remedy=f"Give cipher={cfg.cipher.name} to `python -m scripts.provision` as well",
        )
    merged = adopt_kit(cfg, shared, overrides)
    if "runtime.address" not in given:
        merged.runtime.address = address
    return to_config(merged)
