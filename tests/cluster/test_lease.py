"""One driver a run: who holds its lease, how long that lasts, and what the loser is told. On a folder and on S3."""

import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import lease as leases
from cluster.lease import Lease, LeaseHeld, LeaseLost, Stopped, ask_to_stop, is_over, newest
from fedsam_core.store import Store


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(leases, "STALE_SECONDS", 1.5)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder's process cannot be seen from here, as on another machine."""
    monkeypatch.setattr(leases, "_machine", lambda: "")


def ended(told: list[BaseException], seconds: float = 30) -> BaseException:
    end = time.monotonic() + seconds
    while not told:
        assert time.monotonic() < end
        time.sleep(0.02)
    return told[0]


def test_a_driver_that_lives_keeps_its_run(store: Store, elsewhere: None) -> None:
    first = Lease.take(store, "r")
    first.renew(lambda why: None)
    with pytest.raises(LeaseHeld) as refused:
        Lease.take(store, "r")
    said = str(refused.value)
    assert said.startswith(f"run r is driven by process {os.getpid()} on {os.uname().nodename}, since ")
    assert "last renewed 2" in said
    assert said.endswith("stop it with `fedsam stop r`; once it has given no sign for 1.5 s it may be taken over")
    first.release()
    second = Lease.take(store, "r")  # at once
    assert second.number == 2
    second.release()
    assert Lease.take(store, "other").number == 1


def test_a_driver_that_gives_no_sign_loses_it(store: Store, elsewhere: None) -> None:
    asleep, told = Lease.take(store, "r"), list[BaseException]()
    taken = Lease.take(store, "r")
    assert taken.number == 2
    asleep.renew(told.append)  # it wakes up
    why = ended(told)
    assert isinstance(why, LeaseLost)
    assert str(why).startswith(f"run r was taken over by another driver: process {os.getpid()} on ")
    for look in (asleep.check, asleep.look):
        with pytest.raises(LeaseLost):
            look()
    assert asleep.is_lost
    asleep.release()
    number, holder = newest(store, "r")
    assert (number, holder is not None and is_over(store, "r", number, holder)) == (2, False)  # the other's is its own
    taken.check()


def test_a_killed_driver_on_this_machine_is_seen_at_once(store: Store) -> None:
    """Its beat would still have to stand still for `STALE_SECONDS` elsewhere."""
    code = (
        "import sys, pickle, time; from cluster.lease import Lease; "
        "Lease.take(pickle.loads(bytes.fromhex(sys.argv[1])), 'r'); print('taken', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, pickle.dumps(store).hex()], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "taken\n"
        number, found = newest(store, "r")
        assert found is not None
        assert not is_over(store, "r", number, found)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert is_over(store, "r", number, found)
        assert Lease.take(store, "r").number == 2
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_of_many_at_once_one_has_it(store: Store) -> None:
    def take(_: int) -> Lease | None:
        try:
            lease = Lease.take(store, "r")
        except LeaseHeld:
            return None
        lease.renew(lambda why: None)  # whoever comes a moment later sees that it lives
        return lease

    for number in (1, 2):
        with ThreadPoolExecutor(5) as threads:
            taken = [lease for lease in threads.map(take, range(5)) if lease is not None]
        assert [lease.number for lease in taken] == [number]
        taken[0].release()


def test_whoever_holds_it_is_asked_to_stop(store: Store) -> None:
    lease, told = Lease.take(store, "r"), list[BaseException]()
    lease.renew(told.append)
    lease.check()
    ask_to_stop(store, "r", lease.number)
    assert isinstance(ended(told), Stopped)
    with pytest.raises(Stopped, match="run r is stopped, as was asked: `fedsam resume r` goes on"):
        lease.check()
    lease.release()
    again = Lease.take(store, "r")  # the request was for the other
    again.look()
