"""Training a whole zoo, network by network; what is finished is not trained again."""

from __future__ import annotations

import logging

from flep_fl.contracts.errors import DenoiserError
from flep_fl.data_security.denoise.card import ModelCard, checksum, parse_card
from flep_fl.data_security.denoise.settings import TrainSettings
from flep_fl.data_security.denoise.train import card_path, start_checksum, train_denoiser
from flep_fl.data_security.denoise.zoo_settings import ZooSettings

_log = logging.getLogger(__name__)


def train_zoo(settings: ZooSettings) -> dict[str, ModelCard]:
    """Train all networks of ``settings`` that are not there yet.

    A network is there when its weights are those of its card, and the card states the same training. A
    training that was stopped goes on from its checkpoint.

    Returns
    -------
    dict
        The model cards by file stem, trained now or before.

    Raises
    ------
    FlepError
        As :meth:`ZooSettings.runs` and :func:`~flep_fl.data_security.denoise.train.train_denoiser`.
    """
    cards: dict[str, ModelCard] = {}
    runs = settings.runs()
    for number, (stem, run) in enumerate(runs, start=1):
        card = _finished(run)
        if card is None:
            _log.info("%d/%d %s: %d steps", number, len(runs), stem, run.steps)
            card = train_denoiser(run)
        else:
            _log.info("%d/%d %s is there", number, len(runs), stem)
        cards[stem] = card
    return cards


def _finished(run: TrainSettings) -> ModelCard | None:
    try:
        card = parse_card(card_path(run.out).read_bytes())
        weights = run.out.read_bytes()
    except (OSError, DenoiserError):
        return None
    span = None if run.noise_range is None else (float(run.noise_range[0]), float(run.noise_range[1]))
    wanted = (run.noise_family, run.noise_std, span, run.depth, run.channels, run.unshuffle, run.steps)
    found = (
        *(card.noise_family, card.noise_std, card.noise_range, card.depth, card.channels, card.unshuffle),
        card.steps,
    )
    same = (run.batch, run.crop, run.seed, run.blind, start_checksum(run)) == (
        *(card.batch, card.crop, card.seed),
        card.noise_range is not None and not card.conditioned,
        card.start_sha256,
    )
    return card if wanted == found and same and checksum(weights) == card.sha256 else None
