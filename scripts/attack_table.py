"""Write the table of ``docs/attacks.md``: ``python -m scripts.attack_table MULTIRUN_DIR docs/attacks.md``.

Without a page it prints the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flep_fl.attacks.table import read_results, replace_table, table
from flep_fl.contracts.errors import FlepError


def main() -> int:
    """Read the results of a multirun; write or print the table."""
    parser = argparse.ArgumentParser(description="The table of attacks, from the results of a multirun.")
    parser.add_argument("folder", type=Path, help="the multirun's folder")
    parser.add_argument("page", type=Path, nargs="?", help="a page with the table's markers")
    options = parser.parse_args()
    try:
        text = table(read_results(options.folder))
        if options.page is None:
            print(text)
        else:
            replace_table(options.page, text)
    except FlepError as exc:
        print(f"error ({type(exc).__name__}): {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
