"""Opens what commands work on: a gallery, or the modules of `training`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from retrieval.errors import InputError, MissingDependency

if TYPE_CHECKING:
    from retrieval.gallery.gallery import Gallery


# The environment variable with the token of a service: other users of a machine see the arguments of a program.
TOKEN_VARIABLE: Final = "FACEPRINT_TOKEN"


def service_address(gallery: Path) -> str | None:
    """Returns the address of a service, where that is given in place of a gallery's folder; else None.

    A path of an address has one slash where the address has two: `Path("http://host")` is `http:/host`.
    """
    scheme, *rest = gallery.parts or ("",)
    if scheme not in ("http:", "https:") or not rest or gallery.exists():
        return None
    return f"{scheme}//{'/'.join(rest)}"


def open_gallery(
    folder: Path, command: str, *, device: str = "auto", precision: str = "float32"
) -> "Gallery":
    """Opens a gallery, read-only where its folder is not writable."""
    from retrieval.gallery.gallery import Gallery

    read_only = folder.is_dir() and not os.access(folder, os.W_OK)
    via = f"faceprint {command}"
    return Gallery.open(folder, device=device, precision=precision, read_only=read_only, via=via)


def open_or_create(
    folder: Path,
    model: Path | None,
    command: str,
    *,
    device: str = "auto",
    precision: str = "float32",
    share: str | None = None,
) -> "Gallery":
    """Opens a gallery, or creates it where there is none; with `share` a new one is readable by its group.

    Raises:
        InputError: `share` is given and the gallery exists, or there is no gallery and no `model`.
    """
    from retrieval.errors import GalleryError
    from retrieval.gallery.gallery import Gallery
    from retrieval.models.bundle import ModelBundle
    from retrieval.models.embedder import Embedder
    from retrieval.system.files import is_free

    free = is_free(folder)
    if share is not None and not free:
        raise InputError(
            f"{folder} is there already; open it to its group with `chmod -R g+rX {folder}` and "
            f"`chmod g+s {folder}`."
        )
    if free and model is None:
        raise InputError(f"There is no gallery {folder}; pass --model MODEL to make one.")
    if free and model is not None:
        bundle = ModelBundle.load(model)
        # Opened first: a model that does not run would leave a gallery that refuses every other model.
        embedder = Embedder.open(bundle, device=device, precision=precision)
        # Another process may create the gallery between the check and `create`: then it is opened.
        try:
            via = f"faceprint {command}"
            return Gallery.create(
                folder,
                bundle,
                device=device,
                precision=precision,
                via=via,
                shared=share is not None,
                embedder=embedder,
            )
        except BaseException as error:
            embedder.close()
            if not isinstance(error, GalleryError):
                raise
    gallery = open_gallery(folder, command, device=device, precision=precision)
    if model is not None:
        gallery.require(ModelBundle.load(model))
    return gallery


def training_module(module: str) -> Any:
    """Imports a module of `training`, which needs torch and the packages of the report.

    Raises:
        MissingDependency: one of them is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"training.{module}")
    except ImportError as error:
        raise MissingDependency(
            f"This command needs {error.name or 'torch'}; install it with pip install 'faceprint[train]'."
        ) from error
