"""Addresses and certificates of the link: what is refused, and before anything is started."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.cli.supernode.register import try_load_public_key
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.flower import LinkSettings
from tests.certificates import Authority, login_key


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
        ({"bind": "a:1", "login": "device-0.pub"}, "link.login"),
        ({"login": "{node}.pub"}, "link.login"),
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


def test_login_keys_are_those_that_flower_tells_of_its_nodes(tmp_path: Path) -> None:
    for node in ("device-0", "device-1", "edge-0"):
        login_key(tmp_path / f"{node}.login")
    settings = LinkSettings(bind="a:1", login=f"{tmp_path}/{{node}}.login.pub")
    keys = settings.login_keys(2, 1)
    assert keys is not None
    assert list(keys) == [("device", 0), ("device", 1), ("edge", 0)]
    for (role, index), key in keys.items():
        file = tmp_path / f"{role}-{index}.login.pub"
        assert key == try_load_public_key(file), "as `flwr supernode register` sends it"
    assert LinkSettings().login_keys(2, 1) is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_text("ssh-rsa nonsense"), "OpenSSH"),
        (
            lambda file: shutil.copy(file.with_name("device-0.pub"), file),
            "a key of this node alone",
        ),
    ],
)
def test_a_login_key_that_cannot_be_one_is_named(
    damage: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    for node in ("device-0", "device-1"):
        login_key(tmp_path / node)
    damage(tmp_path / "device-1.pub")
    with pytest.raises(FedsplitError, match=rf"link\.login='.*device-1\.pub'.*{said}"):
        LinkSettings(bind="a:1", login=f"{tmp_path}/{{node}}.pub").login_keys(2, 0)
