"""Flower's processes (SuperLink, SuperNode) under our roof; the only package that touches flwr internals.

Written against flwr 1.41, one minor version at a time: what is imported from below ``flwr.supercore``,
``flwr.superlink`` and ``flwr.supernode`` has no stability promise.

Modules: :mod:`.cloud` (run a ServerApp), :mod:`.site` (run a ClientApp), :mod:`.wire` (messages as bytes),
:mod:`.superlink` and :mod:`.supernode` (entry points of the child processes).
"""
