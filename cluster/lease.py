"""Who drives a run: a lease in the store that keeps it, held by one driver at a time.

runs/RUN/lease/000001.json       a driver that took it; created only where there is none, so that of two one wins
               000001.beat       written anew every few seconds while that driver lives
               000001.stop       somebody asks it to end
               000001.released   it has ended
               000002.json       the next driver

A lease may be taken once it is released, or its holder's process is seen to be gone (on the same machine), or its beat
has stood still for `STALE_SECONDS` by the watch of whoever waits: clocks of two machines are never compared. What a
store cannot forbid, a driver that was asleep and wakes up, is left to the markers that commit rounds.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex

from pydantic import Field, ValidationError

from fedsam_core.errors import StoreError
from fedsam_core.settings import Settings
from fedsam_core.store import Store

RENEW_SECONDS = 2.0
STALE_SECONDS = 15.0


class LeaseHeld(StoreError):
    """Another driver is at work on the run."""


class LeaseLost(StoreError):
    """Another driver has taken the run over."""


class Stopped(KeyboardInterrupt):
    """Somebody asked the run to end. No error: it can be resumed."""


class Holder(Settings):
    """A driver."""

    token: str
    host: str
    pid: int
    started: int = Field(description="of the process, in clock ticks since its machine's start")
    machine: str = Field(description="what tells whether a process number means the same process here")
    since: str


class Lease:
    """A lease that this process holds. `Lease.take`, then `renew`, in the end `release`."""

    def __init__(self, store: Store, run: str, number: int) -> None:
        self.number = number
        self._store = store
        self._run = run
        self._why: BaseException | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def take(cls, store: Store, run: str) -> "Lease":
        """Takes the lease of a run, if need be after `STALE_SECONDS` in which its holder gives no sign.

        Raises:
            LeaseHeld: somebody else has it; who, since when, and what to do.
            StoreError: the store cannot be used.
        """
        number, holder = newest(store, run)
        if holder is not None and not is_over(store, run, number, holder):
            _wait_until_stale(store, run, number, holder)
        mine = _this_process()
        key = _key(run, number + 1, "json")
        if not store.create(key, mine.model_dump_json(indent=1).encode()):
            raise LeaseHeld(_held(store, run, *newest(store, run)))
        return cls(store, run, number + 1)

    def renew(self, on_end: Callable[[BaseException], None]) -> None:
        """From now on tells that this driver lives, in a thread, and calls `on_end` there, once, when it is to end:
        with `Stopped` or `LeaseLost`."""
        self._beat(0)
        self._thread = threading.Thread(target=self._go_on, args=(on_end,), name=f"lease {self._run}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `LeaseLost` or `Stopped` once that is known."""
        if self._why is not None:
            raise self._why

    def look(self) -> None:
        """Looks now; raises as `check`. A store that is away tells nothing."""
        with suppress(StoreError):
            self._look()
        self.check()

    @property
    def is_lost(self) -> bool:
        """Whether another driver has the run now."""
        return isinstance(self._why, LeaseLost)

    def release(self) -> None:
        """This driver has ended. A store that is away will have to see that by the beat."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if not self.is_lost:
            with suppress(StoreError):
                release(self._store, self._run, self.number)

    def _go_on(self, on_end: Callable[[BaseException], None]) -> None:
        count = 1
        while not self._over.wait(RENEW_SECONDS):
            with suppress(StoreError):  # nobody can take the lease either while the store is away
                self._look()
                if self._why is not None:
                    on_end(self._why)
                    return
                self._beat(count)
            count += 1

    def _look(self) -> None:
        names = self._store.list(f"runs/{self._run}/lease/")
        later = _key(self._run, self.number + 1, "json")
        if later in names:
            self._why = LeaseLost(f"run {self._run} was taken over by another driver: {_who(self._store, later)}")
        elif self._why is None and _key(self._run, self.number, "stop") in names:
            self._why = Stopped(f"run {self._run} is stopped, as was asked: `fedsam resume {self._run}` goes on")

    def _beat(self, count: int) -> None:
        beat = json.dumps({"count": count, "time": _now()}).encode()
        self._store.write_bytes(_key(self._run, self.number, "beat"), beat)


def newest(store: Store, run: str) -> tuple[int, Holder | None]:
    """The number of the last lease of a run and who took it; 0 and None before the first."""
    found = [name for name in store.list(f"runs/{run}/lease/") if name.endswith(".json")]
    if not found:
        return 0, None
    try:
        holder = Holder.model_validate_json(store.read_bytes(found[-1]))
    except ValidationError as error:
        raise StoreError(f"{store.url}/{found[-1]} is damaged (no holder of a lease): remove it") from error
    return int(Path(found[-1]).stem), holder


def is_over(store: Store, run: str, number: int, holder: Holder) -> bool:
    """Whether a lease was released, or its holder's process is gone, as far as can be seen from here."""
    return store.exists(_key(run, number, "released")) or _is_gone(holder)


