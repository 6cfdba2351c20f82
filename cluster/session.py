"""The connection of a command to Ray: a cluster that is named, or one of its own."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from fedsam_core.errors import ClusterError


@contextmanager
def ray_session() -> Iterator[None]:
    """Connects to the cluster that RAY_ADDRESS names (a Ray job's own), else to a local one made for this run."""
    address = os.environ.get("RAY_ADDRESS")
    _require_answer(address)
    try:
        # Never "whatever cluster runs on this machine": it may be somebody else's.
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(f"Ray at {address or 'this machine'} cannot be used: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str | None) -> None:
    """Ray itself tries a dead address for minutes; a plain connection tells at once."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): correct the variable, or unset it to start a "
            "local cluster"
        ) from error
