"""Settings of the training of a whole zoo; plain data, checked before PyTorch is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flep_fl.contracts.errors import ConfigError
from flep_fl.data_security.denoise.settings import TrainSettings


@dataclass
class ZooSettings:
    """Which networks are trained, on what.

    Attributes
    ----------
    images, validation, seed, device, threads, source, licence, validation_source
        As in :class:`~flep_fl.data_security.denoise.settings.TrainSettings`, for all networks.
    out
        Folder of the weights and cards.
    networks
        By file stem: what differs from the defaults of ``TrainSettings``. ``start`` is the stem of another
        network, which is trained first.
    only
        Stems to train, with the ones they start from; empty: all.
    scale
        Factor on all numbers of steps.
    """

    images: Path
    out: Path = Path("zoo")
    validation: Path | None = None
    networks: dict[str, Any] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    scale: float = 1.0
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    source: str = "not stated"
    licence: str = "not stated"
    validation_source: str = "not stated"

    def runs(self) -> list[tuple[str, TrainSettings]]:
        """Return the trainings in an order in which every ``start`` is there before it is needed.

        Raises
        ------
        ConfigError
            Naming the network and the setting that cannot be used.
        """
        if not 0 < self.scale <= 100:
            raise ConfigError("scale cannot be used", expected="above 0, at most 100", found=self.scale)
        ordered: list[str] = []
        for stem in self.only or self.networks:
            self._add(stem, ordered, ())
        return [(stem, self._settings(stem)) for stem in ordered]

    def _add(self, stem: str, ordered: list[str], above: tuple[str, ...]) -> None:
        if stem not in self.networks:
            raise ConfigError(
                "There is no such network", expected="one of " + ", ".join(self.networks), found=stem
            )
        if stem in above:
            raise ConfigError("Networks start from each other in a circle", found=" <- ".join((*above, stem)))
        if stem in ordered:
            return
        start = (self.networks[stem] or {}).get("start")
        if start is not None:
            self._add(str(start), ordered, (*above, stem))
        ordered.append(stem)

    def _settings(self, stem: str) -> TrainSettings:
        own = dict(self.networks[stem] or {})
        known = {entry.name for entry in fields(TrainSettings)}
        shared = {entry.name for entry in fields(ZooSettings)} & known
        if wrong := sorted(own.keys() - (known - shared)):
            raise ConfigError(
                f"networks.{stem}.{wrong[0]} is no setting of one network",
                expected="one of " + ", ".join(sorted(known - shared)),
            )
        start = own.pop("start", None)
        base = TrainSettings(
            **{name: getattr(self, name) for name in shared - {"out"}},
            start=None if start is None else self.out / f"{start}.safetensors",
        )
        settings = replace(base, **own, out=self.out / f"{stem}.safetensors")
        return replace(settings, steps=max(1, round(self.scale * settings.steps)))
