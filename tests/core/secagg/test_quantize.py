"""Integers for real values: within the bound, unbiased, never wrapped, never saturated."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg import Encoder, Lane, VectorLayout, decode_sum, encode
from fedsam_core.secagg.layout import RINGS
from fedsam_core.secagg.packing import add_packed, pack, packed_bytes, reduce, unpack
from fedsam_core.secagg.refusals import MalformedMessage, UnfitValues

LAYOUT = VectorLayout((Lane("weights", 1000, 0.25), Lane("count", 1, 5000.0)), max_sites=6)


def values_of(seed: int, layout: VectorLayout = LAYOUT) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {lane.name: generator.uniform(-lane.clip, lane.clip, lane.size) for lane in layout.lanes}


@pytest.mark.parametrize("contributors", [1, 3, 6])
def test_sum_is_within_the_bound_of_the_float64_sum(contributors):
    inputs = [values_of(i) for i in range(contributors)]
    total = np.zeros(LAYOUT.size, np.uint32)
    for i, values in enumerate(inputs):
        total += encode(LAYOUT, values, seed=i)
    decoded = decode_sum(LAYOUT, total, range(contributors))
    for lane in LAYOUT.lanes:
        error = np.abs(decoded[lane.name] - sum(values[lane.name] for values in inputs)).max()
        bound = LAYOUT.error_bound(lane.name, contributors)
        assert decoded[lane.name].dtype == np.float64
        assert 0 < error <= bound
        assert bound <= contributors * lane.clip * 6 / 2**30.9  # 31 - log2(6) bits of magnitude


@pytest.mark.parametrize("bits", RINGS)
@pytest.mark.parametrize("max_sites", [1, 3, 6, 7, 100])
@pytest.mark.parametrize("sign", [-1, 1])
def test_all_sites_at_the_clip_do_not_overflow(max_sites, sign, bits):
    max_sites = min(max_sites, 63 if bits == 8 else 100)  # what 8 bits have room for
    for clip in (1.0, 0.1, 1 / 3, 1e-6, 12345.678):
        layout = VectorLayout((Lane("a", 4, clip, bits),), max_sites)
        total = np.zeros(4, np.uint32)
        for site in range(max_sites):
            add_packed(layout, total, pack(layout, encode(layout, {"a": np.full(4, sign * clip)}, seed=site)))
        decoded = decode_sum(layout, total, range(max_sites))["a"]
        np.testing.assert_allclose(decoded, sign * clip * max_sites, rtol=0, atol=layout.error_bound("a", max_sites))


@settings(max_examples=100, deadline=None)
@given(
    bits=st.sampled_from(RINGS),
    clip=st.floats(1e-6, 1e6),
    max_sites=st.integers(1, 200),
    fractions=st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_value_within_the_clip_survives(bits, clip, max_sites, fractions, seed):
    assume((2 ** (bits - 1) - 1) // max_sites >= 2)  # or the ring has no room
    layout = VectorLayout((Lane("a", len(fractions), clip, bits),), max_sites)
    x = np.array(fractions) * clip
    total = np.zeros(layout.size, np.uint32)
    for site in range(max_sites):
        add_packed(layout, total, pack(layout, encode(layout, {"a": x}, seed + site)))
    decoded = decode_sum(layout, total, range(max_sites))["a"]
    # The oracle's own rounding: a sum of n equal float64 values.
    slack = max_sites * clip * 2.0**-52
    assert np.abs(decoded - max_sites * x).max() <= layout.error_bound("a", max_sites) + slack


@settings(max_examples=100, deadline=None)
@given(bits=st.sampled_from(RINGS), max_sites=st.integers(1, 2**14), clip=st.floats(1e-6, 1e6))
def test_the_ring_has_room_for_all_sites_or_the_layout_is_refused(bits, max_sites, clip):
    lane = Lane("a", 1, clip, bits)
    try:
        layout = VectorLayout((lane,), max_sites)
    except UnfitValues:
        assert (2 ** (bits - 1) - 1) // max_sites < 2
        return
    assert max_sites * (layout.levels(lane) + 1) <= 2 ** (bits - 1) - 1
    assert layout.levels(lane) >= 1


def test_rounding_reports_the_error_that_it_made():
    for bits in RINGS:
        layout = VectorLayout((Lane("a", 70_000, 0.25, bits),), 3)
        x = np.random.default_rng(bits).uniform(-0.25, 0.25, 70_000)
        encoder = Encoder(layout, 5)
        rounding = encoder.put("a", x)
        error = decode_sum(layout, encoder.vector(), ["one"])["a"] - x
        # float64 on both sides: what 32 bits round away is small enough to show it
        np.testing.assert_allclose(rounding.largest, np.abs(error).max(), rtol=1e-5)
        np.testing.assert_allclose(rounding.mean_square, (error**2).mean(), rtol=1e-5)
        assert rounding.largest < layout.step(layout.lanes[0])
        with pytest.raises(UnfitValues, match="given twice"):
            encoder.put("a", x)


@settings(max_examples=60, deadline=None)
@given(
    lanes=st.lists(st.tuples(st.sampled_from(RINGS), st.integers(1, 9)), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_packing_keeps_the_low_bits_and_no_more(lanes, seed):
    layout = VectorLayout(tuple(Lane(str(i), size, 1.0, bits) for i, (bits, size) in enumerate(lanes)), 3)
    vector = np.random.default_rng(seed).integers(0, 2**32, layout.size, dtype=np.uint32)
    packed = pack(layout, vector)
    assert packed.size == packed_bytes(layout)
    assert 0 <= packed.size - sum(bits * size / 8 for bits, size in lanes) <= 20 * len(lanes)
    low = vector.copy()
    reduce(layout, low)
    np.testing.assert_array_equal(unpack(layout, packed.tobytes()), low)
    total = np.arange(layout.size, dtype=np.uint32)
    add_packed(layout, total, packed)
    np.testing.assert_array_equal(total, np.arange(layout.size, dtype=np.uint32) + low)
    for cut in (packed[:-1], np.append(packed, np.uint8(0)), packed[:0]):
        with pytest.raises(MalformedMessage, match="bytes came where"):
            add_packed(layout, total, cut)


@pytest.mark.parametrize("bits", RINGS)
@pytest.mark.parametrize("size", [1, 2, 65_535, 65_536, 65_537, 200_001])
def test_packing_of_long_vectors(bits, size):
    layout = VectorLayout((Lane("a", size, 1.0, bits),), 3)
    vector = np.random.default_rng(size).integers(0, 2**bits, size, dtype=np.uint32)
    packed = pack(layout, vector)
    # Another way to write it down: the j-th values of all blocks as one long number, cut into words.
    values, rows = {8: (4, 1), 12: (8, 3), 16: (2, 1), 20: (8, 5), 24: (4, 3), 32: (1, 1)}[bits]
    length = -(-size // values)
    assert packed.size == 4 * rows * length
    words = packed.view("<u4").reshape(rows, length)
    for j in {0, length // 2, length - 1}:
        places = [j + block * length for block in range(values)]
        number = sum(int(vector[at]) << (bits * block) for block, at in enumerate(places) if at < size)
        assert [int(word) for word in words[:, j]] == [(number >> 32 * row) & 0xFFFFFFFF for row in range(rows)]
    np.testing.assert_array_equal(unpack(layout, packed), vector)


def test_bits_that_belong_to_no_value_are_refused_and_leave_no_trace():
    layout = VectorLayout((Lane("a", 3, 1.0), Lane("b", 3, 1.0, 20)), 3)
    packed = pack(layout, np.ones(6, np.uint32))
    total = np.zeros(6, np.uint32)
    used = pack(layout, np.full(6, 2**32 - 1, np.uint32))
    for bit in range(8 * packed.size):
        forged = packed.copy()
        forged[bit // 8] ^= 1 << bit % 8
        if used[bit // 8] & 1 << bit % 8:
            add_packed(layout, total.copy(), forged)
            continue
        with pytest.raises(MalformedMessage, match="belong to no value"):
            add_packed(layout, total, forged)
        assert not total.any()
    assert np.unpackbits(used).sum() == 3 * 32 + 3 * 20


def test_a_layout_survives_being_written_down():
    layout = VectorLayout((Lane("a", 3, 0.1), Lane("b", 3, 2.0, 20, ("x", "y", "z"))), 5, 3)
    assert VectorLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    for broken in ({}, {**layout.to_dict(), "lanes": 5}, {**layout.to_dict(), "lanes": [["a", 1]]}):
        with pytest.raises(UnfitValues, match="malformed"):
            VectorLayout.from_dict(broken)


def test_rounding_is_unbiased_and_keeps_values_on_the_grid():
    size = 200_000
    layout = VectorLayout((Lane("a", size, 1.0),), max_sites=3)
    step = layout.step(layout.lanes[0])
    for fraction in (0.1, 0.5, 0.9):
        x = np.full(size, 10 * step + fraction * step)
        levels = encode(layout, {"a": x}, seed=1).view(np.int32)
        assert set(np.unique(levels)) == {10, 11}
        # 6 standard deviations of a binomial mean
        assert abs(levels.mean() - 10 - fraction) < 6 * np.sqrt(fraction * (1 - fraction) / size)
    assert not encode(layout, {"a": np.zeros(size)}, seed=1).any()


def test_equal_seeds_round_equally_and_others_do_not():
    values = values_of(0)
    np.testing.assert_array_equal(encode(LAYOUT, values, 5), encode(LAYOUT, values, 5))
    assert (encode(LAYOUT, values, 5) != encode(LAYOUT, values, 6)).any()


def test_pinned_encoding():
    """The bits of a rounding must not change between machines and releases, or rounds could not be repeated."""
    layout = VectorLayout((Lane("a", 4, 1.0),), max_sites=1000)
    assert encode(layout, {"a": np.array([0.123456789, -0.5, 1.0, -1.0])}, 42).tolist() == PINNED


PINNED = [265121, 4293893555, 2147482, 4292819814]


def test_values_clipped_as_float32_are_taken():
    layout = VectorLayout((Lane("a", 2, 0.1),), max_sites=3)
    clipped = np.clip(np.array([5.0, -5.0], np.float32), -0.1, 0.1)
    assert float(clipped[0]) > 0.1
    total = sum(encode(layout, {"a": clipped}, s).astype(np.uint64) for s in range(3)).astype(np.uint32)
    np.testing.assert_allclose(decode_sum(layout, total, range(3))["a"], [0.3, -0.3], atol=1e-7)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weights": np.full(1000, 0.2501)}, "weights.*over its clip"),
        ({"weights": np.full(1000, -0.2501)}, "weights.*over its clip"),
        ({"weights": np.r_[np.zeros(999), np.nan]}, "weights.*NaN"),
        ({"weights": np.r_[np.inf, np.zeros(999)]}, "weights.*infinity"),
        ({"weights": np.r_[-np.inf, np.zeros(999)]}, "weights.*infinity"),
        ({"weights": np.zeros(999)}, "weights.*1000"),
        ({"weights": np.zeros(1000, complex)}, "weights.*complex"),
        ({"count": float("nan")}, "count.*NaN"),
        ({"count": 5001}, "count.*over its clip"),
        ({"other": 1.0}, "no lane 'other'"),
    ],
)
def test_bad_values_are_refused_by_lane(change, complaint):
    with pytest.raises(SecureSumError, match=complaint):
        encode(LAYOUT, {**values_of(0), **change}, seed=0)


def test_missing_lane_is_refused():
    with pytest.raises(SecureSumError, match="count"):
        encode(LAYOUT, {"weights": np.zeros(1000)}, seed=0)


def test_a_sum_out_of_reach_is_refused():
    total = np.zeros(LAYOUT.size, np.uint32)
    total[-1] = 3 * (LAYOUT.levels(LAYOUT.lanes[1]) + 1) + 1
    with pytest.raises(SecureSumError, match=r"count.*cannot reach"):
        decode_sum(LAYOUT, total, range(3))
    assert decode_sum(LAYOUT, total, range(4))["count"][0] > 0
    with pytest.raises(SecureSumError, match="7 contributors"):
        decode_sum(LAYOUT, total, range(7))
    with pytest.raises(SecureSumError, match="must be 1001"):
        decode_sum(LAYOUT, total[:-1], range(3))


def test_layouts_have_their_own_hashes_and_refuse_nonsense():
    hashes = {
        layout.hash
        for layout in (
            LAYOUT,
            VectorLayout(LAYOUT.lanes, 7),
            VectorLayout(LAYOUT.lanes[::-1], 6),
            VectorLayout((Lane("weights", 1000, 0.5), LAYOUT.lanes[1]), 6),
            VectorLayout((Lane("weights", 1000, 0.25, 24), LAYOUT.lanes[1]), 6),
            VectorLayout((Lane("weights", 1000, 0.25, sites=("a", "b", "c")), LAYOUT.lanes[1]), 6),
            VectorLayout(LAYOUT.lanes, 6, min_contributors=4),
        )
    }
    assert len(hashes) == 7
    assert VectorLayout(LAYOUT.lanes, 6).hash == LAYOUT.hash
    for broken in (
        lambda: Lane("a", 0, 1.0),
        lambda: Lane("a", 1, 0.0),
        lambda: Lane("a", 1, float("inf")),
        lambda: VectorLayout((Lane("a", 1, 1.0), Lane("a", 2, 1.0)), 3),
        lambda: VectorLayout((Lane("a", 1, 1.0),), 2**31),
        lambda: VectorLayout((), 3),
        lambda: Lane("a", 1, 1.0, bits=18),
        lambda: Lane("a", 1, 1.0, sites=("b", "a")),
        lambda: VectorLayout((Lane("a", 1, 1.0, sites=("a", "b")),), 1),
        lambda: VectorLayout((Lane("a", 1, 1.0, bits=16),), 2**14),
    ):
        with pytest.raises(SecureSumError):
            broken()
