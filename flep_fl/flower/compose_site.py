"""What one analyst site is wired to: archive, cipher, denoiser, training, encrypted updates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flep_fl.config import Config
from flep_fl.data_analyst.acceptance import AcceptanceTest
from flep_fl.data_analyst.fetch import Progress
from flep_fl.data_analyst.model import build_model, get_arrays, set_arrays
from flep_fl.data_analyst.train import evaluate, train_local
from flep_fl.data_owner.partition import split_test
from flep_fl.flower.models import export_model, write_model
from flep_fl.flower.sessions import session_factory
from flep_fl.flower.site_data import SiteData, load_site_data
from flep_fl.model_security.mod import Mod, ckks_mod
from flep_fl.model_security.session import AnalystSession, Arrays
from flep_fl.provision.kits import SiteKit


@dataclass(frozen=True, slots=True)
class SiteChanges:
    """How a site departs from the ordinary one.

    Attributes
    ----------
    mods
        Flower mods round the training, inside the encryption (``LocalDpMod``, say).
    data
        Turns the restored images into those that the site works with.
    """

    mods: Sequence[Mod] = ()
    data: Callable[[SiteData], SiteData] = lambda data: data


@dataclass(slots=True)
class Site:
    """A site that is ready to take part.

    Attributes
    ----------
    app
        The ClientApp.
    session
        Its state.
    model_file
        Where the final model goes.
    """

    app: ClientApp
    session: AnalystSession
    model_file: Path

    def finished(self, *, wait: bool) -> bool:
        """Whether the site should end: run closed (and it is not to wait), sum rejected, no way on."""
        ended = self.session.closed and not wait
        return ended or self.session.halted or self.session.failure is not None


def prepare_site(
    kit: SiteKit,
    config: Config,
    archive: Path | None,
    out: Path,
    *,
    state: Path | None = None,
    changes: SiteChanges = SiteChanges(),  # frozen
    data: SiteData | None = None,
    on_event: Callable[[str], None] = lambda _line: None,
    on_progress: Progress = lambda what, done, total: None,
) -> Site:
    """Open the archive or fetch from the data owners, restore the images in memory, and make the ClientApp.

    Parameters
    ----------
    kit, config
        This site's kit, and the configuration after :func:`flep_fl.config.adopt_kit`.
    archive
        The sealed archive; None where ``data.owners`` names gateways.
    out
        This site's folder in the run directory.
    state
        Folder of the ledger; ``state`` in the kit where None.
    changes
        How this site departs from the ordinary one.
    data
        The site's images where they are restored already; ``archive`` is not read then.
    on_event
        Gets one line of progress at a time.
    on_progress
        Gets the state of a download.

    Raises
    ------
    FetchError, GrantError, KeystoreError
        When the records cannot be fetched from a data owner.
    ArchiveError, RecordError, EnvelopeError, WrongImageKeyError, HaltedError, KitError
        When the archive or the kit cannot be used.
    TargetError, CipherParameterError
        When this site does not allow or have the cipher that the bundle names, or it cannot follow
        ``restore.order``.
    """
    make_session = session_factory(kit, config, state or kit.folder / "state")
    if data is None:
        data = load_site_data(kit, config, archive, on_event=on_event, on_progress=on_progress)
    data = changes.data(data)
    on_event(f"restored {len(data.train)} training and {len(data.test)} held-out images, in memory only")
    classes, channels = len(data.description.classes), data.train.images.shape[1]

    def initial() -> Arrays:
        model = build_model(config.model.name, classes=classes, channels=channels, seed=config.seed)
        return get_arrays(model)

    session = make_session(initial)
    model_file = out / "model.npz"

    def as_it_comes(model: Arrays) -> Arrays:
        return model

    choose = as_it_comes
    # A contribute-only site opens no global model: there is nothing that it could refuse.
    if config.federation.accept_drop is not None and not kit.contribute_only:
        data, test = _acceptance(kit.name, config, data, state or kit.folder / "state", on_event)

        def choose(model: Arrays) -> Arrays:
            return test.consider(model, session.ledger.entries.run)

    app = _client_app(
        session,
        config,
        kit.name,
        data,
        mods=changes.mods,
        choose=choose,
        on_model=lambda model: write_model(model_file, choose(model)),
        on_close=lambda model: export_model(out, choose(model)),
    )
    return Site(app, session, model_file)


def _acceptance(
    name: str, config: Config, data: SiteData, state: Path, on_event: Callable[[str], None]
) -> tuple[SiteData, AcceptanceTest]:
    """Set a share of the training images aside, and judge global models by them.

    Raises
    ------
    DataError
        The site has a single training image.
    """
    federation = config.federation
    seed = _training_seed(config.seed, name, 0)  # no round has this number
    training, validation = split_test(data.train.labels, federation.accept_share, seed)
    images, labels = data.train.images[validation], data.train.labels[validation]
    classes, channels = len(data.description.classes), data.train.images.shape[1]
    model = build_model(config.model.name, classes=classes, channels=channels, seed=config.seed)
    device = _device(config.runtime.device)

    def score(arrays: Arrays) -> float:
        set_arrays(model, arrays)
        return evaluate(model, images, labels, device=device).accuracy

    kept = replace(data.train, images=data.train.images[training], labels=data.train.labels[training])
    drop = federation.accept_drop or 0.0
    test = AcceptanceTest(
        drop, score, state / "acceptance.npz", on_refusal=lambda line: on_event(f"{name}: {line}")
    )
    return replace(data, train=kept), test


def _client_app(
    session: AnalystSession,
    config: Config,
    name: str,
    data: SiteData,
    *,
    mods: Sequence[Mod],
    choose: Callable[[Arrays], Arrays],
    on_model: Callable[[Arrays], object],
    on_close: Callable[[Arrays], object],
) -> ClientApp:
    """Make an ordinary Flower ClientApp, with encryption as its outermost mod.

    ``choose`` says which model to start from, given the global one.
    """
    classes, channels = len(data.description.classes), data.train.images.shape[1]
    model = build_model(config.model.name, classes=classes, channels=channels, seed=config.seed)
    device = _device(config.runtime.device)

    def evaluate_model(message: Message, context: Context) -> Message:
        set_arrays(model, _arrays(message))
        result = evaluate(model, data.test.images, data.test.labels, device=device)
        majority = float((data.test.labels == data.description.majority_class).mean())
        metrics = MetricRecord(
            {"accuracy": result.accuracy, "loss": result.loss_mean, "majority_accuracy": majority}
        )
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    outermost = ckks_mod(session, evaluate=evaluate_model, on_model=on_model, on_close=on_close)
    app = ClientApp(mods=[outermost, *mods])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        set_arrays(model, choose(_arrays(message)))
        number = _round_number(message)
        settings = config.train
        train_local(
            model,
            data.train.images,
            data.train.labels,
            optimizer=settings.optimizer,
            lr=settings.lr,
            batch_size=settings.batch_size,
            local_epochs=settings.local_epochs,
            seed=_training_seed(config.seed, name, number),
            augment=settings.augment,
            proximal_mu=settings.proximal_mu,
            device=device,
            threads=config.runtime.threads,
        )
        arrays = ArrayRecord({key: Array(value) for key, value in get_arrays(model).items()})
        metrics = MetricRecord({"num-examples": len(data.train.labels)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def _arrays(message: Message) -> Arrays:
    return {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}


def _round_number(message: Message) -> int:
    number = message.content.config_records["config"]["server-round"]
    return number if isinstance(number, int) else 0


def _training_seed(seed: int, site: str, number: int) -> int:
    """Derive the seed of one site's round: the same in every trust mode and runtime."""
    digest = hashlib.sha256(f"{seed}/{site}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
