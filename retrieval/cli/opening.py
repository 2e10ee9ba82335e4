"""Opens what commands work on: a gallery, or the modules of `training`."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from retrieval.errors import InputError, MissingDependency
from retrieval.system.places import Place

if TYPE_CHECKING:
    from retrieval.gallery.gallery import Gallery


# The environment variable with the token of a service: other users of a machine see the arguments of a program.
TOKEN_VARIABLE: Final = "FACEPRINT_TOKEN"


def require_folder(gallery: Place, instead: str) -> Path:
    """Returns the folder of a gallery, for what needs its files.

    Args:
        gallery: as it was given.
        instead: what to do with one in databases, as the second half of a sentence.

    Raises:
        GalleryError: the gallery is in databases.
    """
    if gallery.folder is not None:
        return gallery.folder
    from retrieval.storage.vault import needs_folder

    raise needs_folder(str(gallery), instead)


def import_galleries() -> None:
    """Imports what galleries take, if that is not there yet, without Python's garbage collector."""
    if "retrieval.gallery.gallery" not in sys.modules:
        from retrieval.system.garbage import lasting

        with lasting():
            import_module("retrieval.gallery.gallery")


def open_gallery(
    place: Place, command: str, *, device: str = "auto", precision: str = "float32"
) -> "Gallery":
    """Opens a gallery, read-only where its folder is not writable."""
    import_galleries()
    from retrieval.gallery.gallery import Gallery

    folder, via = place.folder, f"faceprint {command}"
    read_only = folder is not None and folder.is_dir() and not os.access(folder, os.W_OK)
    return Gallery.open(place, device=device, precision=precision, read_only=read_only, via=via)


def open_or_create(
    place: Place,
    model: Path | None,
    command: str,
    *,
    vectors: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    share: str | None = None,
) -> "Gallery":
    """Opens a gallery, or creates it where there is none; with `share` a new one is readable by its group.

    Raises:
        InputError: `share` or `vectors` is given and the gallery exists, or there is no gallery and no `model`.
    """
    import_galleries()
    from retrieval.errors import GalleryError
    from retrieval.gallery.creation import is_free
    from retrieval.gallery.gallery import Gallery
    from retrieval.models.bundle import ModelBundle
    from retrieval.models.embedder import Embedder

    free = is_free(place)
    if share is not None and not free:
        raise InputError(
            f"{place} is there already; open it to its group with `chmod -R g+rX {place}` and "
            f"`chmod g+s {place}`."
        )
    if vectors is not None and not free:
        raise InputError(f"{place} is there already, and states where its vectors are; leave `vectors` out.")
    if free and model is None:
        raise InputError(f"There is no gallery {place}; pass --model MODEL to make one.")
    if free and model is not None:
        bundle = ModelBundle.load(model)
        # Opened first: a model that does not run would leave a gallery that refuses every other model.
        embedder = Embedder.open(bundle, device=device, precision=precision)
        # Another process may create the gallery between the check and `create`: then it is opened.
        try:
            via = f"faceprint {command}"
            return Gallery.create(
                place,
                bundle,
                vectors=vectors,
                device=device,
                precision=precision,
                via=via,
                shared=share is not None,
                embedder=embedder,
            )
        except BaseException as error:
            embedder.close()
            if not isinstance(error, GalleryError) or is_free(place):
                raise
    gallery = open_gallery(place, command, device=device, precision=precision)
    if model is not None:
        gallery.require(ModelBundle.load(model))
    return gallery


def training_module(module: str) -> Any:
    """Imports a module of `training`, which needs torch and the packages of the report.

    Raises:
        MissingDependency: one of them is not installed.
    """
    try:
        return import_module(f"training.{module}")
    except ImportError as error:
        raise MissingDependency(
            f"This command needs {error.name or 'torch'}; install it with pip install 'faceprint[train]'."
        ) from error
