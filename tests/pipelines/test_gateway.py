"""docs/gateway.md as people go through it: certificates, three hospitals' own processes, `fedsam federate`."""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from support.consortium import Consortium

from fedsam_core.secagg.record import read_chain

SITES = ("north", "south", "west")


@pytest.fixture
def consortium(tmp_path: Path) -> Any:
    own = Consortium(tmp_path / "consortium", SITES)
    yield own
    own.end()


def scans(folder: Path, name: str, rng: np.random.Generator) -> Path:
    """A site's folder: five scans in MRI, and one that is torn."""
    folder.mkdir(parents=True)
    for number in range(5):
        image = rng.normal(100, 20, (20, 22, 6)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[4:12, 5:14, 1:5] = 1
        image[label == 1] += 120
        nib.save(nib.Nifti1Image(image, np.diag([1.0, 1.0, 3.0, 1.0])), folder / f"{name}{number}.nii.gz")
        nib.save(nib.Nifti1Image(label, np.diag([1.0, 1.0, 3.0, 1.0])), folder / f"{name}{number}_seg.nii.gz")
    (folder / "PATIENT_DOE.nii.gz").write_bytes(b"torn")
    shutil.copy(folder / f"{name}0_seg.nii.gz", folder / "PATIENT_DOE_seg.nii.gz")
    return folder


def state_hashes(work: Path) -> list[str]:
    """Of the global states in the newest run's record."""
    run = max((work / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    entries, _ = read_chain((run / "record.jsonl").read_bytes().splitlines())
    return [entry["state_hash"] for entry in entries if entry["kind"] == "state"]


def test_three_hospitals_of_their_own_agree_with_one_process(
    consortium: Consortium, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(3)
    folders = {name: scans(tmp_path / "scans" / name, name, rng) for name in SITES}
    keys = tmp_path / "keys"  # the reference has all keys in one place
    keys.mkdir()
    for name in SITES:
        shutil.copy(consortium.folder / name / "keys" / f"{name}.key", keys)
    settings: dict[str, Any] = {
        "name": "small",
        "cohort": {"name": "small", "modality": "mri", "classes": ["organ"]},
        "model": {"backbone": "vit_t", "image_size": 32},
        "rank": 4,
        "learning": {"local_steps": 2, "batch_size": 4},
        "federation": {"rounds": 2, "roster": str(consortium.roster), "share_site_scores": True},
    }
    ended: dict[str, tuple[int, str]] = {}

    def federate(kind: str, *overrides: str) -> None:
        own = {**settings, "work_dir": str(tmp_path / kind), "engine": {"kind": kind, **consortium.engine}}
        # Where a hospital's folder is, its own file says: the aggregator need not know.
        own["cohort"] = {**own["cohort"], "sites": {n: "own" if kind == "gateway" else str(folders[n]) for n in SITES}}
        file = tmp_path / f"{kind}.yaml"
        file.write_text(yaml.safe_dump(own))
        with pytest.raises(SystemExit) as left:
            import_module("pipelines.federate").STAGE.main(["--config", str(file), *overrides])
        said = capsys.readouterr()
        ended[kind] = int(left.value.code or 0), said.out + said.err

    federate("in-process", f"federation.key_dir={keys}")
    assert ended["in-process"][0] == 0, ended
    for name in SITES:
        consortium.serve(name, scans=str(folders[name]))
    federate("gateway")
    status, text = ended["gateway"]
    assert status == 0, text
    assert "waiting for north, south, west to dial in" in text
    assert "all sites are connected" in text
    assert "3 cases were left out" in text
    assert len(states := state_hashes(tmp_path / "gateway")) == 3
    assert states == state_hashes(tmp_path / "in-process")
    for told in (tmp_path / "gateway").rglob("*"):
        assert not told.is_file() or b"DOE" not in told.read_bytes(), told
    assert "DOE" not in text
    assert "PATIENT_DOE" in consortium.log("north")
    # The run asked for scores; the sites' own files do not let them go.
    (run,) = (tmp_path / "gateway" / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["dice"] is not None
    assert not summary["after"].get("per_site")
    federate("gateway", "federation.secure_sum=plain")
    status, text = ended["gateway"]
    assert status == 2
    assert "site north cannot be prepared: AgainstPolicy: this site takes part in masked sums only" in text


def called(command: str, *arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        import_module(f"pipelines.{command}").main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_from_authority_to_a_site_that_can_dial(
    consortium: Consortium, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    assert called("gateway", "authority", "--folder", own) == 0
    assert called("gateway", "request", "north", "--folder", own) == 0
    (asked,) = re.findall(r"request: .*\nfingerprint: ([0-9a-f]{64})", capsys.readouterr().out)
    assert called("gateway", "sign", own / "north.csr", "--site", "south", "--authority", own) == 2
    assert "was made for north, not for south" in capsys.readouterr().err
    assert called("gateway", "sign", own / "north.csr", "--site", "north", "--authority", own, "--days", 30) == 0
    assert f"fingerprint: {asked}" in capsys.readouterr().out  # the same at both ends of the telephone
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in own.glob("*.key")} == {
        "authority.key": "0o600",
        "north.tls.key": "0o600",
    }
    assert called("gateway", "request", "north", "--folder", own) == 2  # nothing is overwritten
    assert "never overwritten" in capsys.readouterr().err
    places = {"certificate": own / "north.crt", "key": own / "north.tls.key", "authority": own / "authority.crt"}
    file = consortium.file("north", **{name: str(path) for name, path in places.items()})
    assert called("site", "check", file) == 0
    assert "site north can dial 127.0.0.1:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"polcy": {}}, "polcy: Extra inputs are not permitted"),
        ({"site": "../north"}, "site: String should match pattern"),
        ({"roster": "/gone"}, "/gone: there is no such roster"),
        ({"policy": {"min_contributors": 2}}, "policy.min_contributors"),
        ({"authority": "/gone.crt"}, "/gone.crt is no certificate of an authority"),
    ],
)
def test_what_is_wrong_with_a_sites_file_is_said_at_its_start(
    consortium: Consortium, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], complaint: str
) -> None:
    assert called("site", "check", consortium.file("north", **settings)) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "PRIVATE KEY" not in error


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ([], "set federation.roster"),
        (["federation.roster=ROSTER", "cohort.path=/x"], "cohort.sites={charite: own"),
        (["federation.roster=ROSTER", "cohort.sites={a: own, b: own, c: own}"], "needs engine.gateway.certificate"),
    ],
)
def test_what_the_aggregator_lacks_is_said_before_anybody_waits(
    consortium: Consortium, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], complaint: str
) -> None:
    told = [override.replace("ROSTER", str(consortium.roster)) for override in overrides]
    if not any(override.startswith("cohort.") for override in told):
        told.append("cohort.source=phantom")
    settings = ["cohort.name=x", "engine.kind=gateway", f"work_dir={tmp_path}", *told]
    with pytest.raises(SystemExit) as left:
        import_module("pipelines.prepare").STAGE.main(settings)
    assert left.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "gateway",
            ("fedsam gateway sign charite.csr --site charite", "authority.crt", "engine.kind=gateway"),
        ),
        ("site", ("site: charite", "fedsam site", "asked/HASH.yaml", "policy.min_contributors", "max_message_bytes")),
    ],
)
def test_help_teaches(capsys: pytest.CaptureFixture[str], command: str, words: tuple[str, ...]) -> None:
    assert called(command, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in words:
        assert word in said
