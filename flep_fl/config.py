"""Configuration: dataclass schemas for hydra, and the checks across their fields.

Nothing heavy is imported here: a wrong value is answered before torch, flwr or tenseal load.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from flep_fl.contracts.differences import differences
from flep_fl.contracts.errors import ConfigError, ConfigMismatchError
from flep_fl.contracts.targets import is_allowed
from flep_fl.model_security.optimiser_settings import DEFAULT_LR, OPTIMISERS, OptimiserSettings
from flep_fl.model_security.profiles import (
    ENCRYPTIONS,
    Profile,
    check_federation,
    describe_federation,
    get_profile,
)

CONFIG_DIR = Path(__file__).resolve().parent.parent / "conf"
"""Where the YAML groups live."""

WIRE_BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 32)
"""Bits that a wire coefficient may have."""

ADDITIVE_NOISE = ("gaussian", "laplacian", "rayleigh")
NOISE_FAMILIES = (*ADDITIVE_NOISE, "rician", "poisson_gaussian", "salt_and_pepper")
"""Families of noise; only additive ones can be taken off again with a key."""

RAY_ADDRESSES = ("local", "auto")
"""What ``runtime.address`` may be with ``runtime=ray``, beside HOST:PORT of a cluster."""

DATA_SETS = ("elpv", "digits", "fashion_mnist", "synthetic", "folder")
"""Names of the owner's sources; the code for each is in :mod:`flep_fl.data_owner.sources`."""

SHARED_SECTIONS = ("seed", "cloud", "ckks", "model", "train", "federation", "denoiser", "restore")
"""Sections that every party of a federation must hold alike; they travel in the startup kit."""

OWN_SETTINGS = {"cloud": ("eval_data",)}
"""What stands in a shared section and is one party's own affair all the same."""


@dataclass
class CloudConfig:
    """Who may see the model: ``untrusted``, ``trusted``, ``mixed`` or ``open``.

    ``trusting``: with ``mixed``, the sites that send the cloud their weights in the clear. ``eval_data``: a
    trusted cloud's own test images, a data set's name or a folder of class folders; the server's own affair,
    not shared.
    """

    trust: str = "untrusted"
    trusting: list[str] = field(default_factory=list)
    eval_data: str | None = None


@dataclass
class CipherConfig:
    """The image cipher; ``layers`` drops or keeps single layers (null: those of the preset).

    ``alpha`` and ``bits`` are one number, or four for the sub-bands LL, LH, HL, HH; ``bits`` null: those of
    the preset. ``secret_images`` is a folder of the owner's secret pictures; null: two of random pixels.
    """

    name: str = "flep"
    layers: list[str] | None = None
    block_side: int = 2
    wavelet: str = "haar"
    alpha: Any = 0.5
    bits: Any = None
    secret_images: str | None = None


@dataclass
class NoiseConfig:
    """Noise; mean and standard deviation in grey levels of the 8-bit scale.

    ``units``: ``image`` (what the analyst's image shows) or ``wire``; null: those of the cipher's preset.
    ``gain`` (grey levels per photon) is for poisson_gaussian, ``amount`` and ``salt`` for salt_and_pepper.
    """

    family: str = "gaussian"
    mean: float = 0.0
    std: float = 25.0
    recovery: str = "denoise"
    gain: float = 1.0
    amount: float = 0.05
    salt: float = 0.5
    units: str | None = None


@dataclass
class DenoiserConfig:
    """The analyst's denoiser."""

    name: str = "dncnn9"


@dataclass
class RestoreConfig:
    """``restore_first`` (descramble, then denoise) or the paper's ``denoise_first``."""

    order: str = "restore_first"


@dataclass
class CkksConfig:
    """Homomorphic encryption of model updates.

    ``profile``: ``default``, ``compact`` or ``classic``. ``encryption``: ``symmetric``, or ``public`` as in
    the paper, where the sites in ``contribute_only`` hold the public key and can decrypt nothing. ``bound``
    and ``max_examples`` null: those of the profile. ``out_of_range``: what a site does with a weight beyond
    the bound, ``refuse`` or ``clip``. ``scheme``: ``ckks``, or a class of your own (see ``allow_targets``).
    """

    scheme: str = "ckks"
    profile: str = "default"
    encryption: str = "symmetric"
    contribute_only: list[str] = field(default_factory=list)
    bound: float | None = None
    max_examples: int | None = None
    out_of_range: str = "refuse"


