"""What a data set is worth: findings, the split they are about, the cleaned list, and labels in doubt."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retrieval.errors import DataError, InputError, Interrupted, Reason
from retrieval.images import pixels
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.quality.check_page import TITLES, page
from retrieval.quality.dataset_check import Check, check
from retrieval.quality.findings import DataFinding, Kind, Level
from retrieval.quality.label_errors import find_label_issues
from retrieval.quality.near_duplicates import (
    MAX_PRINT_DISTANCE,
    MIN_CORRELATION,
    copies,
    correlations,
    prints,
)
from retrieval.quality.photo_set import CheckOptions
from retrieval.sources import photos
from tests.broken import make_broken
from tests.cli.test_app import Faceprint
from training.data import dataset

_SMALL = CheckOptions(preprocessing=Preprocessing(size=32, crop=1.0))


@pytest.fixture
def faceprint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Faceprint:
    return Faceprint(capsys, monkeypatch)


@pytest.fixture
def people(faces: Path, tmp_path: Path) -> Path:
    """A copy of the drawn faces, to be spoiled."""
    return Path(shutil.copytree(faces, tmp_path / "people"))


def draw(path: Path, seed: int, size: tuple[int, int] = (96, 96), kind: str = "RGB") -> Path:
    """A picture of broad coloured patches that no other seed gives."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).convert(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def saved_again(path: Path, target: Path, *, scale: float = 0.7, quality: int = 60) -> Path:
    """The same photograph, smaller and pressed harder."""
    with Image.open(path) as image:
        width, height = (round(side * scale) for side in image.size)
        image.convert("RGB").resize((width, height)).save(target, "JPEG", quality=quality)
    return target


def found(done: Check) -> dict[Kind, DataFinding]:
    return {finding.kind: finding for finding in done.findings}


def names(finding: DataFinding) -> list[list[str]]:
    return [[Path(photo.path or "").name for photo in item.photos] for item in finding.items]


def drawn(folder: Path, people: int = 3, number: int = 4) -> Path:
    """Identity folders in which nothing is alike."""
    for person in range(people):
        for photo in range(number):
            draw(folder / f"p{person}" / f"{person}_{photo}.png", 100 * person + photo)
    return folder


def test_a_set_in_which_nothing_is_wrong_has_no_finding(tmp_path: Path) -> None:
    done = check(os.fspath(drawn(tmp_path / "d")), options=_SMALL)
    assert done.findings == ()
    assert (done.photos, done.readable, done.judged, done.harms) == (12, 12, None, False)
    assert done.effective_people == pytest.approx(3)
    assert len(done.cleaned) == 12


def test_the_halves_are_those_that_train_makes(people: Path) -> None:
    first = sorted(people.glob("*/*.jpg"))[3]
    first.write_bytes(b"no photo any more")
    options = CheckOptions(seed=7, validation_fraction=0.4, preprocessing=_SMALL.preprocessing)
    for path in sorted(people.glob("*/*.jpg")):
        if path != first:
            shutil.copy(path, path.with_name(f"{path.stem}_again.jpg"))
    done = check(os.fspath(people), options=options)
    split = dataset.load(people, validation_fraction=0.4, min_images=None, seed=7)
    shown = {
        photo.path: photo.half
        for finding in done.findings
        if finding.kind in (Kind.ACROSS_SPLIT, Kind.COPY)
        for item in finding.items
        for photo in item.photos
    }
    expected = {os.fspath(one.path): "training" for one in split.train}
    expected |= {os.fspath(one.path): "validation" for one in split.validation}
    assert shown == expected
    assert sum(one.training for one in done.people) == len(split.train)


def test_files_that_cannot_be_read_are_named_with_their_reasons(people: Path) -> None:
    expected = make_broken(people / "broken")
    done = check(os.fspath(people), options=_SMALL)
    finding = found(done)[Kind.UNREADABLE]
    assert finding.level is Level.HARMS
    reasons = {Path(item.photos[0].path or "").name: item.detail.split(":")[0] for item in finding.items}
    assert reasons == {name: str(reason) for name, reason in expected.items()}
    assert done.readable == done.photos - len(expected)
    kinds = {path: kind for path, _, kind in done.left_out}
    assert kinds[os.fspath(people / "broken" / "half.jpg")] is Kind.UNREADABLE
    assert Reason.TRUNCATED in finding.says


