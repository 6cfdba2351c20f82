"""A site that fails as it is told, on either engine: the wrapper of a real site, in a module that Ray can import."""

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fedsam_core.federation import memory
from fedsam_core.federation.site import SiteSpec
from fedsam_core.federation.tasks import attempt_from_json
from support.toys import ToySite

FAULTS = ("die before", "die after", "hang", "slow", "raise", "garbage", "corrupt", "nothing", "nan", "disk full")


@dataclass(frozen=True)
class Fault:
    """What befalls a site, once unless it is said otherwise.

    Attributes:
        round: of training in which it does; None for every call of the method.
        method: of the site.
        what: one of `FAULTS`.
        seconds: for "slow".
        lasting: from that round on, and not once.
    """

    site: str
    round: int | None
    method: str
    what: str
    seconds: float = 0.0
    lasting: bool = False


class FaultySite:
    """Calls the methods of a `ToySite`, but for the faults. `real`: it is alone in its process, and ends that."""

    def __init__(self, spec: SiteSpec, faults: Sequence[Fault], folder: Path, real: bool) -> None:
        self._spec = spec
        self._faults = [fault for fault in faults if fault.site == spec.site]
        self._folder = folder  # a mark for each fault that has happened outlives the process
        self._real = real
        self._round = 0
        self.site = ToySite(spec)

    def where(self) -> int:
        """Id of its process."""
        return os.getpid()

    def counted(self) -> int:
        """See `ToySite`."""
        return self.site.counted

    def settle(self, counted: int, round: int) -> None:
        """What a site is told at the beginning of a round, by itself."""
        self.site._site.memory.settle(counted, round)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("__"):
            raise AttributeError(method)

        def call(**keywords: Any) -> Any:
            if method == "advertise":
                self._round = attempt_from_json(keywords["attempt"]).round
            fault = next((f for f in self._faults if f.method == method and self._due(f)), None)
            return self._plain(method, keywords) if fault is None else self._befall(fault, keywords)

        return call

    def _plain(self, method: str, keywords: dict[str, Any]) -> Any:
        return getattr(self.site, method)(**keywords)

    def _due(self, fault: Fault) -> bool:
        if fault.round is None or (fault.lasting and fault.round <= self._round):
            return True
        mark = self._folder / f"{fault.site}-{fault.round}-{fault.method}-{fault.what}"
        if fault.round != self._round or mark.exists():
            return False
        mark.write_text(str(time.time()))
        return True

    def _befall(self, fault: Fault, keywords: dict[str, Any]) -> Any:
        match fault.what:
            case "die before":
                return self._die()
            case "die after":
                self._plain(fault.method, keywords)
                return self._die()
            case "hang":
                time.sleep(3600)
            case "slow":
                time.sleep(fault.seconds)
            case "raise":
                raise ZeroDivisionError("something in the site's code")
            case "garbage":
                self._plain(fault.method, keywords)
                return b"\x00garbage"
            case "nothing":
                self._plain(fault.method, keywords)
                return None
            case "corrupt":
                reply = bytearray(self._plain(fault.method, keywords))
                reply[len(reply) // 2] ^= 1
                return bytes(reply)
            case "nan":
                learner: Any = self.site._site.learner
                fit = learner.fit
                with patch.object(learner, "fit", lambda *args: _with_nan(fit(*args))):
                    return self._plain(fault.method, keywords)
            case "disk full":

                def refuse(path: Path, _: bytes) -> None:
                    raise memory.write_failed(path, OSError(errno.ENOSPC, "No space left on device"))

                with patch.object(memory, "write_atomic", refuse):
                    return self._plain(fault.method, keywords)
        return self._plain(fault.method, keywords)

    def _die(self) -> None:
        if self._real:
            os.kill(os.getpid(), signal.SIGKILL)
        self.site = ToySite(self._spec)  # its memory is gone
        raise RuntimeError("its process died")


def _with_nan(fit: Any) -> Any:
    update = fit.update.copy()
    update[3] = np.nan
    return type(fit)(**{**vars(fit), "update": update})
