"""Relay the state of an optimiser from one analyst to another: the cloud can neither read nor alter it.

Sites that hold the state say so in signed statements; one of them seals the state. What the joining site
makes of both is its own affair (``model_security.transfer``).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from flep_fl.ai_cloud.exchange import exchange, reply_status
from flep_fl.ai_cloud.members import Member
from flep_fl.contracts.protocol import FLEP_RECORD, OK, STATEMENTS

Ask = Callable[[int, str, str], Message]
"""``ask(node, challenge, donor)``: the message that asks a holder for its statement."""

Give = Callable[[int, bytes], Message]
"""``give(node, sealed)``: the message that brings a site the sealed state."""


@dataclass(frozen=True, slots=True)
class Relay:
    """How the cloud speaks to the sites.

    Attributes
    ----------
    ask, give
        Make the messages.
    payload
        Takes the sealed bytes out of a reply.
    timeout
        Seconds for each exchange.
    say
        Takes one line of progress.
    """

    ask: Ask
    give: Give
    payload: Callable[[Message], bytes]
    timeout: float
    say: Callable[[str], None]


def bring_up_to_date(
    grid: Grid,
    present: Mapping[int, Member],
    asked: Mapping[int, Member],
    fit: tuple[str, str],
    relay: Relay,
) -> None:
    """Hand the state over to every site of ``asked`` that cannot go on with the sum that it gets next.

    Parameters
    ----------
    grid
        Flower's grid.
    present, asked
        The sites that are here, by node, and those of them that are about to be asked for an update;
        ``has_sum`` of those that were helped is brought up to date.
    fit
        Digests of the sum before the last one, and of the last one: who holds the state after either can go
        on.
    relay
        How to speak to them.
    """
    holders = {node: member for node, member in present.items() if member.challenge and member.has_sum in fit}
    lacking = {node: m for node, m in asked.items() if m.challenge and m.has_sum not in fit}
    if not holders or not lacking:
        return
    # Statements must be on one and the same state to add up: take the one that most sites hold.
    votes = Counter(member.has_sum for member in holders.values())
    held = max(fit, key=lambda digest: votes[digest])
    holders = {node: member for node, member in holders.items() if member.has_sum == held}
    for node, member in lacking.items():
        found = _collect(grid, holders, member.challenge, relay)
        if found is None:
            relay.say(f"no site handed the optimiser's state over to site {member.site}")
            continue
        statements, sealed = found
        message = relay.give(node, sealed)
        record = message.content[FLEP_RECORD]
        if isinstance(record, ConfigRecord):
            record[STATEMENTS] = statements
        for _, reply, reason in exchange(grid, {node: message}, timeout=relay.timeout):
            status = reason if reply is None else reply_status(reply)
            if status == OK:
                member.has_sum = held
                relay.say(f"site {member.site} has taken the optimiser's state over")
            else:
                relay.say(f"site {member.site} did not take the optimiser's state: {status}")


def _collect(
    grid: Grid, holders: Mapping[int, Member], challenge: str, relay: Relay
) -> tuple[list[bytes], bytes] | None:
    """Ask all holders for their statements, and one after the other for the state until one sends it."""
    for donor in secrets.SystemRandom().sample(sorted(holders), len(holders)):
        name = holders[donor].site
        statements: list[bytes] = []
        sealed: bytes | None = None
        messages = {node: relay.ask(node, challenge, name) for node in holders}
        for node, reply, _ in exchange(grid, messages, timeout=relay.timeout):
            if reply is None or reply_status(reply) != OK:
                continue
            record = reply.content[FLEP_RECORD]  # (a view such as config_records would hold the reply)
            statement = record.get("statement") if isinstance(record, ConfigRecord) else None
            if not isinstance(statement, bytes):
                continue
            statements.append(statement)
            if node == donor:
                try:
                    sealed = relay.payload(reply)
                except Exception:
                    sealed = None
        if sealed is not None:
            return statements, sealed
    return None
