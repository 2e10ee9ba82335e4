"""The searches of a gallery: by images, by embeddings and by stored faces, for photos and for identities."""

from collections.abc import Iterable
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from retrieval.gallery.active_model import ActiveModel
from retrieval.gallery.image_search import Pictures, faces_near_images, one_face, people_near_images
from retrieval.images.photo_reader import FaceSelection
from retrieval.images.pixels import ImageSource
from retrieval.search import nearest
from retrieval.search.nearest import Found, Match, PeopleResult, PersonMatch, SearchResult
from retrieval.search.question import PeopleQuestion, PeopleSearchOptions, PhotoQuestion, PhotoSearchOptions
from retrieval.storage.any_vault import AnyVault


class GallerySearches:
    """The searches of `Gallery`, which inherits them.

    Attributes:
        vault: the gallery's rows and vectors.
    """

    vault: AnyVault
    _model: ActiveModel

    def search(
        self,
        image: ImageSource,
        k: int | None = 5,
        *,
        exclude_self: bool = False,
        selection: FaceSelection = FaceSelection(),
        **options: Unpack[PhotoSearchOptions],
    ) -> SearchResult:
        """Returns the k nearest stored photos to an image, the classifier's prediction and the decision.

        Args:
            image: a path, bytes, a PIL image or a uint8 array (h, w), (h, w, 3) or (h, w, 4).
            k: number of photos, at least 1; all, if the gallery has fewer. None returns all photos within
                the distance `within`, which is then required.
            exclude_self: leave out the stored face with exactly the bytes of the image.
            selection: which face of the image, for a model with a face detector; not all of them, for which
                there is `search_faces`.
            options: see `PhotoSearchOptions`.

        Raises:
            UnreadableImage: the image cannot be read, or has no such face.
            InputError: k is below 1, or as the options.
        """
        return self.search_many([image], k, exclude_self=exclude_self, selection=selection, **options)[0]

    def search_many(
        self,
        images: Iterable[ImageSource],
        k: int | None = 5,
        *,
        exclude_self: bool = False,
        selection: FaceSelection = FaceSelection(),
        **options: Unpack[PhotoSearchOptions],
    ) -> list[SearchResult]:
        """Searches as `search` does, for many images; returns one result per image, in order."""
        pictures = Pictures(images, one_face(selection), exclude_self)
        return [one for [one] in faces_near_images(self._model, pictures, PhotoQuestion(k, **options))]

    def search_faces(
        self,
        images: Iterable[ImageSource],
        k: int | None = 5,
        *,
        exclude_self: bool = False,
        selection: FaceSelection = FaceSelection("all"),
        **options: Unpack[PhotoSearchOptions],
    ) -> list[list[SearchResult]]:
        """Searches as `search` does, for each face of many images.

        Returns:
            For each image, in order, a result for each of its faces, from left to right. A model without a
            face detector takes each image as one face.
        """
        pictures = Pictures(images, selection, exclude_self)
        return list(faces_near_images(self._model, pictures, PhotoQuestion(k, **options)))

    def search_by_vector(
        self, vector: NDArray[Any], k: int | None = 5, **options: Unpack[PhotoSearchOptions]
    ) -> Found[Match]:
        """Returns the k nearest stored photos to an embedding (d,); otherwise as `search_by_vectors`."""
        return self.search_by_vectors(np.asarray(vector)[None], k, **options)[0]

    def search_by_vectors(
        self, vectors: NDArray[Any], k: int | None = 5, **options: Unpack[PhotoSearchOptions]
    ) -> list[Found[Match]]:
        """Returns the k nearest stored photos to each embedding, nearest first, with the decision.

        Args:
            vectors: (n, d), embedded by this gallery's model.
            k: as of `search`.
            options: see `PhotoSearchOptions`.

        Raises:
            InputError: the vectors have another shape or are not finite, k is below 1, or as the options.
        """
        return nearest.faces_near_vectors(self.vault, vectors, asked=PhotoQuestion(k, **options))

    def search_by_face(
        self, face_id: int, k: int | None = 5, **options: Unpack[PhotoSearchOptions]
    ) -> Found[Match]:
        """Returns the k nearest other photos to a stored one; otherwise as `search_by_vectors`.

        Raises:
            InputError: there is no face of that id, k is below 1, or as the options.
        """
        return nearest.faces_near_face(self.vault, face_id, asked=PhotoQuestion(k, **options))

    def search_people(
        self,
        images: Iterable[ImageSource],
        k: int = 5,
        *,
        exclude_self: bool = False,
        selection: FaceSelection = FaceSelection(),
        **options: Unpack[PeopleSearchOptions],
    ) -> list[PeopleResult]:
        """Returns the k nearest identities to each image, exactly, each with its nearest photos.

        Args:
            images: as of `search`.
            k: number of identities, at least 1. Photos without an identity do not count.
            exclude_self, selection: as of `search`.
            options: see `PeopleSearchOptions`.

        Raises:
            UnreadableImage: an image cannot be read.
            InputError: k is below 1, or as the options.
        """
        pictures = Pictures(images, one_face(selection), exclude_self)
        return [one for [one] in people_near_images(self._model, pictures, PeopleQuestion(k, **options))]

    def search_people_of_faces(
        self,
        images: Iterable[ImageSource],
        k: int = 5,
        *,
        exclude_self: bool = False,
        selection: FaceSelection = FaceSelection("all"),
        **options: Unpack[PeopleSearchOptions],
    ) -> list[list[PeopleResult]]:
        """Searches as `search_people` does, for each face of many images; see `search_faces`."""
        pictures = Pictures(images, selection, exclude_self)
        return list(people_near_images(self._model, pictures, PeopleQuestion(k, **options)))

    def search_people_by_vectors(
        self, vectors: NDArray[Any], k: int = 5, **options: Unpack[PeopleSearchOptions]
    ) -> list[Found[PersonMatch]]:
        """Searches as `search_people` does, for embeddings (n, d)."""
        return nearest.people_near_vectors(self.vault, vectors, asked=PeopleQuestion(k, **options))

    def search_people_by_face(
        self, face_id: int, k: int = 5, **options: Unpack[PeopleSearchOptions]
    ) -> Found[PersonMatch]:
        """Searches as `search_people` does, for a stored face, without the face itself.

        Raises:
            InputError: there is no face of that id, or as `search_people`.
        """
        return nearest.people_near_face(self.vault, face_id, asked=PeopleQuestion(k, **options))
