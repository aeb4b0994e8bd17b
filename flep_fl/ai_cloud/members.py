"""Who takes part: the handshake that turns Flower's anonymous nodes into sites of the kit."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Message
from flwr.serverapp import Grid

from flep_fl.ai_cloud.exchange import exchange, reply_status
from flep_fl.contracts.errors import (
    PUBLIC_CODES,
    FlepError,
    LayoutError,
    MalformedUpdateError,
    QuorumError,
    SignatureError,
    StaleCheckpointError,
    StaleUpdateError,
)
from flep_fl.contracts.protocol import FLEP_RECORD, OK
from flep_fl.model_security.layout import ModelLayout
from flep_fl.model_security.seal import open_control

GATHER_HELLO_SECONDS = 60.0
ROUND_HELLO_SECONDS = 15.0
"""How long new nodes get for the handshake: before the first round, and before a later one."""

REFUSAL_PATIENCE_SECONDS = 20.0
"""After a refusal, how long to wait for another site before starting without the missing ones."""

ASK_AGAIN_SECONDS = 60.0
"""When a node that did not answer a hello is asked again."""

_POLL_SECONDS = 0.2


@dataclass(slots=True)
class Member:
    """A site that said hello, its model's layout, and the digest of the sum whose model it holds."""

    site: str
    layout: ModelLayout
    has_sum: str = ""
    challenge: str = ""
    """What statements for this site must repeat; empty where its model is no optimiser's state."""


