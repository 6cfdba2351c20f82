"""Certificates for Ray's TLS: one authority a cluster, one certificate a node.

Ray's processes are clients and servers of each other, and each shows its certificate: whoever has none of this
authority neither gets in nor is believed. ca.key makes more of them and belongs on no node.
"""

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsam_core.errors import ClusterError

AUTHORITY = "ca"
_DAYS = 365
_EARLIER = timedelta(minutes=10)  # clocks of nodes differ
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")

Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def make_certificates(folder: Path, hosts: Sequence[str], days: int = _DAYS) -> list[str]:
    """Writes HOST.crt and HOST.key for each host, and ca.crt and ca.key unless they are there; keys have mode 0600.

    Args:
        folder: made if it is not there; what it has is never overwritten.
        hosts: names or IP addresses by which nodes reach each other.
        days: for which the certificates hold.

    Returns:
        The names of the files, without .crt and .key, in the order of the hosts.

    Raises:
        ClusterError: a host is no name or address, a file is there already, or the folder cannot be used.
    """
    names = [_file_name(host) for host in hosts]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = _read(folder) if (folder / f"{AUTHORITY}.crt").exists() else _new_authority(folder, days)
        for host, name in zip(hosts, names, strict=True):
            _write(folder, name, _issue(authority, host, days))
    except FileExistsError as error:
        raise ClusterError(
            f"{error.filename} is there already and is never overwritten: move it away, or name other hosts"
        ) from error
    except OSError as error:
        raise ClusterError(f"{error.filename} cannot be used ({error.strerror}): choose another folder") from error
    return names


def tls_variables(folder: Path, name: str) -> dict[str, str]:
    """The environment that has Ray's processes of a node use TLS."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / f"{name}.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / f"{name}.key"),
        "RAY_TLS_CA_CERT": str(folder / f"{AUTHORITY}.crt"),
    }


def _file_name(host: str) -> str:
    if _address(host) is None and (not _HOST.fullmatch(host) or host == AUTHORITY):
        raise ClusterError(f"{host!r} is neither a host's name nor an IP address: name nodes as they reach each other")
    return host.replace(":", "_")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host) if "%" not in host else None
    except ValueError:
        return None


def _new_authority(folder: Path, days: int) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedsam cluster authority")])
    unsigned = _builder(name, key, days).issuer_name(name)
    unsigned = unsigned.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    authority = (unsigned.sign(key, SHA256()), key)
    _write(folder, AUTHORITY, authority)
    return authority


def _issue(authority: Pair, host: str, days: int) -> Pair:
    certificate, signing = authority
    key = ec.generate_private_key(ec.SECP256R1())
    address = _address(host)
    names: list[x509.GeneralName] = [x509.DNSName(host) if address is None else x509.IPAddress(address)]
    names += [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]  # within a node
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    unsigned = _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])]), key, days)
    unsigned = unsigned.issuer_name(certificate.subject)
    unsigned = unsigned.add_extension(x509.SubjectAlternativeName(names), critical=False)
    unsigned = unsigned.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    unsigned = unsigned.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    return unsigned.sign(signing, SHA256()), key


def _builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
    )


def _read(folder: Path) -> Pair:
    path = folder / f"{AUTHORITY}.key"
    try:
        certificate = x509.load_pem_x509_certificate((folder / f"{AUTHORITY}.crt").read_bytes())
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError):  # not chained: what the parser says may quote what it read
        raise ClusterError(f"{folder} holds an authority that cannot be read: choose another folder") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ClusterError(f"{path} is not the key of {AUTHORITY}.crt: choose another folder")
    return certificate, key


def _write(folder: Path, name: str, pair: Pair) -> None:
    certificate, key = pair
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for suffix, data, mode in ((".key", secret, 0o600), (".crt", certificate.public_bytes(Encoding.PEM), 0o644)):
        descriptor = os.open(folder / f"{name}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
