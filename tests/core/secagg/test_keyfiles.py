"""Key files and rosters: what is written comes back, nothing is overwritten or shown, and every fault is refused."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedsam_core.data.sources.tables import is_name
from fedsam_core.errors import SecureSumError
from fedsam_core.secagg.keyfiles import (
    create_identity,
    format_roster,
    passphrase_from_environment,
    read_identity,
    read_roster,
)
from fedsam_core.secagg.keys import _SMALL_ORDER, Identity, Roster

posix = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")


def pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_of(name: str) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32)).public_key().public_bytes_raw()


def entry(name: str) -> str:
    return f"{name} ed25519 {public_of(name).hex()}\n"


def key_file(folder: Path, content: bytes) -> Path:
    path = folder / "north.key"
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def refusal(work: Callable[[], object], *words: str) -> str:
    """The message, which is one line and has all of `words`."""
    with pytest.raises(SecureSumError) as refused:
        work()
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def fails(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------- identities


def test_a_signature_verifies_under_the_roster_that_was_read_back(tmp_path: Path) -> None:
    identities = {}
    for site in ("north", "south", "Köln-2.b"):
        key_path, pub_path = create_identity(site, tmp_path / "keys", None)
        assert (key_path.name, pub_path.name) == (f"{site}.key", f"{site}.pub")
        identities[site] = read_identity(key_path, None)
    joined = tmp_path / "roster.txt"
    joined.write_bytes(b"".join(path.read_bytes() for path in sorted((tmp_path / "keys").glob("*.pub"))))
    roster = read_roster(joined)
    assert dict(roster.keys) == {site: identity.public for site, identity in identities.items()}
    roster.verify("north", identities["north"].sign(b"hello"), b"hello")
    with pytest.raises(SecureSumError):
        roster.verify("north", identities["south"].sign(b"hello"), b"hello")


def test_a_key_is_pkcs8_pem_that_other_tools_read(tmp_path: Path) -> None:
    key_path, _ = create_identity("north", tmp_path, None)
    key = load_pem_private_key(key_path.read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    assert key.public_key().public_bytes_raw() == read_identity(key_path, None).public


def test_an_encrypted_key_opens_with_its_passphrase_only(tmp_path: Path) -> None:
    key_path, pub_path = create_identity("north", tmp_path, "grüne Wiese".encode())
    assert key_path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    identity = read_identity(key_path, "grüne Wiese".encode())
    read_roster(pub_path).verify("north", identity.sign(b"x"), b"x")
    message = refusal(lambda: read_identity(key_path, b"s3same"), str(key_path), "correct FEDSAM_KEY_PASSPHRASE")
    assert "s3same" not in message
    refusal(lambda: read_identity(key_path, None), str(key_path), "key is encrypted; set FEDSAM_KEY_PASSPHRASE")


def test_a_passphrase_for_a_key_in_the_clear_is_refused(tmp_path: Path) -> None:
    key_path, _ = create_identity("north", tmp_path, None)
    refusal(lambda: read_identity(key_path, b"something"), str(key_path), "not encrypted")


@pytest.mark.parametrize("length", [0, 1024])
def test_a_passphrase_of_impossible_length_makes_no_files(tmp_path: Path, length: int) -> None:
    refusal(lambda: create_identity("north", tmp_path, b"x" * length), f"{length} bytes")
    assert not list(tmp_path.iterdir())


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_private_key_is_the_owners_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        key_path, _ = create_identity("north", tmp_path / "keys", None)
    finally:
        os.umask(before)
    assert stat.S_IMODE(key_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(key_path.parent.stat().st_mode) == 0o700


@posix
def test_a_private_key_is_never_open_to_others_even_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def look(descriptor: int) -> None:  # called once the content is in the file
        for path in tmp_path.iterdir():
            seen.setdefault(path.name, stat.S_IMODE(path.stat().st_mode))

    monkeypatch.setattr(os, "fsync", look)
    monkeypatch.setattr(os, "chmod", fails)
    before = os.umask(0)
    try:
        create_identity("north", tmp_path, None)
    finally:
        os.umask(before)
    assert seen == {"north.key": 0o600, "north.pub": 0o644}


@pytest.mark.parametrize("there", ["north.key", "north.pub"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("precious")
    refusal(
        lambda: create_identity("north", tmp_path, None), str(tmp_path / there), "never overwritten", "another folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "precious"


def test_a_link_in_the_keys_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "north.key").symlink_to(tmp_path / "elsewhere")
    refusal(lambda: create_identity("north", tmp_path / "keys", None), "north.key")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("write", [1, 2])
def test_a_full_disk_leaves_neither_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == write:
            fails()

    monkeypatch.setattr(os, "fsync", fsync)
    refusal(lambda: create_identity("north", tmp_path, None), "north." + ("key", "pub")[write - 1], "No space")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_neither_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        create_identity("north", tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refusal(lambda: create_identity("north", tmp_path / "file", None), str(tmp_path / "file"), "another")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    refusal(lambda: create_identity("north", tmp_path, None), "north.key", "Permission denied", "choose a folder")


BAD_NAMES = ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-x", "a b", "a\n", "a\x00", "a:b", "x" * 129, "a#b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_no_sites_makes_no_files(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "keys"
    refusal(lambda: create_identity(name, folder, None), "site name")
    refusal(lambda: format_roster(Roster({name: public_of("a")})), "site name")
    assert not list(tmp_path.iterdir())


def test_a_missing_key(tmp_path: Path) -> None:
    refusal(lambda: read_identity(tmp_path / "north.key", None), str(tmp_path / "north.key"), "no such private key")


def test_a_key_that_is_a_folder(tmp_path: Path) -> None:
    refusal(lambda: read_identity(tmp_path, None), str(tmp_path), "cannot read", "directory")


def test_an_unreadable_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:  # root reads files of any mode, so the mode itself would prove nothing
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refusal(lambda: read_identity(tmp_path / "north.key", None), "north.key", "Permission denied")


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_key(tmp_path: Path, content: bytes) -> None:
    path = key_file(tmp_path, content)
    refusal(lambda: read_identity(path, None), str(path), "the private key is empty")


def other_kinds() -> dict[str, bytes]:
    key = Ed25519PrivateKey.from_private_bytes(b"\x5a" * 32)
    rsa = generate_private_key(65537, 2048)
    agreement = X25519PrivateKey.from_private_bytes(b"\x5a" * 32)
    return {
        "text": b"ZZZsecretZZZ",
        "raw": b"\x5a" * 32,
        "truncated": pem(key)[:70],
        "damaged": pem(key).replace(b"MC4C", b"MC4D"),
        "public": key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "openssh": key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        "huge": pem(key) + b"\n" * (1 << 16),
        "rsa": rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "x25519": agreement.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }


@pytest.mark.parametrize("passphrase", [None, b"something"])
def test_what_is_no_ed25519_private_key(tmp_path: Path, passphrase: bytes | None) -> None:
    for kind, content in other_kinds().items():
        path = key_file(tmp_path, content)
        message = refusal(lambda path=path: read_identity(path, passphrase), str(path))
        if kind in ("rsa", "x25519") and passphrase is None:
            assert "not an Ed25519" in message
        if kind in ("text", "raw", "truncated", "public", "openssh"):
            assert "not a private key in PKCS8 PEM" in message
        secret = content.decode("latin-1").splitlines()[-1 if kind in ("text", "raw") else 1]
        assert secret not in message


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o602])
def test_a_private_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "with space"
    key_path, _ = create_identity("north", folder, None)
    key_path.chmod(mode)
    refusal(lambda: read_identity(key_path, None), str(key_path), f"chmod 600 '{key_path}'")
    key_path.chmod(0o400)
    read_identity(key_path, None)


def test_the_secret_is_in_no_message_and_no_repr(tmp_path: Path) -> None:
    key_path, pub_path = create_identity("north", tmp_path, None)
    body = key_path.read_text().splitlines()[1]
    loaded = load_pem_private_key(key_path.read_bytes(), None)
    assert isinstance(loaded, Ed25519PrivateKey)
    seed = loaded.private_bytes_raw().hex()
    stray = tmp_path / "stray.txt"
    said = [
        refusal(lambda: create_identity("north", tmp_path, None)),
        refusal(lambda: read_identity(key_path, b"s3same")),
        refusal(lambda: read_roster(key_path), "PEM", "SITE.pub"),
        repr(read_identity(key_path, None)),
        pub_path.read_text(),
    ]
    # secrets pasted into a roster, in each place of a line
    for line in (
        body,
        f"{body} ed25519",
        f"{body} x {seed}",
        f"north {seed} x",
        f"north ed25519 {seed}00",
        f"x {body} x",
    ):
        stray.write_text(line)
        said.append(refusal(lambda: read_roster(stray), "line 1"))
    for text in said:
        assert body not in text
        assert seed not in text
        assert "s3same" not in text


def test_the_passphrase_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSAM_KEY_PASSPHRASE", raising=False)
    assert passphrase_from_environment() is None
    monkeypatch.setenv("FEDSAM_KEY_PASSPHRASE", "grüne Wiese")
    assert passphrase_from_environment() == "grüne Wiese".encode()
    monkeypatch.setenv("FEDSAM_KEY_PASSPHRASE", "")
    refusal(passphrase_from_environment, "FEDSAM_KEY_PASSPHRASE", "empty")


# ---------------------------------------------------------------- rosters


def roster_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "roster.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_roster_survives_writing_and_reading(tmp_path: Path) -> None:
    roster = Roster({name: public_of(name) for name in ("west", "north", "_1", "Köln")})
    text = format_roster(roster)
    assert text.splitlines() == sorted(text.splitlines())
    again = read_roster(roster_file(tmp_path, text))
    assert dict(again.keys) == dict(roster.keys)
    assert again.hash == roster.hash


def test_comments_blank_lines_and_foreign_line_ends_are_read(tmp_path: Path) -> None:
    north = entry("north").strip()
    path = roster_file(
        tmp_path,
        f"\ufeff# the consortium\r\n\r\n  {north.upper().replace('NORTH ED', 'north ed')}\r\n\t\n"
        f"south\ted25519  {public_of('south').hex()} # by telephone, 3 May\n#west ed25519 00\n{entry('east').strip()}",
    )
    assert dict(read_roster(path).keys) == {name: public_of(name) for name in ("north", "south", "east")}


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\r"])
def test_no_odd_character_ends_a_comment(tmp_path: Path, separator: str) -> None:
    path = roster_file(tmp_path, f"{entry('north')}# harmless{separator}{entry('evil')}")
    assert list(read_roster(path).keys) == ["north"]


H = public_of("south").hex()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("south", "1 words"),
        (f"south {H}", "2 words"),
        (f"south ed25519 {H} x", "4 words"),
        (f"south ed25519 {H}west ed25519 {H}", "5 words"),
        (f"south ssh-ed25519 {H}", "second word"),
        (f"south ED25519 {H}", "second word"),
        (f"south rsa {H}", "second word"),
        (f"south ed25519 {H[:-1]}", "64 hex digits"),
        (f"south ed25519 {H[:-2]}", "64 hex digits"),
        (f"south ed25519 {H}00", "64 hex digits"),
        (f"south ed25519 {H[:-1]}g", "64 hex digits"),
        (f"south ed25519 0x{H[2:]}", "64 hex digits"),
        (f"south ed25519 {H[:-1]}\u0663", "64 hex digits"),
        (f"../south ed25519 {H}", "name"),
        (f".south ed25519 {H}", "name"),
        (f"a/b ed25519 {H}", "name"),
        (f"{'x' * 129} ed25519 {H}", "name"),
        (f"no\u0308rth ed25519 {H}", "name"),
        (f"\ufeffsouth ed25519 {H}", "name"),
        (f"south\x00 ed25519 {H}", "name"),
        (f"north ed25519 {H}", "'north' is on line 2"),
        (entry("north"), "'north' is on line 2"),
        (f"south ed25519 {public_of('north').hex()}", "that of line 2"),
        (f"south ed25519 {public_of('north').hex().upper()}", "that of line 2"),
        (f"south ed25519 {'00' * 32}", "small order"),
        (f"south ed25519 01{'00' * 30}80", "small order"),
        (b"s\xf6uth ed25519 00", "UTF-8"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path: Path, line: str | bytes, words: str) -> None:
    content = line if isinstance(line, bytes) else line.encode()
    path = roster_file(tmp_path, f"# sites\n{entry('north')}\n".encode() + content + b"\n" + entry("west").encode())
    refusal(lambda: read_roster(path), f"{path}: line 4", words)


def test_utf_16_is_refused(tmp_path: Path) -> None:
    path = roster_file(tmp_path, entry("north").encode("utf-16"))
    refusal(lambda: read_roster(path), str(path), "line 1", "save the roster as UTF-8")


@pytest.mark.parametrize("content", ["", "\n\n", "# nobody yet\n"])
def test_a_roster_of_nobody(tmp_path: Path, content: str) -> None:
    path = roster_file(tmp_path, content)
    refusal(lambda: read_roster(path), str(path), "no site")


def test_a_missing_roster(tmp_path: Path) -> None:
    refusal(lambda: read_roster(tmp_path / "roster.txt"), str(tmp_path / "roster.txt"), "no such roster")


def test_a_roster_that_is_a_folder(tmp_path: Path) -> None:
    refusal(lambda: read_roster(tmp_path), str(tmp_path), "cannot read")


def test_a_huge_roster(tmp_path: Path) -> None:
    text = entry("north")
    path = roster_file(tmp_path, text + "#" * ((1 << 20) - len(text)))
    assert list(read_roster(path).keys) == ["north"]
    path.write_bytes(path.read_bytes() + b"#")
    refusal(lambda: read_roster(path), str(path), "1024 KiB")


def test_a_public_pem_is_no_roster(tmp_path: Path) -> None:
    path = roster_file(tmp_path, other_kinds()["public"])
    refusal(lambda: read_roster(path), str(path), "PEM")


def forged(key: bytes) -> int:
    """Of 256 messages, how many a signature that nobody made (R the neutral point, s = 0) fits under `key`."""
    found = 0
    for number in range(256):
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(b"\x01" + bytes(63), number.to_bytes(2, "big"))
        except InvalidSignature:
            continue
        found += 1
    return found


def test_keys_of_small_order_are_those_under_which_anybody_signs(tmp_path: Path) -> None:
    """The list is needed, as the library takes such keys, and it is complete: the cofactor is 8, so is their number."""
    p = 2**255 - 19
    d = -121665 * pow(121666, -1, p) % p
    ys = [int.from_bytes(raw, "little") for raw in _SMALL_ORDER]
    # On -x² + y² = 1 + d x² y², a point of order 1 or 2 has y = 1 or -1, and one of order 4 has y = 0. Of order 8 is
    # what doubles to y = 0: x² = -y², hence d y⁴ + 2 y² - 1 = 0. Points: 1 + 1 + 2 + 4, as each y but ±1 has two x.
    order_8 = [y for y in ys if (d * y**4 + 2 * y**2 - 1) % p == 0]
    assert len(order_8) == 2
    assert sorted(ys) == sorted([0, 1, p - 1, p, p + 1, *order_8])  # p and p + 1 are other ways to write 0 and 1
    for raw in _SMALL_ORDER:
        for key in (raw, bytes([*raw[:-1], raw[-1] | 0x80])):
            path = roster_file(tmp_path, f"north ed25519 {key.hex()}\n")
            refusal(lambda path=path: read_roster(path), "line 1", "small order")
    assert sum(forged(raw) > 0 for raw in _SMALL_ORDER) >= 5
    assert forged(Identity.generate().public) == 0


@pytest.mark.parametrize(
    "name", ["north", "site-a", "_1", "7", "Köln.2", "x" * 128, "", "..", "../x", "a/b", ".hidden", "-x", "a b"]
)
def test_a_roster_takes_the_names_that_ais_name(name: str) -> None:
    if is_name(name):
        assert format_roster(Roster({name: public_of("a")}))
    else:
        refusal(lambda: format_roster(Roster({name: public_of("a")})), "site name")
