"""What a run's files say of sites that were lost in it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsam_core.federation.site import FederatedSite
from pipelines import verify


def test_the_files_say_who_was_lost_and_why(
    stage: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One site is lost in training, one after its vector, and two in the midst of an opening, one of them for good."""
    faults = {("fit", 1): {"site-b"}, ("confirm", 2): {"site-c"}, ("unmask", 3): {"site-c", "site-d"}}
    gone: set[str] = set()

    def failing(method: str) -> Callable[..., Any]:
        original = getattr(FederatedSite, method)

        def call(self: FederatedSite, *args: Any, **keywords: Any) -> Any:
            site = self.spec.site
            if site in gone:
                raise RuntimeError("nobody is there")
            trains = self._attempt is not None and self._task.purpose == "update"
            if trains and site in faults.get((method, self._current().round), ()):
                faults[method, self._current().round].remove(site)
                gone.update({site} & {"site-d"})
                raise RuntimeError(f"a fault in {method}")
            return original(self, *args, **keywords)

        return call

    for method in ("fit", "confirm", "unmask", "open"):
        monkeypatch.setattr(FederatedSite, method, failing(method))
    phantom = ["cohort.source=phantom", "cohort.path=null", "cohort.phantom.sites=4", "cohort.phantom.cases_per_site=5"]
    phantom += ["cohort.phantom.test_per_site=1", "cohort.phantom.shape=[10, 32, 32]"]
    ended = stage("federate", *phantom, "federation.rounds=4", "federation.validate_every=1")
    assert ended.status == 0, ended.error
    (folder,) = (tmp_path / "work" / "runs").iterdir()
    rows = list(csv.DictReader((folder / "rounds.csv").open()))
    told = [(row["contributors"], row["lost"], row["disturbed"]) for row in rows]
    said = "RuntimeError: a fault in"
    assert told == [
        ("site-a site-c site-d", f"site-b: {said} fit", ""),
        ("site-a site-b site-c site-d", "", f"site-c: {said} confirm"),
        ("", "", f"site-c: {said} unmask; site-d: {said} unmask"),
        ("site-a site-b site-c", "site-d: is not back since it was lost (RuntimeError: nobody is there)", ""),
    ]
    assert rows[2]["state_hash"] == rows[1]["state_hash"] != rows[3]["state_hash"]
    assert [row["val/dice"] != "" for row in rows] == [True, True, False, True]
    absent = {"site-a": 1, "site-b": 2, "site-c": 1, "site-d": 2}
    assert json.loads((folder / "summary.json").read_text())["absent"] == absent
    entries = [json.loads(line) for line in (folder / "record.jsonl").read_bytes().splitlines()]
    updates = [one for one in entries if one["kind"] in ("sum", "failed") and one["task"]["purpose"] == "update"]
    lost = [["site-b"], ["site-c"], ["site-c", "site-d"], ["site-d"], ["site-d"]]
    assert [sorted(one["lost"]) for one in updates] == lost
    assert "round 3: an attempt came to nothing (the round was given up: round 3 failed: only 3 of the 4" in ended.out
    assert {check.status for check in verify.checks(folder, None)} == {"ok", "not checked"}
