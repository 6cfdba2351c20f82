"""`fedsam verify` on the folder of a run: what it prints, its exit status, and whatever is done to the files."""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from fedsam_core.federation.state import pack_state, read_note, unpack_state
from fedsam_core.secagg.keyfiles import create_identity
from fedsam_core.selection import ParameterManifest
from pipelines import cli, console, verify
from pipelines.federate import STAGE
from pipelines.run_folder import RunFolder

SITES = ("site-a", "site-b", "site-c")
CHECKS = ["chain", "run", "keys", "attempts", "signatures", "survivors", "sums", "states", "checkpoint", "head"]
FILES = ("record.jsonl", "manifest.json", "config.yaml", "initial.safetensors", "state.safetensors")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    error: str

    @property
    def findings(self) -> dict[str, dict[str, str]]:
        return {check["what"]: check for check in json.loads(self.out)}

    @property
    def failed(self) -> set[str]:
        return {what for what, check in self.findings.items() if check["status"] == "failed"}


@dataclass(frozen=True)
class Finished:
    """A run with pinned identities.

    Attributes:
        work: its work_dir.
        folder: of the run.
        roster: the consortium's.
        checkpoints: state.safetensors after each round.
    """

    work: Path
    folder: Path
    roster: Path
    checkpoints: list[bytes]


def federate(work: Path, *overrides: str) -> Path:
    """Folder of a small run of phantoms."""
    before = set((work / "runs").glob("*"))
    with pytest.raises(SystemExit) as ended:
        STAGE.main(
            [
                "name=small",
                f"work_dir={work}",
                "cohort.name=small",
                "cohort.source=phantom",
                "cohort.phantom.cases_per_site=5",
                "cohort.phantom.test_per_site=1",
                "cohort.phantom.shape=[10, 32, 32]",
                "model.backbone=vit_t",
                "model.image_size=32",
                "selection=lora",
                "rank=1",
                "engine.kind=in-process",
                "federation.rounds=2",
                "federation.bits=16",
                "learning.local_steps=2",
                "learning.batch_size=4",
                *overrides,
            ]
        )
    assert ended.value.code == 0
    (folder,) = set((work / "runs").iterdir()) - before
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("verify")
    public = [create_identity(site, root / "keys", None)[1] for site in SITES]
    roster = root / "roster.txt"
    roster.write_text("".join(path.read_text() for path in public))
    checkpoints: list[bytes] = []
    write = RunFolder.write

    def remember(self: RunFolder, name: str, data: bytes) -> Path:
        if name == "state.safetensors":
            checkpoints.append(data)
        return write(self, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write", remember)
        pins = (f"federation.roster={roster}", f"federation.key_dir={root / 'keys'}")
        folder = federate(root / "work", *pins)
    return Finished(root / "work", folder, roster, checkpoints)


@pytest.fixture
def folder(finished: Finished, tmp_path: Path) -> Path:
    """A copy of what `fedsam verify` reads, to be tampered with."""
    copy = tmp_path / finished.folder.name
    (copy / "sums").mkdir(parents=True)
    for path in (*(finished.folder / name for name in FILES), *(finished.folder / "sums").iterdir()):
        shutil.copy(path, copy / path.relative_to(finished.folder))
    shutil.copy(finished.folder / "summary.json", copy)
    return copy


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """run(folder, "--json", ...) calls `fedsam verify`."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            verify.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


Verify = Callable[..., Ended]


def refused(ended: Ended, *words: str) -> None:
    """Status 2, nothing on stdout, and one line on stderr with all of `words`."""
    assert ended.status == 2, ended
    assert ended.out == ""
    assert len(ended.error.splitlines()) == 1, ended.error
    assert ended.error.startswith("error: ")
    for word in words:
        assert word in ended.error


def wrong(ended: Ended, *checks: str) -> None:
    """Status 1, nothing on stderr, and all of `checks` failed."""
    assert ended.status == 1, ended
    assert ended.error == ""
    assert ended.failed >= set(checks)


def flips(path: Path, places: Iterable[float], bit: int = 1) -> Iterator[int]:
    """The file with one byte changed at each of `places`; as it was in the end."""
    data = path.read_bytes()
    for at in sorted({int(place) for place in places}):
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        yield at
    path.write_bytes(data)


def entries_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "record.jsonl").read_bytes().splitlines()]


def relink(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Entries changed, all lines linked anew, and every head with them; stored sums stay where they are."""
    lines = (folder / "record.jsonl").read_bytes().splitlines()
    entries = [json.loads(line) for line in lines]
    manifest = ParameterManifest.from_json((folder / "manifest.json").read_text())
    data = (folder / "state.safetensors").read_bytes()
    note = read_note(data)
    noted = entries[[sha256(line).hexdigest() for line in lines].index(note["record_head"])]
    change(entries)
    written, head = [], "0" * 64
    for number, entry in enumerate(entries):
        entry.update(sequence=number, previous=head)
        written.append(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        head = sha256(written[-1][:-1]).hexdigest()
        if entry is noted:
            note["record_head"] = head
    (folder / "record.jsonl").write_bytes(b"".join(written))
    del note["layout_hash"]
    (folder / "state.safetensors").write_bytes(pack_state(manifest, unpack_state(manifest, data), note))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "record_head": head}))