def last_beat(store: Store, run: str, number: int) -> str:
    """When its holder last renewed a lease, as that holder's clock has it; "-" where it never did."""
    with suppress(StoreError, ValueError, KeyError, TypeError):
        return str(json.loads(store.read_bytes(_key(run, number, "beat")))["time"])
    return "-"


def release(store: Store, run: str, number: int) -> None:
    """Notes that the holder has ended; also on behalf of one that was killed."""
    store.write_bytes(_key(run, number, "released"), json.dumps({"time": _now()}).encode())


def ask_to_stop(store: Store, run: str, number: int) -> None:
    """Asks the holder of a lease to end."""
    store.write_bytes(_key(run, number, "stop"), json.dumps({"time": _now()}).encode())


def described(holder: Holder) -> str:
    """In words."""
    return f"process {holder.pid} on {holder.host}, since {holder.since}"


def _wait_until_stale(store: Store, run: str, number: int, holder: Holder) -> None:
    """Returns when the holder has given no sign for `STALE_SECONDS`. Raises LeaseHeld as soon as it gives one."""
    first = _read_beat(store, run, number)
    end = time.monotonic() + STALE_SECONDS
    while time.monotonic() < end:
        time.sleep(RENEW_SECONDS / 4)
        if is_over(store, run, number, holder):
            return
        if _read_beat(store, run, number) != first:
            raise LeaseHeld(_held(store, run, number, holder))


def _held(store: Store, run: str, number: int, holder: Holder | None) -> str:
    who = "another driver" if holder is None else described(holder)
    beat = last_beat(store, run, number)
    return (
        f"run {run} is driven by {who}, last renewed {beat}: stop it with `fedsam stop {run}`; once "
        f"it has given no sign for {STALE_SECONDS:g} s it may be taken over"
    )


def _who(store: Store, key: str) -> str:
    with suppress(StoreError, ValidationError):
        return described(Holder.model_validate_json(store.read_bytes(key)))
    return key


def _read_beat(store: Store, run: str, number: int) -> bytes:
    key = _key(run, number, "beat")
    return store.read_bytes(key) if store.exists(key) else b""


def _is_gone(holder: Holder) -> bool:
    if holder.machine != _machine() or not holder.machine:
        return False
    try:
        state, started = _process(holder.pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return state == "Z" or started != holder.started


def _process(pid: int) -> tuple[str, int]:
    """Its state, and when it was started: fields 3 and 22 of proc_pid_stat(5). Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _this_process() -> Holder:
    machine = _machine()
    return Holder(
        token=token_hex(16),
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_process(os.getpid())[1] if machine else 0,
        machine=machine,
        since=_now(),
    )


def _machine() -> str:
    """The same for all processes that see each other's numbers; "" where the system does not say."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _key(run: str, number: int, kind: str) -> str:
    return f"runs/{run}/lease/{number:06d}.{kind}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
