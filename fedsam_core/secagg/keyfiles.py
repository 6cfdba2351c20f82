"""A site's identity as files: SITE.key stays at the site, SITE.pub goes to the others, who pin it in a roster.

SITE.key is an Ed25519 private key, PKCS8 in PEM, encrypted where a passphrase is given. A roster is UTF-8 text, a line
`NAME ed25519 HEX64` for each site, `#` for comments. SITE.pub is a roster of one line: `cat *.pub > roster.txt` makes
a consortium's.
"""

import contextlib
import os
import re
import shlex
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg.keys import Identity, Roster, of_small_order

ALGORITHM = "ed25519"
PASSPHRASE_VARIABLE = "FEDSAM_KEY_PASSPHRASE"  # noqa: S105 (the variable's name, not what is in it)

_KEY_LIMIT = 64 << 10  # bytes; a key has a few hundred
_ROSTER_LIMIT = 1 << 20
_PEM = "-----BEGIN"

_SITE = re.compile(r"\w[\w.-]{0,127}")  # as sites.csv has them: such a name names files, and leads out of no folder
_HEX = re.compile(r"[0-9a-fA-F]{64}")


def create_identity(site: str, folder: Path, passphrase: bytes | None) -> tuple[Path, Path]:
    """Make a site's key pair: SITE.key, mode 0600, and SITE.pub in `folder`, which is made if it is not there.

    Args:
        passphrase: encrypts SITE.key; None leaves it in the clear. The key is stretched by PBKDF2 with 2048 rounds
            only (the library's choice for PKCS8), so a passphrase that can be guessed does not protect it.

    Returns:
        The paths of SITE.key and SITE.pub.

    Raises:
        SecureSumError: the name is no site's, a file of that name is there already, or the disk refuses. Neither file
            is ever overwritten, and a failure leaves neither of the two behind.
    """
    check_site(site)
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, _encryption(passphrase))
    public = format_roster(Roster({site: key.public_key().public_bytes_raw()})).encode()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SecureSumError(f"{folder}: cannot make the folder ({error.strerror}); choose another one") from error
    key_path, pub_path = folder / f"{site}.key", folder / f"{site}.pub"
    create_file(key_path, secret, 0o600)
    try:
        create_file(pub_path, public, 0o644)
    except BaseException:
        remove_file(key_path)
        raise
    return key_path, pub_path


def read_identity(path: Path, passphrase: bytes | None) -> Identity:
    """The identity in a SITE.key file.

    Raises:
        SecureSumError: the file cannot be read, others than its owner may read it, `passphrase` does not open it, or it
            holds no Ed25519 private key. Nothing of the file's content is in the message.
    """
    data = read_private(path)
    if not data.strip():
        raise SecureSumError(f"{path}: the private key is empty; restore it, or make a new identity: fedsam keys new")
    try:
        key = load_pem_private_key(data, passphrase)
    except TypeError:  # the library's word for a passphrase that is missing, or given for nothing
        if passphrase is None:
            raise SecureSumError(
                f"{path}: the private key is encrypted; set {PASSPHRASE_VARIABLE} to its passphrase"
            ) from None
        raise SecureSumError(
            f"{path}: a passphrase is given, but the private key is not encrypted; unset {PASSPHRASE_VARIABLE}, "
            "or make a new identity that is"
        ) from None
    except (ValueError, UnsupportedAlgorithm):  # not chained: what the parser says may quote what it read
        if passphrase is not None and b"ENCRYPTED" in data:
            raise SecureSumError(
                f"{path}: the passphrase does not open the private key, or the file is damaged; correct "
                f"{PASSPHRASE_VARIABLE}, or restore the file"
            ) from None
        raise SecureSumError(
            f"{path}: not a private key in PKCS8 PEM, or a damaged one; give the SITE.key that fedsam keys new made"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SecureSumError(
            f"{path}: a private key, but not an Ed25519 one; give the SITE.key that fedsam keys new made"
        )
    return Identity(key)


def read_roster(path: Path) -> Roster:
    """The sites of a roster or of a SITE.pub file, in the file's order.

    Raises:
        SecureSumError: naming the line that is wrong, but not quoting it: it may be a secret, given by mistake.
    """
    data = _read(path, _ROSTER_LIMIT, "roster", private=False)
    try:
        text = data.decode().removeprefix("\ufeff")  # some editors put this mark before UTF-8
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SecureSumError(f"{path}: line {line} is not UTF-8; save the roster as UTF-8 text") from None
    if text.lstrip().startswith(_PEM):
        raise SecureSumError(
            f"{path}: a PEM file, not a roster; give a SITE.pub or a roster (a private key is named SITE.key, and "
            "nobody else may have it)"
        )
    keys: dict[str, bytes] = {}
    lines: dict[str | bytes, int] = {}  # where each name and each key was seen
    # Not splitlines(), which also ends a line at characters that an editor shows inside a comment.
    for number, line_text in enumerate(text.split("\n"), start=1):
        words = line_text.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}: line {number}"
        site, key = _entry(words, where)
        if site in lines:
            raise SecureSumError(f"{where}: site {site!r} is on line {lines[site]} already; keep the line that is true")
        if key in lines:
            raise SecureSumError(
                f"{where}: the key of site {site!r} is that of line {lines[key]}; each site makes a key of its own"
            )
        keys[site] = key
        lines[site] = lines[key] = number
    if not keys:
        raise SecureSumError(f"{path}: the roster lists no site; put the line of every site's SITE.pub in it")
    return Roster(keys)


