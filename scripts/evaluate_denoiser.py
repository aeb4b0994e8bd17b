"""Measure a denoiser: ``python -m scripts.evaluate_denoiser images=FOLDER noise.std=25 denoiser=dncnn9``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from flep_fl.config import Config, DenoiserConfig, NoiseConfig, RuntimeConfig, check
from flep_fl.contracts.errors import ConfigError
from flep_fl.entry import hydra_entry, output_dir


@dataclass
class EvaluateDenoiserConfig:
    """What ``evaluate_denoiser`` may be told."""

    noise: NoiseConfig = field(default_factory=NoiseConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    images: str | None = None
    image_size: int | None = None
    estimate: bool = False
    plot: bool = False
    seed: int = 0


ConfigStore.instance().store(name="evaluate_denoiser_schema", node=EvaluateDenoiserConfig)


@hydra_entry("evaluate_denoiser")
def main(cfg: DictConfig) -> None:
    """Measure a denoiser; write results.json and, with plot=true, denoised.png."""
    options = OmegaConf.to_object(cfg)
    if not isinstance(options, EvaluateDenoiserConfig):
        raise ConfigError("This is not the configuration of evaluate_denoiser")
    shared = Config(noise=options.noise, denoiser=options.denoiser, runtime=options.runtime)
    check(shared)
    if options.seed < 0:
        raise ConfigError("seed is out of range", expected="0 or more", found=options.seed)
    if options.noise.units == "wire":
        raise ConfigError("A denoiser is measured in image units", remedy="Leave noise.units out")
    # NumPy and PyTorch take their time; help and configuration errors answer without them.
    from flep_fl.provision.owner import noise_parameters
    from flep_fl.reporting.cipher_figures import require_plotting
    from flep_fl.reporting.console import Progress
    from flep_fl.reporting.denoiser_evaluation import Task, evaluate_denoiser
    from flep_fl.reporting.results import versions, write_json
    from flep_fl.reporting.sample_images import named_images

    if options.plot:
        require_plotting("plot=false")
    noise = noise_parameters(shared)
    images = named_images(Path(options.images) if options.images else None, side=options.image_size)
    progress = Progress("denoise")
    task = Task(
        options.denoiser.name,
        noise,
        seed=options.seed,
        estimated=options.estimate,
        threads=options.runtime.threads,
        device=options.runtime.device,
    )
    out = output_dir()
    with progress.live():
        report = evaluate_denoiser(
            images, task, plot=out / "denoised.png" if options.plot else None, on_event=progress
        )
    report |= {"denoiser": options.denoiser.name, "noise": asdict(noise), "versions": versions()}
    write_json(out / "results.json", report)
    progress(
        f"{options.denoiser.name}: {report['psnr_db']:.2f} dB, SSIM {report['ssim']:.4f} "
        f"(noisy {report['noisy_psnr_db']:.2f} dB), {report['ms_per_megapixel']:.0f} ms/megapixel"
    )
    if report["plain_float32"] is not None:
        plain = report["plain_float32"]
        progress(f"plain float32: {plain['ms_per_megapixel']:.0f} ms/megapixel, ratio {plain['ratio']:.2f}")
    progress(f"results: {out}")


if __name__ == "__main__":
    main()
