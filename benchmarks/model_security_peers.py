"""The peers of ``benchmarks.model_security``: NVFLARE's own code, naive TenSEAL, plain arrays.

Nothing of ours is imported, so that any interpreter with NVFLARE or TenSEAL can run it:
``PYTHON model_security_peers.py {nvflare,tenseal} WEIGHTS CLIENTS``. Prints one line of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TENSORS = 10
"""NVFLARE encrypts tensor by tensor; so many of equal size make the model."""


class Stopwatch:
    """CPU seconds of this process, by the name of a step; several runs of a step count by their median."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, step: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run ``function`` and note its CPU time."""
        started = time.process_time()
        result = function(*arguments)
        self.seconds.setdefault(step, []).append(time.process_time() - started)
        return result

    def per_million(self, weights: int) -> dict[str, float]:
        """Return CPU seconds per million weights."""
        return {step: float(np.median(runs)) * 1e6 / weights for step, runs in self.seconds.items()}


def client_weights(count: int, client: int) -> tuple[np.ndarray, int]:
    """Return one client's model, float32, and its number of examples; the same for every contender."""
    rng = np.random.default_rng(100 + client)
    return rng.normal(0.0, 0.05, count).astype(np.float32), int(rng.integers(50, 1000))


def exact_mean(count: int, clients: int) -> np.ndarray:
    """Return the example-weighted mean in float64."""
    total, examples = np.zeros(count), 0
    for client in range(clients):
        weights, number = client_weights(count, client)
        total += weights.astype(np.float64) * number
        examples += number
    return total / examples


def memory_mb() -> float:
    """Return the largest memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def nvflare(count: int, clients: int) -> dict[str, Any]:
    """NVFLARE's encryptor, serialiser, aggregator and decryptor, called directly."""
    logging.disable(logging.CRITICAL)
    import nvflare as package
    import tenseal as ts
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
    from nvflare.app_opt.he import decomposers
    from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
    from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
    from nvflare.fuel.utils import fobs
    from nvflare.lighter.impl.he import HEBuilder

    decomposers.register()
    builder = HEBuilder()
    builder.initialize(None, None)
    context = ts.context_from(builder.get_serialized_context(is_client=True))
    flare, watch, base = FLContext(), Stopwatch(), memory_mb()

    def encrypt(weights: np.ndarray, examples: int) -> bytes:
        encryptor = HEModelEncryptor()
        encryptor.tenseal_context, encryptor.encrypt_layers, encryptor.n_iter = context, [True], examples
        parts = np.array_split(weights, TENSORS)
        model = {f"layer{index}": part.reshape(1, -1) for index, part in enumerate(parts)}
        return fobs.dumps(encryptor.encryption(model, flare)[0])

    def decrypt(blob: bytes) -> np.ndarray:
        decryptor = HEModelDecryptor()
        decryptor.tenseal_context = context
        parts = fobs.loads(blob)
        model = decryptor.decryption(parts, dict.fromkeys(parts, True), flare)
        return np.concatenate([np.asarray(model[f"layer{index}"]).reshape(-1) for index in range(TENSORS)])

    helper, up = WeightedAggregationHelper(weigh_by_local_iter=False), 0
    for client in range(clients):
        weights, examples = client_weights(count, client)
        blob = watch("encrypt", encrypt, weights, examples)
        up = len(blob)
        parsed = watch("parse", fobs.loads, blob)
        watch("add", helper.add, parsed, examples, str(client), 0)
    total = watch("finish", lambda: fobs.dumps(helper.get_result()))
    mean = watch("decrypt", decrypt, total)
    return _row(
        f"NVFLARE {package.__version__}, {TENSORS} tensors", count, clients, up, len(total), watch, mean, base
    )


def tenseal(count: int, clients: int) -> dict[str, Any]:
    """TenSEAL as its tutorials use it: N=8192, four primes, Galois keys in the context, one vector."""
    import tenseal as ts

    base = memory_mb()
    context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40, 60])
    context.global_scale = 2**40
    context.generate_galois_keys()
    server = ts.context_from(context.serialize(save_secret_key=False))
    watch, total, examples_total, up = Stopwatch(), None, 0, 0
    for client in range(clients):
        weights, examples = client_weights(count, client)
        encrypt = lambda w, n: ts.ckks_vector(context, (w.astype(np.float64) * n).tolist()).serialize()  # noqa: E731
        blob = watch("encrypt", encrypt, weights, examples)
        up, examples_total = len(blob), examples_total + examples
        vector = watch("parse", ts.ckks_vector_from, server, blob)
        total = vector if total is None else watch("add", total.add_, vector)
    blob = watch("finish", total.serialize)
    decrypt = lambda b: np.array(ts.ckks_vector_from(context, b).decrypt()) / examples_total  # noqa: E731
    mean = watch("decrypt", decrypt, blob)
    return _row("TenSEAL as in its tutorials", count, clients, up, len(blob), watch, mean, base)


def plain(count: int, clients: int) -> dict[str, Any]:
    """Float32 arrays, added in float64: no security at all."""
    base, watch, total, examples_total, up = memory_mb(), Stopwatch(), np.zeros(count), 0, 0
    for client in range(clients):
        weights, examples = client_weights(count, client)
        blob = watch("encrypt", weights.tobytes)
        up, examples_total = len(blob), examples_total + examples
        parsed = watch("parse", np.frombuffer, blob, np.float32)
        watch("add", lambda a, n: np.add(total, a.astype(np.float64) * n, out=total), parsed, examples)
    blob = watch("finish", lambda: (total / examples_total).astype(np.float32).tobytes())
    mean = watch("decrypt", lambda b: np.frombuffer(b, np.float32).astype(np.float64), blob)
    return _row("plain float32", count, clients, up, len(blob), watch, mean, base)


def _row(
    name: str, count: int, clients: int, up: int, down: int, watch: Stopwatch, mean: np.ndarray, base: float
) -> dict[str, Any]:
    peak = memory_mb()  # before the comparison takes memory of its own
    return {
        "name": name,
        "weights": count,
        "clients": clients,
        "up": up / count,
        "down": down / count,
        "cpu": watch.per_million(count),
        "peak_mb": peak - base,
        "error": float(np.abs(mean - exact_mean(count, clients)).max()),
    }


def main() -> None:
    """Run one peer; its chatter on standard output is dropped."""
    name, count, clients = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    keep, sink = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    row = {"nvflare": nvflare, "tenseal": tenseal, "plain": plain}[name](count, clients)
    os.dup2(keep, 1)
    print(json.dumps(row))


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]
    main()