def format_roster(roster: Roster) -> str:
    """The text that `read_roster` reads, sites sorted. Raises SecureSumError where a name cannot stand in it."""
    for site in roster.keys:
        check_site(site)
    return "".join(f"{site} {ALGORITHM} {key.hex()}\n" for site, key in sorted(roster.keys.items()))


def passphrase_from_environment() -> bytes | None:
    """The passphrase in FEDSAM_KEY_PASSPHRASE; None where it is not set.

    Raises SecureSumError where it is set but empty: whoever set it would otherwise get a key in the clear unawares.
    """
    value = os.environ.get(PASSPHRASE_VARIABLE)
    if value == "":
        raise SecureSumError(f"{PASSPHRASE_VARIABLE} is set but empty; give it the passphrase, or unset it for none")
    return None if value is None else os.fsencode(value)


def check_site(site: str) -> None:
    """Raises SecureSumError where the name cannot be a site's."""
    if not _SITE.fullmatch(site):
        raise SecureSumError(
            f"site name {site!r}: use at most 128 letters, digits, dots, dashes and underscores, and begin with a "
            "letter, a digit or an underscore"
        )


def _encryption(passphrase: bytes | None) -> KeySerializationEncryption:
    if passphrase is None:
        return NoEncryption()
    if not 1 <= len(passphrase) <= 1023:  # what the library takes
        raise SecureSumError(f"the passphrase has {len(passphrase)} bytes; choose one of 1 to 1023 bytes")
    return BestAvailableEncryption(passphrase)


def _entry(words: list[str], where: str) -> tuple[str, bytes]:
    """Name and key of a roster's line, split into words."""
    if len(words) != 3:
        raise SecureSumError(
            f"{where}: {len(words)} words where `NAME {ALGORITHM} HEX64` belongs; copy the line from the SITE.pub again"
        )
    site, algorithm, digits = words
    if not _SITE.fullmatch(site):
        raise SecureSumError(
            f"{where}: not a site's name; it has at most 128 letters, digits, dots, dashes and underscores: "
            "copy the line from the SITE.pub again"
        )
    if algorithm != ALGORITHM:
        raise SecureSumError(f"{where}: the second word is not {ALGORITHM}; list keys that fedsam keys new made")
    if not _HEX.fullmatch(digits):
        raise SecureSumError(f"{where}: the key is not 64 hex digits; copy the line from the SITE.pub again")
    key = bytes.fromhex(digits)
    if of_small_order(key):
        raise SecureSumError(
            f"{where}: the key is of small order, anybody could sign for site {site!r}; have the site make a new one"
        )
    return site, key


def read_private(path: Path) -> bytes:
    """What is in a file of a private key. Raises SecureSumError where it is missing, or others may read it."""
    return _read(path, _KEY_LIMIT, "private key", private=True)


def _read(path: Path, limit: int, what: str, private: bool) -> bytes:
    """A file of at most `limit` bytes. A private one is looked at once it is open, so nobody can swap it in between."""
    try:
        with path.open("rb") as stream:
            if private and os.name == "posix" and os.fstat(stream.fileno()).st_mode & 0o077:
                raise SecureSumError(
                    f"{path}: others than the owner may read or change this private key; "
                    f"run: chmod 600 {shlex.quote(str(path))}"
                )
            data = stream.read(limit + 1)
    except FileNotFoundError as error:
        raise SecureSumError(f"{path}: there is no such {what}; correct the path, or see fedsam keys --help") from error
    except OSError as error:
        raise SecureSumError(
            f"{path}: cannot read the {what} ({error.strerror}); give a file that you may read"
        ) from error
    if len(data) > limit:
        raise SecureSumError(f"{path}: over {limit >> 10} KiB, so it is no {what}; correct the path")
    return data


def create_file(path: Path, data: bytes, mode: int) -> None:
    """A new file with that mode from its first moment. Raises SecureSumError, and leaves nothing, where it fails."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)  # O_EXCL follows no link either
    except FileExistsError as error:
        raise SecureSumError(
            f"{path}: is there already and is never overwritten; choose another folder, or move it away if the "
            "site shall have a new identity"
        ) from error
    except OSError as error:
        raise _write_failed(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        remove_file(path)
        raise _write_failed(path, error) from error
    except BaseException:
        remove_file(path)
        raise


def _write_failed(path: Path, error: OSError) -> SecureSumError:
    return SecureSumError(f"{path}: cannot write ({error.strerror}); choose a folder that you may write to, with space")


def remove_file(path: Path) -> None:
    """Takes back a file that was just made."""
    with contextlib.suppress(OSError):
        path.unlink()
