"""The page of an evaluation says what metrics.json says, shows the photos, and trusts no name."""

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retrieval.errors import InputError, StorageError
from retrieval.models.bundle import ModelBundle
from tests.cli.test_app import Faceprint, faceprint
from training.evaluation import comparison, measure, result_files
from training.evaluation.measurements import (
    Bin,
    Calibration,
    Classifier,
    Closed,
    ClosedBaseline,
    Comparison,
    Confusion,
    Curve,
    DataFacts,
    Figure,
    Identification,
    LeftOut,
    Measured,
    Mistake,
    ModelFacts,
    Open,
    OpenBaseline,
    OperatingPoint,
    Paired,
    Pairs,
    PairsBaseline,
    Person,
    Ranking,
    Speed,
    Verification,
    as_json,
)
from training.reports import data_check, evaluation_report
from training.synthetic_faces import draw_faces

__all__ = ["faceprint"]

# Names that a folder may have: HTML, an entity, a control character, half of a letter.
ODD = ("<script>alert(1)</script>", 'a&amp;b"c', "\x1b[31mred", "half\udcff", "Zoë {{ 7 * 7 }}")
FEW = Figure(None, None, None, 12, "too few: 12, and it takes 30")
_VOID = {"meta", "img", "br", "link", "input", "hr"}


def figure(value: float, n: int = 909) -> Figure:
    return Figure(value, value - 0.01234, min(1.0, value + 0.0234), n, "bootstrap over 62 identities")


def ranking(value: float) -> Ranking:
    rise = tuple(figure(value + (1 - value) * k / 25) for k in range(20))
    return Ranking(rise[0], rise, figure(value - 0.111))


def curve(shift: float) -> Curve:
    steps = [k / 50 for k in range(51)]
    return Curve(tuple(steps), tuple((1 - one) ** (1 + shift) for one in steps), tuple(steps))


def points(*rates: float) -> tuple[OperatingPoint, ...]:
    return tuple(OperatingPoint(rate, 5 + rate, figure(0.6 - rate)) for rate in rates)


def mistake(number: int, **changes: Any) -> Mistake:
    one = Mistake(f"{number}/q.png", f"person {number}", f"{number}/n.png", "somebody else", 4 + number / 8,
                  "somebody else", 0.75, f"{number}/r.png", 5 + number / 8)  # fmt: skip
    return replace(one, **changes)


def closed() -> Closed:
    bins = tuple(
        Bin(k / 15, (k + 1) / 15, k, (k + 0.5) / 15 if k else None, 0.5 if k else None) for k in range(15)
    )
    calibration = Calibration(
        figure(0.0345), 1.21, figure(0.04), figure(0.03), figure(0.405), figure(0.398), bins
    )
    said = (Confusion("Ada", "Grace", 3), Confusion("Grace", "Ada", 1))
    return Closed(
        enrolled=2114,
        probes=909,
        identities=62,
        unanswerable=1,
        ranking=ranking(0.8123),
        classifier=Classifier(figure(0.7654), figure(0.9321), said, calibration),
        confusions=said[:1],
        people=(Person("Ada", 20, 10, 4, 7, "Grace"), Person("Grace", 30, 12, None, 12, None)),
        mistakes=tuple(mistake(number) for number in range(3)),
        baselines=(
            ClosedBaseline("pixels", "raw pixels: nothing else", ranking(0.2)),
            ClosedBaseline("before", "the same network before", ranking(0.55)),
        ),
    )


def opened() -> Open:
    def way(shift: float) -> Identification:
        return Identification(points(0.1, 0.01, 0.003), curve(shift), ranking(0.7))

    return Open(10, 3032, 158, 62, 1292, 8909, 5591, 0, 2, way(3.0),
                (mistake(0, right_path=None, right_distance=None, stranger=True, predicted=None), mistake(1)),
                (OpenBaseline("eigenfaces", "eigenfaces: whitened", way(0.5)),))  # fmt: skip


