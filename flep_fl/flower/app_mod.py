"""``ckks_mod`` for any Flower ClientApp: one kit makes its updates encrypted, signed and verifiable.

Nothing lives between two messages: every one opens the session from the kit's state folder and closes it, so
it is all the same whether messages come to one process or each to its own (as under ``flwr run``).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FrameType

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flep_fl.config import config_of
from flep_fl.contracts.errors import FlepError, KitError, ModOrderError, public_code
from flep_fl.contracts.protocol import FLEP_RECORD
from flep_fl.flower.models import Arrays, export_model, write_model
from flep_fl.flower.sessions import session_factory
from flep_fl.model_security.mod import ClientAppCallable, Mod
from flep_fl.model_security.mod import ckks_mod as session_mod
from flep_fl.provision.kits import CLOUD, DEALER, OWNER, load_site_kit

KIT_VARIABLE = "FLEP_KIT"
"""Environment variable that names the kit where neither the node nor the app does."""

APP_METRICS = ("accuracy", "loss", "eval_acc", "eval_loss", "train_acc", "train_loss")
"""Metrics of the app that may leave a site unless it says otherwise: unweighted means, no counts."""

_LOG = logging.getLogger(__name__)


def ckks_mod(
    kit: str | Path | None = None,
    *,
    metrics: Collection[str] = APP_METRICS,
    out: str | Path | None = None,
) -> Mod:
    """Make the mod that encrypts what a ClientApp sends.

    It must be the first of the app's mods, which in Flower is the outermost one: what others do to an update
    (clipping, noise) then happens before encryption. The app itself stays as it is.

    Parameters
    ----------
    kit
        The site's startup kit. The SuperNode's own ``--node-config 'kit="..."'`` goes before it; where both
        are missing, the environment variable ``FLEP_KIT`` is read. A folder that holds the kits of several
        sites is for simulation: the node with ``partition-id`` i takes the i-th by name.
    metrics
        Names of the app's metrics that may leave the site; everything else stays, ``num-examples`` too.
    out
        Folder for the global model (``model.npz`` after each round; ``model.pt`` and ``model.safetensors``
        when the run is over); ``model`` in the kit where None.

    Returns
    -------
    Callable
        A Flower mod. Whatever fails leaves as a reason code, and in full to this site's log: Flower would
        send an exception's text to the cloud. It raises :class:`ModOrderError` alone.
    """
    return _AppMod(
        Path(kit) if kit is not None else None, frozenset(metrics), Path(out) if out is not None else None
    )


@dataclass(frozen=True, slots=True)
class _AppMod:
    """See :func:`ckks_mod`."""

    kit: Path | None
    metrics: frozenset[str]
    out: Path | None

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer one message of the cloud."""
        # Raised, not answered: the outer mod would answer our answer instead of the cloud.
        refuse_outer_mods(sys._getframe(1))
        try:
            return self._answer(message, context, call_next)
        except FlepError as exc:
            _LOG.error("%s: %s", type(exc).__name__, exc)
            return _refusal(message, exc)
        except Exception as exc:
            _LOG.exception("ckks_mod failed")
            return _refusal(message, exc)

    def _answer(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        kit = load_site_kit(site_kit_folder(self.kit, context))
        out = self.out / kit.name if self.out is not None else kit.folder / "model"
        session = session_factory(kit, config_of(kit.federation.shared), kit.folder / "state")(None)
        try:
            mod = session_mod(
                session,
                on_model=partial(write_model, out / "model.npz"),
                on_close=partial(_finish, out),
                metrics=self.metrics,
            )
            return mod(message, context, call_next)
        finally:
            session.ledger.close()


def _finish(out: Path, model: Arrays) -> None:
    files = export_model(out, model)
    _LOG.info("the run is over; model: %s", ", ".join(map(str, files)))


def _refusal(message: Message, exc: Exception) -> Message:
    record = ConfigRecord({"status": public_code(exc)})
    return Message(RecordDict({FLEP_RECORD: record}), reply_to=message)


def site_kit_folder(default: Path | None, context: Context) -> Path:
    """Return the folder of the kit that a node uses; see :func:`ckks_mod`.

    Raises
    ------
    KitError
        When none is named, or a folder of kits is named and the node has no fitting ``partition-id``.
    """
    told = context.node_config.get("kit") or default or os.environ.get(KIT_VARIABLE)
    if not told:
        raise KitError(
            "This node does not know its startup kit",
            remedy="Start the SuperNode with --node-config 'kit=\"kits/a\"', or name it in ckks_mod(...)",
        )
    folder = Path(str(told)).expanduser()
    if (folder / "kit.json").exists():
        return folder
    kits = sorted(path.parent for path in folder.glob("*/kit.json") if path.parent.name not in NOT_SITES)
    number = context.node_config.get("partition-id")
    if not kits:
        raise KitError(
            f"There is no startup kit in {folder.absolute()}",
            remedy="Run `python -m scripts.provision 'sites=[a,b,c]' out=kits` first; relative paths start "
            "where the SuperNode was started",
        )
    if not isinstance(number, int) or not 0 <= number < len(kits):
        raise KitError(
            f"{folder} holds the kits of {len(kits)} sites",
            expected=f"partition-id 0 to {len(kits) - 1} in the node's configuration",
            found=number,
            remedy="Name this site's own kit, or simulate as many nodes as there are kits",
        )
    return kits[number]


NOT_SITES = frozenset({CLOUD, OWNER, DEALER})
"""Folders of a provisioning that are nobody's site."""


def refuse_outer_mods(frame: FrameType | None) -> None:
    """Raise :class:`ModOrderError` when a mod of Flower's that changes updates stands outside this one.

    Outside, it would see ciphertext: at best the update is thrown away, and the noise that the user relies on
    is never added. Flower calls mods nested in each other, so the outer ones are on the stack.
    """
    while frame is not None and frame.f_code is not ClientApp.__call__.__code__:
        if (name := _changing_mods().get(frame.f_code)) is not None:
            error = ModOrderError(
                f"{name} stands before ckks_mod in the list of mods: it would change ciphertext, not updates",
                expected=f"mods=[ckks_mod(...), {name}]",
                found=f"mods=[{name}, ckks_mod(...)]",
                remedy="Put ckks_mod first: Flower's first mod is the outermost one",
            )
            _LOG.error("%s: %s", type(error).__name__, error)
            raise error
        frame = frame.f_back


def _changing_mods() -> dict[CodeType, str]:
    from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod

    return {
        LocalDpMod.__call__.__code__: "LocalDpMod",
        fixedclipping_mod.__code__: "fixedclipping_mod",
        adaptiveclipping_mod.__code__: "adaptiveclipping_mod",
    }