# A true run.


def test_a_run_verifies_as_a_table(finished: Finished, run: Verify) -> None:
    ended = run(finished.folder)
    assert ended.status == 0
    assert ended.error == ""
    for word in (*CHECKS, "configuration", "not checked", "training", "identities", "MLflow", "--roster"):
        assert word in ended.out
    assert "failed" not in ended.out
    assert ended.out.splitlines()[-1] == "nothing that could be checked is wrong"


def test_a_run_verifies_as_json(finished: Finished, run: Verify) -> None:
    ended = run(finished.folder, "--json")
    assert ended.status == 0
    checks = json.loads(ended.out)
    assert all(set(check) == {"what", "status", "detail"} for check in checks)
    assert {check["status"] for check in checks} == {"ok", "not checked"}
    ok = [check["what"] for check in checks if check["status"] == "ok"]
    assert ok[: len(CHECKS)] == CHECKS
    assert set(ok[len(CHECKS) :]) == {"configuration", "end"}
    assert len(ended.findings) == len(checks)
    assert ended.findings["states"]["detail"] == "2 of 2 rounds repeated bit for bit from their sums"
    unchecked = {what for what, check in ended.findings.items() if check["status"] == "not checked"}
    assert unchecked == {"head outside", "training", "masked vectors", "identities"}


def test_the_head_to_compare_is_the_one_in_mlflow(finished: Finished, run: Verify) -> None:
    client = MlflowClient(f"sqlite:///{finished.work / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedsam")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{finished.folder.name}'")
    head = found[0].data.tags["fedsam.record_head"]
    assert len(head) == 64
    assert head in run(finished.folder, "--json").findings["head outside"]["detail"]
    assert json.loads((finished.folder / "summary.json").read_text())["record_head"] == head


def test_a_run_verifies_where_it_is_copied_to(folder: Path, run: Verify) -> None:
    assert run(folder).status == 0


def test_the_consortiums_roster_is_compared(finished: Finished, run: Verify, tmp_path: Path) -> None:
    ended = run(finished.folder, "--roster", finished.roster, "--json")
    assert ended.status == 0
    assert "identities" not in ended.findings
    lines = finished.roster.read_text().splitlines()
    names, keys = [line.split()[0] for line in lines], [line.split()[-1] for line in lines]
    other = tmp_path / "roster.txt"
    other.write_text("\n".join(lines[:2]) + "\n")
    wrong(run(finished.folder, "--roster", other, "--json"), "keys")
    swapped = zip(names, [keys[1], keys[0], keys[2]], strict=True)
    other.write_text("".join(f"{name} ed25519 {key}\n" for name, key in swapped))
    wrong(run(finished.folder, "--roster", other, "--json"), "keys")
    create_identity("site-b", tmp_path / "stranger", None)
    other.write_text("\n".join([lines[0], (tmp_path / "stranger" / "site-b.pub").read_text(), lines[2]]))
    ended = run(finished.folder, "--roster", other, "--json")
    wrong(ended, "keys", "signatures")
    assert "site-b" in ended.findings["keys"]["detail"]