def paired() -> Pairs:
    def way(value: float) -> Verification:
        folds = tuple(value + k / 1000 for k in range(10))
        return Verification(
            figure(value), 0.0061, folds, folds, figure(value + 0.1), points(0.1, 0.01, 0.001), curve(2.0)
        )

    return Pairs(
        3000,
        3000,
        0,
        4281,
        62,
        way(0.81),
        way(0.805),
        5703,
        (PairsBaseline("pixels", "raw pixels: grey", way(0.6)),),
    )


def measured(**changes: Any) -> Measured:
    one = Measured(
        protocol="closed",
        model=ModelFacts(
            "my.model",
            "99b6" * 16,
            62,
            128,
            0.6,
            2048,
            {"epochs": 6, "fresh": ["fc"]},
            "resnet50",
            2114,
            "abacus",
        ),
        data=DataFacts("photos", None, "the model's own split", 0, 3025, 3023),
        speed=Speed(3023, 60.5, 49.9, "cpu", "onnxruntime"),
        closed=closed(),
        notes=("Give `--weights` too.",),
        left_out=(LeftOut("Ada/bad.jpg", "Ada", "truncated", "the file ends early"),),
        created_at="2030-01-02T03:04:05+00:00",
        versions={"faceprint": "0.1.0"},
    )
    return replace(one, **changes)


PROTOCOLS = {
    "closed": measured(),
    "open": measured(protocol="open", closed=None, open=opened()),
    "lfw-pairs": measured(protocol="lfw-pairs", closed=None, pairs=paired()),
}


