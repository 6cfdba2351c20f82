"""What a run sends, in bytes of real messages: every preset x LoRA rule x ring, beside full fine-tuning in fp32.

    python benchmarks/bytes.py --json --keep rows.jsonl                  # all rows; two hours, 17 GB; resumable
    python benchmarks/bytes.py --preset flap --rule rolora --bits 8      # one row
    python benchmarks/bytes.py --preset flap --rule rolora --bits 8 --all-rounds

SAM ViT-B at 224 px, two classes, LoRA rank 32, six sites, 25 rounds. A row runs the federation itself, in one process:
keys, shares, masks, signatures, histograms, probes, the coded broadcast, and a last scoring that brings every site the
result. Only the training is not done: sites draw their updates from a normal distribution. What goes up is masked, so
its length does not depend on the values. What goes down does, and normal values are long to code: at 8 bits they take
6.6 bits each, where steps of real training took 4.0 to 4.8.

Rounds repeat: the first has the histograms of unknown clips, even and odd ones differ under rolora. So two rounds are
run, four of rolora, and bytes of 25 are the first ones' and the last one's, or last two's, as often as they come;
`--all-rounds` runs all 25.
`bits` goes with broadcast_bits 32 for 32, 24 and 20, else with the same. `ratio` is bytes of full fine-tuning in fp32
(the first row) over the row's. Presets without LoRA have one rule.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedsam_core.data.cohort import CohortConfig, read_cohort
from fedsam_core.data.preprocess import PreparedCohort, PreprocessConfig, prepare
from fedsam_core.data.slices import SliceConfig
from fedsam_core.data.sources.phantom import PhantomConfig
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import InProcessEngine
from fedsam_core.federation.groups import tensor_groups
from fedsam_core.federation.lora_rules import trained_kinds
from fedsam_core.federation.rounds import Federation
from fedsam_core.federation.site import FederatedSite, SiteSpec, Trained
from fedsam_core.federation.state import GlobalState
from fedsam_core.hashing import derive_seed
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.learner import Fit
from fedsam_core.sam.adapters import shared_state
from fedsam_core.sam.backbones import ModelConfig
from fedsam_core.selection import PRESETS, preset
from fedsam_core.store import LocalStore

SITES, ROUNDS, CLASSES, RANK, IMAGE = 6, 25, 2, 32, 224
RULES = ("factors", "ffa", "rolora", "product-sketch", "product-dense")
BITS = {32: 32, 24: 32, 20: 32, 16: 16, 12: 12, 8: 8}
"""Ring, and the bits of the broadcast that goes with it."""
BASELINE = ("full", "factors", 32)
_SPREAD = 1e-3  # of a drawn update


class DrawnSite(FederatedSite):
    """A site that draws its updates instead of training, and has no case to score."""

    def _train(self, state: GlobalState) -> Trained:
        site, number = self._site, self._current().round
        draws = np.random.default_rng(derive_seed(self.spec.seed, self.spec.site, number))
        update = np.zeros(site.manifest.shared_size, np.float32)
        for group in tensor_groups(site.manifest, trained_kinds(self.spec.federation, number)).values():
            update[group.index] = _SPREAD * draws.standard_normal(group.index.size, np.float32)
        nothing = np.zeros(len(site.classes))
        return Trained(Fit(update, len(site.learner.dataset), 0.0, nothing, nothing), state.vector.copy(), None)

    def _segment_all(self, split: Any) -> Any:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="a list of rows, else a Markdown table")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--rule", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--all-rounds", action="store_true", help="run all 25")
    parser.add_argument("--keep", type=Path, help="file of finished rows: what it has is not measured again")
    options = parser.parse_args()
    asked = [
        (name, rule, bits)
        for name in options.preset
        for rule in options.rule
        for bits in options.bits
        if rule == "factors" or PRESETS[name].lora is not None
    ]
    kept = read_rows(options.keep, options.all_rounds)
    with TemporaryDirectory() as folder:
        prepared = tiny_cohort(Path(folder))
        # The largest last: they take minutes and 17 GB each.
        missing = [key for key in sorted({*asked, BASELINE}, key=_size) if key not in kept]
        for number, key in enumerate(missing, start=1):
            print(f"{number} of {len(missing)}: {' '.join(map(str, key))}", file=sys.stderr, flush=True)
            kept[key] = measure(prepared, *key, all_rounds=options.all_rounds)
            if options.keep is not None:
                with options.keep.open("a") as rows_file:
                    rows_file.write(json.dumps(kept[key]) + "\n")
    full, rows = kept[BASELINE], [kept[key] for key in asked]
    rows = [row | {"ratio": full["bytes_total"] / row["bytes_total"]} for row in rows]
    print(json.dumps(rows, indent=1) if options.json else table(rows))


def read_rows(file: Path | None, all_rounds: bool) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Rows that were finished before, by what they are of."""
    if file is None or not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {(r["preset"], r["rule"], r["bits"]): r for r in rows if (r["rounds_run"] == ROUNDS) == all_rounds}


