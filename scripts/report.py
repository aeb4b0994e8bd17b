"""Make the report of a run or of a sweep: ``python -m scripts.report DIR [attacks=[DIR,...]]``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from flep_fl.contracts.errors import ConfigError
from flep_fl.entry import hydra_entry, require


@dataclass
class ReportCommandConfig:
    """What ``report`` may be told; see ``conf/report.yaml``."""

    dir: str = ""
    attacks: list[str] = field(default_factory=list)
    title: str | None = None


ConfigStore.instance().store(name="report_schema", node=ReportCommandConfig)


@hydra_entry("report")
def main(cfg: DictConfig) -> None:
    """Merge what lies below a folder into one page, one CSV, one table and plots."""
    options = OmegaConf.to_object(cfg)
    if not isinstance(options, ReportCommandConfig):
        raise ConfigError("This is not the configuration of report")
    require(cfg, "dir", "outputs/simulate/...")
    from flep_fl.reporting.make_report import make_report

    for path in make_report(Path(options.dir), [Path(folder) for folder in options.attacks], options.title):
        print(path)


def with_names(arguments: list[str]) -> list[str]:
    """Give a folder that stands by itself its name, ``dir=``; hydra knows options only.

    Raises
    ------
    ConfigError
        Two folders stand by themselves.
    """
    alone = [a for a in arguments if "=" not in a and not a.startswith("-")]
    if len(alone) > 1:
        raise ConfigError(
            f"report was given {len(alone)} folders",
            expected="one folder",
            found=", ".join(alone),
            remedy="Name the folder above them; folders of attacks go into attacks=[DIR,...]",
        )
    return [_option(a) if a in alone else a for a in arguments]


def _option(folder: str) -> str:
    escaped = folder.replace("\\", "\\\\").replace("'", "\\'")
    return f"dir='{escaped}'"


if __name__ == "__main__":
    try:
        sys.argv[1:] = with_names(sys.argv[1:])
    except ConfigError as exc:
        print(f"error (ConfigError): {exc}", file=sys.stderr)
        sys.exit(2)
    main()
