# SPDX-License-Identifier: Apache-2.0
"""The coordinator's certificate: from a CA in a Secret, rotated with overlap, or from a given Secret."""

import base64
import ipaddress
import ssl
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpipe_api.base import UserError

CA_LIFE = timedelta(days=365)
SERVING_LIFE = timedelta(days=90)
OVERLAP = timedelta(days=1)
"""How long a new CA is published before it signs anything, so that every agent trusts it by then."""

_BACKDATED = timedelta(minutes=5)  # clocks of edge nodes differ
_FIELDS = ("ca.crt", "ca.key", "tls.crt", "tls.key", "next-ca.crt", "next-ca.key", "old-ca.crt")


@dataclass(frozen=True)
class Material:
    """PEM texts. `next_*` is the next CA, `old_*` the one that signed what agents may still see."""

    ca_crt: bytes
    ca_key: bytes
    tls_crt: bytes
    tls_key: bytes
    next_ca_crt: bytes = b""
    next_ca_key: bytes = b""
    old_ca_crt: bytes = b""

    @property
    def bundle(self) -> str:
        """What agents trust: every CA that has signed or will sign."""
        return b"".join((self.ca_crt, self.next_ca_crt, self.old_ca_crt)).decode()

    def to_secret(self) -> dict[str, str]:
        """Return the Secret's data in base64; empty fields are left out."""
        fields = {name: getattr(self, _attribute(name)) for name in _FIELDS}
        return {name: base64.b64encode(pem).decode() for name, pem in fields.items() if pem}

    @classmethod
    def from_secret(cls, name: str, data: Mapping[str, str]) -> "Material":
        """Read a Secret. UserError names what is missing."""
        try:
            texts = {_attribute(n): base64.b64decode(data[n]) for n in _FIELDS if n in data}
            return cls(**({"ca_key": b""} | texts))
        except (TypeError, ValueError):
            raise UserError(f"Secret {name}: needs ca.crt, tls.crt and tls.key") from None


def _attribute(field: str) -> str:
    return field.replace(".", "_").replace("-", "_")


def renew(material: Material | None, hosts: Sequence[str], now: datetime) -> Material:
    """Return the material as it should be now: the same object when nothing is due.

    At two thirds of the CA's life the next one is made and published; after OVERLAP it signs; the old
    one is published until it expires. The serving certificate is renewed at two thirds of its life, and when
    its names or its CA changed.
    """
    if material is None:
        crt, key = _new_ca(now)
        return Material(crt, key, *_serving(crt, key, hosts, now))
    ca = x509.load_pem_x509_certificate(material.ca_crt)
    if material.old_ca_crt and _end(material.old_ca_crt) <= now:
        material = replace(material, old_ca_crt=b"")
    if not material.next_ca_crt and _due(ca, now):
        crt, key = _new_ca(now)
        material = replace(material, next_ca_crt=crt, next_ca_key=key)
    expired = ca.not_valid_after_utc <= now
    if material.next_ca_crt:
        following = x509.load_pem_x509_certificate(material.next_ca_crt)
        if expired or following.not_valid_before_utc + _BACKDATED + OVERLAP <= now:
            old = b"" if expired else material.ca_crt
            fresh = Material(material.next_ca_crt, material.next_ca_key, b"", b"", old_ca_crt=old)
            crt, key = _serving(fresh.ca_crt, fresh.ca_key, hosts, now)
            return replace(fresh, tls_crt=crt, tls_key=key)
    serving = x509.load_pem_x509_certificate(material.tls_crt)
    if _due(serving, now) or _hosts(serving) != sorted(hosts):
        crt, key = _serving(material.ca_crt, material.ca_key, hosts, now)
        material = replace(material, tls_crt=crt, tls_key=key)
    return material


def _end(pem: bytes) -> datetime:
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def _due(certificate: x509.Certificate, now: datetime) -> bool:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= start + (end - start) * 2 / 3


def _hosts(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return sorted([*names.get_values_for_type(x509.DNSName), *addresses])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _builder(subject: str, life: timedelta, now: datetime) -> x509.CertificateBuilder:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    builder = x509.CertificateBuilder().subject_name(name).serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - _BACKDATED).not_valid_after(now + life)


def _new_ca(now: datetime) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(f"FedPipe CA {now:%Y-%m-%d}", CA_LIFE, now).public_key(key.public_key())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        builder.issuer_name(builder._subject_name)  # type: ignore[arg-type]
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)


def _serving(ca_crt: bytes, ca_key: bytes, hosts: Sequence[str], now: datetime) -> tuple[bytes, bytes]:
    authority = x509.load_pem_x509_certificate(ca_crt)
    signer = serialization.load_pem_private_key(ca_key, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder("fedpipe-coordinator", SERVING_LIFE, now)
        .public_key(key.public_key())
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def load_certificate(context: ssl.SSLContext, material: Material) -> None:
    """Let new connections of a server's context use the serving certificate."""
    with tempfile.TemporaryDirectory() as directory:
        crt, key = Path(directory, "tls.crt"), Path(directory, "tls.key")
        crt.write_bytes(material.tls_crt)
        key.touch(mode=0o600)
        key.write_bytes(material.tls_key)
        context.load_cert_chain(crt, key)


def now_utc() -> datetime:
    """Return the time that certificates are made for."""
    return datetime.now(UTC)
