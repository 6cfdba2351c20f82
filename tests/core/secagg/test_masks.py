"""Masks: the AES-CTR stream, independent of how it is cut up, and nothing of the vector left to see."""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from fedsam_core.secagg.keys import Secret, pair_mask_key, self_mask_key
from fedsam_core.secagg.masks import PIECE, apply_masks

KEYS = [bytes([i]) * 32 for i in range(4)]


def stream_by_hand(key: bytes, count: int) -> np.ndarray:
    """Counter mode from single blocks: encrypt 0, 1, 2 ... as big-endian 128-bit numbers."""
    encryptor = Cipher(AES(key), ECB()).encryptor()
    blocks = -(-count // 4)
    return np.frombuffer(encryptor.update(b"".join(i.to_bytes(16, "big") for i in range(blocks))), "<u4")[:count]


def test_masks_are_the_counter_mode_stream_and_wrap_around():
    size = PIECE + 3
    vector = np.arange(size, dtype=np.uint32) * np.uint32(2654435761)
    masked = vector.copy()
    apply_masks(masked, [Secret(KEYS[0]), Secret(KEYS[1])], [Secret(KEYS[2])])
    streams = [stream_by_hand(key, size).astype(np.int64) for key in KEYS]
    expected = (vector.astype(np.int64) + streams[0] + streams[1] - streams[2]) % 2**32
    np.testing.assert_array_equal(masked, expected.astype(np.uint32))
    apply_masks(masked, [Secret(KEYS[2])], [Secret(KEYS[0]), Secret(KEYS[1])])
    np.testing.assert_array_equal(masked, vector)


def masked_inputs(consortium, size: int, attempt_number: int, vector: np.ndarray) -> dict[str, np.ndarray]:
    parties = consortium(4, size=size, attempt_number=attempt_number, seed=f"a{attempt_number}")
    parties.vectors = dict.fromkeys(parties.sites, vector)
    parties.run(until="masked")
    return {site: np.frombuffer(data[48:-64], "<u4") for site, data in parties.sent["masked"].items()}


def test_masked_vectors_of_a_fixed_input_look_uniform_and_share_nothing(consortium):
    """Entropy is fixed here, so these figures never change; the critical values are those of p = 1e-6."""
    size = 50_000
    vector = (np.arange(size) % 97 - 48).astype(np.int32).view(np.uint32)
    first = masked_inputs(consortium, size, 0, vector)
    second = masked_inputs(consortium, size, 1, vector)
    views = [*first.values(), *second.values()]
    views += [views[0] - views[1], views[0] - views[4], views[3] - views[7]]  # differences of sites and of attempts
    for values in views:
        counts = np.bincount(values.view(np.uint8), minlength=256)
        expected = 4 * size / 256
        assert ((counts - expected) ** 2 / expected).sum() < 377  # chi-square, 255 degrees of freedom, p = 1e-6
    for i, a in enumerate(views[:8]):
        assert abs(np.corrcoef(a, vector.view(np.int32))[0, 1]) < 5 / np.sqrt(size)
        for b in views[i + 1 : 8]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(size)
            assert (a == b).mean() < 1e-3


def test_a_server_that_knows_all_pair_masks_still_meets_the_self_mask(consortium):
    """A vector that comes after its site was declared lost, and its mask key rebuilt, must stay hidden."""
    size = 4096
    parties = consortium(3, size=size)
    parties.vectors = dict.fromkeys(parties.sites, np.zeros(size, np.uint32))
    parties.run(until="share")
    parties.broadcast["share"] = parties.close("share")
    session, context = parties.sessions["site1"], parties.attempt.digest()
    pairs = {
        peer: pair_mask_key(session._mask_secret, 1, peer, session._peers[peer].mask_key, context) for peer in (0, 2)
    }
    own = self_mask_key(session._seed, 1, context)
    masked = np.frombuffer(parties.call("masked", "site1", parties.broadcast["share"])[48:-64], "<u4").copy()
    apply_masks(masked, plus=[pairs[0]], minus=[pairs[2]])
    assert (masked == 0).mean() < 0.01
    apply_masks(masked, plus=[], minus=[own])
    assert not masked.any()


def test_attempts_differ_even_if_a_site_drew_the_same_secrets(consortium):
    """The attempt's digest salts every key, so a broken source of entropy does not make masks repeat at once."""
    vector = np.zeros(256, np.uint32)
    views = []
    for number in (0, 1):
        parties = consortium(3, size=256, attempt_number=number)
        parties.vectors = dict.fromkeys(parties.sites, vector)
        parties.run(until="masked")
        views.append(np.frombuffer(parties.sent["masked"]["site0"][48:-64], "<u4"))
    assert (views[0] != views[1]).mean() > 0.99
