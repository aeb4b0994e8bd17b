"""The SuperLink of ``benchmarks.streaming --databases flower``: ours, but with Flower's own ``--database``.

Takes the arguments of ``flep_fl.flower.runtime.superlink`` and the file's name in ``FLEP_BENCH_DATABASE``.
Messages and their 5 MB chunks then lie in one SQLite file, as upstream keeps them, in the place of our files.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from flep_fl.flower.runtime import superlink


def main() -> None:
    """Serve until SIGTERM."""
    command: Any = importlib.import_module("flwr.superlink.cli.flower_superlink")
    serve = command.flower_superlink

    def serve_with_database() -> None:
        sys.argv += ["--database", os.environ["FLEP_BENCH_DATABASE"]]
        serve()

    command.flower_superlink = serve_with_database
    # Ours reaches into the state in memory, which is not used here.
    superlink.forget = lambda state, ids: state.delete_messages(ids)
    superlink.main()


if __name__ == "__main__":
    main()
