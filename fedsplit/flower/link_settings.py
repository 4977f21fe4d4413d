"""Where one end of the link listens and is reached, and the certificates it shows and trusts."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from fedsplit.errors import FedsplitError, SettingsError, require
from fedsplit.transport import Tls

SECURITIES = PLAIN, ENCRYPTED, MUTUAL = "plain", "tls", "mutual"
NODE = "{node}"
_EVERY_INTERFACE = ("", "0.0.0.0", "[::]")
_UNIX = "unix:"


@dataclass(frozen=True)
class LinkSettings:
    """One end of the link: addresses, and files with certificates as PEM.

    Parameters
    ----------
    bind : str or None
        Where it listens: ``host:port``, or ``unix:/path/of/socket``. None for a device, which only
        dials out, and for a server whose devices run on the same machine.
    advertise : str or None
        ``host:port`` that others dial, where it is not `bind` (behind NAT, in a container, on
        every interface); it needs the same port only if nothing forwards.
    certificate, key : str or None
        Prove this end. A server that has them speaks TLS.
    root : str or None
        Checks the other end. A server that has it asks for certificates (mutual TLS).
    login : str or None
        Of the server: public keys with which nodes log in at Flower's SuperLink, where that
        authenticates them; ``{node}`` in the path stands for ``device-0``, ``edge-0``, ... A node
        is then the device or edge whose key it has, whatever it says; None: it is taken at its
        word, while nobody else is in that place.

    Raises
    ------
    FedsplitError
        If an address is none that can be listened on or dialled, or a certificate lacks its key.
    """

    bind: str | None = None
    advertise: str | None = None
    certificate: str | None = None
    key: str | None = None
    root: str | None = None
    login: str | None = None

    def __post_init__(self) -> None:
        if self.bind is not None and not self.bind.startswith(_UNIX):
            _host_and_port("link.bind", self.bind)
        if self.advertise is not None:
            host, port = _host_and_port("link.advertise", self.advertise)
            dialled = port > 0 and host not in _EVERY_INTERFACE
            require(
                dialled, "link.advertise", self.advertise, "a host and port that can be dialled"
            )
            require(self.bind is not None, "link.advertise", self.advertise, "given with bind")
        elif self.bind is not None and not self.bind.startswith(_UNIX):
            host, _ = _host_and_port("link.bind", self.bind)
            require(
                host not in _EVERY_INTERFACE,
                "link.advertise",
                None,
                f"given where bind={self.bind!r} is every interface: others cannot dial that",
            )
        paired = (self.certificate is None) == (self.key is None)
        require(paired, "link.certificate", self.certificate, "given together with its key")
        if self.login is not None:
            require(NODE in self.login, "link.login", self.login, f"a path with {NODE} in it")
            require(self.bind is not None, "link.login", self.login, "given with bind")

    @classmethod
    def of_node(cls, node_config: Mapping[str, object]) -> "LinkSettings":
        """Return the settings in a Flower node configuration.

        Its keys are ``bind``, ``advertise``, ``link-certificate``, ``link-key``, ``link-root``.
        """

        def text(key: str) -> str | None:
            return str(node_config[key]) if key in node_config else None

        return cls(
            text("bind"),
            text("advertise"),
            text("link-certificate"),
            text("link-key"),
            text("link-root"),
        )

    @property
    def security(self) -> str:
        """What a server with these settings asks of those who dial it."""
        if self.certificate is None:
            return PLAIN
        return ENCRYPTED if self.root is None else MUTUAL

    def server_tls(self, security: str) -> Tls | None:
        """Return what a server of a run with this `security` listens with.

        Raises
        ------
        FedsplitError
            If a file is missing from the settings, or cannot be read.
        """
        if security == PLAIN:
            return None
        root = self._read("root") if security == MUTUAL else None
        return Tls(root, self._read("certificate"), self._read("key"))

    def client_tls(self, security: str) -> Tls | None:
        """Return what a node of a run with this `security` dials with.

        Raises
        ------
        FedsplitError
            If a file is missing from the settings, or cannot be read; or if the node was told to
            check the server, but the run's link is in the clear.
        """
        if security == PLAIN:
            require(
                self.root is None, "link-root", self.root, "absent, the link of this run is plain"
            )
            return None
        root = self._read("root")
        if security == ENCRYPTED:
            return Tls(root)
        return Tls(root, self._read("certificate"), self._read("key"))

    def login_keys(self, n_devices: int, n_edges: int) -> dict[tuple[str, int], bytes] | None:
        """Return the login key of each role and index, as Flower tells those of its nodes.

        Raises
        ------
        FedsplitError
            If one cannot be read, or two places have the same.
        """
        if self.login is None:
            return None
        keys: dict[tuple[str, int], bytes] = {}
        places = [*product(["device"], range(n_devices)), *product(["edge"], range(n_edges))]
        for role, index in places:
            path = self.login.replace(NODE, f"{role}-{index}")
            try:
                key = load_ssh_public_key(Path(path).read_bytes())
            except (OSError, ValueError, UnsupportedAlgorithm) as error:
                allowed = f"a public key in OpenSSH's form that can be read ({error})"
                raise SettingsError("link.login", path, allowed) from None
            pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            require(pem not in keys.values(), "link.login", path, "a key of this node alone")
            keys[role, index] = pem
        return keys

    def _read(self, field: str) -> bytes:
        path = getattr(self, field)
        require(path is not None, f"link-{field}", path, "a PEM file, the link of this run is TLS")
        try:
            return Path(str(path)).read_bytes()
        except OSError as error:
            raise FedsplitError(f"link-{field}={path!r}: cannot be read ({error})") from None


def _host_and_port(field: str, address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    valid = colon == ":" and port.isdecimal() and int(port) < 1 << 16
    require(valid, field, address, "host:port")
    return host, int(port)
