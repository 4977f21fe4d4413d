"""Certificates for tests: a root of our own, and what it signed for nodes on this machine."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_LIFETIME = datetime.timedelta(hours=2)


class Authority:
    """Signs certificates for 127.0.0.1 and writes them as ``NAME.crt`` and ``NAME.key``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("fedsplit test root")
        builder = self._builder(self._name, self._key.public_key())
        root = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
        self._write("ca.crt", root.sign(self._key, hashes.SHA256()))

    def issue(self, name: str) -> None:
        """Write a certificate and its key for `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternative = [
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.DNSName("localhost"),
        ]
        builder = self._builder(_name(name), key.public_key()).add_extension(
            x509.SubjectAlternativeName(alternative), critical=False
        )
        self._write(f"{name}.crt", builder.sign(self._key, hashes.SHA256()))
        (self._folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _LIFETIME)
            .not_valid_after(now + _LIFETIME)
        )

    def _write(self, file: str, certificate: x509.Certificate) -> None:
        (self._folder / file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def login_key(file: Path) -> None:
    """Write the key pair with which a SuperNode logs in: `file`, and `file` with ``.pub``."""
    key = ec.generate_private_key(ec.SECP384R1())
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    file.with_name(f"{file.name}.pub").write_bytes(public)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])
