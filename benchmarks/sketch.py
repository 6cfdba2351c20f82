"""The mean of sites' low-rank products by every rule: how far from the best of its rank, and for how many bytes.

    python benchmarks/sketch.py            # Markdown tables, three minutes on a core of its own
    python benchmarks/sketch.py --json     # the same as {"rules": [...], "secure": [...]}

Six sites have factors B_i = (U + h X_i) S^1/2 and A_i = S^1/2 (V + h Y_i)' of one layer: U, V orthonormal columns that
all share (the global state before the round), X_i, Y_i each site's own columns of unit norm, drawn independently, and
S = diag(k^-2), a spectrum as LoRA had it after training vit_t on phantoms (singular values 1, .1, .04, .01 at k = 1, 2,
4, 8). h is the heterogeneity: low, medium, high. Trained sites were at .04 to .6, falling from round to round.

Errors are |found - P|_F / |P|_F against the mean product P, in float64, mean [lowest..highest] over the seeds:

  factors         mean(B) mean(A), what is averaged where each factor is averaged for itself
  optimum         the best of its rank: numpy's SVD of P
  product-dense   from the dense sum
  product-sketch  from sums of sketches with rank + p columns and q power iterations

up and down: values a site sends and gets in the round, relative to those of `factors`. The test matrix is drawn from a
seed by all and costs nothing; down counts the bases and the new factors.

The second table does the same with integers: sites send the change of their products, weighted, rotated where the ring
is narrow, quantised and masked, and bases travel down coded. Each sum is done twice, masked and plain, and "equal" says
in how many of the sums the opened total had the very same bits, and in how many runs the factors had.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from fedsam_core.federation.broadcast import decode_step, encode_step
from fedsam_core.federation.products import (
    Factors,
    Matrix,
    dense,
    from_dense,
    from_sketch,
    orthonormal,
    sketch_left,
    sketch_right,
    test_matrix,
)
from fedsam_core.federation.rotation import Rotation
from fedsam_core.secagg import (
    AggregatorSession,
    Attempt,
    Lane,
    SiteSession,
    VectorLayout,
    decode_sum,
    default_threshold,
    development_roster,
    encode,
)

SEEDS = range(5)
SITES = tuple(f"site-{index}" for index in range(6))
SHAPES = ((768, 768), (256, 128))
RANKS = (8, 32)
HETEROGENEITY = {"low": 0.1, "medium": 0.4, "high": 1.0}
OVERSAMPLING = (0, 4, 8, 16)
POWER = (0, 1, 2)
DECAY = 2.0  # singular values k^-DECAY
BITS = (32, 16, 12, 8)
HEADROOM = 2.0  # clip over the largest value, as federation.clip_headroom has it

# A sum over sites of what each of them makes of its factors: Mean(work) -> the mean of work(factors).
Mean = Callable[[Callable[[Factors], Matrix]], Matrix]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cases = [(shape, rank, name) for shape in SHAPES for rank in RANKS for name in HETEROGENEITY]
    rules = [row for case in cases for row in compare(*case)]
    secure = [row for case in cases for row in compare_secure(*case)]
    if options.json:
        print(json.dumps({"rules": rules, "secure": secure}))
        return
    print_rules(rules)
    print_secure(secure)


def sites_of(shape: tuple[int, int], rank: int, h: float, seed: int) -> tuple[Factors, list[Factors]]:
    """The global factors before the round, and each site's after it."""
    rng = np.random.default_rng([seed, *shape, rank])
    root = np.arange(1, rank + 1) ** (-DECAY / 2)
    u, v = (np.linalg.qr(rng.standard_normal((size, rank))).Q for size in shape)

    def own(common: Matrix) -> Matrix:
        return common + h * rng.standard_normal(common.shape) / np.sqrt(common.shape[0])

    return Factors(u * root, (v * root).T), [Factors(own(u) * root, (own(v) * root).T) for _ in SITES]


def sketched(mean: Mean, inner: int, rank: int, p: int, q: int, seed: int, sent: Callable[[Matrix], Matrix]) -> Factors:
    """The rule `product-sketch`; `sent` is what becomes of a basis on its way down."""
    right = test_matrix(inner, rank + p, seed)
    basis = sent(orthonormal(mean(lambda site: sketch_right(*site, right))))
    for _ in range(q):
        rows = sent(orthonormal(mean(lambda site, basis=basis: sketch_left(basis, *site)).T))
        basis = sent(orthonormal(mean(lambda site, rows=rows: sketch_right(*site, rows))))
    return from_sketch(basis, mean(lambda site: sketch_left(basis, *site)), rank)[0]


