"""The connection of a command to Ray: a cluster that is named, or one of its own."""

import logging
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import ray

from fedsam_core.errors import ClusterError

# A method of Ray's head that changes nothing and, unlike its health check, is closed to whoever lacks the token.
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_ANSWER_SECONDS = 5.0
_OPTIONS = [("grpc.enable_http_proxy", 0)]  # as Ray has it: a token is not shown to proxies


@contextmanager
def ray_session() -> Iterator[None]:
    """Connects to the cluster that RAY_ADDRESS names (a Ray job's own), else to a local one made for this run."""
    address = os.environ.get("RAY_ADDRESS")
    _require_answer(address)
    _require_token(address)
    try:
        # Never "whatever cluster runs on this machine": it may be somebody else's.
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        # It answers, or `_require_answer` had said so, and takes the token.
        fix = ": use the cluster's version of Ray, and its RAY_AUTH_MODE" if address else ""
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


def _require_token(address: str | None) -> None:
    """A cluster that does not take this process's token says so at once; Ray itself keeps knocking for 20 s."""
    if not address or os.environ.get("RAY_AUTH_MODE") == "k8s":  # whose tokens are not for us to find
        return
    token = _token()
    about = [("authorization", f"Bearer {token}")] if token else []
    with _channel(address.removeprefix("ray://")) as channel:
        try:
            channel.unary_unary(_CHECK_ALIVE)(b"", timeout=_ANSWER_SECONDS, metadata=about)
        except grpc.RpcError as error:
            # Anything else is for Ray itself to tell.
            if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.UNAUTHENTICATED:
                has = "does not take this process's token" if token else "wants a token"
                raise ClusterError(
                    f"the Ray cluster at {address} {has}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what "
                    "`ray get-auth-token` prints on the cluster"
                ) from None


def _token() -> str:
    """This process's token, where Ray looks for it; "" for none."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return ""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _channel(address: str) -> grpc.Channel:
    """To Ray's head, encrypted as Ray's own connections are."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address, _OPTIONS)
    files = [os.environ.get(f"RAY_TLS_{name}", "") for name in ("CA_CERT", "SERVER_KEY", "SERVER_CERT")]
    try:
        authority, key, certificate = (Path(name).read_bytes() for name in files)
    except OSError as error:
        raise ClusterError(
            "RAY_USE_TLS is set, but a file of RAY_TLS_CA_CERT, RAY_TLS_SERVER_KEY, RAY_TLS_SERVER_CERT cannot be "
            f"read ({error.filename}: {error.strerror}): `fedsam certs --help` says how they are made"
        ) from error
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate), _OPTIONS)


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