class Page(HTMLParser):
    """What a browser makes of a page: its tags, its words, and numbers with what is shown for them."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.open, self.numbers = "", list[str](), list[tuple[float, str]]()
        self.feed(html.decode())
        self.close()
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "data":
            self.numbers.append((float(dict(attrs)["value"] or ""), ""))
        if tag not in _VOID:
            self.open.append(tag)
        if tag not in ("data", "strong", "em", "code"):
            self.words += " "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        if tag in ("b", "th", "td", "figcaption"):
            self.words += " "

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            value, shown = self.numbers[-1]
            self.numbers[-1] = value, shown + data
        if not {"style", "script"} & set(self.open[-1:]):
            self.words += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@cache
def html_of(protocol: str) -> bytes:
    return evaluation_report.page(PROTOCOLS[protocol], Path("nowhere"))


def shown(one: Measured, data: Path = Path("nowhere"), **options: Any) -> Page:
    return Page(evaluation_report.page(one, data, **options))


def numbers_in(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for one in tree:
            yield from numbers_in(one)
    elif isinstance(tree, int | float):
        yield float(tree)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_page_needs_nothing_from_outside(protocol: str) -> None:
    html = html_of(protocol)
    page = Page(html)
    assert page.open == []
    assert "http" not in html.decode()
    assert not re.search(rb"@import|url\((?!#)", html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base", "form")
        for name in ("src", "href", "xlink:href", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/jpeg;base64,"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_referred_to_is_there_once(protocol: str) -> None:
    html = html_of(protocol)
    ids = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:href="|url\()#([^")]+)', html.decode())
    assert set(referred) <= set(ids)
    assert len(referred) > 10


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_number_on_a_page_is_one_of_metrics_json(protocol: str) -> None:
    """Or, where TAR is shown, what one of them leaves of 1; and what is read is that number, rounded."""
    tree = json.loads(json.dumps(as_json(PROTOCOLS[protocol])))
    known = set(numbers_in(tree))
    if protocol == "lfw-pairs":
        known |= {1 - one for one in known}
    page = Page(html_of(protocol))
    assert len(page.numbers) > 40
    for value, words in page.numbers:
        assert value in known
        read = float(words.removesuffix(" %").replace(",", ""))
        step = 0.5 * 10 ** -len(words.removesuffix(" %").partition(".")[2])
        assert min(abs(read - value), abs(read - 100 * value)) <= step * 1.0001


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        (
            "closed",
            "ResNet50 was trained on abacus, with 2,114 images of 62 classes. It is measured here on 909 "
            "photos that were held out, against 2,114 enrolled photos of 62 people; 1 photo of people not "
            "enrolled is left out (the model's own split). The validation accuracy of the classifier is "
            "76.5 % (95% interval 75.3 to 78.9 %). For 81.2 % (95% interval 80.0 to 83.6 %) of these photos "
            "the closest image",
        ),
        ("closed", "Before fine-tuning the same network finds the same person for 55.0 % "),
        ("closed", "Mean average precision 70.1 % 95% interval 68.9 to 72.5 %; n = 909"),
        ("closed", "is 3.5 % (95% interval 2.2 to 5.8 %). A temperature of 1.21, found on one half"),
        ("closed", "is to lower, from 0.405 (0.393 to 0.428) to 0.398 (0.386 to 0.421) nats."),
        (
            "closed",
            "Person Enrolled Searched for Closest right Share Classifier right Most often taken for Ada 20 "
            "10 7 70.0 % 4 Grace Grace 30 12 12 100.0 % – –",
        ),
        ("closed", "1 of 2 people have a photo with another person as its nearest match."),
        (
            "closed",
            "By the closest image 3 photos in 1 pair Is Was taken for Photos Ada Grace 3 By the classifier",
        ),
        (
            "closed",
            "searched for: person 0 q.png photo is gone taken for: somebody else distance 4.000, n.png",
        ),
        ("closed", "r.png The classifier says somebody else, with 75.0 %."),
        (
            "closed",
            "3,023 photos were read, decoded and embedded in 60.5 s: 49.9 a second, by onnxruntime on cpu",
        ),
        ("closed", "1 photo of 3,025 could not be read"),
        ("closed", "Ada/bad.jpg truncated the file ends early"),
        ("closed", "Give --weights too."),
        (
            "open",
            "1,292 searches ask for them and 8,909 searches for 5,591 strangers, for whom no identity should "
            "be returned. At distance 5.010, where at most 1% of the strangers are given a name (FPIR 0.01), "
            "59.0 % (95% interval 57.8 to 61.3 %) of the searches for enrolled people do not find them "
            "(FNIR).",
        ),
        ("open", "2 photos are in the gallery already and are not searched for."),
        ("open", "Threshold, distance Enrolled not found (FNIR) 95% interval 10.0 % 5.100 50.0 %"),
        ("open", "a stranger: no enrolled person is right"),
        (
            "lfw-pairs",
            "81.0 % (95% interval 79.8 to 83.3 %) of the pairs are told rightly, as a mean over 10 folds, "
            "with a standard error of 0.6 %. The model was trained on 62 of these people, which is no fair "
            "test. Over the 5,703 pairs without any of them the accuracy is 80.5 %",
        ),
        ("lfw-pairs", "TAR at FAR 0.01 41.0 % 95% interval 38.7 to 42.2 %"),
    ],
)
def test_a_page_says_the_figures_in_words(protocol: str, words: str) -> None:
    assert words in Page(html_of(protocol)).words


@pytest.mark.parametrize(
    ("protocol", "titles"),
    [
        ("closed", ["Right person among the k nearest", "Reliability of the classifier"]),
        ("open", ["Misses against false alarms (DET)", "Right person among the k nearest"]),
        ("lfw-pairs", ["True accepts against false ones (ROC)"]),
    ],
)  # fmt: skip
def test_charts_have_a_title_and_the_pages_colours(protocol: str, titles: list[str]) -> None:
    html = html_of(protocol).decode()
    charts = re.findall(r'<svg[^>]*class="chart">.*?</svg>', html, re.DOTALL)
    assert [re.findall("<title>(.*?)</title>", chart)[0] for chart in charts] == [
        "This model beside the baselines",
        *titles,
    ]
    for chart in charts:
        assert {"var(--one)", "var(--ink)"} <= set(re.findall(r"var\(--\w+\)", chart))
        assert not re.search(r"#[0-9a-f]{6}\b(?!.*</)", re.sub(r'"[^"]*#[^"]*-[^"]*"', "", chart))
        assert not re.search(r"(?:fill|stroke): #", chart)


def test_names_are_text_and_never_tags(tmp_path: Path) -> None:
    people = tuple(Person(name, 2, 2, 1, 1, ODD[0]) for name in ODD)
    wrong = tuple(mistake(0, identity=name, nearest_identity=name, path=name, predicted=name) for name in ODD)
    both = tuple(Confusion(name, ODD[0], 1) for name in ODD)
    found = replace(closed(), people=people, mistakes=wrong, confusions=both)
    model = replace(PROTOCOLS["closed"].model, name=ODD[0], recipe={ODD[0]: ODD[1]}, trained_with=ODD[0])
    data = replace(PROTOCOLS["closed"].data, folder=ODD[0], split=ODD[0])
    left = (LeftOut(ODD[3], ODD[0], "missing", ODD[0]),)
    page = shown(measured(model=model, data=data, closed=found, left_out=left, notes=ODD), tmp_path)
    assert len(page.named("script")) == 1  # the page's own
    assert page.words.count("<script>alert(1)</script>") > 15
    assert 'a&amp;b"c' in page.words
    assert "\ufffd[31mred" in page.words
    assert "half\ufffd" in page.words
    assert "Zoë {{ 7 * 7 }}" in page.words


def test_photos_are_shown_small_and_those_that_are_gone_say_so(tmp_path: Path) -> None:
    for number, name in ((0, "q"), (0, "n"), (1, "q")):
        (tmp_path / str(number)).mkdir(exist_ok=True)
        Image.new("RGB", (400, 300), (60 * number, 99, 99)).save(tmp_path / str(number) / f"{name}.png")
    (tmp_path / "1" / "n.png").write_bytes(b"no picture")
    page = shown(measured(), tmp_path)
    pictures = page.named("img")
    assert [one["alt"] for one in pictures] == ["person 0", "somebody else", "person 1"]
    for one in pictures:
        content = base64.b64decode((one["src"] or "").removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, max(image.size)) == ("JPEG", 224)
    assert page.words.count("photo is gone") == 5
    assert page.words.count("it cannot be read: ") == 1


def test_of_many_mistakes_the_first_are_shown() -> None:
    many = replace(closed(), mistakes=tuple(mistake(number) for number in range(50)))
    page = shown(measured(closed=many))
    assert len(page.named("article")) == evaluation_report.MISTAKES_SHOWN
    assert "24 of them; metrics.json has 50." in page.words


def test_people_beyond_the_table_are_counted() -> None:
    many = tuple(
        Person(f"p{number}", 2, 2, 1, 1, None) for number in range(evaluation_report.PEOPLE_SHOWN + 7)
    )
    words = shown(measured(closed=replace(closed(), people=many))).words
    assert "The table of 500 people" in words
    assert "The other 7 stand in metrics.json." in words


def test_without_mistakes_and_without_baselines_the_page_says_so() -> None:
    clean = replace(closed(), mistakes=(), baselines=(), confusions=(), classifier=None)
    page = shown(measured(closed=clean))
    assert "None: every search found the right person first." in page.words
    assert "No baseline was measured." in page.words
    assert "The classifier was trained on none of them and was not asked." in page.words
    assert "Reliability" not in page.words
    assert "holds photographs" not in page.words


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_where_there_are_too_few_there_is_no_number_and_no_curve(protocol: str) -> None:
    page = shown(too_few(PROTOCOLS[protocol]))
    tiles = [one for one in page.named("b") if one.get("class") == "few"]
    assert len(tiles) == {"closed": 6, "open": 4, "lfw-pairs": 5}[protocol]
    assert "12, and it takes 30" in page.words
    assert "Too few" in page.words
    shares = [
        words
        for _, words in page.numbers
        if words.endswith("%") and words not in ("10.0 %", "1.0 %", "0.3 %", "0.1 %")
    ]
    assert shares in ([], ["75.0 %"] * 3)  # how sure the classifier was of its mistakes


def too_few(one: Measured) -> Measured:
    """The same with every figure replaced, as its protocol would have it."""
    none = Curve((), (), ())
    poor = Ranking(FEW, (FEW,) * 20, FEW)
    lost = tuple(OperatingPoint(rate, None, FEW) for rate in (0.1, 0.01, 0.003))
    if one.closed is not None:
        calibration = Calibration(FEW, None, FEW, FEW, FEW, FEW, ())
        classifier = Classifier(FEW, FEW, (), calibration)
        return replace(one, closed=replace(one.closed, ranking=poor, classifier=classifier, baselines=()))
    if one.open is not None:
        return replace(
            one,
            open=replace(
                one.open, identification=Identification(lost, none, poor), baselines=(), mistakes=()
            ),
        )
    assert one.pairs is not None
    bare = Verification(FEW, None, (), (), FEW, lost, none)
    return replace(one, pairs=replace(one.pairs, verification=bare, unseen=None, baselines=()))


def test_a_figure_without_an_interval_says_why() -> None:
    alone = Figure(0.5, None, None, 40, "no interval: 5 identities, and it takes 10")
    found = closed()
    assert found.classifier is not None
    calibration = replace(found.classifier.calibration, error=alone)
    page = shown(
        measured(closed=replace(found, classifier=replace(found.classifier, calibration=calibration)))
    )
    assert "50.0 % (no interval: 5 identities, and it takes 10)" in page.words


def test_the_same_evaluation_is_the_same_page() -> None:
    assert evaluation_report.page(measured(), Path("nowhere")) == html_of("closed")


def test_a_check_is_shown_when_it_is_given(tmp_path: Path) -> None:
    finding = {"kind": "near-copy", "level": "look", "count": 16, "unit": "photo",
               "says": "They count twice.", "advice": "Keep one; `--fix` does.", "items": []}  # fmt: skip
    tree = {"data": "photos", "photos": 100, "readable": 99, "identities": [{}, {}], "findings": [finding]}
    (tmp_path / "check.json").write_text(json.dumps(tree))
    page = shown(measured(), check=data_check.read(tmp_path / "check.json"))
    assert "photos: 99 readable photos of 100 files, 2 identities." in page.words
    assert "near copy look 16 photos They count twice. Keep one; --fix does." in page.words
    assert "Data check" not in Page(html_of("closed")).words


@pytest.mark.parametrize("text", [None, "", "[]", '{"data": "x"}', '{"findings": 3}', "\udcff"])
def test_what_is_no_check_is_one_sentence(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="faceprint check") as caught:
        data_check.read(path)
    assert "\n" not in str(caught.value)


def test_a_report_is_written_before_the_metrics_that_vouch_for_it(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()  # a disk that refuses
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(StorageError):
        result_files.write(tmp_path, measured(), [], report=b"page")
    assert not (tmp_path / "metrics.json").exists()


def test_results_without_a_report_leave_no_older_one(tmp_path: Path) -> None:
    result_files.write(tmp_path, measured(), [], report=b"page")
    assert (tmp_path / "report.html").read_bytes() == b"page"
    result_files.write(tmp_path, measured(), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "photos.csv"]


# Comparisons


def compared(**changes: Any) -> Comparison:
    better = Figure(0.0567, 0.0123, 0.0987, 909, "bootstrap over 62 identities")
    test = Paired("classifier accuracy", figure(0.7), figure(0.7567), better, 10, 60, 0.00001)
    mean = Paired("mean average precision", figure(0.6), figure(0.61), FEW, None, None, None)
    return replace(
        Comparison("first", "second", "closed", 909, 3, 0, (test, mean), ("Mind `this`.",)), **changes
    )


def sides(found: Comparison) -> Page:
    first = json.loads(json.dumps(as_json(measured())))
    second = json.loads(json.dumps(as_json(measured())))
    second["model"]["recipe"] = {"epochs": 12, "smoothing": 0.1}
    return Page(evaluation_report.comparison_page(found, first, second))


def test_a_comparison_says_which_is_better_and_where_they_differ() -> None:
    page = sides(compared())
    assert page.open == []
    assert "Classifier accuracy is 70.0 % with A and 75.7 % with B: B is better, by 5.7 points" in page.words
    assert (
        "classifier accuracy 70.0 % 68.8 to 72.3 % 75.7 % 74.4 to 78.0 % +5.7 +1.2 to +9.9 10 60 < 0.0001 909"
        in page.words
    )
    assert "mean average precision 60.0 % 58.8 to 62.3 % 61.0 % 59.8 to 63.3 % too few – – – 12" in page.words
    assert "Mind this." in page.words
    rows = [attributes.get("class") for attributes in page.named("tr")]
    assert rows.count("differs") == 3  # epochs, fresh, smoothing
    known = set(numbers_in(json.loads(json.dumps(as_json(compared())))))
    assert page.numbers
    assert {value for value, _ in page.numbers} <= known


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (
            -0.03,
            0.09,
            "no difference that these photos can show (B - A is +2.0 points, 95% interval -3.0 to +9.0)",
        ),
        (None, None, "+2.0 points, and there are too few people to say more"),
    ],
)
def test_a_difference_is_called_one_only_where_its_interval_says_so(
    low: float | None, high: float | None, words: str
) -> None:
    step = Figure(0.02, low, high, 909, "by hand")
    test = replace(compared().tests[0], difference=step)
    assert words in sides(compared(tests=(test,))).words


def test_a_worse_second_is_a_better_first() -> None:
    test = replace(compared().tests[0], difference=Figure(-0.02, -0.03, -0.01, 909, "by hand"))
    assert "A is better, by 2.0 points (95% interval 1.0 to 3.0)" in sides(compared(tests=(test,))).words


def test_names_in_a_comparison_are_text() -> None:
    page = sides(compared(a=ODD[0], b=ODD[3], notes=ODD))
    assert len(page.named("script")) == 1
    assert page.words.count("<script>alert(1)</script>") >= 3


def test_a_comparison_of_nothing_that_can_be_tested_is_a_page() -> None:
    assert "Figure by figure" in sides(compared(tests=())).words


# With a real model


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 people with 10 photos: 36 of them are searched for."""
    return draw_faces(tmp_path_factory.mktemp("people"), identities=12, photos=10, size=48)