def test_a_plain_run_says_that_it_was_not_private(finished: Finished, run: Verify) -> None:
    ended = run(federate(finished.work, "federation.secure_sum=plain", "federation.rounds=1"), "--json")
    assert ended.status == 0
    assert ended.findings["privacy"]["status"] == "not checked"
    assert "plain" in ended.findings["privacy"]["detail"]
    assert ended.findings["states"]["detail"].startswith("1 of 1")


def test_a_run_that_keeps_no_sums_says_so(finished: Finished, run: Verify) -> None:
    folder = federate(finished.work, "federation.keep_sums=false", "federation.rounds=1")
    assert not (folder / "sums").exists()
    ended = run(folder, "--json")
    assert ended.status == 0
    assert "federation.keep_sums=false" in ended.findings["unkept sums"]["detail"]
    assert ended.findings["all states"]["detail"].startswith("1 of 1 rounds")
    assert run(folder).out.splitlines()[-1] == "nothing that could be checked is wrong"


# A run that was tampered with.


def test_any_changed_byte_of_the_record_is_found(folder: Path, run: Verify) -> None:
    path = folder / "record.jsonl"
    data = path.read_bytes()
    closing = data.rstrip().rfind(b"\n")  # of what follows, see below
    ends = [at for at in range(closing) if data[at : at + 1] == b"\n"]
    signature = data.index(b'"signature":"') + 20
    inner = [0, signature, signature + 64, *ends, *(at + 1 for at in ends), *(at - 1 for at in ends)]
    for _ in flips(path, [*inner, *np.linspace(0, closing - 1, 40)]):
        wrong(run(folder, "--json"), "chain")
    line = data[closing + 1 :]
    for word in (
        b'"attempt"',
        b'"previous":"',
        b'"model_hash":"',
        b'"signature":"',
        b'"digest":"',
        b'"header":"',
        b'"bytes":',
    ):
        for at in flips(path, [closing + 1 + line.index(word) + len(word) + 1]):
            assert run(folder, "--json").status == 1, at
    assert run(folder).status == 0


def test_lines_removed_swapped_and_appended_are_found(folder: Path, run: Verify) -> None:
    path = folder / "record.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for at in range(len(lines) - 1):
        path.write_bytes(b"".join(lines[:at] + lines[at + 1 :]))
        wrong(run(folder, "--json"), "chain")
        path.write_bytes(b"".join([*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]))
        wrong(run(folder, "--json"), "chain")
        path.write_bytes(b"".join(lines[: at + 1]))  # all after it are missing
        if at < len(lines) - 2:
            assert run(folder, "--json").status == 1
    for more in (lines[0], lines[-1], b"\n", b"{}\n", b"no entry", b"\x00"):
        path.write_bytes(b"".join([*lines, more]))
        wrong(run(folder, "--json"), "chain")
    path.write_bytes(b"".join(lines)[:-20])
    wrong(run(folder, "--json"), "chain")


def test_any_changed_byte_of_the_checkpoint_is_found(folder: Path, run: Verify) -> None:
    path = folder / "state.safetensors"
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    places = [*range(10), *np.linspace(10, header - 1, 25), header, *np.linspace(header + 1, size - 1, 25)]
    for at in flips(path, places):
        ended = run(folder, "--json")
        wrong(ended)
        assert ended.failed <= {"checkpoint", "head"}, at


def test_any_changed_byte_of_the_first_state_is_found(folder: Path, run: Verify) -> None:
    path = folder / "initial.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    tensors = data.index(b'"dtype"')  # behind the note, of which see below
    for _ in flips(path, [*range(9), *np.linspace(tensors, header - 1, 12), *np.linspace(header, len(data) - 1, 12)]):
        wrong(run(folder, "--json"), "states")


def test_any_changed_byte_of_a_sum_is_found(folder: Path, run: Verify) -> None:
    paths = sorted((folder / "sums").iterdir())
    assert len(paths) == 2
    for path in paths:
        for _ in flips(path, np.linspace(0, path.stat().st_size - 1, 12), bit=0x40):
            wrong(run(folder, "--json"), "sums")
    first, second = (path.read_bytes() for path in paths)
    for data in (b"", first[:-1], first + b"\0", second):
        paths[0].write_bytes(data)
        wrong(run(folder, "--json"), "sums", "states")


