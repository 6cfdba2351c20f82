"""`fedsam doctor` names what is wrong: each test plants a fault in a healthy cohort and reads the line about it."""

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster import doctor as nodes
from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import FedsamError
from fedsam_core.estimates import training_memory
from fedsam_core.learning.config import LearningConfig
from fedsam_core.sam.adapters import adapt
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.secagg.keyfiles import create_identity
from fedsam_core.selection import preset
from fedsam_core.store import LocalStore
from pipelines import doctor
from pipelines.config import load_config
from pipelines.prepare import prepare_sites, prepared_location

SITES = ("north", "south", "west")

Examine = Callable[..., list[doctor.Finding]]


@pytest.fixture
def examine(small_settings: list[str]) -> Examine:
    """examine("key=value", ...): the findings about the small cohort, which is prepared first."""
    healthy = load_config(None, small_settings)
    prepare_sites(healthy)

    def run(*overrides: str, quick: bool = False) -> list[doctor.Finding]:
        return doctor.examine(load_config(None, [*small_settings, *overrides]), quick)

    return run


def seen(config: list[str], *facts: nodes.NodeFacts) -> doctor.Seen:
    """What doctor would see on nodes that found this; any of them may be given any site."""
    by_id = {str(number): node for number, node in enumerate(facts)}
    return doctor.Seen(load_config(None, config), SITES, by_id, dict.fromkeys(SITES, tuple(by_id)))


def named(findings: list[doctor.Finding], check: str, level: str, *words: str) -> None:
    """One of the check's findings has this level and all the words, in one line."""
    lines = [f for f in findings if f.check == check and f.level == level and all(word in f.text for word in words)]
    assert lines, [f for f in findings if f.level != "ok"]
    assert "\n" not in lines[0].text


def only(findings: list[doctor.Finding], check: str) -> None:
    """Nothing else fails."""
    assert {f.check for f in findings if f.level == "FAIL"} == {check}, findings


