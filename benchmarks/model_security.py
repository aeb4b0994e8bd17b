"""Bytes, CPU time, memory and error of encrypted aggregation, ours and peers', one process after another.

    python -m benchmarks.model_security [--large] [--nvflare PYTHON] [--out FILE.json]

Every contender averages the same weights of ten clients. Ours are complete: check values, signed envelopes,
structural checks and the verification of the sum are in the bytes and in the seconds. ``--large`` adds 11M
weights (three clients). ``--nvflare`` names an interpreter that has ``nvflare[HE]``; it pins other versions
of packages that we need.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.model_security_peers import Stopwatch, client_weights, exact_mean, memory_mb

OURS = [f"{name}-{kind}" for name in ("default", "compact", "classic") for kind in ("symmetric", "public")]
PEERS = ["nvflare", "tenseal", "plain"]
MAX_EXAMPLES = 4096
STEPS = ("encrypt", "parse", "add", "finish", "decrypt")


def ours(variant: str, count: int, clients: int) -> dict[str, Any]:  # noqa: PLR0915 - one scene
    """One contender of ours: exactly what sites and cloud do, without Flower's messages."""
    import numpy as np
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from flep_fl.model_security.adder import KeylessAdder
    from flep_fl.model_security.authenticator import ProjectionContext, authenticate, verify_sum
    from flep_fl.model_security.cipher import CkksModelCipher
    from flep_fl.model_security.ciphertext_format import CheckedPayload
    from flep_fl.model_security.contribution import average, weighted_vector
    from flep_fl.model_security.keyring import CheckKey, ModelKey
    from flep_fl.model_security.layout import ModelLayout
    from flep_fl.model_security.profiles import get_profile, vector_length
    from flep_fl.model_security.seal import (
        Expectation,
        UpdateHeader,
        new_nonce,
        open_sum,
        open_update,
        seal_sum,
        seal_update,
    )

    profile = get_profile(*variant.split("-"))
    base = memory_mb()
    key, check_key = ModelKey.generate(profile), CheckKey.generate()
    cipher, length = CkksModelCipher(key, profile), vector_length(count, checked=True)
    signing = {f"site{client}": Ed25519PrivateKey.generate() for client in range(clients)}
    public, cloud = {name: k.public_key() for name, k in signing.items()}, Ed25519PrivateKey.generate()
    layout = ModelLayout.of({"weights": client_weights(count, 0)[0]})
    context = ProjectionContext(key.key_id, "bench", "run", 1)
    common: dict[str, Any] = {
        "federation": "bench", "run": "run", "round": 1, "attempt": 1, "previous": "", "key_id": key.key_id,
        "layout": layout.digest, "profile": profile.digest, "config": "0" * 64, "mode": "ckks",
    }  # fmt: skip

    def encrypt(site: str, weights: np.ndarray, examples: int) -> bytes:
        flat = layout.flatten({"weights": weights})
        vector = weighted_vector(flat, examples, MAX_EXAMPLES, profile.default_bound)
        header = UpdateHeader(**common, sender=site, nonce=new_nonce())
        checks = authenticate(check_key, context, header.tag_input(), vector)
        return seal_update(header, cipher.encrypt(np.concatenate([vector, checks])), signing[site])

    def parse(blob: bytes) -> Any:
        return open_update(blob, expected=Expectation(**common), public_keys=public)

    def check(payload: bytes) -> None:
        CheckedPayload(payload, profile, length, allow_seeded=profile.seeded_uploads).check()

    def decrypt(blob: bytes) -> np.ndarray:
        signed = open_sum(
            blob,
            cloud_key=cloud.public_key(),
            site_keys=public,
            expected=Expectation(**common),
            min_contributors=2,
            own_sender="site0",
            own_header=own,
        )
        values = cipher.decrypt(signed.payload, length)
        vector, tags = values[: count + 1], [header.tag_input() for header in signed.headers]
        verify_sum(check_key, context, tags, vector, values[count + 1 :], profile.tolerance(clients))
        return layout.unflatten(average(vector))["weights"]

    watch, adder = Stopwatch(), KeylessAdder(key.public_context(), profile, length)
    headers, own, up = [], b"", 0
    for client, site in enumerate(signing):
        weights, examples = client_weights(count, client)
        blob = watch("encrypt", encrypt, site, weights, examples)
        up = len(blob)
        update = watch("parse", parse, blob)
        watch("check", check, update.payload)
        watch("add", adder.add, update.payload)
        own = own or update.header_bytes
        headers.append(update.without_payload())
        del update, blob
    total = watch("finish", lambda: seal_sum(headers, adder.result(), cloud))
    mean = watch("decrypt", decrypt, total)
    peak = memory_mb()
    cpu = watch.per_million(count)
    checking = cpu.pop("check")  # the adder checks as well; what it does more is adding
    cpu["parse"] += checking
    cpu["add"] -= checking
    return {
        "name": f"ours, {profile.name}, {profile.encryption}",
        "weights": count,
        "clients": clients,
        "up": up / count,
        "down": len(total) / count,
        "cpu": cpu,
        "peak_mb": peak - base,
        "error": float(np.abs(mean - exact_mean(count, clients)).max()),
    }


def run(contender: str, count: int, clients: int, nvflare: str | None) -> dict[str, Any] | None:
    """Run one contender in a process of its own; None where it is not installed."""
    if contender in PEERS:
        script = Path(__file__).with_name("model_security_peers.py")
        python = (nvflare or sys.executable) if contender == "nvflare" else sys.executable
        command = [python, str(script), contender, str(count), str(clients)]
    else:
        command = [
            sys.executable,
            "-m",
            "benchmarks.model_security",
            "--one",
            contender,
            str(count),
            str(clients),
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    if result.returncode:
        print(f"{contender}: not run ({result.stderr.strip().splitlines()[-1]})", file=sys.stderr)
        return None
    return json.loads(result.stdout)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| weights | contender | B/weight up | down | encrypt | parse, verify | add | finish "
        "| decrypt, check | peak MB | max error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = " | ".join(f"{row['cpu'].get(step, 0.0):.3f}" for step in STEPS)
        lines.append(
            f"| {row['weights']:,} | {row['name']} | {row['up']:.2f} | {row['down']:.2f} | {seconds} "
            f"| {row['peak_mb']:.0f} | {row['error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run everything, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="11M weights as well")
    parser.add_argument("--nvflare", metavar="PYTHON", help="interpreter that has nvflare[HE]")
    parser.add_argument("--out", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "WEIGHTS", "CLIENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(ours(options.one[0], int(options.one[1]), int(options.one[2]))))
        return
    rows = []
    for count in [*options.sizes, *([11_000_000] if options.large else [])]:
        for contender in (*OURS, *PEERS):
            row = run(contender, count, 10 if count <= 1_000_000 else 3, options.nvflare)
            if row is not None:
                rows.append(row)
                print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if options.out:
        Path(options.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