def test_any_changed_byte_of_the_manifest_is_found(folder: Path, run: Verify) -> None:
    """Most make it unreadable: its own hash does not fit any more."""
    path = folder / "manifest.json"
    data = path.read_bytes()
    statuses = set()
    for _ in flips(path, np.linspace(data.index(b'"layout_hash"') + 1, len(data) - 2, 40)):
        ended = run(folder, "--json")
        statuses.add(ended.status)
        if ended.status == 2:
            refused(ended, "manifest.json")
        else:
            wrong(ended)
    assert statuses <= {1, 2}


def test_another_model_than_the_runs_is_found(folder: Path, run: Verify) -> None:
    path = folder / "manifest.json"
    manifest = ParameterManifest.from_json(path.read_text())
    shorter = ParameterManifest(manifest.selection, manifest.shared[:-1], manifest.local)
    path.write_text(shorter.to_json())
    wrong(run(folder, "--json"), "run")


@pytest.mark.parametrize(("key", "value"), [("numel", 1), ("numel", -1), ("numel", 1.5), ("group", "head")])
def test_what_the_layout_hash_leaves_out_of_the_manifest_is_found(
    folder: Path, run: Verify, key: str, value: object
) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["shared"][0][key] = value
    (folder / "manifest.json").write_text(json.dumps(content))
    wrong(run(folder, "--json"), "states")


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("learning_rate: 0.002", "learning_rate: 0.003"),
        ("local_steps: 2", "local_steps: 3"),
        ("\nseed: 0", "\nseed: 1"),
        ("bits: 16", "bits: 32"),
        ("  rounds: 2", "  rounds: 3"),
        ("update_clip: 2.0", "update_clip: 3.0"),
        ("rank: 1", "rank: 2"),
        ("selection: lora", "selection: flap"),
        ("augment: true", "augment: false"),
        ("image_size: 32", "image_size: 48"),
        ("secure_sum: masked", "secure_sum: plain"),
        ("deadline_s: 3600.0", "deadline_s: 3.0"),
    ],
)
def test_altered_settings_are_found(folder: Path, run: Verify, was: str, becomes: str) -> None:
    path = folder / "config.yaml"
    text = path.read_text()
    assert text.count(was) == 1
    path.write_text(text.replace(was, becomes))
    ended = run(folder, "--json")
    wrong(ended, "configuration")
    assert ended.failed == {"configuration"}


@pytest.mark.parametrize(
    "data", [b"", b"a: [", b"\xff\xfe\x00", b"rounds: 2\n", b"[1, 2]\n", b"a: &a [*a]\n", b"&a {b: *a}"]
)
def test_settings_that_are_none_are_found(folder: Path, run: Verify, data: bytes) -> None:
    (folder / "config.yaml").write_bytes(data)
    wrong(run(folder, "--json"), "configuration")


def test_a_checkpoint_of_another_round_is_found(finished: Finished, folder: Path, run: Verify) -> None:
    first, last = finished.checkpoints
    path = folder / "state.safetensors"
    assert path.read_bytes() == last
    path.write_bytes(first)
    wrong(run(folder, "--json"), "checkpoint", "head")
    path.write_bytes((folder / "initial.safetensors").read_bytes())
    wrong(run(folder, "--json"), "checkpoint", "head")
    manifest = ParameterManifest.from_json((folder / "manifest.json").read_text())
    note = read_note(last)
    del note["layout_hash"]
    path.write_bytes(pack_state(manifest, unpack_state(manifest, first), note))  # under the header of the last
    wrong(run(folder, "--json"), "checkpoint")


def test_a_missing_checkpoint_is_found(folder: Path, run: Verify) -> None:
    (folder / "state.safetensors").unlink()
    ended = run(folder, "--json")
    wrong(ended, "checkpoint")
    assert "state.safetensors cannot be read" in ended.findings["checkpoint"]["detail"]


