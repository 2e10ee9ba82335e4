"""The active model of an open gallery: the one that its tables name, reloaded when they change."""

import threading
from dataclasses import dataclass

from retrieval.database.reader import Reader
from retrieval.database.records import Generation
from retrieval.errors import ModelMismatch
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder, may_use_gpu
from retrieval.models.engine import PrecisionDrift
from retrieval.storage.vault import Vault


@dataclass(frozen=True)
class _Active:
    generation: Generation
    bundle: ModelBundle


class ActiveModel:
    """The model that answers searches, loaded when it is first needed. Safe to share between threads.

    Args:
        vault: the gallery's.
        device, engine, precision: see `Embedder.open`.

    Raises:
        BundleError, ModelMismatch: the model is missing, damaged or another one.
    """

    def __init__(self, vault: Vault, *, device: str, engine: str, precision: str) -> None:
        self.vault = vault
        self.device = device
        self.engine = engine
        self.precision = precision
        self._embedder: Embedder | None = None
        self._loading = threading.Lock()
        with vault.store.read() as reader:
            generation = vault.serving(reader)
            self._active = _Active(generation, vault.bundle(reader, generation))

    @classmethod
    def of(cls, vault: Vault, *, device: str, engine: str, precision: str) -> "ActiveModel":
        """The active model of a gallery that was just opened, and is closed where it has none.

        Raises:
            BundleError, ModelMismatch: the model is missing, damaged or another one.
        """
        try:
            return cls(vault, device=device, engine=engine, precision=precision)
        except BaseException:
            vault.close()
            raise

    def open_other(self, bundle: ModelBundle) -> Embedder:
        """Another model, loaded on the same device by the same engine, in full precision."""
        return Embedder.open(bundle, device=self.device, engine=self.engine)

    def close(self) -> None:
        """Ends what the engine started."""
        with self._loading:
            if self._embedder is not None:
                self._embedder.close()

    @property
    def bundle(self) -> ModelBundle:
        """The model as of the last call."""
        return self._active.bundle

    def require(self, bundle: ModelBundle) -> None:
        """Checks that a bundle is the active model; see `Gallery.require`."""
        if bundle.fingerprint != self.bundle.fingerprint:
            raise ModelMismatch(
                f"The gallery {self.vault.folder} was made with another model (fingerprint "
                f"{self.bundle.fingerprint[:12]}, not {bundle.fingerprint[:12]}); "
                "leave `model` out, or enroll into a new gallery."
            )

    @property
    def may_use_gpu(self) -> bool:
        """Whether photos are embedded on a GPU, as far as can be said before the model is loaded."""
        return may_use_gpu(self.device, self.engine)

    @property
    def drift(self) -> PrecisionDrift | None:
        """How far distances drift under the precision; None where they do not, or nobody knows yet."""
        return None if self._embedder is None else self._embedder.drift

    def loaded(self) -> tuple[int, Embedder]:
        """The number of the model as of the last call, and that model, loaded."""
        self.vault.store.check_open()
        with self._loading:
            if self._embedder is None:
                self._embedder = Embedder.open(
                    self.bundle, device=self.device, engine=self.engine, precision=self.precision
                )
            return self._active.generation.id, self._embedder

    def adopt(self, embedder: Embedder, fingerprint: str) -> None:
        """Uses a model that was loaded already; closes it where another one is active by now."""
        with self._loading:
            if self._embedder is None and fingerprint == self._active.bundle.fingerprint:
                self._embedder = embedder
                return
        embedder.close()

    def refresh(self, reader: Reader) -> Generation:
        """The generation of a snapshot, whose model is the active one from now on."""
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
        """The generation that is active now."""
        with self.vault.store.read() as reader:
            return self.refresh(reader)

    def switched(self) -> ModelMismatch:
        """What to raise where photos were prepared for a model that is no longer the active one."""
        return ModelMismatch(
            f"The gallery {self.vault.folder} went over to another model meanwhile; "
            "run the same command again."
        )