def test_a_healthy_cohort_and_the_exit_status(
    examine: Examine, small_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = []
    for more in ([], ["federation.secure_sum=plain"], ["model.checkpoint=/nowhere/sam.pth"], ["nonsense=1"]):
        with pytest.raises(SystemExit) as ended:
            doctor.main([*small_settings, *more, "--json"])
        statuses.append(ended.value.code)
        told = capsys.readouterr()
        if not more:
            findings = [doctor.Finding(**finding) for finding in json.loads(told.out)]
            checks = ["settings", "model", "stores", "tracking", "libraries", "clocks", "gpus", "disks", "weights"]
            assert [finding.check for finding in findings] == [*checks, "keys", "shares", "trust"]
            assert {finding.check for finding in findings if finding.level != "ok"} == {"keys"}  # no roster
        elif more[0].startswith("nonsense"):
            assert "unknown key nonsense" in told.err
    assert statuses == [0, 0, 1, 2]
    with pytest.raises(SystemExit):
        doctor.main(small_settings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "11 ok, 1 warnings, 0 failures"
    assert len(lines) == 13  # a line each


def test_nothing_is_written_and_no_phantom_is_made(tmp_path: Path) -> None:
    config = load_config("demo", ["engine.kind=in-process", f"work_dir={tmp_path / 'new'}"])
    findings = doctor.examine(config)
    named(findings, "shares", "warn", "site site-b", "not prepared", "fedsam prepare")
    assert not [f for f in findings if f.level == "FAIL"]
    left = {path.name for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert left <= {"mlflow.db", "mlflow.db.lock"}  # MLflow makes its database when it is asked


def test_a_checkpoint_that_is_missing(examine: Examine) -> None:
    findings = examine("model.checkpoint=/nowhere/sam.pth")
    named(findings, "weights", "FAIL", "/nowhere/sam.pth", "No such file")
    only(findings, "weights")


def test_another_checkpoint_on_a_node(small_settings: list[str], tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    config = [*small_settings, f"model.checkpoint={path}"]
    question = doctor._question(load_config(None, config), (), False)
    path.write_bytes(b"another")
    there = replace(nodes.look(question), name="far")
    path.write_bytes(b"weights")
    here = nodes.look(question)
    findings = doctor.weights(seen(config, here, there))
    named(findings, "weights", "FAIL", str(path), "far", "another file", there.checkpoint[:12])
    assert len(findings) == 1
    assert doctor.weights(seen(config, here))[0].level == "ok"


@pytest.fixture
def consortium(tmp_path: Path) -> list[str]:
    """Keys of every site, and the roster of all."""
    for site in SITES:
        create_identity(site, tmp_path / "keys", None)
    lines = [(tmp_path / "keys" / f"{site}.pub").read_text() for site in SITES]
    (tmp_path / "roster.txt").write_text("".join(lines))
    return [f"federation.roster={tmp_path / 'roster.txt'}", f"federation.key_dir={tmp_path / 'keys'}"]


def test_keys_and_rosters(
    examine: Examine,
    consortium: list[str],
    small_settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config(None, [*small_settings, *consortium])
    keys, roster = tmp_path / "keys", tmp_path / "roster.txt"
    findings = examine(*consortium)
    named(findings, "keys", "ok", "every site's key")
    assert {f.level for f in findings} == {"ok"}

    (keys / "south.key").rename(keys / "away")
    (keys / "south.key").write_bytes((keys / "west.key").read_bytes())  # another site's key in its place
    (keys / "south.key").chmod(0o600)
    findings = examine(*consortium)
    named(findings, "keys", "FAIL", "site south", "has the key", "lists", "SITE.pub")
    only(findings, "keys")

    (keys / "south.key").chmod(0o644)
    named(examine(*consortium), "keys", "FAIL", "site south", "chmod 600")
    (keys / "south.key").unlink()
    named(examine(*consortium), "keys", "FAIL", "site south", "no such private key")
    (keys / "away").rename(keys / "south.key")

    whole = roster.read_text()
    question = doctor._question(config, SITES, False)
    here = nodes.look(question)
    create_identity("east", tmp_path / "more", None)
    roster.write_text(whole + (tmp_path / "more" / "east.pub").read_text())
    there = replace(nodes.look(question), name="far")
    named(doctor.keys(seen([*small_settings, *consortium], here, here, there)), "keys", "FAIL", "far", "another roster")
    roster.write_text("".join(line for line in whole.splitlines(keepends=True) if not line.startswith("west ")))
    findings = examine(*consortium)
    named(findings, "settings", "FAIL", "west")
    named(findings, "keys", "FAIL", "site west", "does not list it")
    roster.write_text(whole)

    policy = tmp_path / "policy.yaml"
    policy.write_text("min_contributors: 9\n")
    monkeypatch.setenv("FEDSAM_SITE_POLICY", str(policy))
    named(examine(*consortium), "keys", "FAIL", "site north", "federation.min_contributors=9")


def test_prepared_shares(examine: Examine, small_settings: list[str], cohort_folder: Path) -> None:
    share = Path(prepared_location(load_config(None, small_settings))) / "west"
    case = next(iter(sorted((share / "cases").iterdir())))
    whole = case.read_bytes()
    case.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    findings = examine()
    named(findings, "shares", "FAIL", "site west", case.name, "damaged")
    only(findings, "shares")
    assert {f.level for f in examine(quick=True) if f.check == "shares"} == {"ok"}  # as it says: listed, not read
    with pytest.raises(FedsamError, match="damaged"):  # it would have ended the run
        PreparedCohort.open(LocalStore(share)).load(case.name.partition(".")[0])

    case.unlink()
    findings = examine()
    named(findings, "shares", "warn", "site west", "lacks prepared cases", "fedsam prepare")
    assert not [f for f in findings if f.level == "FAIL"]

    settings = [f"{site}: {cohort_folder.parent / site}" for site in SITES]  # folders that are not there
    (share.parent).rename(share.parent.with_name("gone"))
    own = ["cohort.path=null", f"cohort.sites={{{', '.join(settings)}}}", "cohort.classes=[outer, inner]"]
    findings = examine(*own, "cohort.modality=mri")
    named(findings, "shares", "FAIL", "site south", "not prepared", "nor can it be prepared", "south")
    only(findings, "shares")


def test_a_share_that_another_preparation_made(small_settings: list[str], examine: Examine) -> None:
    question = doctor._question(load_config(None, small_settings), SITES, False)
    facts = nodes.look(question)
    other = {**facts.sites, "south": replace(facts.sites["south"], made_with="f" * 64)}
    findings = doctor.shares(seen(small_settings, replace(facts, sites=other)))
    named(findings, "shares", "FAIL", "site south", "other settings")


def test_stores_that_cannot_be_used(examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "planted")
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # nobody listens
        endpoint = f"http://127.0.0.1:{dead.getsockname()[1]}"
        findings = examine("storage.results=s3://bucket/runs", f"storage.s3_endpoint={endpoint}")
        named(findings, "stores", "FAIL", "s3://bucket/runs", endpoint, "check the endpoint")
        only(findings, "stores")
        assert "planted" not in repr(findings)
    (tmp_path / "file").write_text("")
    named(examine(f"storage.results={tmp_path / 'file'}"), "stores", "FAIL", str(tmp_path / "file"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    findings = examine("storage.prepared=s3://bucket/cohorts", "storage.s3_endpoint=http://127.0.0.1:9")
    named(findings, "stores", "FAIL", "has no keys for buckets", "AWS_ACCESS_KEY_ID")


def test_a_tracking_server_that_is_away_or_unusable(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{dead.getsockname()[1]}"
        named(examine(f"tracking.uri={uri}"), "tracking", "warn", uri, "does not answer", "fedsam track sync")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
        named(examine(f"tracking.uri={uri}"), "tracking", "FAIL", "MLFLOW_TRACKING_PASSWORD")
    findings = examine("tracking.uri=/tmp/mlruns")
    named(findings, "tracking", "FAIL", "sqlite:///")
    only(findings, "tracking")


def test_a_disk_that_is_too_small(examine: Examine, small_settings: list[str]) -> None:
    findings = examine("federation.rounds=1000000000000")  # of a sum of over a megabyte each
    named(findings, "disks", "FAIL", "are needed", "are free", "work")
    only(findings, "disks")
    facts = nodes.look(doctor._question(load_config(None, small_settings), SITES, False))
    full = {folder: replace(disk, free=2**20, device=7) for folder, disk in facts.disks.items()}
    named(doctor.disks(seen(small_settings, replace(facts, disks=full))), "disks", "FAIL", "1.05 MB are free")


def test_a_folder_that_may_not_be_written(small_settings: list[str]) -> None:
    facts = nodes.look(doctor._question(load_config(None, small_settings), SITES, False))
    closed = {folder: replace(disk, writable=False) for folder, disk in facts.disks.items()}
    named(doctor.disks(seen(small_settings, replace(facts, disks=closed))), "disks", "FAIL", "may not be written")


def test_a_gpu_that_is_too_small(
    small_settings: list[str], examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(nodes, "_cuda", lambda: "13.0")

    def gpu(total: int, used: int) -> None:
        program.write_text(f"#!/bin/sh\necho 'Tiny 1, {total}, {used}'\n")
        program.chmod(0o755)

    large = ("model.backbone=vit_h", "model.image_size=1024", "learning.batch_size=4")
    gpu(8000, 500)
    assert nodes.gpus() == (nodes.Gpu("Tiny 1", 8000 * 2**20, 7500 * 2**20),)
    findings = examine(*large)
    named(findings, "gpus", "FAIL", "Tiny 1", "7.8 GiB", "learning.batch_size")
    only(findings, "gpus")
    gpu(80000, 79000)
    named(examine(*large), "gpus", "warn", "1.0 GiB free", "nvidia-smi")
    gpu(80000, 500)
    assert [f.level for f in examine(*large) if f.check == "gpus"] == ["ok"]
    monkeypatch.setattr(nodes, "_cuda", lambda: "")
    named(examine(), "gpus", "FAIL", "without CUDA")


def test_sites_that_share_a_gpu_need_room_together(small_settings: list[str]) -> None:
    config = load_config(None, [*small_settings, "model.backbone=vit_b", "model.image_size=512"])
    facts = replace(nodes.look(doctor._question(config, SITES, False)), cuda="13.0")
    need = doctor.training_memory(config.model, 2, config.layers, config.learning)

    def level(booked: float, memory: float) -> str:
        gpu = nodes.Gpu("Tiny 1", int(memory), int(memory))
        homes = dict.fromkeys(SITES, ("node",))
        facts_of = {"node": replace(facts, gpus=(gpu,))}
        (finding,) = doctor.gpus(doctor.Seen(config, SITES, facts_of, homes, dict.fromkeys(SITES, booked)))
        return finding.level

    assert level(1, 1.1 * need.most) == "ok"
    assert level(0.5, 2.1 * need.most) == "ok"
    assert level(0.5, 2.1 * need.least) == "warn"
    assert level(0.3333, 2.1 * need.least) == "FAIL"


def test_what_a_step_keeps_is_counted_as_it_is() -> None:
    model, selection = ModelConfig(backbone="vit_t", image_size=32), preset("flap", 4)
    estimate = training_memory(model, 2, selection, LearningConfig(batch_size=3))
    segmenter = build_segmenter(model, 2, selection, seed=0)
    adapt(segmenter, selection)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*segmenter.parameters(), *segmenter.buffers())}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        segmenter.train()(torch.zeros(3, 3, 32, 32)).softmax(1).sum().backward()
    assert estimate.activations == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.05)
    gradients = sum(p.grad.numel() for p in segmenter.parameters() if p.grad is not None)
    assert estimate.optimiser == 3 * 4 * gradients
    assert estimate.weights == 4 * sum(p.numel() for p in segmenter.parameters())
    larger = training_memory(model, 2, selection, LearningConfig(batch_size=30))
    assert 8 * estimate.activations < larger.activations < 10 * estimate.activations  # the grid's positions stay one
    assert estimate.least <= estimate.most < larger.most
    assert larger.least < larger.most
    lean = training_memory(model, 2, selection, LearningConfig(batch_size=30, checkpointing=True))
    assert lean.activations < larger.activations / 2


def test_other_versions_and_clocks(small_settings: list[str]) -> None:
    here = nodes.look(doctor._question(load_config(None, small_settings), (), False))
    far = replace(here, name="far", versions={**here.versions, "fedsam": "0" * 12, "peft": "0.1"})
    named(doctor.libraries(seen(small_settings, here, far)), "libraries", "FAIL", "far", "fedsam 000000000000", "peft")
    older = replace(here, name="far", versions={**here.versions, "peft": "0.1"})
    named(doctor.libraries(seen(small_settings, here, older)), "libraries", "warn", "far", "peft 0.1")
    for off, error, level, words in (
        (-3600.0, 0.1, "FAIL", ("far", "3600 s behind")),
        (10.0, 0.1, "warn", ("far", "10 s ahead of")),
        (10.0, 9.0, "ok", ()),  # it took so long to ask that nobody knows
    ):
        node = replace(here, name="far", clock_off=off, clock_error=error)
        named(doctor.clocks(seen(small_settings, here, node)), "clocks", level, *words)


def test_an_open_cluster_is_told(small_settings: list[str]) -> None:
    node = replace(nodes.look(doctor._question(load_config(None, small_settings), (), False)), ray_auth=False)
    plain = [*small_settings, "federation.secure_sum=plain"]
    findings = doctor.trust(seen(plain, node, node))
    for words in (("RAY_AUTH_MODE=token",), ("RAY_USE_TLS=1",), ("secure_sum=masked",)):
        named(findings, "trust", "warn", *words)
    closed = replace(node, ray_auth=True, ray_tls=True)
    assert [f.level for f in doctor.trust(seen(small_settings, closed, closed))] == ["ok"]


def test_a_check_that_breaks_does_not_stop_the_others(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(doctor, "open_tracking", broken)
    findings = examine()
    named(findings, "tracking", "FAIL", "could not be checked", "ZeroDivisionError")
    assert len(findings) == 12


def test_sites_that_cannot_be_told(examine: Examine) -> None:
    findings = examine("cohort.path=/nowhere")
    named(findings, "sites", "FAIL", "/nowhere")
    named(findings, "shares", "warn", "not checked")
    only(findings, "sites")