def test_a_missing_first_state_is_named(folder: Path, run: Verify) -> None:
    (folder / "initial.safetensors").unlink()
    ended = run(folder, "--json")
    assert ended.status == 0
    assert ended.findings["all states"]["status"] == "not checked"


def test_a_missing_sum_is_found_where_sums_are_kept(folder: Path, run: Verify) -> None:
    next((folder / "sums").iterdir()).unlink()
    ended = run(folder, "--json")
    wrong(ended, "sums")
    assert "unkept sums" not in ended.findings


def test_a_run_without_its_summary_did_not_come_to_its_end(folder: Path, run: Verify) -> None:
    (folder / "summary.json").unlink()
    ended = run(folder, "--json")
    assert ended.status == 0
    assert ended.findings["end"]["status"] == "not checked"
    for data in (b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"record_head": 5}'):
        (folder / "summary.json").write_bytes(data)
        wrong(run(folder, "--json"), "end")


def test_the_table_names_what_is_wrong(folder: Path, run: Verify) -> None:
    (folder / "state.safetensors").write_bytes(b"")
    ended = run(folder)
    assert ended.status == 1
    assert "failed" in ended.out
    assert ended.out.splitlines()[-1] == "wrong: checkpoint, head"


def test_a_record_linked_anew_is_found_by_what_the_sites_signed(finished: Finished, folder: Path, run: Verify) -> None:
    relink(folder, lambda entries: None)
    assert run(folder, "--json").status == 0

    def lower(entries: list[dict[str, Any]]) -> None:
        entries[6]["attempt"]["threshold"] = 2

    relink(folder, lower)
    ended = run(folder, "--json", "--roster", finished.roster)
    wrong(ended, "attempts", "survivors")
    assert ended.findings["chain"]["status"] == "ok"


@pytest.mark.parametrize("key", ["config_hash", "weights_hash", "roster_hash"])
def test_a_beginning_that_does_not_fit_the_settings_is_found(folder: Path, run: Verify, key: str) -> None:
    relink(folder, lambda entries: entries[0].update({key: "0" * 64}))
    assert run(folder, "--json").failed == {"configuration"}


def test_a_weights_file_that_is_not_here_is_named(folder: Path, run: Verify) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("checkpoint: auto", "checkpoint: /nowhere/sam.pth"))
    ended = run(folder, "--json")
    assert ended.status == 0
    assert ended.findings["backbone"]["status"] == "not checked"


def test_another_cohort_is_found(folder: Path, run: Verify) -> None:
    relink(folder, lambda entries: entries[0]["about"].update(cohort_hash="0" * 64))
    assert run(folder, "--json").failed == {"configuration"}


# What cannot be read.


def test_a_folder_that_is_no_run(run: Verify, tmp_path: Path, folder: Path) -> None:
    refused(run(tmp_path / "nowhere"), "nowhere", "cannot be read", "give the folder of a run")
    refused(run(tmp_path), "record.jsonl", "give the folder of a run")
    refused(run(folder / "record.jsonl"), "record.jsonl", "give the folder of a run")
    refused(run("x" * 5000))
    refused(run("[/bold]"), "[/bold]")


@pytest.mark.parametrize("name", ["record.jsonl", "manifest.json"])
def test_a_file_that_is_missing_or_a_folder(folder: Path, run: Verify, name: str) -> None:
    (folder / name).unlink()
    refused(run(folder), name, "No such file")
    (folder / name).mkdir()
    refused(run(folder, "--json"), name, "directory")


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"\xff\xfe\x00" * 1000, b"\x00" * 5_000_000, b"9" * 1_000_000, b"\n" * 100_000], ids=len
)
def test_a_record_that_is_none(folder: Path, run: Verify, data: bytes) -> None:
    (folder / "record.jsonl").write_bytes(data)
    ended = run(folder, "--json")
    wrong(ended, "chain")
    assert len(ended.findings) == 1
    assert "\n" not in ended.findings["chain"]["detail"]
    assert run(folder).status == 1


