"""The table of costs in docs/cluster.md is what infra/costs.py prints."""

import subprocess
import sys

from support.terraform import ROOT


def printed(*arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "infra/costs.py", *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_documentation_shows_what_the_script_prints():
    assert printed() in (ROOT / "docs/cluster.md").read_text()


def test_bytes_and_prices_follow_the_formulas():
    row = printed("--seconds-a-slice", "0", "--start-seconds", "0", "--seconds-a-sum", "144").splitlines()[2]
    name, sites, round_seconds, hours, gigabytes, dollars = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, sites, round_seconds, hours) == ("Fed-KiTS19", "6", "144", "1.00")
    assert gigabytes == f"{2 * 6 * 25 * 1_846_384 * 4 / 1e9:.2f}"
    assert dollars == f"{6 * 1.26 + 0.40 + 0.02 * 2 * 6 * 25 * 1_846_384 * 4 / 1e9:.2f}"
    assert printed("--bits", "8").splitlines()[2].split("|")[5].strip() == "0.55"
