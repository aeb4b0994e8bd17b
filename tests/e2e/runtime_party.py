"""A minimal party for the runtime tests, run as its own process: ``runtime_party.py cloud|site ...``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from flep_fl.contracts.errors import FlepError, SumCheckError, SuperLinkLostError
from flep_fl.flower.processes import Interrupted, stop_on_signals
from flep_fl.flower.runtime import cloud as cloud_module
from flep_fl.flower.runtime.cloud import run_cloud
from flep_fl.flower.runtime.security import CloudSecurity, SiteSecurity
from flep_fl.flower.runtime.site import run_site


def say(line: str) -> None:
    print(line, flush=True)


def replies_to(grid: Grid, waiting: set[str]) -> Iterator[Message]:
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        time.sleep(0.1)


def run_round(grid: Grid, number: int, sites: int, *, last: bool, after: str) -> None:
    nodes: list[int] = []
    while len(nodes) < sites:
        nodes = sorted(grid.get_node_ids())
        time.sleep(0.1)
    say(f"NODES {len(nodes)}")
    content = RecordDict({"config": ConfigRecord({"last": "yes" if last else "no", "round": number})})
    messages = [Message(content, node, "train", group_id=str(number)) for node in nodes]
    started = time.monotonic()
    pushed = set(grid.push_messages(messages))
    while after and not Path(after).exists():
        time.sleep(0.05)
    for reply in replies_to(grid, pushed):
        if reply.has_error():
            say(f"ERROR {reply.error.code} {reply.error.reason}")
        else:
            values = reply.content["arrays"]["v"].numpy()
            say(f"REPLY {number} {reply.content['m']['calls']} {values.sum():.0f}")
    say(f"ROUND {number} {time.monotonic() - started:.1f}")


def server_app() -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        sites, rounds = int(context.run_config["sites"]), int(context.run_config["rounds"])
        number = 1
        while number <= rounds:
            try:
                run_round(grid, number, sites, last=number == rounds, after=str(context.run_config["after"]))
                number += 1
            except SuperLinkLostError as exc:
                if not context.run_config["patient"]:
                    raise
                say(f"LOST: {exc}")
        if context.run_config["linger"]:
            while True:
                say(f"NODES {len(list(grid.get_node_ids()))}")
                time.sleep(0.25)

    return app


def client_app(fail: str, slow: float) -> tuple[ClientApp, list[bool]]:
    import numpy as np

    app = ClientApp()
    closed: list[bool] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        say(f"TRAIN {context.node_config['site']}")
        end = time.monotonic() + slow
        while time.monotonic() < end:
            time.sleep(0.05)
        closed.append(message.content["config"]["last"] == "yes")
        if fail == "named":
            raise SumCheckError("the secret number is 4711")
        if fail == "other":
            raise ValueError("the secret number is 4711")
        calls = context.state["calls"]["n"] + 1 if "calls" in context.state else 1
        context.state["calls"] = MetricRecord({"n": calls})
        arrays = ArrayRecord({"v": Array(np.full(2_000_000, calls, dtype=np.int32))})
        return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"calls": calls})}), reply_to=message)

    return app, closed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("--address")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--name", default="a")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--linger", action="store_true")
    parser.add_argument("--patient", action="store_true")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--database", default="disk")
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--node-key", type=Path)
    parser.add_argument("--certificate", type=Path)
    parser.add_argument("--private-key", type=Path)
    parser.add_argument("--node-keys", type=Path)
    parser.add_argument("--after", default="", help="look for replies once this file exists")
    parser.add_argument("--fail", default="")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--idle-timeout", type=float, default=0.0)
    options = parser.parse_args()
    cloud_security = site_security = None
    if options.certificate:
        keys = {site: pem.encode() for site, pem in json.loads(options.node_keys.read_text()).items()}
        cloud_security = CloudSecurity(options.certificate, options.private_key, options.ca, keys)
    elif options.ca:
        site_security = SiteSecurity(options.ca, options.node_key)
    cloud_module.MOST_RESTARTS = options.restarts
    with stop_on_signals() as stop:
        try:
            if options.role == "cloud":
                outcome = run_cloud(
                    server_app(),
                    address=options.address,
                    home=options.home,
                    run_config={
                        "sites": options.sites,
                        "rounds": options.rounds,
                        "linger": options.linger,
                        "after": options.after,
                        "patient": options.patient,
                    },
                    stop=stop,
                    log=say,
                    security=cloud_security,
                    database=options.database,
                )
                say(f"OUTCOME {outcome.status}")
            else:
                app, closed = client_app(options.fail, options.slow)
                run_site(
                    app,
                    cloud=options.address,
                    site=options.name,
                    home=options.home,
                    done=lambda: bool(closed) and closed[-1],
                    stop=stop,
                    idle_timeout=options.idle_timeout,
                    node_config={"site": options.name},
                    log=say,
                    security=site_security,
                )
        except Interrupted:
            say("INTERRUPTED")
            return 130
        except FlepError as exc:
            say(f"{type(exc).__name__}: {exc}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