@dataclass(slots=True)
class Members:
    """The sites of a run, by node.

    Attributes
    ----------
    run
        Identifier of the run; an introduction for another one is refused.
    site_keys
        The sites' signature keys by name, from the kit.
    hello
        Makes the hello message for ``(node, challenge)``.
    say
        Takes one line of progress.
    compare
        Takes a site's name and its introduction; raises StaleUpdateError where the site has seen more of the
        run than this cloud has.
    present
        The members by node id.
    joined
        Every site that ever joined.
    layout
        The layout of the model, once gathered: that of most sites. All others must have the same.
    """

    run: str
    site_keys: Mapping[str, Ed25519PublicKey]
    hello: Callable[[int, str], Message]
    say: Callable[[str], None]
    compare: Callable[[str, Mapping[str, Any]], None] = lambda _site, _identity: None
    present: dict[int, Member] = field(default_factory=dict)
    joined: set[str] = field(default_factory=set)
    layout: ModelLayout | None = None
    _node_of: dict[str, int] = field(default_factory=dict)
    _refused: dict[int, str] = field(default_factory=dict)
    _ask_again: dict[int, float] = field(default_factory=dict)
    _layouts: dict[str, ModelLayout] = field(default_factory=dict)

    def gather(
        self,
        grid: Grid,
        *,
        quorum: int,
        timeout: float,
        wanted: Set[str] | None = None,
        resumed: bool = False,
    ) -> None:
        """Wait until every wanted site (None: of the kit) has joined, or for ``timeout`` seconds.

        Raises
        ------
        QuorumError
            When fewer than ``quorum`` sites joined.
        StaleCheckpointError
            When that is so in a ``resumed`` run because sites refused what they have gone on from.
        """
        wanted = wanted or set(self.site_keys)
        self.say(f"waiting for {len(wanted)} sites")
        deadline = time.monotonic() + timeout
        reasons: set[str] = set()
        patience = deadline
        while time.monotonic() < deadline and not wanted <= self.sites():
            if self.welcome(grid, timeout=GATHER_HELLO_SECONDS) == 0:
                time.sleep(_POLL_SECONDS)
            if new := set(self._refused.values()) - reasons:
                reasons |= new
                patience = min(patience, time.monotonic() + REFUSAL_PATIENCE_SECONDS)
            if time.monotonic() >= patience and len(self.sites()) + (resumed and self._stale()) >= quorum:
                break
        if self.layout is None:
            self._settle()
        if resumed and len(self.sites()) < quorum <= len(self.sites()) + self._stale():
            raise StaleCheckpointError(
                "The sites have gone on since this checkpoint was written, or have left its run",
                expected=f"at least federation.quorum={quorum} sites that go on from it",
                found=len(self.sites()),
                remedy="Resume from the newest copy of the run's folder, or start a new run without resume=",
            )
        if len(self.sites()) < quorum:
            missing = ", ".join(sorted(wanted - self.sites())) or "none"
            refused = f"; nodes were refused: {', '.join(sorted(reasons))}" if reasons else ""
            raise QuorumError(
                f"Too few sites joined (missing: {missing}{refused})",
                expected=f"at least federation.quorum={quorum}",
                found=len(self.sites()),
                remedy="Start the missing sites with `python -m clients`, or raise federation.round_timeout",
            )

    def wait_for(self, grid: Grid, *, quorum: int, timeout: float, wanted: Set[str] = frozenset()) -> bool:
        """Wait until ``quorum`` sites and all of ``wanted`` are here; return whether a quorum is."""
        deadline = time.monotonic() + timeout
        while True:
            self.welcome(grid)
            enough = len(self.sites()) >= quorum
            if (enough and wanted <= self.sites()) or time.monotonic() >= deadline:
                return enough
            time.sleep(_POLL_SECONDS)

    def forget(self) -> None:
        """Forget all nodes: the SuperLink that knew them is gone, and they come back as new ones."""
        self.present.clear()
        self._node_of.clear()
        self._refused.clear()
        self._ask_again.clear()

    def _stale(self) -> int:
        """Return how many nodes were refused, or refused to join, because their site has seen more."""
        return sum(code == StaleUpdateError.code for code in self._refused.values())

    def sites(self) -> set[str]:
        """Return the names of the members."""
        return {member.site for member in self.present.values()}

    def welcome(self, grid: Grid, *, timeout: float = ROUND_HELLO_SECONDS) -> int:
        """Drop the nodes that left and shake hands with those that are new; return how many joined."""
        online = set(grid.get_node_ids())
        for gone in set(self.present) - online:
            self.say(f"site {self.present[gone].site} left")
            self._drop(gone)
        for gone in set(self._refused) - online:
            del self._refused[gone]
        later = {node for node, moment in self._ask_again.items() if time.monotonic() < moment}
        new = sorted(online - set(self.present) - set(self._refused) - later)
        if not new:
            return 0
        challenges = {node: secrets.token_hex(16) for node in new}
        messages = {node: self.hello(node, challenge) for node, challenge in challenges.items()}
        joined = 0
        for node, reply, reason in exchange(grid, messages, timeout=timeout):
            status = reason if reply is None else reply_status(reply)
            if reply is None and status not in PUBLIC_CODES:
                # It may only have been slow, or be gone already: ask it again, but not in every round.
                self._ask_again[node] = time.monotonic() + ASK_AGAIN_SECONDS
                self.say(f"a node did not say hello: {status}")
                continue
            if reply is None or status != OK:
                self._refused[node] = status
                self.say(f"a node was refused: {status}")
                continue
            try:
                self._admit(node, reply, challenges[node])
                joined += 1
            except FlepError as exc:
                self._refused[node] = exc.code
                self.say(f"a node was refused ({type(exc).__name__}): {exc}")
            except Exception as exc:
                # Whatever a hello was made to break, it breaks for its sender alone.
                self._refused[node] = MalformedUpdateError.code
                self.say(f"a node was refused ({type(exc).__name__})")
        return joined

    def _drop(self, node: int) -> None:
        """Forget a member's node."""
        site = self.present.pop(node).site
        if self._node_of.get(site) == node:
            del self._node_of[site]

    def _admit(self, node: int, reply: Message, challenge: str) -> None:
        site, identity = self._identify(reply, challenge)
        text = str(identity.get("layout"))
        # Thousands of sites have one model: its description is read, and kept, once.
        layout = self._layouts.get(text) or ModelLayout.from_json(text)
        self.compare(site, identity)
        if self.layout is not None and layout.digest != self.layout.digest:
            raise _other_layout(site, layout, self.layout)
        # A site that was restarted has a new node before the old one is given up: the newest counts. The
        # challenge makes sure that it is the site itself and not a recording of it.
        old = self._node_of.get(site)
        if old is not None and old in self.present:
            self._drop(old)
            self._refused[old] = StaleUpdateError.code
        holds, state_challenge = (str(identity.get(name, "")) for name in ("holds", "state_challenge"))
        self._layouts[text] = layout
        self.present[node], self._node_of[site] = Member(site, layout, holds, state_challenge), node
        self.joined.add(site)
        self.say(f"site {site} joined ({len(self.present)}/{len(self.site_keys)})")

    def _settle(self) -> None:
        """Take the layout that most sites have, and refuse the others; no single site decides."""
        if not self.present:
            return
        votes = Counter(member.layout.digest for member in self.present.values())
        winner = votes.most_common(1)[0][0]
        self.layout = next(m.layout for m in self.present.values() if m.layout.digest == winner)
        for node, member in list(self.present.items()):
            if member.layout.digest != winner:
                error = _other_layout(member.site, member.layout, self.layout)
                self.say(f"site {member.site} was refused ({type(error).__name__}): {error}")
                self._refused[node] = error.code
                self._drop(node)
        self._layouts.clear()  # the others' models are of no use any more

    def _identify(self, reply: Message, challenge: str) -> tuple[str, dict[str, Any]]:
        """Verify the signed introduction in a hello reply."""
        record = reply.content.config_records[FLEP_RECORD]
        blob, claimed = record.get("identity"), record.get("site")
        key = self.site_keys.get(claimed) if isinstance(claimed, str) else None
        if key is None or not isinstance(claimed, str) or not isinstance(blob, bytes):
            raise SignatureError("A node introduced itself as a site that is not in the kit")
        identity = open_control(blob, key)
        if (identity.get("run"), identity.get("site"), identity.get("challenge")) != (
            self.run,
            claimed,
            challenge,
        ):
            raise StaleUpdateError(f"Site {claimed} sent an introduction that answers another hello")
        return claimed, identity


def _other_layout(site: str, found: ModelLayout, expected: ModelLayout) -> LayoutError:
    return LayoutError(
        f"Site {site} has another model than the others",
        expected=f"layout {expected.digest[:12]} with {expected.size} weights",
        found=f"layout {found.digest[:12]} with {found.size} weights",
        remedy="Seal all archives from one data set, and use one release on every site",
    )
