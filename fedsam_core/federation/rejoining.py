"""How sites that were lost come back, without holding up the others.

A lost site is asked to open again, in the background. A round waits for it once, shortly; from then on it is taken back
in whatever sum finds it there. Only where too few sites are left without it is it waited for longer.
"""

import math
from collections.abc import Callable, Collection
from time import monotonic
from typing import Any

from fedsam_core.federation.attendance import Attendance, Patience
from fedsam_core.federation.engine import Engine

TOO_FEW_SECONDS = 120.0
"""What the others wait, at most, before a sum that cannot be opened without the lost sites."""

Enough = Callable[[Collection[str]], bool]
"""Whether the sites that are there are enough for what is to be done."""

TakeBack = Callable[[str, Any], str]
"""Given a site and what it said when it opened; says why it cannot be taken back, "" if it was."""


class Rejoining:
    """Asks lost sites to open again."""

    def __init__(self, engine: Engine, attendance: Attendance, patience: Patience, take_back: TakeBack) -> None:
        self._engine = engine
        self._attendance = attendance
        self._patience = patience
        self._take_back = take_back
        self._opening: set[str] = set()  # have been asked, and are still at it
        self._waited: set[str] = set()  # have been waited for, and did not come

    def rejoin(self, round_number: int, seconds: float, enough: Enough = lambda present: True) -> None:
        """Takes back whoever is there again.

        Args:
            seconds: to wait for sites that have not been waited for since they were lost.
            enough: while it says no, all are waited for.
        """
        attendance = self._attendance
        too_few = not enough(attendance.present(round_number))
        if too_few:
            attendance.wake()
            seconds = TOO_FEW_SECONDS
        resting = attendance.resting(round_number)
        asked = [site for site in attendance.away if site in self._opening or site not in resting]
        awaited = {site for site in asked if site not in self._waited and site not in resting}
        # Whoever missed a deadline has that time once more: it may be slow, and need not be ended.
        grace = max((min(seconds, self._patience.overdue(site)) for site in awaited), default=0.0)
        self._ask(asked, set() if too_few else awaited, grace, round_number, enough)
        if seconds > 0:
            self._waited |= awaited & set(attendance.away)
            # Whoever was silent for a whole stage, and still is, hangs: only its end can bring it back.
            hung = {site for site in awaited & self._opening if self._patience.overdue(site) < math.inf}
            for site in hung:
                self._engine.restart(site)
            self._ask(attendance.away if too_few else hung, hung, seconds, round_number, enough)

    def _ask(
        self, sites: Collection[str], awaited: Collection[str], seconds: float, round_number: int, enough: Enough
    ) -> None:
        """Asks sites to open; whoever is neither awaited nor needed may answer later."""
        end, waiting = monotonic() + seconds, set(sites)
        while waiting:
            wanted = waiting & set(awaited) or not enough(self._attendance.present(round_number))
            left = max(0.0, end - monotonic()) if wanted else 0.0
            replies, lost = self._engine.poll("open", {site: {} for site in sorted(waiting)}, left)
            for site, reply in replies.items():
                if why := self._take_back(site, reply):
                    lost[site] = why
                else:
                    self._attendance.take_back(site)
                    self._patience.returned(site)
                    self._waited.discard(site)
            for site, why in lost.items():
                self._attendance.lose(site, why)
            waiting -= replies.keys() | lost.keys()
            self._opening = (self._opening | waiting) - replies.keys() - lost.keys()
            if left == 0 and not replies and not lost:
                return