def test_one_file_under_two_names_harms_and_every_copy_of_it_goes(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "d")
    shutil.copy(folder / "p0" / "0_0.png", folder / "p1" / "stolen.png")
    saved_again(folder / "p0" / "0_0.png", folder / "p0" / "smaller.jpg")
    done = check(os.fspath(folder), options=_SMALL)
    finding = found(done)[Kind.TWO_NAMES]
    assert finding.level is Level.HARMS
    assert names(finding) == [["0_0.png", "stolen.png"]]
    gone = {Path(path or "").name for path, _, _ in done.left_out}
    assert gone == {"0_0.png", "stolen.png", "smaller.jpg"}


def test_a_photograph_saved_again_under_another_name_is_found_and_both_go(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "d")
    for person in (1, 2):  # the second one as well, though the first is in a pair already
        saved_again(
            folder / "p0" / "0_2.png", folder / f"p{person}" / f"again{person}.jpg", quality=50 + person
        )
    done = check(os.fspath(folder), options=_SMALL)
    finding = found(done)[Kind.TWO_NAMES_NEAR]
    assert (finding.level, finding.count) == (Level.HARMS, 3)
    assert {Path(path or "").name for path, _, _ in done.left_out} == {"0_2.png", "again1.jpg", "again2.jpg"}


def test_copies_harm_where_they_lie_on_both_sides_of_the_split(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "d", number=6)
    for number in range(6):
        shutil.copy(folder / "p0" / f"0_{number}.png", folder / "p0" / f"z{number}.png")
        saved_again(folder / "p1" / f"1_{number}.png", folder / "p1" / f"z{number}.jpg")
    done = found(check(os.fspath(folder), options=_SMALL))
    exact = [*done[Kind.ACROSS_SPLIT].items, *done[Kind.COPY].items]
    near = [*done[Kind.ACROSS_SPLIT_NEAR].items, *done[Kind.NEAR_COPY].items]
    assert len(exact) == len(near) == 6
    for kind in (Kind.ACROSS_SPLIT, Kind.ACROSS_SPLIT_NEAR):
        assert all(
            {one.half for one in item.photos} == {"training", "validation"} for item in done[kind].items
        )
    for kind in (Kind.COPY, Kind.NEAR_COPY):
        assert all(len({one.half for one in item.photos}) == 1 for item in done[kind].items)
    assert (done[Kind.ACROSS_SPLIT].level, done[Kind.COPY].level) == (Level.HARMS, Level.LOOK)


def test_identities_that_cannot_be_split_harm_unless_train_leaves_them_out(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "d")
    draw(folder / "alone" / "1.png", 900)
    draw(folder / "loose.png", 901)
    finding = found(check(os.fspath(folder), options=_SMALL))[Kind.SINGLE_PHOTO]
    assert (finding.level, finding.count, finding.items[0].detail) == (Level.HARMS, 1, "alone: 1 photo")
    wanted = CheckOptions(min_images=4, preprocessing=_SMALL.preprocessing)
    done = check(os.fspath(folder), options=wanted)
    assert not done.harms
    assert found(done)[Kind.TOO_FEW_PHOTOS].count == 1
    assert found(done)[Kind.NO_IDENTITY].count == 1
    # The photo of nobody stays in the list: nothing is wrong with it.
    assert (os.fspath(folder / "loose.png"), None) in done.cleaned


def test_odd_pictures_are_found_the_worst_first(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "d", number=6)
    Image.new("RGB", (96, 96), (200, 10, 10)).save(folder / "p0" / "flat.png")
    draw(folder / "p0" / "wide.png", 700, (300, 96))
    draw(folder / "p0" / "wider.png", 701, (500, 96))
    draw(folder / "p1" / "grey.png", 702, kind="L")
    draw(folder / "p1" / "tiny.png", 703, (20, 20))
    black = np.zeros((96, 96, 3), np.uint8)
    black[:24, :24, 0] = 255
    Image.fromarray(black).save(folder / "p2" / "dark.png")
    Image.fromarray(255 - black).save(folder / "p2" / "bright.png")
    done = found(check(os.fspath(folder), options=_SMALL))
    assert names(done[Kind.STRETCHED]) == [["wider.png"], ["wide.png"]]
    for kind in (Kind.FLAT, Kind.DARK, Kind.BRIGHT, Kind.TINY):
        assert names(done[kind]) == [[f"{kind}.png"]]
    assert names(done[Kind.GREY_AMONG_COLOUR]) == [["grey.png"]]
    assert "`image_size=96`" in done[Kind.TINY].advice


