"""TLS and node authentication of the sites' port, with real processes."""

from __future__ import annotations

import re
import socket
import ssl
from pathlib import Path

import httpx
import pytest
from certificates import Authority
from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from runtime_parties import Starter, until

from flep_fl.flower.runtime.tls import load_node_key, node_fingerprint

pytestmark = pytest.mark.e2e


def test_known_sites_federate_and_all_others_are_refused_by_name(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    port = int(address.rpartition(":")[2])
    authority, foreign = Authority(tmp_path / "ca"), Authority(tmp_path / "foreign")
    certificate, key = authority.server()
    known = {name: authority.node(name) for name in ("a", "b")}
    stranger = authority.node("c", known=False)
    start = Starter(address, tmp_path)
    try:
        # A site that is early waits: the cloud is not there yet.
        early = start("site", "a", "--ca", str(authority.ca), "--node-key", str(known["a"]))
        cloud_files = [
            "--certificate",
            str(certificate),
            "--private-key",
            str(key),
            "--ca",
            str(authority.ca),
        ]
        cloud = start(
            "cloud", "cloud", "--rounds", "1", *cloud_files, "--node-keys", str(authority.known_keys())
        )
        cloud.wait_for("SuperLink ready")
        assert ssl.get_server_certificate(("127.0.0.1", port), ca_certs=str(authority.ca))
        # Whoever does not trust this authority says so itself, and sends nothing.
        unknown_key = start("site", "c", "--ca", str(authority.ca), "--node-key", str(stranger))
        other_ca = start("site", "d", "--ca", str(foreign.ca), "--node-key", str(known["b"]))
        # A stock SuperNode with the right authority and no key of the kit: it makes one and registers itself.
        own_key, own_public = generate_key_pairs()
        with (
            FleetHttpClient.from_server_address(
                address, False, authority.ca.read_bytes(), [NodeAuthHttpInterceptor(own_key, own_public)]
            ) as stock,
            pytest.raises(httpx.HTTPStatusError),
        ):
            stock.RegisterNode(RegisterNodeFleetRequest(public_key=public_key_to_bytes(own_public)))
        assert [site.exit_status(40) for site in (unknown_key, other_ca)] == [1, 1]
        shown = node_fingerprint(load_node_key(stranger))
        assert f"NodeRefusedError: {address} does not accept this site's node key {shown}" in unknown_key.text
        assert "kits of one federation" in unknown_key.text
        assert "not from this federation's authority; nothing was sent to it" in other_ca.text
        assert "Traceback" not in unknown_key.text + other_ca.text
        # The cloud's own terminal says who.
        cloud.wait_for(f"refused a node with the key {shown} that is not in the kit, at 127.0.0.1")
        cloud.wait_for(f"refused a node with the key {node_fingerprint(own_key)} that registers itself")
        assert "NODES" not in cloud.text
        late = start("site", "b", "--ca", str(authority.ca), "--node-key", str(known["b"]))
        assert cloud.exit_status(40) == 0, cloud.text
        assert [site.exit_status(20) for site in (early, late)] == [0, 0]
    finally:
        start.stop()
    assert "OUTCOME finished:completed" in cloud.text
    assert cloud.text.count("REPLY 1") == 2
    log = (tmp_path / "cloud" / "superlink.log").read_text()
    assert re.search(f"refused a node with the key {shown} that is not in the kit", log)
    # No secret outlives the run.
    assert not [*tmp_path.rglob("*.secret"), *tmp_path.rglob("*.token"), *tmp_path.rglob("node-keys.json")]
    assert until(lambda: not (tmp_path / "cloud" / "objects").exists(), 5)
