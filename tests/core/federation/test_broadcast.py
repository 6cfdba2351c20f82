"""The coded step: every decoder gets the same bits, near the entropy, and no bytes crash or flood it."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedsam_core.errors import CheckpointError, ConfigError, TrainingError
from fedsam_core.federation import broadcast
from fedsam_core.federation.broadcast import WIDTHS, decode_step, encode_step
from fedsam_core.federation.coding import BLOCK, Reader, decode_integers, encode_integers

CODED = (
    "4653444e010863b767279b5ea99aae517f7c000000000000e03f010300030301040003545d0f000e1c1f040000000000000000000001000e"
    "1c200c08080c100c141018102014480000448ed193fe6876ea193d69ad9e7a123990d6faa3259163f4fe6876ea39464f5a67a79e44828dff"
    "1f55139bb43569c3c66ffcab899fd8a40d4f1b36fefdf46a6243c74fc771fc741ccf4fc7f1f4741c4f77b8076e6ce0700fcc710f1c2e679c"
    "7186b7edb6ddfefdfdfddfdfdfff6dbb6def7f7f7ffff723b519691378faf8dad8c80ae9cd0178665fbfc3207071ff630f535599379f79f2"
    "3c95d8e85b1173d57d70a2e487e665579733a9a3fec492fd04ee3930714150f31b0dbc25a5d182a90e6b3f6e0b602dff62e5ac098f974d85"
    "2f1b0d6ec464534156c1da064612de0745c9913b50ec4619dc3928df59cabb43f643f888ff87b36a897df03014d6499813fbe3b2eada1728"
    "8017c71fa0af29343e303200d0be3d00047e3c5e7b0b00"
)
PACKED = "4653444e010c75cc27f757ad168f413a90c9000000000000e03f00fe0f000408"

HEADER = 18
"""Bytes before the groups; the last four are their checksum."""


def sizes_of(values: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: group.size for name, group in values.items()}


def with_checksum(data: bytes) -> bytes:
    """As a forger sends it: damaged, but the checksum fits."""
    return data[: HEADER - 4] + struct.pack("<I", zlib.crc32(data[HEADER:])) + data[HEADER:]


def some_step(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    loud = np.repeat(generator.lognormal(0, 1, 20), 100)
    return {
        "lora.B": generator.standard_normal(2000) * loud,
        "head": generator.laplace(size=777),
        "frozen": np.zeros(50),
    }


GENUINE = {bits: encode_step(some_step(), bits) for bits in WIDTHS}
SIZES = sizes_of(some_step())


@pytest.mark.parametrize("bits", WIDTHS)
def test_values_come_back_within_half_a_step_of_their_group_and_zeros_as_zeros(bits: int) -> None:
    step = some_step()
    data = encode_step(step, bits)
    decoded = decode_step(data, sizes_of(step))
    assert list(decoded) == list(step)
    for name, values in step.items():
        scale = np.abs(values).max() / (2 ** (bits - 1) - 1)
        assert decoded[name].dtype == np.float64
        assert np.abs(decoded[name] - values).max() <= 0.5000001 * scale
        np.testing.assert_array_equal(decoded[name], np.rint(values / (scale or 1)) * scale)
    assert len(data) < 2777 * bits / 8
    assert data == encode_step(dict(reversed(step.items())), bits)


def test_a_decoded_step_is_coded_without_further_loss() -> None:
    step = some_step()
    once = decode_step(encode_step(step, 12), sizes_of(step))
    twice = decode_step(encode_step(once, 12), sizes_of(step))
    for name in step:
        np.testing.assert_allclose(twice[name], once[name], rtol=1e-15)


def test_zeros_and_nothing_cost_a_few_bytes() -> None:
    for step in ({"a": np.zeros(1_000_000)}, {"a": np.zeros(0)}, {"a": np.full(10, 1e-300)}):
        data = encode_step(step, 8)
        assert len(data) == HEADER + 8
        np.testing.assert_array_equal(decode_step(data, sizes_of(step))["a"], np.zeros(step["a"].size))
    assert decode_step(encode_step({}, 8), {}) == {}


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    size=st.integers(1, 400),
    seed=st.integers(0, 2**32),
    tail=st.sampled_from([0.5, 1.0, 3.0, 1000.0]),
    exponent=st.integers(-280, 300),
)
@example(bits=8, size=1, seed=0, tail=1.0, exponent=0)
@example(bits=16, size=BLOCK + 1, seed=1, tail=0.5, exponent=0)
def test_any_vector_survives(bits: int, size: int, seed: int, tail: float, exponent: int) -> None:
    x = np.random.default_rng(seed).standard_t(tail, size)
    x *= 10.0**exponent / np.abs(x).max()
    decoded = decode_step(encode_step({"g": x}, bits), {"g": size})["g"]
    assert np.abs(decoded - x).max() <= 0.5000001 * np.abs(x).max() / (2 ** (bits - 1) - 1)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), bits=st.integers(2, 16))
def test_any_integers_survive(data: st.DataObject, bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    values = np.array(data.draw(st.lists(st.integers(-most, most), min_size=1, max_size=200)), dtype=np.int32)
    values = np.repeat(values, data.draw(st.integers(1, 70)))  # many equal ones: few symbols, classes of one
    coded = encode_integers(values, bits)
    reader = Reader(coded)
    np.testing.assert_array_equal(decode_integers(reader, values.size, bits), values)
    reader.end()
    assert len(coded) <= 1 + -(-values.size * bits // 8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("law", ["gauss", "laplace", "t3", "uniform"])
def test_bytes_are_near_the_entropy(law: str, bits: int) -> None:
    generator, n = np.random.default_rng(0), 300_000
    laws = {
        "gauss": generator.standard_normal,
        "laplace": lambda size: generator.laplace(size=size),
        "t3": lambda size: generator.standard_t(3, size),
        "uniform": lambda size: generator.uniform(-1, 1, size),
    }
    x = laws[law](n)
    data = encode_step({"g": x}, bits)
    # The entropy of the density, less the bits that a step stands for: a histogram of 16 bits would be too sparse.
    entropies = {"gauss": 0.5 * np.log2(2 * np.pi * np.e), "laplace": np.log2(2 * np.e), "t3": 2.55695, "uniform": 1.0}
    fine = entropies[law] - np.log2(np.abs(x).max() / (2 ** (bits - 1) - 1))
    if fine < 6:  # the step is no longer small against the density
        counts = np.unique(np.rint(x / (np.abs(x).max() / (2 ** (bits - 1) - 1))), return_counts=True)[1]
        fine = np.sum(counts * np.log2(n / counts)) / n
    assert 8 * len(data) / n == pytest.approx(fine, abs=0.012)
    assert len(data) <= HEADER + 9 + -(-n * bits // 8)


def test_loud_and_quiet_layers_in_one_group_are_coded_by_their_own_loudness() -> None:
    loudness = np.repeat([1.0, 0.01, 0.1, 0.001], 25_000)
    x = np.random.default_rng(0).standard_normal(100_000) * loudness
    shuffled = np.random.default_rng(1).permutation(x)
    assert len(encode_step({"g": x}, 12)) < 0.85 * len(encode_step({"g": shuffled}, 12))


def test_a_group_of_several_pieces_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).laplace(size=1000)
    whole = decode_step(encode_step({"g": x}, 8), {"g": 1000})["g"]
    monkeypatch.setattr(broadcast, "_PIECE", 300)
    np.testing.assert_array_equal(decode_step(encode_step({"g": x}, 8), {"g": 1000})["g"], whole)


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"federation\.broadcast_bits=10"):
        encode_step({"a": np.ones(3)}, 10)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(TrainingError, match="step for a holds NaN"):
            encode_step({"a": np.array([1.0, bad])}, 8)


def test_a_message_for_others_is_refused() -> None:
    data = encode_step({"a": np.ones(3), "b": np.ones(4)}, 8)
    for sizes in ({"a": 3}, {"a": 4, "b": 3}, {"a": 3, "c": 4}, {"a": 3, "b": 4, "c": 1}, {}):
        with pytest.raises(CheckpointError, match="other groups"):
            decode_step(data, sizes)
    with pytest.raises(CheckpointError, match="no broadcast step"):
        decode_step(b"XXXX" + data[4:], {"a": 3, "b": 4})
    with pytest.raises(CheckpointError, match="version 1"):
        decode_step(data[:4] + b"\2" + data[5:], {"a": 3, "b": 4})
    with pytest.raises(CheckpointError, match="10 bits"):
        decode_step(data[:5] + b"\n" + data[6:], {"a": 3, "b": 4})


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, 1e-320, 1e308])
def test_a_scale_that_no_encoder_writes_is_refused(scale: float) -> None:
    data = encode_step({"a": np.ones(3)}, 8)
    forged = with_checksum(data[:HEADER] + struct.pack("<d", scale) + data[HEADER + 8 :])
    with pytest.raises(CheckpointError, match="scale"):
        decode_step(forged, {"a": 3})


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_truncation_and_every_trailing_byte_is_refused(bits: int) -> None:
    data, sizes = GENUINE[bits], SIZES
    for stop in range(len(data)):
        with pytest.raises(CheckpointError):
            decode_step(data[:stop], sizes)
        if stop >= HEADER and (stop < 300 or stop % 7 == 0):
            with pytest.raises(CheckpointError):
                decode_step(with_checksum(data[:stop]), sizes)
    for extra in (b"\0", b"\1", bytes(1000)):
        with pytest.raises(CheckpointError):
            decode_step(data + extra, sizes)
        with pytest.raises(CheckpointError, match="too many"):
            decode_step(with_checksum(data + extra), sizes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_flipped_bit_is_found(bits: int) -> None:
    step = {"a": some_step()["head"][:100], "b": np.ones(3)}
    data = encode_step(step, bits)
    for at in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(CheckpointError):
            decode_step(bytes(flipped), sizes_of(step))


def decodes_or_refuses(data: bytes, sizes: dict[str, int]) -> None:
    try:
        decoded = decode_step(data, sizes)
    except CheckpointError:
        return
    assert {name: values.size for name, values in decoded.items()} == sizes
    assert all(np.isfinite(values).all() for values in decoded.values())


@settings(max_examples=300, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6),
    near_the_front=st.booleans(),
)
def test_a_forgers_changes_are_refused_or_are_another_step(
    bits: int, changes: list[tuple[int, int]], near_the_front: bool
) -> None:
    data = bytearray(GENUINE[bits])
    for at, change in changes:
        data[HEADER + at % (150 if near_the_front else len(data) - HEADER)] ^= change
    decodes_or_refuses(with_checksum(bytes(data)), SIZES)


@settings(max_examples=500, deadline=None)
@given(body=st.binary(max_size=300), bits=st.sampled_from(WIDTHS), size=st.integers(0, 300), mantissa=st.integers(0, 7))
def test_random_bytes_never_crash(body: bytes, bits: int, size: int, mantissa: int) -> None:
    decodes_or_refuses(body, {"g": size})
    front = encode_step({"g": np.zeros(size)}, bits)[:HEADER]
    decodes_or_refuses(with_checksum(front + body), {"g": size})
    decodes_or_refuses(with_checksum(front + struct.pack("<dB", 0.5, mantissa) + body), {"g": size})


def test_huge_counts_do_not_allocate() -> None:
    front = encode_step({"g": np.zeros(100)}, 8)[:HEADER] + struct.pack("<dB", 0.5, 3)
    huge = b"\xff\xff\xff\xff\x03"
    for body in (huge * 20, b"\1\0\1\2" + b"\0\1" + b"\x64" + huge, b"\x40" + huge * 9, b"\1\0\1\2\0\1\x64" + huge):
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            decode_step(with_checksum(front + body), {"g": 100})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()


def test_the_format_does_not_change_unseen() -> None:
    """Bytes written once must decode to the same for ever, or the version must rise."""
    i = np.arange(512)
    coded = (i * 7919 % 64 - 32) ** 3 // np.where(i // 128 % 2, 260, 20000)
    coded[0] = 127
    packed = np.array([2047, -2047, 5])
    for values, bits, kept in ((coded, 8, CODED), (packed, 12, PACKED)):
        scale = 0.5
        decoded = decode_step(bytes.fromhex(kept), {"g": values.size})["g"]
        np.testing.assert_array_equal(decoded, values * scale)
        assert len(encode_step({"g": values * scale}, bits)) <= len(kept) // 2
