"""MLflow's pages of a study, driven as a person would, and pictured."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from support.browser import Browser

UNFOLD = '[data-component-id*="runnamecellrenderer"]'  # the sign before the parent's name
_ASSISTANT = '[data-component-id="mlflow.assistant.chat_panel.close"]'
_METRICS = "#dubois-select-2"  # the second list of the plot's settings
_ONLY_DIFFERENCES = "[...document.querySelectorAll('[role=switch]')].forEach(e => e.click())"
_HEADING = "[...document.querySelectorAll('h2, h3, div')].find(e => e.innerText === 'Run details')"


def compare_url(server: str, experiment: str, runs: Sequence[str]) -> str:
    """The page that compares runs, by their MLflow ids."""
    return f"{server}/#/compare-runs?runs={json.dumps(list(runs))}&experiments={json.dumps([experiment])}"


def parallel_coordinates(page: Browser, names: Sequence[str], selections: Collection[str], png: Path) -> None:
    """Pictures the plot with Dice as its last axis. Raises AssertionError if a run or selection is not on the page."""
    page.wait_for([*names, "Parallel Coordinates Plot"])
    page.run("document.querySelector(arguments[0])?.click()", _ASSISTANT)
    page.click(_METRICS)
    page.click('[title="test/dice"]')
    page.wait(lambda text: [word for word in ("selection", "test/dice", *selections) if word not in _axes(page)], 60)
    page.click('[role="tab"][aria-selected="true"]')  # closes the list
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
