"""Certificates for Ray's TLS: who made them, whom they are for, and that no key is open or lost."""

import ipaddress
import re
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from cluster.certificates import make_certificates, tls_variables
from fedsam_core.errors import ClusterError
from pipelines import certs


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_nodes_certificate_is_its_authoritys_and_for_its_address(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    assert make_certificates(folder, ["10.0.0.1", "head.internal"]) == ["10.0.0.1", "head.internal"]
    make_certificates(folder, ["fd00::7"])  # a node that comes later, of the same authority
    for host, subject in (
        ("10.0.0.1", x509.IPAddress(ipaddress.ip_address("10.0.0.1"))),
        ("head.internal", x509.DNSName("head.internal")),
        ("fd00__7", x509.IPAddress(ipaddress.ip_address("fd00::7"))),
    ):
        own = certificate(folder / f"{host}.crt")
        names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert subject in names
        own.verify_directly_issued_by(certificate(folder / "ca.crt"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / f"{host}.crt", folder / f"{host}.key")  # they belong together
    with pytest.raises(ValueError, match="Issuer"):
        certificate(folder / "10.0.0.1.crt").verify_directly_issued_by(certificate(folder / "head.internal.crt"))
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.key")} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_nothing_is_overwritten_and_odd_hosts_are_refused(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["10.0.0.1"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ClusterError, match=r"10\.0\.0\.1\.key is there already and is never overwritten"):
        make_certificates(tmp_path, ["10.0.0.1"])
    for host in ("../x", "", "a b", "-x", "ca", "a\n", "a/b", "fe80::1%eth0"):
        with pytest.raises(ClusterError, match="neither a host's name nor an IP address"):
            make_certificates(tmp_path, ["10.0.0.2", host])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "ca.key").write_bytes(before["10.0.0.1.key"])
    with pytest.raises(ClusterError, match=r"ca\.key is not the key of ca\.crt"):
        make_certificates(tmp_path, ["10.0.0.2"])
    (tmp_path / "ca.key").write_bytes(b"none")
    with pytest.raises(ClusterError, match="cannot be read"):
        make_certificates(tmp_path, ["10.0.0.2"])


def test_the_command_says_what_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        certs.main([str(tmp_path / "certs"), "10.0.0.1"])
    assert not ended.value.code
    said = capsys.readouterr().out
    told = dict(re.findall(r"(RAY_\w+)=(\S+)", said))
    assert told == {"RAY_AUTH_MODE": "token", **tls_variables(tmp_path / "certs", "10.0.0.1")}
    assert all(Path(path).is_file() for name, path in told.items() if name.startswith("RAY_TLS"))
    assert "PRIVATE KEY" not in said