@dataclass
class DataConfig:
    """The owner's images. ``image_size`` null keeps the native size; ``limit`` null takes all.

    ``mode`` is what a folder's files are decoded to: ``grey`` (8 bits), or ``native``: colour stays colour,
    and grey of 16 bits stays so.

    An analyst's own: ``owners`` are the addresses of gateways to fetch from, ``https://HOST:PORT``, with
    ``#KEY`` where the owner's key is known; ``owner_ca`` is the certificate authority of their certificates;
    ``cache`` keeps sealed records and keystore (null: ``owners`` in the kit's folder).
    """

    name: str = "elpv"
    path: str | None = None
    image_size: int | None = None
    limit: int | None = None
    test_fraction: float = 0.2
    mode: str = "grey"
    owners: list[str] = field(default_factory=list)
    owner_ca: str | None = None
    cache: str | None = None


@dataclass
class PartitionConfig:
    """How the training images are divided among the sites."""

    name: str = "dirichlet"
    alpha: float = 1.0


@dataclass
class ModelConfig:
    """The classifier; restored images are reduced to ``input_size`` (null: never; smaller ones stay)."""

    name: str = "cnn"
    input_size: int | None = 64


@dataclass
class TrainConfig:
    """Local training. ``proximal_mu`` above 0 is FedProx: it keeps local models near the global one."""

    optimizer: str = "adamw"
    lr: float = 1e-3
    batch_size: int = 32
    local_epochs: int = 3
    augment: bool = False
    proximal_mu: float = 0.0


@dataclass
class FederationConfig:
    """Rounds, who must take part, and what every analyst makes of the average.

    ``quorum`` null means ``min_contributors``. ``optimizer``: ``fedavg`` (the average is the model),
    ``fedavgm`` (``momentum``) or ``fedadam`` (``beta_1``, ``beta_2``, ``tau``); ``optimizer_lr`` null: 1 for
    fedavgm, 0.1 for fedadam, as in Flower. ``accept_drop``: an analyst keeps the model that it has when the
    new one's accuracy on a share ``accept_share`` of its training images, set aside for that, lies by more
    than this below the best that it has accepted; null: every verified model is taken.
    """

    sites: int = 3
    rounds: int = 3
    fraction: float = 1.0
    quorum: int | None = None
    min_contributors: int = 3
    round_timeout: float = 600.0
    optimizer: str = "fedavg"
    optimizer_lr: float | None = None
    momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    accept_drop: float | None = None
    accept_share: float = 0.2


@dataclass
class RuntimeConfig:
    """Processes and hardware. ``idle_timeout`` 0 waits for ever; ``threads`` null lets torch choose.

    ``name``: ``process`` (server and clients), ``local`` or ``ray`` (simulation, in one process or on Ray).
    ``address`` is where sites reach the cloud; with ``ray`` it is Ray's: ``local``, ``auto`` or HOST:PORT.

    ``tls`` of the sites' port: ``auto`` is on unless the address is loopback; ``off`` works on loopback only.
    ``database`` is where the cloud's SuperLink keeps messages until they are fetched: ``disk`` or ``memory``.
    """

    name: str = "process"
    address: str = "127.0.0.1:9092"
    tls: str = "auto"
    wait: bool = False
    idle_timeout: float = 3600.0
    database: str = "disk"
    device: str = "auto"
    threads: int | None = None


@dataclass
class ProvisionConfig:
    """What ``scripts.provision`` does: ``create``, ``add``, ``revoke``, ``rotate`` or ``show``.

    ``hosts`` are further names and addresses of the cloud, for its certificate; null keeps those it has.
    """

    hosts: list[str] | None = None
    certificate_days: int = 365
    authority_days: int = 3650


