"""TLS: checks the certificate and the key of the service before it starts."""

import ssl
from pathlib import Path

from retrieval.errors import InputError
from retrieval.system.files import why


def check_certificate(certfile: Path, keyfile: Path | None) -> None:
    """Checks that the service can speak TLS with a certificate and its key.

    Args:
        certfile, keyfile: as of `Settings`.

    Raises:
        InputError: a file cannot be read, is not what it should be, does not belong to the other, or the key
            has a passphrase.
    """
    for path in (certfile, keyfile):
        try:
            if path is not None:
                path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {why(error)}; give a file in PEM.") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password=_refuse)
    except _HasPassphrase as error:
        raise InputError(
            f"The private key in {keyfile or certfile} has a passphrase, which a service cannot type; give "
            "one without, readable by its user alone."
        ) from error
    except ssl.SSLError as error:
        where = f"{certfile} and {keyfile}" if keyfile else str(certfile)
        raise InputError(
            f"{where} are no certificate with its private key in PEM ({error.reason or 'unknown format'}); "
            "give `certfile` and `keyfile` that belong together."
        ) from error


class _HasPassphrase(Exception):
    """The key is encrypted."""


def _refuse() -> str:
    raise _HasPassphrase
