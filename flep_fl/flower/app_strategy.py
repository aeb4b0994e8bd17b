"""``EncryptedFedAvg`` for any Flower ServerApp: Flower's own signature, a startup kit instead of trust."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from flep_fl.ai_cloud import strategy
from flep_fl.ai_cloud.members import Member
from flep_fl.ai_cloud.strategy import FirstModel
from flep_fl.config import config_of, federated_optimiser
from flep_fl.contracts.app_settings import AppSettings
from flep_fl.contracts.errors import ConfigError, KitError, LayoutError, ModelWithheldError
from flep_fl.contracts.protocol import APP_METRICS_RECORD, Kind
from flep_fl.flower.compose_cloud import adder_factory, average_opener, cloud_terms
from flep_fl.flower.runtime.traffic import message_bytes
from flep_fl.model_security import optimiser
from flep_fl.model_security.first_model import first_model_digest
from flep_fl.model_security.layout import ModelLayout
from flep_fl.provision.kits import load_cloud_kit

KIT_VARIABLE = "FLEP_KIT"
"""Environment variable that names the kit where the app does not."""

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]

_MAX_METRICS = 64
_MAX_NAME = 128


class WithheldModel(ArrayRecord):
    """Stands for the model in the result of a cloud that cannot open it; whoever reads it is told so."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise ModelWithheldError(
            "This cloud adds ciphertext and never holds the model; the sites do",
            remedy="Take it from a site (model/model.pt in its kit), or provision with cloud=trusted",
        )

    to_torch_state_dict = _refuse
    to_numpy_ndarrays = _refuse
    __getitem__ = _refuse


