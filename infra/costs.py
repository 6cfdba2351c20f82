"""What a federation of the paper's three cohorts takes and costs on the consortium of infra/terraform.

Every figure is an argument with a default; those of speed and price are assumptions to be replaced by yours:
`python infra/costs.py --help`. Prints the table that docs/cluster.md shows.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Cohort:
    """A cohort of the paper: training cases by site, slices a case (assumed), values that `flap` sends at rank 32."""

    name: str
    train_cases: tuple[int, ...]
    slices: int
    values: int


COHORTS = (
    Cohort("Fed-KiTS19", (9, 11, 9, 9, 12, 24), 216, 1_846_384),
    Cohort("Fed-IXI", (249, 145, 59), 55, 1_712_488),
    Cohort("Prostate MRI", (24, 24, 15, 10, 9, 9), 25, 1_712_488),
)


@dataclass(frozen=True)
class Costs:
    """Hours, gigabytes (10^9 bytes) moved up and down, and dollars of one run."""

    round_seconds: float
    hours: float
    gigabytes: float
    dollars: float


def costs(cohort: Cohort, given: argparse.Namespace) -> Costs:
    """The formulas of docs/cluster.md."""
    sites = len(cohort.train_cases)
    round_seconds = max(cohort.train_cases) * cohort.slices * given.seconds_a_slice + given.seconds_a_sum
    hours = (given.rounds * round_seconds + given.start_seconds) / 3600
    gigabytes = 2 * sites * given.rounds * cohort.values * given.bits / 8 / 1e9
    hourly = sites * given.site_price + given.shared_price
    return Costs(round_seconds, hours, gigabytes, hours * hourly + gigabytes * given.transfer_price)


def parser() -> argparse.ArgumentParser:
    """The assumptions and their defaults."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    number = {"type": float, "metavar": "N"}
    found.add_argument("--rounds", type=int, metavar="N", default=25, help="the paper's")
    found.add_argument("--seconds-a-slice", **number, default=0.01, help="training at 224 px on a site's GPU")
    found.add_argument("--seconds-a-sum", **number, default=5.0, help="keys, masks, sum and checkpoint of a round")
    found.add_argument("--start-seconds", **number, default=900.0, help="from `terraform apply` to the first round")
    found.add_argument("--bits", type=int, metavar="N", default=32, help="federation.bits and broadcast_bits")
    found.add_argument("--site-price", **number, default=1.26, help="USD an hour of a site's machine")
    found.add_argument("--shared-price", **number, default=0.40, help="USD an hour of head, MLflow, database, NAT")
    found.add_argument("--transfer-price", **number, default=0.02, help="USD a GB between zones, both ends")
    return found


def table(given: argparse.Namespace) -> str:
    """Markdown."""
    lines = ["| cohort | sites | s a round | hours | GB moved | USD a run |", "|---|---|---|---|---|---|"]
    for cohort in COHORTS:
        one = costs(cohort, given)
        lines.append(
            f"| {cohort.name} | {len(cohort.train_cases)} | {one.round_seconds:.0f} | {one.hours:.2f} | "
            f"{one.gigabytes:.2f} | {one.dollars:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(parser().parse_args()))