def test_a_photo_that_is_turned_by_its_exif_is_as_wide_as_a_person_sees_it(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 1, (60, 90))
    with Image.open(tmp_path / "a.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    upright, turned = (pixels.glance(tmp_path / name, side=64) for name in ("a.png", "b.png"))
    assert (turned.width, turned.height) == (upright.width, upright.height) == (60, 90)
    assert np.abs(turned.small.astype(int) - upright.small).max() <= 1


def test_uneven_identities_are_as_varied_as_fewer_of_equal_size(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "d", people=2, number=2)
    for number in range(38):
        draw(folder / "p0" / f"more{number}.png", 500 + number)
    done = check(os.fspath(folder), options=_SMALL)
    share = np.array([40, 2]) / 42
    assert done.effective_people == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert "p0" in found(done)[Kind.UNEVEN].says


def test_the_cleaned_list_has_nothing_that_harms_and_train_and_ingest_read_it(
    people: Path, tmp_path: Path, faceprint: Faceprint, bundle: ModelBundle
) -> None:
    first, second = sorted(people.iterdir())[:2]
    photo = min(first.iterdir())
    shutil.copy(photo, second / "stolen.jpg")
    shutil.copy(max(first.iterdir()), first / 'copy, "quoted"\n.jpg')
    draw(people / "Zoë" / "só.png", 3)
    draw(people / "1.5" / "1.png", 4)
    draw(people / "1.5" / "2.png", 5)
    make_broken(people / "broken")
    before = {path: path.stat().st_mtime_ns for path in people.rglob("*.jpg") if path.is_file()}
    fixed = tmp_path / "clean.csv"
    status, out, _ = faceprint("check", people, "--fix", fixed, "--image-size", 32)
    assert ("`fix`" in out, "--fix" in out) == (False, True)
    assert (status, f"in {fixed}" in out) == (0, True)
    with fixed.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["identity"] for row in rows} >= {"1.5", first.name}
    assert os.fspath(photo) not in {row["path"] for row in rows}
    again = check(os.fspath(fixed), options=_SMALL)
    assert not again.harms
    assert len(again.cleaned) == len(rows)
    split = dataset.load(fixed, validation_fraction=0.3, min_images=None, seed=0)
    assert len(split.train) + len(split.validation) == len(rows)
    assert split.left_out == ()
    assert "1.5" in split.labels
    status, out, _ = faceprint("ingest", tmp_path / "g", fixed, "--model", bundle.folder)
    assert f"enrolled {len(rows)} " in out
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("made", [1, 30])
def test_checking_a_cleaned_list_cleans_nothing_more(made: int, tmp_path: Path) -> None:
    """However copies of copies hang together, what is left has no copies."""
    random = np.random.default_rng(made)
    folder = drawn(tmp_path / "d", people=4, number=5)
    originals = sorted(folder.glob("*/*.png"))
    for number in range(made):
        chosen = originals[random.integers(len(originals))]
        person = folder / f"p{random.integers(4)}"
        saved_again(chosen, person / f"s{number}.jpg", scale=random.uniform(0.5, 1), quality=50 + number)
    done = check(os.fspath(folder), options=_SMALL)
    fixed = tmp_path / "clean.csv"
    with fixed.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "identity"), *done.cleaned])
    again = check(os.fspath(fixed), options=_SMALL)
    assert again.left_out == ()
    assert len(done.cleaned) + len(done.left_out) == done.photos


def test_one_photo_is_checked_and_found_to_be_too_few(tmp_path: Path, faceprint: Faceprint) -> None:
    path = draw(tmp_path / "one.png", 1)
    status, out, _ = faceprint("check", path)
    assert status == 0
    assert "1 photo of 0 identities" in out
    status, _, err = faceprint("check", path, "--strict")
    assert (status, "something was found that harms" in err.lower()) == (1, True)


