"""Certificates of a consortium's gateway: an authority, requests, and what it signs. X.509, ECDSA on P-256.

The private key of a certificate is made where it is used and never leaves; what travels is a request (NAME.csr) and the
certificate (NAME.crt). Whom a certificate names is what the signer says, not what the request asks for.
"""

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.gateway.transport import SITE_URN
from fedsam_core.errors import ConfigError
from fedsam_core.secagg.keyfiles import check_site, create_file, read_private, remove_file

AUTHORITY = "authority"
_EARLIER = timedelta(minutes=5)  # clocks of hospitals differ
_ARC = ec.SECP256R1()

PublicKey = ec.EllipticCurvePublicKey


def create_authority(folder: Path, days: int = 3650) -> tuple[Path, Path]:
    """authority.key (mode 0600) and authority.crt: whoever holds the key says who is who.

    Raises:
        SecureSumError: a file is there already, or the disk refuses.
    """
    key = ec.generate_private_key(_ARC)
    name = _name("fedsam consortium")
    builder = _certificate(name, name, key.public_key(), timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False)
    certificate = builder.sign(key, hashes.SHA256())
    return _write_pair(folder, AUTHORITY, key, certificate.public_bytes(Encoding.PEM), ".crt")


def create_request(name: str, folder: Path) -> tuple[Path, Path]:
    """NAME.tls.key (mode 0600), which stays, and NAME.csr, which goes to whoever signs.

    Raises:
        SecureSumError: the name cannot be a site's, a file is there already, or the disk refuses.
    """
    check_site(name)
    key = ec.generate_private_key(_ARC)
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(name)).sign(key, hashes.SHA256())
    return _write_pair(folder, f"{name}.tls", key, request.public_bytes(Encoding.PEM), ".csr")


def sign_site(request: Path, site: str, authority: Path, days: float = 365) -> Path:
    """The certificate of a site, beside its request: it names the site, and serves for nothing but dialling out.

    Raises:
        ConfigError: the request is none or asks for another name, or the authority's files are not to be used.
        SecureSumError: the certificate is there already.
    """
    check_site(site)
    asked = _read_request(request)
    subject = [str(part.value) for part in asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if subject != [site[:64]]:
        raise ConfigError(
            f"{request} was made for {' '.join(subject) or 'nobody'}, not for {site}: name whom you mean, and "
            "compare the fingerprint by telephone"
        )
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(SITE_URN + site)])
    return _sign(request, asked, site, names, ExtendedKeyUsageOID.CLIENT_AUTH, authority, days)


def sign_aggregator(request: Path, hosts: list[str], authority: Path, days: float = 365) -> Path:
    """The certificate of the aggregator, under the names and addresses that sites dial. Raises as `sign_site`."""
    if not hosts:
        raise ConfigError("name the host that sites dial: --aggregator fedsam.example.org")
    names = x509.SubjectAlternativeName([_host(host) for host in hosts])
    asked = _read_request(request)
    return _sign(request, asked, hosts[0], names, ExtendedKeyUsageOID.SERVER_AUTH, authority, days)


def fingerprint(path: Path) -> str:
    """SHA-256 (hex) of the public key in a request or a certificate, for comparing by telephone.

    Raises:
        ConfigError: it is neither.
    """
    data = _read(path)
    try:
        if b"REQUEST" in data:
            key = x509.load_pem_x509_csr(data).public_key()
        else:
            key = x509.load_pem_x509_certificate(data).public_key()
    except ValueError as error:
        raise ConfigError(f"{path} is neither a certificate nor a request for one") from error
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _sign(
    request: Path,
    asked: x509.CertificateSigningRequest,
    name: str,
    names: x509.SubjectAlternativeName,
    serves_for: x509.ObjectIdentifier,
    authority: Path,
    days: float,
) -> Path:
    try:
        root = x509.load_pem_x509_certificate(_read(authority / f"{AUTHORITY}.crt"))
        key = load_pem_private_key(read_private(authority / f"{AUTHORITY}.key"), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{authority} holds no authority: fedsam gateway authority --folder {authority}") from error
    public = asked.public_key()
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(public, PublicKey):
        raise ConfigError(f"{request}: the gateway's keys are on P-256, as fedsam gateway request makes them")
    builder = _certificate(_name(name), root.subject, public, timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([serves_for]), critical=False)
    builder = builder.add_extension(names, critical=False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False)
    path = request.with_suffix(".crt")
    create_file(path, builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), 0o644)
    return path


def _certificate(
    subject: x509.Name, issuer: x509.Name, public: PublicKey, lifetime: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + min(lifetime, timedelta(0)) - _EARLIER)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); correct the path") from error


def _read_request(path: Path) -> x509.CertificateSigningRequest:
    try:
        request = x509.load_pem_x509_csr(_read(path))
    except ValueError as error:
        raise ConfigError(
            f"{path} is no request for a certificate: give the NAME.csr of fedsam gateway request"
        ) from error
    if not request.is_signature_valid:
        raise ConfigError(f"{path}: whoever made the request does not hold its key; have it made and sent again")
    return request


def _write_pair(
    folder: Path, name: str, key: ec.EllipticCurvePrivateKey, public: bytes, suffix: str
) -> tuple[Path, Path]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key_path = folder / f"{name}.key"
    public_path = folder / f"{name.removesuffix('.tls')}{suffix}"
    create_file(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    try:
        create_file(public_path, public, 0o644)
    except BaseException:
        remove_file(key_path)
        raise
    return key_path, public_path
