"""Shared fixtures."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# One thread a process: the suite starts many, and two cores are all it may count on.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent / "support"))
# The benchmarks stand beside the package and are not installed with it.
sys.path.append(str(Path(__file__).parent.parent))