def test_a_folder_without_photos_and_one_that_is_missing_are_errors(
    tmp_path: Path, faceprint: Faceprint
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no photos; it must hold one subfolder"):
        check(os.fspath(tmp_path / "empty"))
    with pytest.raises(DataError, match="There is no file or folder"):
        check(os.fspath(tmp_path / "none"))
    with pytest.raises(InputError, match="twice"):
        check("-")
    assert faceprint("check", tmp_path / "empty")[0] == 2


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--fix", "list.txt", "ends in .csv"),
        ("--page", "page.txt", "ends in .html"),
        ("--json-file", "no folder/all.json", "There is no folder"),
        ("--fix", "people/list.csv", "among the photos"),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_anything_is_looked_at(
    option: str, name: str, words: str, people: Path, tmp_path: Path, faceprint: Faceprint
) -> None:
    status, out, err = faceprint("check", people, option, tmp_path / name)
    assert (status, out) == (2, "")
    assert words in err
    assert not (tmp_path / name).exists()


def test_the_json_and_the_page_have_every_finding_and_the_page_stands_alone(
    people: Path, tmp_path: Path, faceprint: Faceprint
) -> None:
    shutil.copy(sorted(people.glob("*/*.jpg"))[0], people / "copy & <b>.jpg")
    make_broken(people / "<i>broken")
    said, shown = tmp_path / "check.json", tmp_path / "check.html"
    status, _, _ = faceprint("check", people, "--json-file", said, "--page", shown)
    assert status == 0
    told = json.loads(said.read_text("utf-8"))
    html = shown.read_text("utf-8")
    kinds = [finding["kind"] for finding in told["findings"]]
    assert {"unreadable", "single-photo", "tiny", "no-identity"} <= set(kinds)
    assert all(f'id="{kind}"' in html for kind in kinds)
    assert "<i>broken" not in html
    assert "&lt;i&gt;broken" in html
    assert "http" not in html.replace("http-equiv", "")
    assert 'src="data:image/jpeg;base64,' in html
    assert told["photos"] == told["cleaned"] + len(told["left_out"])


def test_the_worst_comes_first_and_every_kind_has_a_title(people: Path) -> None:
    make_broken(people / "broken")
    done = check(os.fspath(people))
    levels = [list(Level).index(finding.level) for finding in done.findings]
    assert levels == sorted(levels)
    assert set(TITLES) == set(Kind)


def test_a_photo_that_is_gone_before_the_page_is_drawn_is_an_empty_tile(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "d")
    shutil.copy(folder / "p0" / "0_0.png", folder / "p1" / "stolen.png")
    done = check(os.fspath(folder), options=_SMALL)
    (folder / "p1" / "stolen.png").unlink()
    assert '<div class="gone">missing</div>' in page(done).decode()


def test_a_check_that_is_stopped_raises_and_one_that_goes_on_tells_of_each_photo(people: Path) -> None:
    with pytest.raises(Interrupted, match="nothing was written"):
        check(os.fspath(people), should_stop=lambda: True)
    heard: list[str] = []
    done = check(os.fspath(people), on_photo=lambda stage, one: heard.append(stage))
    assert heard == ["looking"] * done.photos


def test_a_moved_photo_is_in_doubt_with_a_model_beside_the_nearest_of_both(
    people: Path, bundle: ModelBundle
) -> None:
    for person in sorted(people.iterdir()):
        first = min(person.iterdir())
        for path in person.iterdir():
            if path != first:
                path.unlink()
        with Image.open(first) as image:
            for number, angle in enumerate((8, -8, 16)):
                image.rotate(angle).save(person / f"turned{number}.jpg")
    one, other = sorted(people.iterdir())[:2]
    (one / "turned1.jpg").rename(other / "moved.jpg")
    heard: list[str] = []
    done = check(
        os.fspath(people), model=bundle, options=_SMALL, on_photo=lambda stage, _: heard.append(stage)
    )
    assert done.judged == heard.count("embedding") == len(done.cleaned)
    finding = found(done)[Kind.WRONG_LABEL]
    assert finding.level is Level.LOOK
    assert "moved.jpg" in {Path(item.photos[0].path or "").name for item in finding.items}
    assert [[photo.path for photo in item.photos] for item in finding.items] == in_doubt(done, bundle)


def in_doubt(done: Check, bundle: ModelBundle) -> list[list[str]]:
    """For each photo in doubt: it, the nearest of another person, and of its own, all embedded at once."""
    paths, people = [path for path, _ in done.cleaned], [name for _, name in done.cleaned]
    _, labels = np.unique(people, return_inverse=True)
    with Embedder.open(bundle) as embedder:
        vectors = embedder.embed(np.stack([pixels.read(path, size=32) for path in paths])).vectors
    return [[paths[one.row], paths[one.other], paths[one.own]] for one in find_label_issues(vectors, labels)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 8), st.sampled_from([0.0, 1000.0]))
