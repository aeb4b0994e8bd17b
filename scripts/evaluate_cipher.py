"""Measure an image cipher: ``python -m scripts.evaluate_cipher images=FOLDER cipher=flep keys=200``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from flep_fl.config import (
    CipherConfig,
    Config,
    DenoiserConfig,
    NoiseConfig,
    RestoreConfig,
    RuntimeConfig,
    check,
)
from flep_fl.contracts.errors import ConfigError
from flep_fl.entry import hydra_entry, output_dir


@dataclass
class EvaluateCipherConfig:
    """What ``evaluate_cipher`` may be told."""

    cipher: CipherConfig = field(default_factory=CipherConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    restore: RestoreConfig = field(default_factory=RestoreConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    allow_targets: list[str] = field(default_factory=list)
    images: str | None = None
    image_size: int | None = None
    keys: int = 20
    level: float = 0.05
    figures: bool = True


ConfigStore.instance().store(name="evaluate_cipher_schema", node=EvaluateCipherConfig)


def read_config(cfg: DictConfig) -> tuple[EvaluateCipherConfig, Config]:
    """Return this script's options, and the sections that it shares with the others, checked.

    Raises
    ------
    ConfigError
        Naming the field.
    """
    options = OmegaConf.to_object(cfg)
    if not isinstance(options, EvaluateCipherConfig):
        raise ConfigError("This is not the configuration of evaluate_cipher")
    shared = Config(
        cipher=options.cipher,
        noise=options.noise,
        denoiser=options.denoiser,
        restore=options.restore,
        runtime=options.runtime,
        allow_targets=options.allow_targets,
    )
    check(shared)
    if not 0 < options.level < 1:
        raise ConfigError(f"level={options.level} is no significance level", remedy="Set level to 0.05")
    if options.keys < 1:
        raise ConfigError(f"keys={options.keys} measures nothing", remedy="Set keys to 1 or more")
    return options, shared


@hydra_entry("evaluate_cipher")
def main(cfg: DictConfig) -> None:
    """Measure a cipher; write tables, figures and results.json."""
    options, shared = read_config(cfg)
    from flep_fl.contracts.files import write_atomic
    from flep_fl.data_security.limits import entropy_mean
    from flep_fl.provision.owner import cipher_parameters, image_denoiser, noise_parameters, restore_order
    from flep_fl.reporting.cipher_evaluation import evaluate, subject_of
    from flep_fl.reporting.cipher_figures import draw_cipher_figures, require_plotting
    from flep_fl.reporting.cipher_tables import full_report
    from flep_fl.reporting.console import Progress
    from flep_fl.reporting.results import versions, write_json
    from flep_fl.reporting.sample_images import named_images

    if options.figures:
        require_plotting("figures=false")
    progress = Progress("evaluate")
    images = named_images(Path(options.images) if options.images else None, side=options.image_size)
    subject = subject_of(cipher_parameters(shared), noise_parameters(shared))
    cipher = subject.draw()
    denoise, order = image_denoiser(shared, cipher.bundle, cipher), restore_order(shared)
    with progress.live():
        report = evaluate(
            images,
            subject,
            keys=options.keys,
            denoise=denoise,
            order=order,
            level=options.level,
            on_event=progress,
        )
    report |= {
        "cipher": {
            "name": shared.cipher.name,
            **asdict(subject.parameters),
            "noise": asdict(subject.noise),
            "denoiser": shared.denoiser.name,
            "restore_order": order,
            "measured": "sealed bytes" if subject.sealed else "wire image before the envelope",
        },
        "level": options.level,
        "ideal_entropy": {
            str(entry["pixels"]): entropy_mean(entry["pixels"]) for entry in report["limits"].values()
        },
        "versions": versions(),
    }
    out = output_dir()
    write_json(out / "results.json", report)
    page = full_report(report, title=f"Image cipher: {shared.cipher.name}")
    write_atomic(out / "report.md", page.encode())
    if options.figures:
        draw_cipher_figures(out / "figures", images, subject, denoise=denoise, order=order)
    print(page)
    progress(f"results: {out}")


if __name__ == "__main__":
    main()
