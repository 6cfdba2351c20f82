"""No attempt is answered twice, and no sum is opened for two sets of survivors."""

from pathlib import Path
from typing import Any

import pytest
from support.federations import put_back, small_cohort, small_federation, small_specs

from fedsam_core.errors import RoundError, SecureSumError
from fedsam_core.federation.answered import Answered
from fedsam_core.federation.engine import in_process
from fedsam_core.federation.site import FederatedSite
from fedsam_core.secagg import Attempt
from fedsam_core.secagg.refusals import OpenedBefore, OutOfTurn

SITES = ("a", "b", "c", "d")


def attempt(number: int, round_number: int = 1, model: str = "m") -> Attempt:
    return Attempt("run", round_number, number, "l", "c", model, SITES, 3)


@pytest.mark.parametrize("restarted", [False, True])
def test_attempts_and_rounds_go_up_only(tmp_path: Path, restarted: bool) -> None:
    path = tmp_path / "a.answered" / "run.json"
    answered = Answered(path)
    answered.enter(attempt(3, 2))
    if restarted:
        answered = Answered(path)
    for late in (attempt(3, 2), attempt(2, 2), attempt(4, 1)):
        with pytest.raises(OutOfTurn, match="attempt 3 in round 2 was entered before"):
            answered.enter(late)
    answered.enter(attempt(4, 2))


@pytest.mark.parametrize("restarted", [False, True])
def test_a_sum_is_opened_for_one_set_of_survivors(tmp_path: Path, restarted: bool) -> None:
    path = tmp_path / "run.json"
    answered = Answered(path)
    answered.enter(attempt(1))
    answered.open(attempt(1), "update", SITES)
    if restarted:
        answered = Answered(path)
    answered.enter(attempt(2))
    answered.open(attempt(2), "update", SITES)  # the same again shows nothing new
    answered.open(attempt(2), "scores/val", SITES[:3])
    answered.enter(attempt(3))
    for method in (answered.check, answered.open):
        with pytest.raises(OpenedBefore, match="opened for a, b, c, d before: opening it for a, b, c would show"):
            method(attempt(3), "update", SITES[:3])
    answered.enter(attempt(4, 2))
    with pytest.raises(OpenedBefore):  # nor in another round, as long as it is about the same state
        answered.open(attempt(4, 2), "scores/val", SITES[1:])
    answered.open(attempt(4, 2), "update", SITES[:3])  # which is trained anew in every round
    with pytest.raises(OpenedBefore):
        answered.open(attempt(4, 2), "update", SITES)
    answered.open(attempt(4, 2, model="n"), "update", SITES)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"run": 3}', b'{"attempt": "x"}'])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(SecureSumError, match=r"run.json, which keeps this site from answering twice"):
        Answered(path)


def test_a_driver_that_opens_a_round_twice_does_not_learn_the_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It opens the round for all four sites, then claims that the attempt failed and opens it without one of them."""
    prepared = small_cohort(tmp_path, sites=4)
    specs = small_specs(prepared, attempts=1)

    class Dropping:
        def __init__(self, inner: Any) -> None:
            self._inner = inner
            self.dropped: set[str] = set()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def call(self, method: str, args: Any, deadline: float, *rest: Any) -> Any:
            asked = {site: given for site, given in args.items() if method != "fit" or site not in self.dropped}
            replies, lost = self._inner.call(method, asked, deadline, *rest)
            return replies, lost | {site: "dropped" for site in args if site not in asked}

    engine = Dropping(in_process(specs, FederatedSite))
    federation, state = small_federation(engine, specs[0])
    slices = federation.total_weight()
    new = federation.train(1, slices)[0].state
    put_back(federation, state)
    assert federation.train(1, slices)[0].state.hash == new.hash
    put_back(federation, state)
    engine.dropped = {"site-d"}
    with pytest.raises(RoundError, match="OpenedBefore: the update sum of this state was opened for"):
        federation.train(1, slices)
    assert "site site-a refused confirm" in caplog.text
    put_back(federation, new.tensors)
    federation.train(2, slices)  # another state has other updates
