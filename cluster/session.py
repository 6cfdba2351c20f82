"""The connection of a command to Ray: a cluster that is named, or one of its own."""

import logging
import os
import socket
import ssl
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
        # It answers, or `_require_answer` had said so: what keeps a client out is most often its token.
        fix = ": set RAY_AUTH_MODE and RAY_AUTH_TOKEN as on the cluster, and use its version of Ray" if address else ""
        raise ClusterError(f"Ray at {address or 'this machine'} cannot be used ({reason}){fix}") from error
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
        encrypts = _encrypts(host, int(port))
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): correct the variable, or unset it to start a "
            "local cluster"
        ) from error
    if encrypts != (os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")):
        raise ClusterError(
            f"the Ray cluster at {address} {'encrypts (TLS)' if encrypts else 'does not encrypt'}, this process does "
            f"{'not' if encrypts else 'so'}: set RAY_USE_TLS and RAY_TLS_* as on the cluster (`fedsam certs --help`)"
        )


def _encrypts(host: str, port: int) -> bool:
    """Whether a server speaks TLS. Nothing is trusted or sent: Ray itself checks certificates.

    Raises:
        OSError: nobody answers.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, port), timeout=10) as connection:
        try:
            context.wrap_socket(connection).close()
        except ssl.SSLError as error:
            return "ALERT" in (error.reason or "")  # it has understood, and refuses
        except OSError:
            return False  # it hung up, or has nothing to say to that
    return True
