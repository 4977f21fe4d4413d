"""Addresses and certificates of the link: what is refused, and before anything is started."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.flower import LinkSettings
from tests.certificates import Authority


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bind": "7000"}, "link.bind"),
        ({"bind": "host:port"}, "link.bind"),
        ({"bind": "host:70000"}, "link.bind"),
        ({"bind": "0.0.0.0:7000"}, "link.advertise"),
        ({"bind": "[::]:7000"}, "link.advertise"),
        ({"bind": "0.0.0.0:7000", "advertise": "0.0.0.0:7000"}, "link.advertise"),
        ({"bind": "0.0.0.0:7000", "advertise": "cloud:0"}, "link.advertise"),
        ({"advertise": "cloud:7000"}, "link.advertise"),
        ({"certificate": "a.crt"}, "link.certificate"),
        ({"key": "a.key"}, "link.certificate"),
    ],
)
def test_what_cannot_work_is_named(settings: dict[str, str], named: str) -> None:
    with pytest.raises(FedsplitError, match=named):
        LinkSettings(**settings)


@given(st.integers(0, 65535))
def test_any_port_of_a_host_can_be_bound(port: int) -> None:
    assert LinkSettings(bind=f"edge.example.org:{port}").security == "plain"


def test_certificates_say_how_safe_the_link_is() -> None:
    pair = {"bind": "a:1", "certificate": "a.crt", "key": "a.key"}
    assert LinkSettings(bind="a:1").security == "plain"
    assert LinkSettings(**pair).security == "tls"
    assert LinkSettings(**pair, root="ca.crt").security == "mutual"


def test_a_node_must_be_able_to_take_part_in_the_link(tmp_path: Path) -> None:
    Authority(tmp_path).issue("node")
    root = {"link-root": str(tmp_path / "ca.crt")}
    pair = {
        "link-certificate": str(tmp_path / "node.crt"),
        "link-key": str(tmp_path / "node.key"),
    }
    both = LinkSettings.of_node({"partition-id": 3, **root, **pair})
    encrypted, mutual = both.client_tls("tls"), both.client_tls("mutual")
    assert encrypted is not None
    assert mutual is not None
    assert encrypted.root == mutual.root == (tmp_path / "ca.crt").read_bytes()
    assert encrypted.key is None
    assert mutual.key == (tmp_path / "node.key").read_bytes()
    assert LinkSettings.of_node({}).client_tls("plain") is None
    for settings, security, named in (
        (root, "plain", "link-root"),  # would otherwise trust whoever answers
        ({}, "tls", "link-root"),
        (root, "mutual", "link-certificate"),
        ({"link-root": str(tmp_path / "absent")}, "tls", "cannot be read"),
    ):
        with pytest.raises(FedsplitError, match=named):
            LinkSettings.of_node(settings).client_tls(security)
    with pytest.raises(FedsplitError, match="link-certificate"):
        LinkSettings.of_node({"bind": "a:1", **root}).server_tls("tls")
