"""Whether a site takes over a new global model: an acceptance test on its own validation images.

Encryption hides a poisoned update from the cloud, and the sum hides who sent it; the analysts alone can look
at what comes out. The rule (``federation.accept_drop``): a site keeps the model that it has when the new
one's accuracy on the site's validation images lies more than ``accept_drop`` below the *best* accuracy that
it has accepted in this run. The best, not the last: small drops must not add up.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.files import write_secret

Arrays = Mapping[str, NDArray[Any]]


class AcceptanceTest:
    """Holds the model that a site works with. Each model is judged once, also over a restart of the site.

    Parameters
    ----------
    drop
        Largest drop of accuracy that is accepted, 0..1.
    score
        Returns a model's accuracy on the site's validation images, 0..1; the same for the same model.
    path
        Keeps the accepted model and the verdict (0600). A file that is missing or damaged costs the memory
        of what was accepted before: the next model is taken as it comes.
    on_refusal
        Called with one line when a model is refused.
    """

    def __init__(
        self,
        drop: float,
        score: Callable[[Arrays], float],
        path: Path,
        *,
        on_refusal: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._drop, self._score, self._path, self._on_refusal = drop, score, path, on_refusal
        self._run, self._judged, self._best = "", "", 0.0
        self._kept: Arrays = {}
        self._load()

    def consider(self, model: Arrays, run: str) -> Arrays:
        """Judge a model, unless that was done before, and return the one to work with.

        Parameters
        ----------
        model
            The global model.
        run
            Names the run. The first model of a run is always taken: there is nothing to compare it with.
        """
        digest = _digest(model)
        if run == self._run and digest == self._judged:
            return self._kept
        accuracy = self._score(model)
        if run != self._run:
            self._run, self._kept, self._best = run, dict(model), accuracy
        elif accuracy < self._best - self._drop:
            self._on_refusal(
                f"the new global model is refused: accuracy {accuracy:.3f} on own validation images, "
                f"{self._best:.3f} accepted before"
            )
        else:
            self._kept, self._best = dict(model), max(self._best, accuracy)
        self._judged = digest
        self._save()
        return self._kept

    def _save(self) -> None:
        meta = json.dumps({"run": self._run, "judged": self._judged, "best": self._best})
        texts = [np.frombuffer(text.encode(), np.uint8) for text in (meta, json.dumps(list(self._kept)))]
        buffer = io.BytesIO()
        np.savez(buffer, *texts, *self._kept.values())
        write_secret(self._path, buffer.getvalue())

    def _load(self) -> None:
        try:
            with np.load(self._path, allow_pickle=False) as stored:
                meta, names = (json.loads(stored[f"arr_{index}"].tobytes()) for index in (0, 1))
                kept = {name: stored[f"arr_{index}"] for index, name in enumerate(names, start=2)}
                run, judged, best = str(meta["run"]), str(meta["judged"]), float(meta["best"])
        except Exception:  # whatever numpy, zip or JSON say of a file that is missing or damaged
            return
        self._run, self._judged, self._best, self._kept = run, judged, best, kept


def _digest(model: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in model.items():
        digest.update(f"{name}/{array.dtype.str}/{array.shape}/".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
