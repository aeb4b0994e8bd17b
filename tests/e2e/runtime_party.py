"""A minimal party for the runtime tests, run as its own process: ``runtime_party.py cloud|site ...``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from flep_fl.contracts.errors import FlepError, SumCheckError
from flep_fl.flower.processes import Interrupted, stop_on_signals
from flep_fl.flower.runtime.cloud import run_cloud
from flep_fl.flower.runtime.site import run_site


def say(line: str) -> None:
    print(line, flush=True)


def replies_to(grid: Grid, waiting: set[str]) -> Iterator[Message]:
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        time.sleep(0.1)


def server_app() -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        sites, rounds = int(context.run_config["sites"]), int(context.run_config["rounds"])
        nodes: list[int] = []
        while len(nodes) < sites:
            nodes = sorted(grid.get_node_ids())
            time.sleep(0.1)
        say(f"NODES {len(nodes)}")
        for number in range(1, rounds + 1):
            last = "yes" if number == rounds else "no"
            content = RecordDict({"config": ConfigRecord({"last": last, "round": number})})
            messages = [Message(content, node, "train", group_id=str(number)) for node in nodes]
            started = time.monotonic()
            pushed = set(grid.push_messages(messages))
            time.sleep(int(context.run_config["nap"]))
            for reply in replies_to(grid, pushed):
                if reply.has_error():
                    say(f"ERROR {reply.error.code} {reply.error.reason}")
                else:
                    values = reply.content["arrays"]["v"].numpy()
                    say(f"REPLY {number} {reply.content['m']['calls']} {values.sum():.0f}")
            say(f"ROUND {number} {time.monotonic() - started:.1f}")
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
    parser.add_argument("--nap", type=int, default=0)
    parser.add_argument("--fail", default="")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--idle-timeout", type=float, default=0.0)
    options = parser.parse_args()
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
                        "nap": options.nap,
                    },
                    stop=stop,
                    log=say,
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
