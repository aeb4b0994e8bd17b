"""A child that does what its arguments say, in order: ``say:TEXT``, ``sleep:SECONDS``, ``exit:STATUS``."""

from __future__ import annotations

import os
import sys
import time

for argument in sys.argv[1:]:
    verb, _, value = argument.partition(":")
    if verb == "say":
        print(value, flush=True)
    elif verb == "sleep":
        time.sleep(float(value))
    else:
        os._exit(int(value))