def test_doubts_are_those_of_a_brute_force_in_float64(seed: int, n: int, people: int, offset: float) -> None:
    random = np.random.default_rng(seed)
    vectors = (random.normal(size=(n, 5)) + offset).astype(np.float32)
    labels = random.integers(0, people, n)
    exact = vectors.astype(np.float64)
    distances = np.linalg.norm(exact[:, None] - exact[None], axis=2)
    expected = {}
    for row in range(n):
        own = [other for other in np.flatnonzero(labels == labels[row]) if other != row]
        others = np.flatnonzero(labels != labels[row])
        if not own or not len(others):
            continue
        near, far = min(own, key=lambda o: distances[row, o]), min(others, key=lambda o: distances[row, o])
        centroids = (exact[own].mean(0), exact[labels == labels[far]].mean(0))
        mine, theirs = (np.linalg.norm(exact[row] - centroid) for centroid in centroids)
        if distances[row, far] < distances[row, near] and theirs < mine:
            expected[row] = (near, far)
    done = find_label_issues(vectors, labels)
    assert {one.row: (one.own, one.other) for one in done} == expected
    strengths = [one.strength for one in done]
    assert strengths == sorted(strengths, reverse=True)
    assert all(0 < strength <= 1 for strength in strengths)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_copies_are_the_pairs_of_a_comparison_of_all_with_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    broad = random.integers(0, 256, (40, 4, 4)).repeat(8, axis=1).repeat(8, axis=2)
    grey = np.concatenate([broad, broad[:20] + random.normal(0, 8, (20, 32, 32)), np.full((3, 32, 32), 7)])
    grey = np.clip(grey[random.permutation(len(grey))], 0, 255).astype(np.uint8)
    textured = grey.std(axis=(1, 2)) >= 10
    bits = np.unpackbits(prints(grey), axis=1)
    expected = {
        (one, other)
        for one in range(len(grey))
        for other in range(one + 1, len(grey))
        if textured[one] and textured[other]
        and (bits[one] != bits[other]).sum() <= MAX_PRINT_DISTANCE
        and correlations(grey[one], grey[other : other + 1])[0] >= MIN_CORRELATION
    }  # fmt: skip
    pairs = [(pair.first, pair.second) for pair in copies(grey)]
    assert pairs == sorted(expected)
    assert len(pairs) > 0


def test_a_check_without_a_model_imports_no_torch(people: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from retrieval.quality.dataset_check import check; "
        "from retrieval.quality.check_page import page; "
        f"page(check({os.fspath(people)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_training_on_a_list_says_which_photos_by_paths_from_the_list(faces: Path, tmp_path: Path) -> None:
    from training.run import TrainingOptions, _split_card

    table = tmp_path / "list.csv"
    with table.open("w", newline="") as file:
        rows = ((photo.path, photo.identity) for photo in photos.scan([faces]))
        csv.writer(file).writerows([("path", "identity"), *rows])
    split = dataset.load(table, validation_fraction=0.3, min_images=None, seed=0)
    assert split == dataset.load(faces, validation_fraction=0.3, min_images=None, seed=0)
    card = _split_card(split, table, TrainingOptions())
    assert {(tmp_path / name).resolve() for name in card["validation"]} == {
        one.path.resolve() for one in split.validation
    }


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_what_a_list_cannot_name_is_left_out_of_training_with_its_reason(
    name: str, faces: Path, tmp_path: Path
) -> None:
    paths = [os.fspath(path) for path in sorted(faces.glob("*/*.jpg"))]
    lines = [*paths, os.fspath(faces / next(faces.iterdir()).name / "gone.jpg"), "https://example.org/a.jpg"]
    (tmp_path / name).write_text("\n".join(lines if name == "list.txt" else ["path", *lines]) + "\n")
    split = dataset.load(tmp_path / name, validation_fraction=0.3, min_images=2, seed=0)
    assert len(split.train) + len(split.validation) == len(paths)
    assert sorted(reason for _, reason in split.left_out) == ["missing", "unsupported-format"]
