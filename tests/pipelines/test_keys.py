"""`fedsam keys` as a person calls it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsam_core.secagg.keyfiles import read_identity, read_roster
from pipelines import cli, keys


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    error: str


Keys = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Keys:
    """run("new", "north", ...) calls `fedsam keys` with an own home folder and no passphrase."""
    monkeypatch.delenv("FEDSAM_KEY_PASSPHRASE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def call(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            keys.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


def refused(ended: Ended, *words: str) -> None:
    """Status 2, nothing on stdout, and one line on stderr with all of `words`."""
    assert ended.status == 2, ended
    assert ended.out == ""
    assert len(ended.error.splitlines()) == 1, ended.error
    for word in words:
        assert word in ended.error


def spoken(text: str) -> str:
    """The fingerprint as somebody hears it."""
    return re.sub(r"\s", "", text.partition("fingerprint:")[2])[:64]


def test_from_key_to_roster(run: Keys, tmp_path: Path) -> None:
    folder = tmp_path / "with [brackets]"
    for site in ("north", "south"):
        made = run("new", site, "--folder", folder)
        assert (made.status, made.error) == (0, "")
        public = read_roster(folder / f"{site}.pub")
        assert public.key(site) == read_identity(folder / f"{site}.key", None).public
        for word in (f"{folder}/{site}.key", f"{folder}/{site}.pub", f"{site} ed25519 {public.key(site).hex()}\n"):
            assert word in made.out
        for word in ("not encrypted", f"Send {site}.pub to the coordinator", "cat *.pub > roster.txt", "telephone"):
            assert word in made.out
        assert spoken(made.out) == public.hash
    path = folder / "roster.txt"
    path.write_bytes(b"".join(pub.read_bytes() for pub in folder.glob("*.pub")))
    shown = run("show", path)
    roster = read_roster(path)
    assert (shown.status, shown.error) == (0, "")
    for site in ("north", "south"):
        assert re.search(rf"{site}\W+{roster.key(site).hex()}", shown.out)
    assert spoken(shown.out) == roster.hash
    assert re.search(r"fingerprint:\n(  ([0-9a-f]{4}( |\n|$)){8}){2}", shown.out)


def test_keys_are_kept_in_the_home_folder(run: Keys, tmp_path: Path) -> None:
    assert run("new", "north").status == 0
    assert {path.name for path in (tmp_path / "home" / ".fedsam" / "keys").iterdir()} == {"north.key", "north.pub"}
    assert run("new", "south", "--folder", "~/other").status == 0
    assert (tmp_path / "home" / "other" / "south.key").is_file()


def test_a_key_shows_only_its_public_line(run: Keys, tmp_path: Path) -> None:
    run("new", "north", "--folder", tmp_path)
    shown = run("show", tmp_path / "north.key")
    assert (shown.status, shown.error) == (0, "")
    assert shown.out == (tmp_path / "north.pub").read_text()


def test_an_encrypted_key(run: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSAM_KEY_PASSPHRASE", "correct horse")
    made = run("new", "north", "--folder", tmp_path)
    assert made.status == 0
    assert "encrypted, open it with FEDSAM_KEY_PASSPHRASE" in made.out
    assert "correct horse" not in made.out + made.error
    assert run("show", tmp_path / "north.key").out == (tmp_path / "north.pub").read_text()
    monkeypatch.setenv("FEDSAM_KEY_PASSPHRASE", "wrong horse")
    ended = run("show", tmp_path / "north.key")
    refused(ended, "north.key", "does not open")
    assert "horse" not in ended.error
    monkeypatch.delenv("FEDSAM_KEY_PASSPHRASE")
    refused(run("show", tmp_path / "north.key"), "north.key", "is encrypted; set FEDSAM_KEY_PASSPHRASE")
    assert run("show", tmp_path / "north.pub").status == 0


def test_an_empty_passphrase_makes_no_key(run: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSAM_KEY_PASSPHRASE", "")
    refused(run("new", "north", "--folder", tmp_path), "FEDSAM_KEY_PASSPHRASE", "empty")
    assert not list(tmp_path.iterdir())


def test_the_secret_is_in_no_output(run: Keys, tmp_path: Path) -> None:
    said = [run("new", "north", "--folder", tmp_path)]
    body = (tmp_path / "north.key").read_text().splitlines()[1]
    (tmp_path / "copy.txt").write_bytes((tmp_path / "north.key").read_bytes())
    (tmp_path / "body.txt").write_text(body)
    said += [run("new", "north", "--folder", tmp_path)]
    said += [run("show", tmp_path / name) for name in ("north.key", "north.pub", "copy.txt", "body.txt")]
    assert [ended.status for ended in said] == [0, 2, 0, 0, 2, 2]
    for ended in said:
        assert body not in ended.out + ended.error
        assert "PRIVATE KEY" not in ended.out + ended.error


def test_nothing_is_overwritten(run: Keys, tmp_path: Path) -> None:
    run("new", "north", "--folder", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refused(run("new", "north", "--folder", tmp_path), "north.key", "never overwritten")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_refusals_are_one_line(run: Keys, tmp_path: Path) -> None:
    refused(run("new", "../north", "--folder", tmp_path), "../north", "letters")
    refused(run("show", tmp_path / "none.pub"), "none.pub", "no such roster")
    refused(run("show", tmp_path / "none.key"), "none.key", "no such private key")
    (tmp_path / "roster.txt").write_text("# ours\nnorth ed25519 12\n")
    refused(run("show", tmp_path / "roster.txt"), "roster.txt: line 2", "64 hex digits")
    run("new", "north", "--folder", tmp_path)
    (tmp_path / "north.key").chmod(0o644)
    refused(run("show", tmp_path / "north.key"), "north.key", "chmod 600")
    (tmp_path / "north.key").chmod(0o600)
    (tmp_path / "north.key").rename(tmp_path / "my north.key")
    refused(run("show", tmp_path / "my north.key"), "my north")


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("new",), ("show",)])
def test_wrong_usage(run: Keys, arguments: tuple[str, ...]) -> None:
    ended = run(*arguments)
    assert ended.status == 2
    assert "usage: fedsam keys" in ended.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--help",), ("new", "show", "SITE.key", "fedsam keys new north", "cat *.pub > roster.txt", "telephone")),
        (("new", "--help"), ("SITE", "--folder", "~/.fedsam/keys", "FEDSAM_KEY_PASSPHRASE", "fedsam keys new north")),
        (("show", "--help"), ("FILE", "fingerprint", "fedsam keys show roster.txt", "north.key > north.pub")),
    ],
)
def test_help_teaches(run: Keys, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    ended = run(*arguments)
    assert (ended.status, ended.error) == (0, "")
    assert "--pass" not in ended.out  # a passphrase on the command line would be in the shell's history
    for word in words:
        assert word in ended.out


def test_the_command_is_listed_and_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FEDSAM_KEY_PASSPHRASE", raising=False)
    monkeypatch.setattr("sys.argv", ["fedsam", "keys", "new", "north", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert (tmp_path / "north.key").is_file()
    assert cli.COMMANDS["keys"] in cli._help()
