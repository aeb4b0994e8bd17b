"""What the tests of fetching share."""

from __future__ import annotations

import pytest
from owner_world import World


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.close()