def test_garbage_in_place_of_any_file_ends_in_a_line(folder: Path, run: Verify) -> None:
    huge = np.random.default_rng(3).bytes(10_000_000)
    sums = [f"sums/{path.name}" for path in (folder / "sums").iterdir()]
    for name in (*FILES, *sums):
        path = folder / name
        data = path.read_bytes()
        for garbage in (b"", b"\xff\xfe\x00" * 99, b"null", b"{}", b"[]", data[: len(data) // 2], huge):
            path.write_bytes(garbage)
            ended = run(folder, "--json")
            assert ended.status in (1, 2), (name, garbage[:9])
            if ended.status == 2:
                refused(ended, name)
            else:
                wrong(ended)
        path.write_bytes(data)


def test_a_roster_that_cannot_be_read(finished: Finished, run: Verify, tmp_path: Path) -> None:
    refused(run(finished.folder, "--roster", tmp_path / "nowhere.txt"), "nowhere.txt", "no such roster")
    refused(run(finished.folder, "--roster", tmp_path), "roster")
    (tmp_path / "roster.txt").write_bytes(b"site-a ed25519 \xff\n")
    refused(run(finished.folder, "--roster", tmp_path / "roster.txt"), "line 1", "UTF-8")
    (tmp_path / "roster.txt").write_text("site-a\n")
    refused(run(finished.folder, "--roster", tmp_path / "roster.txt", "--json"), "line 1")


def test_help_teaches(run: Verify) -> None:
    ended = run("--help")
    assert ended.status == 0
    text = " ".join(ended.out.split())
    for words in (
        "fedsam verify",
        "--roster",
        "--json",
        "public keys",
        "example: fedsam verify ",
        "Exit status: 0 nothing is wrong, 1 a check failed, 2 the run cannot be read",
        "signatures",
    ):
        assert words in text


def test_wrong_arguments_end_with_usage(run: Verify) -> None:
    for arguments in ([], ["a", "b"], ["a", "--rooster", "b"]):
        ended = run(*arguments)
        assert ended.status == 2
        assert ended.error.startswith("usage: fedsam verify")


def test_fedsam_hands_over(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedsam", "verify", str(finished.folder), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)


def test_the_record_on_disk_holds_no_case_and_no_private_key(finished: Finished) -> None:
    record = (finished.folder / "record.jsonl").read_bytes()
    shares = list((finished.work / "cohorts").rglob("cohort.json"))
    cases = [case["id"] for share in shares for case in json.loads(share.read_text())["cohort"]["cases"]]
    assert len(cases) == 15
    assert not [case for case in cases if case.encode() in record]
    for path in (finished.roster.parent / "keys").glob("*.key"):
        assert not [line for line in path.read_bytes().splitlines() if line in record]
    assert str(finished.work).encode() not in record  # nor where anything is on the driver


def test_the_closing_line_is_guarded_too(folder: Path, run: Verify) -> None:
    """No line after it holds its hash."""
    path = folder / "record.jsonl"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    for becomes in (
        last[:-1] + b" ",
        last[:-1] + b" \n",
        last[:-1],
        last.replace(b'"lost":{}', b'"lost":{"a":"b"}'),
        b"",
    ):
        assert becomes != last
        path.write_bytes(b"".join([*lines, becomes]))
        wrong(run(folder, "--json"))


def test_a_newline_changed_to_another_is_found(folder: Path, run: Verify) -> None:
    path = folder / "record.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r", 1))
    wrong(run(folder, "--json"), "chain")


def test_the_note_in_the_first_state_is_compared(folder: Path, run: Verify) -> None:
    path = folder / "initial.safetensors"
    data = path.read_bytes()
    for _ in flips(path, [data.index(b"layout_hash") + 30]):
        wrong(run(folder, "--json"), "states")


def test_another_selection_in_the_manifest_is_found(folder: Path, run: Verify) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["selection"]["lora"]["alpha"] = 5.0
    path.write_text(json.dumps(content))
    wrong(run(folder, "--json"), "configuration")


def test_an_altered_learning_rate_is_not_hidden_by_a_missing_checkpoint(folder: Path, run: Verify) -> None:
    path = folder / "config.yaml"
    text = path.read_text().replace("learning_rate: 0.002", "learning_rate: 0.5")
    path.write_text(text.replace("checkpoint: auto", "checkpoint: /nowhere/sam.pth"))
    wrong(run(folder, "--json"), "configuration")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda first: first.pop("about"), id="nothing about it"),
        pytest.param(lambda first: first.update(about=5), id="about that is none"),
        pytest.param(lambda first: first["about"].pop("cohort_hash"), id="no cohort"),
        pytest.param(lambda first: first["about"].update(cohort_hash=float("nan")), id="a cohort that is none"),
        pytest.param(lambda first: first.pop("weights_hash"), id="no weights"),
        pytest.param(lambda first: first.update(weights_hash=[5]), id="weights that are none"),
        pytest.param(lambda first: first.pop("config_hash"), id="no configuration"),
        pytest.param(lambda first: first.update(config_hash=5), id="a configuration that is none"),
        pytest.param(lambda first: first.pop("sites"), id="no sites"),
        pytest.param(lambda first: first.update(sites=[]), id="an empty list of sites"),
        pytest.param(lambda first: first.update(run="../x"), id="a run that is a path"),
    ],
)
def test_a_beginning_that_is_malformed_is_a_finding(
    folder: Path, run: Verify, change: Callable[[dict[str, Any]], object]
) -> None:
    relink(folder, lambda entries: change(entries[0]))
    wrong(run(folder, "--json"))


