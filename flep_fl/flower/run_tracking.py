"""Open what tracks a run (``tracking=``), and close it whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flep_fl.config import Config
from flep_fl.reporting.tracking import Tracker, make_tracker

FOLDER = "tensorboard"


@contextmanager
def tracked(
    config: Config, out: Path, settings: Mapping[str, Any], on_event: Callable[[str], None]
) -> Iterator[Tracker]:
    """Yield the tracker of a run; a run that ends in an error is marked as failed.

    Parameters
    ----------
    config
        ``tracking``.
    out
        The run's folder; its name is the run's.
    settings
        What is kept of the configuration. A cloud gives the shared settings only.
    on_event
        Gets a line where the store fails.

    Raises
    ------
    MissingExtraError, ConfigError
        As :func:`flep_fl.reporting.tracking.make_tracker`.
    """
    wanted = config.tracking
    tracker = make_tracker(
        wanted.name,
        folder=out / FOLDER if wanted.folder is None else Path(wanted.folder),
        uri=wanted.uri,
        experiment=wanted.experiment,
        run=out.name,
        settings=settings,
        on_event=on_event,
    )
    try:
        yield tracker
    except BaseException:
        tracker.close(failed=True)
        raise
    tracker.close()