@dataclass
class ReportConfig:
    """``report.html``: ``full``, ``brief`` (no images, no figures of the cipher) or ``none``.

    ``keys``: random keys that the figures of the cipher are taken over.
    """

    name: str = "full"
    keys: int = 5


@dataclass
class TrackingConfig:
    """Scalars of every round for other tools: ``none``, ``tensorboard`` or ``mlflow``.

    ``folder``: TensorBoard's; null: ``tensorboard`` beside ``results.json``. ``uri`` and ``experiment``:
    MLflow's store, a local file by default, and the experiment that the run is put under.
    """

    name: str = "none"
    folder: str | None = None
    uri: str = "sqlite:///mlflow.db"
    experiment: str = "flep"


@dataclass
class Config:
    """Everything a script may be told."""

    seed: int = 0
    cloud: CloudConfig = field(default_factory=CloudConfig)
    cipher: CipherConfig = field(default_factory=CipherConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    restore: RestoreConfig = field(default_factory=RestoreConfig)
    ckks: CkksConfig = field(default_factory=CkksConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    provision: ProvisionConfig = field(default_factory=ProvisionConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    allow_targets: list[str] = field(default_factory=list)
    action: str = ""
    sites: list[str] = field(default_factory=list)
    kits: str = "kits"
    kit: str = ""
    archive: str = ""
    out: str = ""
    resume: str = ""


def register() -> None:
    """Make the schema known to hydra under the name ``flep_schema``, and ``${times:a,b}`` to YAML."""
    ConfigStore.instance().store(name="flep_schema", node=Config)
    OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)


def to_config(cfg: DictConfig) -> Config:
    """Turn hydra's config into a :class:`Config` and check it.

    Raises
    ------
    ConfigError
        Naming the field, what it holds, and the remedy.
    """
    config = OmegaConf.to_object(cfg)
    if not isinstance(config, Config):  # pragma: no cover - to_object returns the dataclass
        raise ConfigError("The configuration does not follow the schema")
    check(config)
    return config


def _one_of(name: str, value: str, allowed: Sequence[str], allow_targets: Sequence[str] = ()) -> None:
    if value in allowed or is_allowed(value, allow_targets):
        return
    close = difflib.get_close_matches(value, allowed, n=1)
    hint = f"Did you mean {name}={close[0]}" if close else f"Set {name} to one of them"
    raise ConfigError(
        f"{name}={value} is not known", expected="one of " + ", ".join(allowed), found=value, remedy=hint
    )


def _require(holds: bool, problem: str, remedy: str) -> None:
    if not holds:
        raise ConfigError(problem, remedy=remedy)


def check(config: Config) -> None:
    """Check every field and every pair of fields that must fit together.

    Raises
    ------
    ConfigError
        The first violation, by field name.
    ProfileError
        When the CKKS profile cannot hold this federation.
    """
    targets = config.allow_targets
    _require(
        0 <= config.seed < 2**32, f"seed={config.seed} is out of range", "Set seed to 0 or more, below 2**32"
    )
    _require(
        not config.sites or len(config.sites) == config.federation.sites,
        f"sites names {len(config.sites)} sites and federation.sites={config.federation.sites}",
        "Give one of the two, or make them agree",
    )
    _one_of("cloud", config.cloud.trust, ("untrusted", "trusted", "mixed", "open"))
    _one_of("cipher.name", config.cipher.name, ("flep", "paper", "aead", "none"), targets)
    for layer in config.cipher.layers or ():
        _one_of("cipher.layers", layer, ("scramble", "encode", "noise", "mask", "envelope"))
    _one_of("noise.family", config.noise.family, NOISE_FAMILIES, targets)
    if config.noise.units is not None:
        _one_of("noise.units", config.noise.units, ("image", "wire"))
    _one_of("noise.recovery", config.noise.recovery, ("denoise", "keyed"))
    _one_of("restore.order", config.restore.order, ("restore_first", "denoise_first"))
    _one_of("denoiser", config.denoiser.name, ("dncnn9", "fast", "blind", "none"), targets)
    _one_of("data", config.data.name, DATA_SETS, targets)
    _one_of("data.mode", config.data.mode, ("grey", "native"))
    _one_of("partition", config.partition.name, ("iid", "dirichlet"), targets)
    _one_of("model", config.model.name, ("cnn", "mobilenet_v3_small", "resnet18"), targets)
    _one_of("federation.optimizer", config.federation.optimizer, list(OPTIMISERS))
    _one_of("train.optimizer", config.train.optimizer, ("sgd", "adam", "adamw"))
    _one_of("runtime.device", config.runtime.device, ("auto", "cpu", "cuda"))
    _one_of("runtime.tls", config.runtime.tls, ("auto", "on", "off"))
    _one_of("runtime.name", config.runtime.name, ("process", "local", "ray"))
    _one_of("tracking", config.tracking.name, ("none", "tensorboard", "mlflow"))
    _one_of("report", config.report.name, ("full", "brief", "none"))
    _require(
        0 <= config.report.keys <= 100_000,
        f"report.keys={config.report.keys} is out of range",
        "Set report.keys to 5, or to 0 to measure nothing",
    )
    _one_of("runtime.database", config.runtime.database, ("disk", "memory"))
    _check_images(config)
    _check_training(config)
    _check_ckks(config)
    _check_federation(config)


def _per_band(name: str, value: Any) -> list[Any]:
    """Return one number, or four for the sub-bands, as a list."""
    if not isinstance(value, list | tuple):
        return [value]
    _require(
        len(value) == 4,
        f"{name}={value} has the wrong length",
        f"Set {name} to one number, or to four: [LL,LH,HL,HH]",
    )
    return list(value)


def _check_images(config: Config) -> None:
    noise, cipher, data = config.noise, config.cipher, config.data
    _require(
        math.isfinite(noise.std) and noise.std >= 0,
        f"noise.std={noise.std} is not a standard deviation",
        "Set noise.std to 0 (no noise) or above; 25 is the default",
    )
    _require(
        math.isfinite(noise.mean), f"noise.mean={noise.mean} is not finite", "Set noise.mean to a number"
    )
    for alpha in _per_band("cipher.alpha", cipher.alpha):
        _require(
            type(alpha) in (int, float) and 0 < alpha <= 1,
            f"cipher.alpha={cipher.alpha} is outside (0, 1]",
            "Set cipher.alpha above 0 and at most 1 (1: the secret image plays no part)",
        )
    _require(
        cipher.block_side >= 1,
        f"cipher.block_side={cipher.block_side} is not a block size",
        "Set cipher.block_side to 1 or more; 2 is the default",
    )
    for bits in [] if cipher.bits is None else _per_band("cipher.bits", cipher.bits):
        _require(
            type(bits) is int and bits in WIRE_BITS,
            f"cipher.bits={cipher.bits} is not supported",
            "Set cipher.bits to 8 or 16, or use others of " + ", ".join(map(str, WIRE_BITS)),
        )
    _require(
        noise.recovery != "keyed" or noise.family not in NOISE_FAMILIES[len(ADDITIVE_NOISE) :],
        f"noise.recovery=keyed cannot be supported for noise.family={noise.family}: it depends on the pixel",
        "Set noise.recovery=denoise, or noise.family to one of " + ", ".join(ADDITIVE_NOISE),
    )
    _require(
        0.01 <= noise.gain <= 255,
        f"noise.gain={noise.gain} is outside 0.01..255",
        "Set noise.gain to grey levels per photon; 1 is the default",
    )
    for name, share in (("noise.amount", noise.amount), ("noise.salt", noise.salt)):
        _require(0 <= share <= 1, f"{name}={share} is not a share", f"Set {name} between 0 and 1")
    for name, size in (("data.image_size", data.image_size), ("model.input_size", config.model.input_size)):
        _require(
            size is None or size >= 1,
            f"{name}={size} is not a size",
            f"Set {name} to pixels or to null (native)",
        )
    _require(
        data.limit is None or data.limit >= 1,
        f"data.limit={data.limit} leaves no image",
        "Set data.limit to a number of images or to null (all)",
    )
    _require(
        0 < data.test_fraction < 1,
        f"data.test_fraction={data.test_fraction} leaves no training or no test images",
        "Set data.test_fraction between 0 and 1; 0.2 is the default",
    )
    _require(
        data.name != "folder" or bool(data.path),
        "data=folder needs data.path",
        "Add data.path=FOLDER, a folder with one sub-folder per class",
    )
    _require(
        config.partition.alpha > 0 and math.isfinite(config.partition.alpha),
        f"partition.alpha={config.partition.alpha} is not positive",
        "Set partition.alpha above 0; small values give unequal sites",
    )


def _check_training(config: Config) -> None:
    train = config.train
    _require(
        math.isfinite(train.lr) and train.lr > 0,
        f"train.lr={train.lr} is not a learning rate",
        "Set train.lr above 0; 0.001 is the default",
    )
    _require(
        math.isfinite(train.proximal_mu) and train.proximal_mu >= 0,
        f"train.proximal_mu={train.proximal_mu} is not a weight",
        "Set train.proximal_mu to 0 (FedAvg) or above; 0.01 to 1 are usual",
    )
    for name, value in (("batch_size", train.batch_size), ("local_epochs", train.local_epochs)):
        _require(value >= 1, f"train.{name}={value} is not positive", f"Set train.{name} to 1 or more")
    _require(
        config.runtime.threads is None or config.runtime.threads >= 1,
        f"runtime.threads={config.runtime.threads} is not positive",
        "Set runtime.threads to 1 or more, or to null",
    )
    for name, days in (
        ("certificate_days", config.provision.certificate_days),
        ("authority_days", config.provision.authority_days),
    ):
        _require(
            0 < days <= 36500, f"provision.{name}={days} is out of range", f"Set provision.{name} to 1..36500"
        )
    _require(
        config.runtime.idle_timeout >= 0,
        f"runtime.idle_timeout={config.runtime.idle_timeout} is negative",
        "Set runtime.idle_timeout to seconds, or to 0 to wait for ever",
    )
    host, _, port = config.runtime.address.rpartition(":")
    _require(
        (config.runtime.name == "ray" and config.runtime.address in RAY_ADDRESSES)
        or (bool(host) and port.isdigit() and 0 < int(port) < 65536),
        f"runtime.address={config.runtime.address} is not HOST:PORT",
        "Set runtime.address to something like 127.0.0.1:9092",
    )


def _check_federation(config: Config) -> None:
    federation = config.federation
    _require(
        federation.rounds >= 1,
        f"federation.rounds={federation.rounds} runs nothing",
        "Set federation.rounds to 1 or more",
    )
    _require(
        0 < federation.fraction <= 1,
        f"federation.fraction={federation.fraction} is outside (0, 1]",
        "Set federation.fraction above 0 and at most 1",
    )
    _require(
        federation.round_timeout > 0,
        f"federation.round_timeout={federation.round_timeout} is not positive",
        "Set federation.round_timeout to seconds",
    )
    _require(
        federation.min_contributors >= 2,
        f"federation.min_contributors={federation.min_contributors} would let a sum be one site's update",
        "Set federation.min_contributors to 3 (or to 2, where the sum minus one's own update is the other's)",
    )
    _require(
        federation.sites >= federation.min_contributors,
        f"federation.sites={federation.sites} is below "
        f"federation.min_contributors={federation.min_contributors}",
        "Add sites, or set federation.min_contributors=2 and accept that two sites see each other's updates",
    )
    quorum = effective_quorum(config)
    _require(
        config.cloud.trust == "open" or quorum >= federation.min_contributors,
        f"federation.quorum={quorum} is below federation.min_contributors={federation.min_contributors}: "
        "the analysts would refuse every such sum",
        "Raise federation.quorum or set it to null",
    )
    taking_part = participants(config)
    _require(
        1 <= quorum <= taking_part,
        f"federation.quorum={quorum} cannot be reached: {taking_part} of {federation.sites} sites take part "
        "in a round",
        "Lower federation.quorum or raise federation.fraction",
    )
    _require(
        federation.accept_drop is None or 0 <= federation.accept_drop < 1,
        f"federation.accept_drop={federation.accept_drop} is not a drop of accuracy",
        "Set federation.accept_drop between 0 and 1 (0.05: five points), or to null to take every model",
    )
    _require(
        0 < federation.accept_share < 1,
        f"federation.accept_share={federation.accept_share} leaves no validation or no training images",
        "Set federation.accept_share between 0 and 1; 0.2 is the default",
    )
    federated_optimiser(config)
    _check_trust(config)
    if config.ckks.scheme == "ckks":
        check_federation(
            ckks_profile(config),
            sites=federation.sites,
            bound=ckks_bound(config),
            max_examples=ckks_max_examples(config),
        )


def _check_ckks(config: Config) -> None:
    ckks = config.ckks
    _one_of("ckks.scheme", ckks.scheme, ("ckks",), config.allow_targets)
    _one_of("ckks.encryption", ckks.encryption, ENCRYPTIONS)
    _one_of("ckks.out_of_range", ckks.out_of_range, ("refuse", "clip"))
    alone = ckks.contribute_only
    _require(
        ckks.scheme == "ckks" or (ckks.encryption == "symmetric" and config.cloud.trust != "mixed"),
        f"ckks.scheme={ckks.scheme} has neither a public key nor sums with plain vectors",
        "Set ckks.encryption=symmetric and cloud=untrusted or trusted",
    )
    _require(
        not alone or ckks.encryption == "public",
        f"ckks.contribute_only={alone} needs a public key",
        "Set ckks.encryption=public, or ckks.contribute_only=[]",
    )
    _require(
        not alone or (ckks.scheme == "ckks" and config.cloud.trust != "open"),
        f"ckks.contribute_only={alone} fits ckks.scheme=ckks and an encrypted federation only",
        "Set ckks.contribute_only=[]",
    )
    unknown = sorted(set(alone) - set(config.sites)) if config.sites else []
    _require(
        not unknown and len(set(alone)) == len(alone),
        f"ckks.contribute_only={alone} names a site twice or one that is not in sites",
        "Name sites of the federation, each once",
    )
    _require(
        len(alone) < config.federation.sites,
        "ckks.contribute_only names every site: nobody could open the model",
        "Leave at least one site that holds the model key",
    )


def ckks_profile(config: Config) -> Profile:
    """Return the profile in use, its encryption included; :class:`ConfigError` if there is none."""
    return get_profile(config.ckks.profile, config.ckks.encryption)


def ckks_bound(config: Config) -> float:
    """Return ``ckks.bound``, or the profile's where it is not set."""
    bound = config.ckks.bound
    return ckks_profile(config).default_bound if bound is None else bound


def ckks_max_examples(config: Config) -> int:
    """Return ``ckks.max_examples``, or the profile's where it is not set."""
    largest = config.ckks.max_examples
    return ckks_profile(config).default_max_examples if largest is None else largest


def ckks_line(config: Config) -> str:
    """Say in one line what protects the updates: for the start of a server, a client or a simulation."""
    if config.cloud.trust == "open":
        return "cloud=open: updates are not encrypted"
    if config.ckks.scheme != "ckks":
        return f"updates are encrypted by {config.ckks.scheme}"
    return describe_federation(
        ckks_profile(config),
        sites=config.federation.sites,
        bound=ckks_bound(config),
        max_examples=ckks_max_examples(config),
    )


def _check_trust(config: Config) -> None:
    _require(
        config.cloud.eval_data is None or config.cloud.trust in ("trusted", "open"),
        f"cloud.eval_data={config.cloud.eval_data} needs a cloud that can open the model, not "
        f"cloud={config.cloud.trust}",
        "Leave it out, and let the sites evaluate; or provision for cloud=trusted",
    )
    trusting = config.cloud.trusting
    _require(
        not trusting or config.cloud.trust == "mixed",
        f"cloud.trusting={trusting} fits cloud=mixed only",
        "Set cloud=mixed, or cloud.trusting=[]",
    )
    _require(
        config.cloud.trust != "mixed" or config.ckks.scheme == "ckks",
        f"cloud=mixed fits ckks.scheme=ckks only, not {config.ckks.scheme}",
        "Set ckks.scheme=ckks, or choose another trust mode",
    )
    unknown = sorted(set(trusting) - set(config.sites)) if config.sites else []
    _require(
        not unknown and len(set(trusting)) == len(trusting),
        f"cloud.trusting={trusting} names a site twice or one that is not in sites",
        "Name sites of the federation, each once",
    )


def update_mode(config: Config) -> str:
    """Return what updates are: ``ckks``, ``mixed`` or ``open``."""
    return config.cloud.trust if config.cloud.trust in ("mixed", "open") else "ckks"


def federated_optimiser(config: Config) -> OptimiserSettings:
    """Return what every analyst applies to the average of a round; its numbers are checked here."""
    federation = config.federation
    lr = federation.optimizer_lr
    return OptimiserSettings(
        name=federation.optimizer,
        lr=DEFAULT_LR[federation.optimizer] if lr is None else lr,
        momentum=federation.momentum,
        beta_1=federation.beta_1,
        beta_2=federation.beta_2,
        tau=federation.tau,
    )


def effective_quorum(config: Config) -> int:
    """Return ``federation.quorum``, or ``federation.min_contributors`` where it is not set."""
    quorum = config.federation.quorum
    return config.federation.min_contributors if quorum is None else quorum


def participants(config: Config) -> int:
    """Return how many sites are asked in a round: ``ceil(fraction * sites)``."""
    return math.ceil(config.federation.fraction * config.federation.sites - 1e-9)


def shared_part(config: Config) -> dict[str, Any]:
    """Return the sections that all parties must hold alike, as plain JSON-ready values."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    if not isinstance(plain, dict):  # pragma: no cover - a dataclass becomes a dict
        raise ConfigError("The configuration does not follow the schema")
    return {section: _without_own(section, plain[section]) for section in SHARED_SECTIONS}


def _without_own(section: str, value: Any) -> Any:
    own = OWN_SETTINGS.get(section)
    return {k: v for k, v in value.items() if k not in own} if own and isinstance(value, dict) else value


def shared_digest(shared: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of the shared sections in canonical JSON."""
    return hashlib.sha256(canonical_json(shared)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Serialise JSON with sorted keys, no spaces and ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def require_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, we: str, they: str) -> None:
    """Refuse two differing shared configurations by field name.

    Raises
    ------
    ConfigMismatchError
        Listing each differing field with both values.
    """
    found = differences(ours, theirs)
    if found:
        listed = "; ".join(
            f"{name} is {mine!r} in {we} and {other!r} in {they}" for name, mine, other in found
        )
        raise ConfigMismatchError(
            f"{we} and {they} disagree: {listed}",
            remedy="What all parties share is fixed by `python -m scripts.provision`; "
            "make new kits to change it",
        )


def config_of(shared: Mapping[str, Any]) -> Config:
    """Return the checked configuration of a kit's shared sections; all else has its default.

    Raises
    ------
    ConfigError
        When the sections are not valid.
    """
    return to_config(adopt_kit(OmegaConf.structured(Config), shared, []))


def adopt_kit(cfg: DictConfig, shared: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """Replace the shared sections by the kit's, after refusing overrides that contradict it.

    Parameters
    ----------
    cfg
        What hydra composed.
    shared
        The kit's shared sections.
    overrides
        The command line's overrides (``HydraConfig.get().overrides.task``).

    Raises
    ------
    ConfigMismatchError
        When an override names a shared field with another value than the kit's.
    """
    kit_view = OmegaConf.create(dict(shared))
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
        if key.partition(".")[0] not in SHARED_SECTIONS:
            continue
        ours, theirs = OmegaConf.select(cfg, key), OmegaConf.select(kit_view, key)
        section, _, leaf = key.partition(".")
        if leaf in OWN_SETTINGS.get(section, ()):
            continue
        plain = [OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for v in (ours, theirs)]
        if not leaf:
            plain = [_without_own(section, value) for value in plain]
        require_same({key: plain[0]}, {key: plain[1]}, we="the command line", they="the kit")
    merged = OmegaConf.merge(cfg, kit_view)
    if not isinstance(merged, DictConfig):  # pragma: no cover - merging mappings gives a mapping
        raise ConfigError("The kit's configuration is not a mapping")
    return merged