def test_a_beginning_must_come_first(folder: Path, run: Verify) -> None:
    def change(entries: list[dict[str, Any]]) -> None:
        entries.append(entries.pop(0))
        for entry in entries:
            if entry["kind"] == "state":
                entry["sums"] = [number - 1 for number in entry["sums"]]

    relink(folder, change)
    for path in sorted((folder / "sums").iterdir()):
        path.rename(path.with_name(f"{int(path.stem) - 1:06d}.bin"))
    wrong(run(folder, "--json"), "run")


@pytest.mark.parametrize("version", ["[/x]", "[bold]x[/]", "\ud800", "\x1b[2J", "a\nb\tc", "x" * 10_000], ids=range(6))
def test_what_a_record_says_is_printed_as_text(
    folder: Path, run: Verify, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Not as markup, nor so that it moves the cursor."""
    monkeypatch.setattr(console, "out", Console(highlight=False, soft_wrap=True))  # what fails is left in its buffer
    relink(folder, lambda entries: entries[0].update(version=version))
    assert run(folder, "--json").findings["run"]["detail"].count(version) == 1
    ended = run(folder)
    assert ended.status == 0
    assert "\x1b" not in ended.out
    if version.startswith("["):
        assert version in ended.out


@pytest.mark.parametrize("throughout", [False, True])
def test_a_masked_run_that_calls_itself_plain_is_found(
    finished: Finished, folder: Path, run: Verify, throughout: bool
) -> None:
    """All that the sites sent is gone; config.yaml still says how it was."""

    def change(entries: list[dict[str, Any]]) -> None:
        entries[0]["secure_sum"] = "plain"
        if throughout:
            entries[0]["federation"]["secure_sum"] = "plain"
        for entry in entries:
            if entry["kind"] == "sum":
                entry.update(messages=[], course=None)

    relink(folder, change)
    wrong(run(folder, "--roster", finished.roster, "--json"), "survivors" if throughout else "run")


@pytest.mark.parametrize("name", ["record.jsonl", "manifest.json", "config.yaml"])
def test_a_file_nested_without_end_ends_in_a_line(folder: Path, run: Verify, name: str) -> None:
    for opening in (b"[", b'{"a":'):
        (folder / name).write_bytes(opening * 100_000)
        ended = run(folder, "--json")
        if name == "manifest.json":
            refused(ended, name)
        else:
            wrong(ended)


def test_a_manifest_of_a_giant_ends_in_a_line(folder: Path, run: Verify) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["shared"][0]["numel"] = 10**17
    (folder / "manifest.json").write_text(json.dumps(content))
    wrong(run(folder, "--json"))


def test_a_missing_manifest_is_named_once(folder: Path, run: Verify) -> None:
    (folder / "manifest.json").unlink()
    assert run(folder).error.count("manifest.json") == 1
