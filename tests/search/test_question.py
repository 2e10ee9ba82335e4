"""Question: the keyword arguments of searches, and what is refused before anything is read."""

import inspect
from typing import Any, get_type_hints

import pytest

from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.search.question import (
    PeopleQuestion,
    PeopleSearchOptions,
    PhotoQuestion,
    PhotoSearchOptions,
    Question,
    SearchOptions,
)

PHOTO_SEARCHES = ("search", "search_many", "search_by_vector", "search_by_vectors", "search_by_face")
PEOPLE_SEARCHES = ("search_people", "search_people_by_vectors", "search_people_by_face")


def keywords(question: type[Question]) -> dict[str, Any]:
    """The keyword arguments that a question takes, with their types."""
    parameters = inspect.signature(question.__init__).parameters.values()
    names = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    hints = get_type_hints(question.__init__)
    return {name: hints[name] for name in names}


def test_options_have_the_names_and_types_that_their_questions_take() -> None:
    assert get_type_hints(SearchOptions) == keywords(Question)
    assert get_type_hints(PhotoSearchOptions) == keywords(Question) | keywords(PhotoQuestion)
    assert get_type_hints(PeopleSearchOptions) == keywords(Question) | keywords(PeopleQuestion)


@pytest.mark.parametrize("options", [SearchOptions, PhotoSearchOptions, PeopleSearchOptions])
def test_each_option_is_documented_where_it_is_declared(options: type) -> None:
    described = inspect.getdoc(options) or ""
    inherited = {} if options is SearchOptions else get_type_hints(SearchOptions)
    assert all(f"\n    {name}: " in described for name in get_type_hints(options).keys() - inherited)


@pytest.mark.parametrize("option", ["within", "rule", "mean_of", "photos", "exclude_self", "limit"])
def test_a_search_takes_no_option_of_another_kind(gallery: Gallery, option: str) -> None:
    own = {name: {"within"} for name in PHOTO_SEARCHES}
    own |= {name: {"rule", "mean_of", "photos"} for name in PEOPLE_SEARCHES}
    for name in ("search", "search_many", "search_people"):
        own[name].add("exclude_self")
    for name, taken in own.items():
        if option not in taken:
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
                getattr(gallery, name)([], **{option: 1})


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (PhotoQuestion, {"k": 0}, "The number of neighbours must be at least 1, not 0"),
        (PhotoQuestion, {"k": None}, "Say how many neighbours, or within which distance"),
        (PeopleQuestion, {"k": None}, "Say how many neighbours, or within which distance"),
        (PeopleQuestion, {"k": 1, "mean_of": 0}, "A mean needs at least 1 photo"),
        (PeopleQuestion, {"k": 1, "fpir": 0.1, "max_distance": 1.0}, "Give an FPIR or a greatest distance"),
        (PhotoQuestion, {"k": 1, "fpir": 0.6}, "An FPIR lies above 0 and is at most 0.5"),
        (PhotoQuestion, {"k": 1, "max_distance": -1.0}, "The greatest distance must be a number"),
    ],
)
def test_what_cannot_be_answered_is_refused(kind: type[Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        kind(**options)


def test_none_is_what_an_option_is_without_being_given() -> None:
    options: SearchOptions = {"where": None, "explanation": None, "fpir": None, "max_distance": None}
    given, absent = PhotoQuestion(5, within=None, **options), PhotoQuestion(5)
    assert vars(given) == vars(absent)
