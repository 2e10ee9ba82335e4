"""The active model of an open gallery: the model that its tables name, reloaded after a switch."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from retrieval.database.reader import Reader
from retrieval.database.records import Generation
from retrieval.errors import ModelMismatch
from retrieval.images.photo_reader import PhotoReader
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder, may_use_gpu
from retrieval.models.engine import PrecisionDrift
from retrieval.storage.any_vault import AnyVault

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Active:
    generation: Generation
    bundle: ModelBundle


class ActiveModel:
    """The model that answers searches, loaded on first use. Safe to share between threads.

    Args:
        vault: the gallery's.
        device, engine, precision: see `Embedder.open`.

    Raises:
        BundleError, ModelMismatch: the model is missing, damaged or another one.
    """

    def __init__(self, vault: AnyVault, *, device: str, engine: str, precision: str) -> None:
        self.vault = vault
        self.device = device
        self.engine = engine
        self.precision = precision
        self._embedder: Embedder | None = None
        self._reader: tuple[str, PhotoReader] | None = None
        self._reading = threading.Lock()
        self._loading = threading.Lock()
        with vault.store.read() as reader:
            generation = vault.serving(reader)
            self._active = _Active(generation, vault.bundle(reader, generation))

    @classmethod
    def of(cls, vault: AnyVault, *, device: str, engine: str, precision: str) -> "ActiveModel":
        """Returns the active model of a gallery that was just opened; on an error, the gallery is closed.

        Raises:
            BundleError, ModelMismatch: the model is missing, damaged or another one.
        """
        try:
            return cls(vault, device=device, engine=engine, precision=precision)
        except BaseException:
            vault.close()
            raise

    def open_other(self, bundle: ModelBundle) -> Embedder:
        """Loads another model on the same device, with the same engine, in full precision."""
        return Embedder.open(bundle, device=self.device, engine=self.engine)

    def reopening(self, open_gallery: Callable[..., _T]) -> tuple[Callable[[str], _T], tuple[str]]:
        """Returns what pickles an open gallery: a function that opens it again, and its argument.

        Raises:
            InputError: the gallery is closed.
        """
        self.vault.store.check_open()
        options: dict[str, Any] = {"device": self.device, "engine": self.engine, "precision": self.precision}
        vault = self.vault
        options |= {"vectors": vault.vectors_address, "read_only": vault.read_only, "via": vault.via}
        reopen = partial(open_gallery, **options)
        return reopen, (self.vault.place,)

    def close(self) -> None:
        """Closes the loaded model, and ends the threads and processes of its engine."""
        with self._loading:
            if self._embedder is not None:
                self._embedder.close()

    @property
    def bundle(self) -> ModelBundle:
        """The active model as of the last call of `refresh`, or of the opening."""
        return self._active.bundle

    def require(self, bundle: ModelBundle) -> None:
        """Raises a ModelMismatch unless a bundle is the active model; see `Gallery.require`."""
        if bundle.fingerprint != self.bundle.fingerprint:
            raise ModelMismatch(
                f"The gallery {self.vault.name} was made with another model (fingerprint "
                f"{self.bundle.fingerprint[:12]}, not {bundle.fingerprint[:12]}); "
                "leave `model` out, or enroll into a new gallery."
            )

    @property
    def may_use_gpu(self) -> bool:
        """Whether photos may be embedded on a GPU; an estimate, made without loading the model."""
        return may_use_gpu(self.bundle, self.device, self.engine)

    @property
    def drift(self) -> PrecisionDrift | None:
        """How far distances drift because of the precision; None if they do not, or before it is measured."""
        return None if self._embedder is None else self._embedder.drift

    def loaded(self) -> tuple[int, Embedder]:
        """Returns the number of the active generation as of the last `refresh`, and its loaded model."""
        self.vault.store.check_open()
        with self._loading:
            if self._embedder is None:
                self._embedder = Embedder.open(
                    self.bundle, device=self.device, engine=self.engine, precision=self.precision
                )
            return self._active.generation.id, self._embedder

    def photo_reader(self) -> PhotoReader:
        """Returns the photo reader of the active model as of the last `refresh`; does not load the model.

        Raises:
            BundleError, StorageError: as `ModelBundle.load_photo_reader`.
        """
        bundle = self.bundle
        with self._reading:
            if self._reader is None or self._reader[0] != bundle.fingerprint:
                self._reader = bundle.fingerprint, bundle.load_photo_reader()
            return self._reader[1]

    def adopt(self, embedder: Embedder, fingerprint: str) -> None:
        """Takes over a model that the caller has loaded; closes it if another one is active or loaded."""
        with self._loading:
            if self._embedder is None and fingerprint == self._active.bundle.fingerprint:
                self._embedder = embedder
                return
        embedder.close()

    def refresh(self, reader: Reader) -> Generation:
        """Makes the model of a snapshot the active one here, and returns its generation."""
        generation = self.vault.state(reader).generation
        with self._loading:
            if generation != self._active.generation:
                before, self._active = (
                    self._active,
                    _Active(generation, self.vault.bundle(reader, generation)),
                )
                if before.bundle.fingerprint != self._active.bundle.fingerprint:
                    self._embedder = None
        return generation

    def current(self) -> Generation:
        """Refreshes the active model from a new snapshot; returns its generation."""
        with self.vault.store.read() as reader:
            return self.refresh(reader)

    def switched(self) -> ModelMismatch:
        """Returns the error for photos that were prepared for a model that is no longer active."""
        return ModelMismatch(
            f"The gallery {self.vault.name} switched models meanwhile; run the same command again."
        )