def values_sent(shape: tuple[int, int], rank: int, method: str, p: int = 0, q: int = 0) -> tuple[float, float]:
    """Values up and down, relative to those of both factors."""
    out, inner = shape
    factors, width = rank * (out + inner), rank + p
    if method == "product-dense":
        return out * inner / factors, 1.0
    if method == "product-sketch":
        return (1 + q) * width * (out + inner) / factors, 1 + width * (out + q * (out + inner)) / factors
    return 1.0, 1.0


def error(found: Factors, p: Matrix) -> float:
    return float(np.linalg.norm(dense(*found) - p) / np.linalg.norm(p))


def compare(shape: tuple[int, int], rank: int, heterogeneity: str) -> list[dict[str, Any]]:
    """A row for each rule, in float64."""
    errors: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for seed in SEEDS:
        _, sites = sites_of(shape, rank, HETEROGENEITY[heterogeneity], seed)

        def mean(work: Callable[[Factors], Matrix], sites: list[Factors] = sites) -> Matrix:
            return np.mean([work(site) for site in sites], axis=0)

        p = mean(lambda site: site.b @ site.a)
        s = np.linalg.svd(p, compute_uv=False)
        errors["factors", 0, 0].append(error(Factors(mean(lambda site: site.b), mean(lambda site: site.a)), p))
        errors["optimum", 0, 0].append(float(np.linalg.norm(s[rank:]) / np.linalg.norm(s)))
        errors["product-dense", 0, 0].append(error(from_dense(mean(lambda site: dense(*site)), rank)[0], p))
        for over in OVERSAMPLING:
            for power in POWER:
                found = sketched(mean, shape[1], rank, over, power, seed, lambda basis: basis)
                errors["product-sketch", over, power].append(error(found, p))
    optimum = errors["optimum", 0, 0]
    rows = []
    for (method, over, power), found_errors in errors.items():
        up, down = values_sent(shape, rank, method, over, power)
        rows.append(
            {
                "shape": shape,
                "rank": rank,
                "heterogeneity": heterogeneity,
                "rule": method,
                "oversampling": over,
                "power_iterations": power,
                "up": up,
                "down": down,
                "errors": found_errors,
                "over_optimum": float(np.mean(found_errors) / np.mean(optimum)),
            }
        )
    return rows


class SecureMean:
    """Means over sites of changes since the round's start, by masked sums, each checked against the plain sum."""

    def __init__(self, old: Factors, sites: list[Factors], bits: int, seed: int) -> None:
        self.old, self.sites, self.bits, self.seed = old, sites, bits, seed
        self.sums = self.equal = 0
        self.plain: Mean = lambda work: self._mean(work, masked=False)
        self.masked: Mean = lambda work: self._mean(work, masked=True)

    def _mean(self, work: Callable[[Factors], Matrix], masked: bool) -> Matrix:
        before = work(self.old)
        changes = [(work(site) - before).ravel() / len(SITES) for site in self.sites]
        rotation = Rotation(before.size, self.seed) if self.bits <= 16 else None
        if rotation is not None:
            changes = [rotation.forward(change) for change in changes]
        clip = HEADROOM * max(float(np.abs(change).max()) for change in changes)
        layout = VectorLayout((Lane("update", changes[0].size, clip, self.bits),), max_sites=len(SITES))
        vectors = [encode(layout, {"update": change}, seed=index) for index, change in enumerate(changes)]
        total = np.sum(vectors, axis=0, dtype=np.uint32)  # wraps, as the ring does
        if masked:
            opened = masked_sum(layout, vectors)
            spare = np.uint32(32 - self.bits)
            self.sums += 1
            self.equal += int(np.array_equal(opened << spare, total << spare))
            total = opened
        mean = decode_sum(layout, total, SITES)["update"]
        return before + (mean if rotation is None else rotation.inverse(mean)).reshape(before.shape)

    def sent(self, basis: Matrix) -> Matrix:
        """A basis as the sites decode it."""
        if self.bits > 16:
            return basis.astype(np.float32).astype(np.float64)
        message = encode_step({"basis": basis.ravel()}, self.bits)
        return decode_step(message, {"basis": basis.size})["basis"].reshape(basis.shape)