def _size(key: tuple[str, str, int]) -> tuple[bool, bool, str]:
    return key[0] == "full", key[0] == "attention", key[0]


def tiny_cohort(folder: Path) -> PreparedCohort:
    """Six sites with scans as small as can be: nothing is trained on them."""
    phantom = PhantomConfig(sites=SITES, cases_per_site=2, test_per_site=1, shape=(8, 16, 16))
    config = CohortConfig(name="phantom", source="phantom", val_fraction=0, phantom=phantom)
    return prepare(read_cohort(config, folder), PreprocessConfig(), LocalStore(folder / "prepared"))


def measure(prepared: PreparedCohort, name: str, rule: str, bits: int, all_rounds: bool) -> dict[str, Any]:
    """One row: bytes of all sites together, up and down, over 25 rounds."""
    config = FederationConfig.model_validate(
        {"rounds": ROUNDS, "validate_every": 0, "rule": rule, "bits": bits, "broadcast_bits": BITS[bits]}
    )
    spec = SiteSpec(
        run="bytes",
        site=prepared.cohort.sites[0],
        sites=prepared.cohort.sites,
        seed=0,
        config_hash="0" * 64,
        cohort=prepared.url,
        model=ModelConfig(backbone="vit_b", image_size=IMAGE),
        selection=preset(name, RANK),
        slices=SliceConfig(augment=False),
        learning=LearningConfig(precision="fp32"),
        federation=config,
        inference_batch=1,
    )
    sites = {site: DrawnSite(spec.model_copy(update={"site": site})) for site in prepared.cohort.sites}
    first = sites[spec.site]
    frozen = first.open()["weights_hash"]
    manifest = first._site.manifest
    federation = Federation(InProcessEngine(sites), spec, manifest, CLASSES, frozen)
    federation.open(shared_state(first._site.learner.segmenter, manifest))
    weight, ledger = federation.total_weight(), federation.ledger
    cycle = 2 if rule == "rolora" else 1  # rounds until one is like an earlier one
    run = range(1, (ROUNDS if all_rounds else 2 * cycle) + 1)
    for number in run:
        federation.train(number, weight)
    federation.score("test", ROUNDS)

    def whole_run(direction: Any) -> int:
        # What goes down in a round is the step of the one before: the last one's comes with the scores.
        sums = [ledger.total(direction, number, "update") + ledger.total(direction, number, "mag") for number in run]
        rest = ledger.total(direction) - sum(sums)
        more = sum(sums[len(run) - cycle + (number - 1) % cycle] for number in range(len(run) + 1, ROUNDS + 1))
        return int(rest + sum(sums) + more)

    up, down = whole_run("up"), whole_run("down")
    return {
        "preset": name,
        "rule": rule,
        "bits": bits,
        "broadcast_bits": BITS[bits],
        "trainable": manifest.trainable,
        "rounds_run": len(run),
        "bytes_up": up,
        "bytes_down": down,
        "bytes_total": up + down,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| preset | rule | bits | up MB | down MB | total MB | less than full |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        size = " | ".join(f"{row[part] / 1e6:,.1f}" for part in ("bytes_up", "bytes_down", "bytes_total"))
        lines.append(f"| {row['preset']} | {row['rule']} | {row['bits']} | {size} | {row['ratio']:.1f}x |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