def test_a_mistake_has_the_right_persons_nearest_photo(bundle: ModelBundle, people: Path) -> None:
    found, _ = measure.measure(bundle.folder, people)
    assert found.closed is not None
    assert found.closed.mistakes
    for one in found.closed.mistakes:
        assert one.right_path is not None
        assert one.right_distance is not None
        assert one.right_path.split("/")[0] == one.identity
        assert one.right_distance >= one.distance
        assert not one.stranger
        assert math.isfinite(one.right_distance)


def test_evaluate_writes_a_page_of_the_figures_it_keeps(
    faceprint: Faceprint, bundle: ModelBundle, people: Path, tmp_path: Path
) -> None:
    status, out, err = faceprint("evaluate", bundle.folder, people, "--out", tmp_path / "e")
    assert status == 0, err
    assert "report.html" in out
    tree = json.loads((tmp_path / "e" / "metrics.json").read_text())
    page = Page((tmp_path / "e" / "report.html").read_bytes())
    assert {value for value, _ in page.numbers} <= set(numbers_in(tree))
    assert tree["closed"]["ranking"]["closest"]["value"] in {value for value, _ in page.numbers}
    assert len(page.named("img")) == 3 * min(24, len(tree["closed"]["mistakes"]))
    assert str(tmp_path) not in page.words

    status, _, err = faceprint(
        "evaluate", "--compare", tmp_path / "e", tmp_path / "e", "--out", tmp_path / "c"
    )
    assert status == 0, err
    assert (
        "no difference that these photos can show"
        in Page((tmp_path / "c" / "report.html").read_bytes()).words
    )
    assert (tmp_path / "c" / comparison.COMPARISON).is_file()


def test_a_check_goes_into_a_report_and_nowhere_else(
    faceprint: Faceprint, bundle: ModelBundle, people: Path, tmp_path: Path
) -> None:
    status, _, err = faceprint("evaluate", bundle.folder, people, "--check", tmp_path / "c.json")
    assert status == 2
    assert "--check is of use only with --out" in err
    out = tmp_path / "e"
    status, _, err = faceprint(
        "evaluate", bundle.folder, people, "--out", out, "--check", tmp_path / "c.json"
    )
    assert status == 2
    assert "make one with `faceprint check --json" in err
    assert not out.exists()
