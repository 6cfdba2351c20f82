"""Hashes and seeds: everything that identifies a configuration, a layout or a random stream."""

import hashlib
import json
from pathlib import Path
from typing import Any


def stable_hash(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`: equal for equal content, whatever the key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed that depends on every part, such as (run seed, "round", 3, "site", "a").

    Parts are hashed with their types and lengths, so ("a", "bc") and ("ab", "c") differ.
    """
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1
