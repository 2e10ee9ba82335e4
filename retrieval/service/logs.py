"""The log of the service: lines on standard error, without a name or a path of a person."""

import logging
import sys


def log_to_standard_error() -> None:
    """Sends the log of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("faceprint", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if name == "faceprint" else logging.WARNING)
        logger.propagate = False
