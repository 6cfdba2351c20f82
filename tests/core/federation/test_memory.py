"""What a site keeps between rounds: there again after a restart, for its owner only, and never another run's."""

import contextlib
import errno
import logging
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fedsam_core.errors import CheckpointError, DataError
from fedsam_core.federation.memory import Array, SiteMemory

LAYOUT = "a" * 64


@pytest.fixture(params=["ram", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "site" / "memory" if request.param == "disk" else None


def state(number: int) -> dict[str, Array]:
    rng = np.random.default_rng(number)
    return {
        "b": rng.normal(size=(3, 2)).astype(np.float32),
        "a": rng.normal(size=5),
        "moments/count": np.array(number, dtype=np.int64),
        "empty": np.empty((0, 4), dtype=np.float32),
        "seen": np.array([True, False]),
    }


def assert_equal(got: dict[str, Array], expected: dict[str, Array]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert got[name].shape == value.shape
        assert got[name].tobytes() == value.tobytes()


def assert_found(found: tuple[int, dict[str, Array]] | None, number: int) -> None:
    assert found is not None
    assert found[0] == number
    assert_equal(found[1], state(number))


def test_a_repeated_round_starts_from_what_it_started_from(folder: Path | None) -> None:
    memory = SiteMemory(folder, LAYOUT)
    assert memory.latest() is None
    assert memory.before(1) is None
    for number in (1, 2, 3, 4):
        memory.save(number, state(number))
        assert_found(memory.latest(), number)
    for _ in range(2):
        assert_found(memory.before(4), 3)
        memory.save(4, state(4))
    assert_found(memory.before(5), 4)
    assert_found(memory.before(9), 4)  # the site was away for some rounds
    assert_found(memory.before(3), 2)  # the driver's checkpoint of round 3 is damaged
    assert memory.rounds == (2, 3, 4)


def test_a_restarted_site_has_it_again(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path / "m", LAYOUT)
    for number in (4, 6):
        memory.save(number, state(number))
    again = SiteMemory(tmp_path / "m", LAYOUT)
    assert again.rounds == (4, 6)
    assert_found(again.before(6), 4)
    assert_found(again.latest(), 6)
    assert SiteMemory(None, LAYOUT).latest() is None


def test_what_is_kept_does_not_follow_what_the_caller_does(folder: Path | None) -> None:
    memory = SiteMemory(folder, LAYOUT)
    given_away = state(1)
    memory.save(1, given_away)
    given_away["a"][:] = 7
    for _ in range(2):
        found = memory.latest()
        assert found is not None
        assert_equal(found[1], state(1))
        found[1]["b"][:] = 7  # arrays come back writable


def test_views_are_kept_as_they_look(folder: Path | None) -> None:
    memory = SiteMemory(folder, LAYOUT)
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"transposed": whole.T, "strided": whole[::2, ::3], "reversed": whole[::-1], "read-only": whole.view()}
    views["read-only"].setflags(write=False)
    memory.save(1, views)
    found = memory.latest()
    assert found is not None
    for name, value in views.items():
        np.testing.assert_array_equal(found[1][name], value)


def test_a_run_that_was_taken_back_leaves_its_other_course(folder: Path | None) -> None:
    memory = SiteMemory(folder, LAYOUT)
    for number in (1, 2, 3, 4):
        memory.save(number, state(number))
    memory.save(3, state(3))
    assert memory.rounds == (2, 3)
    memory.save(4, state(4))
    assert_found(memory.before(4), 3)


def test_a_run_that_was_taken_back_too_far_is_logged(folder: Path | None, caplog: pytest.LogCaptureFixture) -> None:
    memory = SiteMemory(folder, LAYOUT)
    with caplog.at_level(logging.WARNING):
        assert memory.before(1) is None
        for number in (3, 4):
            memory.save(number, state(number))
        assert_found(memory.before(4), 3)
        assert not caplog.records
        assert memory.before(2) is None
    assert caplog.messages == ["round 2 starts without the site's own values: only those after round 3 and 4 are kept"]
    memory.save(2, state(2))
    assert memory.rounds == (2,)


@pytest.mark.parametrize("existing", [False, True])
def test_others_on_the_machine_cannot_read_it(tmp_path: Path, existing: bool) -> None:
    folder = tmp_path / "m"
    if existing:
        folder.mkdir(mode=0o755)
    before = os.umask(0)
    try:
        SiteMemory(folder, LAYOUT).save(1, state(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]


def test_a_failed_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SiteMemory(tmp_path / "m", LAYOUT)
    for number in (1, 2):
        memory.save(number, state(number))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for number in (2, 3):
            with pytest.raises(DataError, match=f"round-00000{number}.safetensors: the disk is full"):
                memory.save(number, state(5))
    assert memory.rounds == (1, 2)
    assert_found(memory.before(2), 1)
    assert_found(memory.latest(), 2)
    assert len(list((tmp_path / "m").iterdir())) == 2


def test_what_a_killed_process_was_writing_is_swept(tmp_path: Path) -> None:
    SiteMemory(tmp_path, LAYOUT).save(1, state(1))
    (tmp_path / ".round-000002.safetensors.x7f3.tmp").write_bytes(b"half")
    (tmp_path / "note.txt").write_text("mine")
    assert_found(SiteMemory(tmp_path, LAYOUT).latest(), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note.txt", "round-000001.safetensors"]


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "m"):
        with pytest.raises(DataError, match=f"{folder}: cannot write .*choose a working folder"):
            SiteMemory(folder, LAYOUT)


def test_another_layout_is_refused_when_opened(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    SiteMemory(folder, LAYOUT).save(1, state(1))
    with pytest.raises(CheckpointError, match=f"{folder} keeps a site's values for another selection") as caught:
        SiteMemory(folder, "b" * 64)
    assert "give this run a folder of its own, or remove that one" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 9, b"\xff" * 64, save({"a": np.zeros(2)}), save({"a": np.zeros(2)}, {"fedsam": "[]"})]
)
def test_a_foreign_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    memory = SiteMemory(tmp_path, LAYOUT)
    path = tmp_path / "round-000001.safetensors"
    path.write_bytes(content)
    for call in (memory.latest, lambda: memory.before(2), lambda: SiteMemory(tmp_path, LAYOUT)):
        with pytest.raises(CheckpointError, match=f"{path} is unreadable.*remove it") as caught:
            call()
        assert "\n" not in str(caught.value)
    path.unlink()
    assert SiteMemory(tmp_path, LAYOUT).latest() is None


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_goes_unseen(tmp_path: Path, data: st.DataObject) -> None:
    """One flipped bit or a cut anywhere: an error or, where the header's spelling alone changed, the same values."""
    path = tmp_path / "round-000001.safetensors"
    path.unlink(missing_ok=True)  # of the example before
    memory = SiteMemory(tmp_path, LAYOUT)
    memory.save(1, state(1))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert_found(memory.latest(), 1)


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_is_held_is_kept_once_it_counts_and_forgotten_otherwise(tmp_path: Path, on_disk: bool) -> None:
    def memory() -> SiteMemory:
        return SiteMemory(tmp_path / "memory" if on_disk else None, LAYOUT)

    kept = memory()
    for number in (1, 2):
        kept.hold(number, {"n": np.array([number])})
        assert kept.rounds == tuple(range(1, number))  # not yet
        kept.keep(number)
    kept.hold(3, {"n": np.array([3])})
    if on_disk:
        kept = memory()  # the site was restarted between its vector and the opening of the sum
    kept.settle(3, 4)
    assert kept.rounds == (1, 2, 3)
    kept.hold(4, {"n": np.array([4])})
    kept.settle(3, 5)  # the sum of round 4 was opened without it
    kept.settle(2, 5)  # nobody changes that any more, nor what was told of an earlier round
    kept.settle(2, 4)
    if on_disk:
        memory().settle(2, 5)
        memory().settle(2, 4)
    assert kept.rounds == (1, 2, 3)
    kept.hold(5, {"n": np.array([5])})
    kept.keep(5)  # it helped to open an attempt that failed, and was not in the next one
    kept.settle(3, 6)
    assert kept.rounds == (2, 3)
    latest = kept.before(6)
    assert latest is not None
    assert latest[0] == 3
    assert latest[1]["n"] == [3]
    if on_disk:
        rounds = {"round-000002.safetensors", "round-000003.safetensors"}
        assert {path.name for path in (tmp_path / "memory").iterdir()} == {*rounds, "settled.json"}
        assert (tmp_path / "memory" / "round-000003.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_round_under_way_is_left_as_it_is_when_it_is_settled(tmp_path: Path) -> None:
    """An attempt is repeated, or the round's scores are asked for: what is held of it may still count."""
    memory = SiteMemory(tmp_path, LAYOUT)
    memory.hold(4, {"n": np.array([4])})
    memory.settle(3, 4)
    memory.keep(4)
    memory.settle(3, 4)
    assert memory.rounds == (4,)