def masked_sum(layout: VectorLayout, vectors: list[Any]) -> Any:
    """The opened sum (uint32), by all stages of the secure sum."""
    attempt = Attempt("bench", 1, 1, layout.hash, "config", "model", SITES, default_threshold(len(SITES)))
    roster, identities = development_roster(SITES)
    aggregator = AggregatorSession(attempt, roster, layout)
    sessions = {name: SiteSession(attempt, name, identities[name], roster, layout) for name in SITES}
    for name, session in sessions.items():
        aggregator.receive_advertise(name, session.advertise())
    advertised = aggregator.advertised()
    for name, session in sessions.items():
        aggregator.receive_share(name, session.share(advertised))
    deliveries = aggregator.deliveries()
    for (name, session), vector in zip(sessions.items(), vectors, strict=True):
        session.deliver(deliveries[name])
        aggregator.receive_masked(name, session.masked_input(vector))
    survivors = aggregator.survivors()
    for name, session in sessions.items():
        aggregator.receive_confirmation(name, session.confirm(survivors))
    confirmations = aggregator.confirmations()
    for name, session in sessions.items():
        aggregator.receive_unmask(name, session.unmask(confirmations))
    total, _ = aggregator.total()
    return total


def compare_secure(shape: tuple[int, int], rank: int, heterogeneity: str) -> list[dict[str, Any]]:
    """A row for each ring and rule, from integers."""

    def by_factors(mean: Mean, _: SecureMean) -> Factors:
        return Factors(mean(lambda site: site.b), mean(lambda site: site.a))

    def by_dense(mean: Mean, _: SecureMean) -> Factors:
        return from_dense(mean(lambda site: dense(*site)), rank)[0]

    def by_sketch(mean: Mean, secure: SecureMean) -> Factors:
        return sketched(mean, shape[1], rank, 8, 0, secure.seed, secure.sent)

    rows = []
    for bits in BITS:
        for method, work in (("factors", by_factors), ("product-dense", by_dense), ("product-sketch", by_sketch)):
            errors, runs, equal, sums, equal_sums = [], 0, 0, 0, 0
            for seed in SEEDS:
                old, sites = sites_of(shape, rank, HETEROGENEITY[heterogeneity], seed)
                secure = SecureMean(old, sites, bits, seed)
                masked, plain = work(secure.masked, secure), work(secure.plain, secure)
                errors.append(error(masked, np.mean([site.b @ site.a for site in sites], axis=0)))
                runs += 1
                equal += all(np.array_equal(one, other) for one, other in zip(masked, plain, strict=True))
                sums += secure.sums
                equal_sums += secure.equal
            rows.append(
                {
                    "shape": shape,
                    "rank": rank,
                    "heterogeneity": heterogeneity,
                    "rule": method,
                    "bits": bits,
                    "errors": errors,
                    "runs": runs,
                    "equal_runs": equal,
                    "sums": sums,
                    "equal_sums": equal_sums,
                }
            )
    return rows


def spread(errors: list[float]) -> str:
    return f"{np.mean(errors):.4f} [{min(errors):.4f}..{max(errors):.4f}]"


def print_rules(rows: list[dict[str, Any]]) -> None:
    levels = " | ".join(f"{name} (h = {h:g})" for name, h in HETEROGENEITY.items())
    for shape in SHAPES:
        for rank in RANKS:
            print(f"\n{shape[0]} x {shape[1]}, rank {rank}\n\n| rule | up | down | {levels} |")
            print("|---|---|---|", "---|" * len(HETEROGENEITY), sep="")
            block = [row for row in rows if row["shape"] == shape and row["rank"] == rank]
            for first in (row for row in block if row["heterogeneity"] == next(iter(HETEROGENEITY))):
                kind = [first[key] for key in ("rule", "oversampling", "power_iterations")]
                name = first["rule"]
                if name == "product-sketch":
                    name += f" p={kind[1]} q={kind[2]}"
                cells = [
                    spread(row["errors"])
                    for row in block
                    if [row[key] for key in ("rule", "oversampling", "power_iterations")] == kind
                ]
                bytes_of = ("", "") if name == "optimum" else (f"{first['up']:.2f}", f"{first['down']:.2f}")
                print(f"| {name} |", " | ".join((*bytes_of, *cells)), "|")


def print_secure(rows: list[dict[str, Any]]) -> None:
    print("\nFrom masked integers, product-sketch with p=8 q=0\n")
    print("| layer | ring | rule |", " | ".join(HETEROGENEITY), "| equal sums | equal runs |")
    print("|---|---|---|", "---|" * len(HETEROGENEITY), "---|---|", sep="")
    blocks: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        blocks[row["shape"], row["rank"], row["bits"], row["rule"]].append(row)
    for (shape, rank, bits, rule), block in blocks.items():
        sums = f"{sum(row['equal_sums'] for row in block)} of {sum(row['sums'] for row in block)}"
        runs = f"{sum(row['equal_runs'] for row in block)} of {sum(row['runs'] for row in block)}"
        cells = " | ".join(spread(row["errors"]) for row in block)
        print(f"| {shape[0]} x {shape[1]}, rank {rank} | {bits} | {rule} | {cells} | {sums} | {runs} |")


if __name__ == "__main__":
    main()