class EncryptedFedAvg(strategy.EncryptedFedAvg):
    """FedAvg over encrypted updates, in the place of Flower's own.

    Parameters
    ----------
    kit
        The cloud's startup kit; the environment variable ``FLEP_KIT`` where None.
    fraction_train, fraction_evaluate
        Shares of the sites that train and evaluate in a round, 0..1. ``fraction_train`` None takes
        ``federation.fraction`` of the kit; at least ``federation.quorum`` sites must be left to train.
    weighted_by_key
        Name of the metric with which the app tells its number of examples; it stays at the site.
    arrayrecord_key, configrecord_key
        Names of the records under which the app finds the model and its configuration.
    proximal_mu
        FedProx (Li et al. 2020): the app finds it as ``proximal-mu`` in its configuration, as with Flower's
        own FedProx, and does the rest.
    on_event
        Takes one line of progress at a time; Flower's log where None.

    Raises
    ------
    KitError, ConfigError
        When the kit cannot be used or a number is out of range.
    """

    def __init__(
        self,
        kit: str | Path | None = None,
        *,
        fraction_train: float | None = None,
        fraction_evaluate: float = 1.0,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        proximal_mu: float | None = None,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        told = kit or os.environ.get(KIT_VARIABLE)
        if not told:
            raise KitError("The cloud's startup kit is not named", remedy='EncryptedFedAvg("kits/cloud")')
        self._kit = load_cloud_kit(Path(told).expanduser())
        config = config_of(self._kit.federation.shared)
        self._trust = config.cloud.trust
        terms = cloud_terms(self._kit, config)
        if fraction_train is not None:
            terms = dataclasses.replace(
                terms, participants=_share(fraction_train, len(terms.site_keys), "fraction_train")
            )
        if terms.participants < terms.quorum:
            raise ConfigError(
                f"fraction_train={fraction_train} asks {terms.participants} sites in a round",
                expected=f"at least federation.quorum={terms.quorum}",
                remedy="Raise fraction_train",
            )
        self._evaluating = _share(fraction_evaluate, len(terms.site_keys), "fraction_evaluate")
        if proximal_mu is not None and not (math.isfinite(proximal_mu) and proximal_mu >= 0):
            raise ConfigError(f"proximal_mu={proximal_mu} is not a number of 0 or more")
        self._settings = AppSettings(arrayrecord_key, configrecord_key, weighted_by_key)
        self._proximal_mu = proximal_mu
        self._configs: dict[str, ConfigRecord] = {}
        self._told: dict[tuple[Kind, int], list[dict[str, float]]] = {}
        self._opened = average_opener(self._kit, config)
        self._optimiser = federated_optimiser(config)
        self._state: optimiser.OptimiserState | None = None
        self._evaluate_fn: Evaluate | None = None
        self._result = Result()
        super().__init__(
            terms,
            self._kit.signing_key,
            adder_factory(self._kit, config),
            message_bytes=message_bytes,
            on_sum=self._open if self._opened is not None else None,
            on_event=on_event or logging.getLogger("flwr").info,
        )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Run the federation as Flower's own strategies do.

        Parameters
        ----------
        grid
            Flower's grid.
        initial_arrays
            The first model; it travels in the clear, and every site checks that it is the same for all.
        num_rounds
            1 to ``federation.rounds`` of the kit, which is what the sites have agreed to; all of them where
            None.
        timeout
            Seconds for one exchange; ``federation.round_timeout`` of the kit where None.
        train_config, evaluate_config
            What the app finds in its configuration record, beside ``server-round``. The sites see that it is
            the cloud's word, signed and unaltered.
        evaluate_fn
            Evaluates the model at the cloud; only for a cloud that can open it.

        Returns
        -------
        Result
            ``arrays``: the model where ``cloud`` is trusted or open; with an untrusted cloud a
            :class:`WithheldModel`, because the sites alone hold it. The metrics are unweighted means of what
            the sites let out.

        Raises
        ------
        ConfigError
            When an argument does not fit the kit.
        LayoutError, WeightRangeError
            When the first model cannot be federated.
        QuorumError
            When too few sites join, or no round reaches the quorum.
        """
        self._check(num_rounds, evaluate_fn)
        if not initial_arrays:
            raise LayoutError("initial_arrays holds no model", remedy="Pass ArrayRecord(model.state_dict())")
        first = {name: array.numpy() for name, array in initial_arrays.items()}
        ModelLayout.of(first).flatten(first)  # refuses what is not finite
        self.first = FirstModel(initial_arrays, first_model_digest(first))
        if self._opened is not None and self._optimiser.has_memory:
            self._state = optimiser.start(self._optimiser, ModelLayout.of(first).flatten(first))
        self._configs = {
            "round": ConfigRecord(dict(train_config or {})),
            "evaluate": ConfigRecord(dict(evaluate_config or {})),
        }
        if self._proximal_mu is not None:
            self._configs["round"]["proximal-mu"] = self._proximal_mu
        self.terms = dataclasses.replace(
            self.terms,
            rounds=num_rounds or self.terms.rounds,
            round_timeout=timeout or self.terms.round_timeout,
        )
        self._evaluate_fn = evaluate_fn
        self._result = Result(arrays=ArrayRecord() if self._opened is not None else WithheldModel())
        self._evaluate_centrally(0, initial_arrays)
        super().start(grid)
        if self._opened is None:
            self._say("the model stays at the sites: model.pt and model.safetensors beside their kits")
        return self._result

    def _check(self, num_rounds: int | None, evaluate_fn: Evaluate | None) -> None:
        if num_rounds is not None and not 1 <= num_rounds <= self.terms.rounds:
            raise ConfigError(
                f"num_rounds={num_rounds} does not fit the kit",
                expected=f"1 to federation.rounds={self.terms.rounds}",
                remedy=f"Provision with federation.rounds={num_rounds}: the sites agree to it in their kits",
            )
        if evaluate_fn is not None and self._opened is None:
            raise ConfigError(
                f"evaluate_fn needs the model, and a cloud with cloud={self._trust} never holds it",
                remedy="Let the sites evaluate (@app.evaluate), or provision with cloud=trusted",
            )

    # --- hooks of the base -----------------------------------------------------------------------

    def _app_fields(self, kind: Kind, number: int) -> dict[str, Any]:
        if kind not in self._configs:
            return {}
        return dataclasses.replace(self._settings, values=dict(self._configs[kind])).to_fields()

    def _after_round(self, grid: Grid) -> None:
        number = self._record.round
        self._result.train_metrics_clientapp.update(self._means("round", number))
        if self._record.error:
            return
        if self._opened is not None:
            self._evaluate_centrally(number, self._result.arrays)
        if self._evaluating:
            self.evaluate_now(grid, self._evaluators())
            self._result.evaluate_metrics_clientapp.update(self._means("evaluate", number))

    def _note_app_metrics(self, kind: Kind, reply: Message) -> None:
        record = reply.content.get(APP_METRICS_RECORD)
        if isinstance(record, MetricRecord) and len(record) <= _MAX_METRICS:
            found = {
                name: float(value)
                for name, value in record.items()
                if len(name) <= _MAX_NAME and isinstance(value, (int, float)) and math.isfinite(value)
            }
            self._told.setdefault((kind, self._record.round), []).append(found)

    # --- details ---------------------------------------------------------------------------------

    def _open(self, number: int, payload: bytes, layout: ModelLayout) -> None:
        """Open the sum and take the same step as every analyst does."""
        if self._opened is not None:
            weights = self._opened(payload, layout)
            if self._state is not None:
                self._state = optimiser.step(self._optimiser, self._state, weights, number)
                weights = self._state.weights
            model = layout.unflatten(weights)
            self._result.arrays = ArrayRecord({name: Array(value) for name, value in model.items()})

    def _evaluate_centrally(self, number: int, arrays: ArrayRecord) -> None:
        if self._evaluate_fn is not None:
            metrics = self._evaluate_fn(number, arrays)
            if metrics is not None:
                self._result.evaluate_metrics_serverapp[number] = metrics

    def _evaluators(self) -> Mapping[int, Member]:
        members = sorted(self.members.present.items(), key=lambda item: item[1].site)
        if self._evaluating >= len(members):
            return dict(members)
        return dict(secrets.SystemRandom().sample(members, self._evaluating))

    def _means(self, kind: Kind, number: int) -> dict[int, MetricRecord]:
        """Average what the sites told of a round, each metric over those that told it."""
        told = self._told.get((kind, number), [])
        names = sorted({name for one in told for name in one})
        if not names:
            return {}
        return {number: MetricRecord({n: _mean(one[n] for one in told if n in one) for n in names})}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _share(fraction: float, sites: int, name: str) -> int:
    if not 0 <= fraction <= 1:
        raise ConfigError(f"{name}={fraction} is not a share", expected="0 to 1")
    return math.ceil(fraction * sites - 1e-9)
