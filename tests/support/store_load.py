"""Processes that write into a private database until they are killed, and what must be true afterwards."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys

import numpy as np

from flep_fl.contracts.owner_records import Capture

KEY = secrets.token_bytes(32)


def picture(sequence, device="cam"):
    seed = [sequence, *device.encode()]
    return np.random.default_rng(seed).integers(0, 256, (20, 20), dtype=np.uint8)


def capture(sequence, device="cam", **settings):
    return Capture("cells", device, sequence, picture(sequence, device), **{"label": 0, **settings})


WRITER = """
import sys, threading
from pathlib import Path
import numpy as np
from flep_fl.contracts.errors import StoreBusyError
from flep_fl.contracts.owner_records import Capture
from flep_fl.private_database.store import OwnerDatabase

path, key, start = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3])
database = OwnerDatabase(path if "://" in path else Path(path), key)

def device(number):
    for i in range(start, start + 100000):
        rng = np.random.default_rng([i, *f"cam-{number}".encode()])
        image = rng.integers(0, 256, (20, 20), dtype=np.uint8)
        receipt = database.put(Capture("cells", f"cam-{number}", i, image, label=0))
        sys.stdout.write(f"{number} {i} {receipt.record_id}\\n")
        sys.stdout.flush()

for number in range(8):
    threading.Thread(target=device, args=(number,)).start()
"""


def start_writer(location, start):
    command = [sys.executable, "-c", WRITER, str(location), KEY.hex(), str(start)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read_acknowledged(child, at_least):
    lines = []
    for line in child.stdout:
        lines.append(line)
        if len(lines) == at_least:
            child.send_signal(signal.SIGKILL)
    child.wait()
    # The last line may be cut off by the kill itself.
    return [line.split() for line in lines if line.endswith("\n")]


def check_after_kill(database, acknowledged):
    """Acknowledged means stored; nothing is there twice; nothing is half there."""
    records = {r.record_id: r for r in database.records()}
    for number, sequence, record_id in acknowledged:
        tags = records[record_id].tags
        assert (tags.device, tags.sequence) == (f"cam-{number}", int(sequence))
    origins = [(r.tags.device, r.tags.sequence) for r in records.values()]
    assert len(origins) == len(set(origins))
    for record in records.values():
        np.testing.assert_array_equal(record.image, picture(record.tags.sequence, record.tags.device))
    return len(records)
