"""MLflow's pages of a study, driven as a person would, and pictured."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from support.browser import Browser

UNFOLD = '[data-component-id*="runnamecellrenderer"]'  # the sign before the parent's name
PARAMETERS = ("selection", "seed")
METRICS = ("comm/bytes_total", "test/dice")
_ASSISTANT = '[data-component-id="mlflow.assistant.chat_panel.close"]'
_PARAMETERS = "#dubois-select-1"  # the first list of the plot's settings
_METRICS = "#dubois-select-2"  # the second list of the plot's settings
_CHOSEN = "return document.querySelector(arguments[0]).getAttribute('aria-description').split(', ')"
_ONLY_DIFFERENCES = "[...document.querySelectorAll('[role=switch]')].forEach(e => e.click())"
_HEADING = "[...document.querySelectorAll('h2, h3, div')].find(e => e.innerText === 'Run details')"


def compare_url(server: str, experiment: str, runs: Sequence[str]) -> str:
    """The page that compares runs, by their MLflow ids."""
    return f"{server}/#/compare-runs?runs={json.dumps(list(runs))}&experiments={json.dumps([experiment])}"


def parallel_coordinates(page: Browser, names: Sequence[str], selections: Collection[str], png: Path) -> None:
    """Pictures the plot, with bytes and Dice as its last axes.

    Raises:
        AssertionError: a run or a selection is not on the page.
    """
    page.wait_for([*names, "Parallel Coordinates Plot"])
    page.run("document.querySelector(arguments[0])?.click()", _ASSISTANT)
    for field, wanted in ((_PARAMETERS, PARAMETERS), (_METRICS, METRICS)):
        page.click(field)
        chosen = page.run(_CHOSEN, field)
        for name in [
            *(name for name in chosen if name not in wanted),
            *(name for name in wanted if name not in chosen),
        ]:
            page.write(field, name)  # the list itself shows no more than ten
            page.click(f'[title="{name}"][class*=option]')  # adds it or takes it away, and empties the field
        page.click('[role="tab"][aria-selected="true"]')  # closes the list
    words = [*PARAMETERS, *METRICS, *(selection[:10] for selection in selections)]  # MLflow cuts values on an axis
    page.wait(lambda text: [word for word in words if word not in _axes(page)], 60)
    page.save(png)


def differences(page: Browser, png: Path) -> str:
    """Pictures the table of only the parameters that differ; returns the page's text."""
    page.run(_ONLY_DIFFERENCES)
    table = page.wait(lambda text: ["a table of differences alone"] * ("federation.attempts" in text), 60)
    page.run(f"{_HEADING}.scrollIntoView()")
    page.save(png)
    return table


def _axes(page: Browser) -> list[str]:
    """What is written in the plot."""
    written: list[str] = page.run("return [...document.querySelectorAll('svg text')].map(e => e.textContent)")
    return written
