"""docs/gateway.md as people go through it: certificates, three hospitals' own processes, `fedsam federate`."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from support.consortium import Consortium

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
    assert "site north cannot take part: AgainstPolicy: this site takes part in masked sums only" in text
