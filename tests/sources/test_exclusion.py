"""What every walk passes over: the litter of NAS boxes and desktops, and what patterns say."""

import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pathspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from retrieval import ingest
from retrieval.bulk.calibrate import calibrate
from retrieval.errors import DataError, InputError
from retrieval.gallery.gallery import Gallery
from retrieval.quality.dataset_check import check
from retrieval.sources.exclusion import IGNORE_FILE, Exclusion, PassedOver, Pattern
from retrieval.sources.photos import count, scan
from training.data.dataset import load
from training.evaluation.protocols import photos_of

LITTER = [
    "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found", ".Trash-1000", "Thumbs", "_gsdata_",
    "System Volume Information", "@Recycle", "@tmp", ".@__thumb", "__MACOSX", "desktop.ini", "Thumbs.db",
    "ehthumbs.db", "Icon\r", ".AppleDouble", ".Spotlight-V100", ".picasaoriginals",
    "Lightroom Catalog Previews.lrdata",
]  # fmt: skip


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def taken(root: Path, *exclude: str, passed_over: PassedOver | None = None) -> list[str]:
    """What a scan finds, as paths below `root`."""
    found = scan([root], exclude=exclude, passed_over=passed_over)
    return [os.path.relpath(photo.path or "", root) for photo in found]


@pytest.mark.parametrize("name", LITTER)
def test_litter_is_passed_over_at_any_depth_in_any_case_and_in_archives(name: str, tmp_path: Path) -> None:
    names = [f"{spelled}/Ann/1.jpg" for spelled in sorted({name, name.upper(), name.lower()})]
    names += [f"Ann/{name}/1.jpg", f"Bea/{name}", "Ann/2.jpg"]
    root = fill(tmp_path / "root", *names)
    assert taken(root) == ["Ann/2.jpg"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed, tarfile.open(tmp_path / "a.tar", "w") as tar:
        for one in names:
            packed.write(root / one, one)
            tar.add(root / one, one)
    assert taken(tmp_path / "a.zip") == taken(tmp_path / "a.tar") == ["Ann/2.jpg"]


@pytest.mark.parametrize("name", ["eaDir", "recycle", "Thumb", "tmp", "found", "Icon", "Lrdata", "snapshot"])
def test_what_a_person_may_be_called_is_no_litter(name: str, tmp_path: Path) -> None:
    assert taken(fill(tmp_path, f"{name}/1.jpg")) == [f"{name}/1.jpg"]


def test_what_was_passed_over_is_counted_by_rule_with_the_files_inside(tmp_path: Path) -> None:
    fill(tmp_path, "Ann/1.jpg", "Ann/@eaDir/1.jpg/thumb.jpg", "Ann/@eaDir/2.jpg/thumb.jpg", "@eaDir/x.jpg")
    fill(tmp_path, "Ann/Thumbs.db", "Bea/thumbs.db", "Bea/.git/config", "Bea/.x", "Bea/2.gif", "Bea/3.jpg")
    passed_over = PassedOver()
    assert taken(tmp_path, "*.gif", passed_over=passed_over) == ["Ann/1.jpg", "Bea/3.jpg"]
    assert str(passed_over) == (
        "3 files in 2 folders of @eaDir; 2 files of Thumbs.db; "
        "1 file in 1 folder and 1 file of names that begin with a dot; 1 file of *.gif"
    )
    assert passed_over.as_json()[1] == {"rule": "@eaDir", "files": 3, "folders": 2, "at_least": False}


@pytest.mark.parametrize(("rules", "words"), [(9, "and by 1 more rule"), (10, "and by 2 more rules")])
def test_rules_that_are_not_shown_are_counted(rules: int, words: str) -> None:
    passed_over = PassedOver()
    for number in range(rules):
        passed_over.add_file(f"*.{number}")
    assert str(passed_over).endswith(f"; 1 file of *.7; {words}")


def test_the_patterns_of_a_source_are_not_counted_as_passed_over(tmp_path: Path) -> None:
    """Those in a folder below it are no patterns, and are."""
    fill(tmp_path, "Ann/1.jpg", "Ann/.faceprintignore", ".faceprintignore")
    passed_over = PassedOver()
    assert taken(tmp_path, passed_over=passed_over) == ["Ann/1.jpg"]
    assert str(passed_over) == "1 file of names that begin with a dot"


def test_a_folder_of_more_files_than_are_counted_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.sources.exclusion.MAX_COUNTED", 5)
    fill(tmp_path, "Ann/1.jpg", *(f"#snapshot/{n}.jpg" for n in range(6)), "#recycle/a/b/c/d/e/f.jpg")
    passed_over = PassedOver()
    assert taken(tmp_path, passed_over=passed_over) == ["Ann/1.jpg"]
    assert str(passed_over) == (
        "more than 5 files in 1 folder of #snapshot; more than 0 files in 1 folder of #recycle"
    )


def test_a_folder_that_links_outside_is_passed_over_without_a_look_behind_the_link(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "1.jpg", "2.jpg")
    root = fill(tmp_path / "root", "Ann/1.jpg", "Ann/@eaDir/x.jpg")
    (root / "Ann/@eaDir/out").symlink_to(tmp_path / "elsewhere")
    passed_over = PassedOver()
    assert taken(root, passed_over=passed_over) == ["Ann/1.jpg"]
    assert str(passed_over) == "2 files in 1 folder of @eaDir"


# Patterns


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("*.gif", ["Ann/1.jpg", "Ann/raw/3.jpg", "raw"]),
        ("raw", ["Ann/1.jpg", "Ann/2.gif"]),
        ("raw/", ["Ann/1.jpg", "Ann/2.gif", "raw"]),
        ("/raw", ["Ann/1.jpg", "Ann/2.gif", "Ann/raw/3.jpg"]),
        ("Ann/raw", ["Ann/1.jpg", "Ann/2.gif", "raw"]),
        ("Ann/*.jpg", ["Ann/2.gif", "Ann/raw/3.jpg", "raw"]),
        ("Ann/**", ["raw"]),
        ("Ann/**/", ["Ann/1.jpg", "Ann/2.gif", "raw"]),
        ("**/[12].*", ["Ann/raw/3.jpg", "raw"]),
        ("A[!a]n", ["raw"]),
        ("Ann[!a]1.jpg", ["Ann/1.jpg", "Ann/2.gif", "Ann/raw/3.jpg", "raw"]),
        ("ann", ["Ann/1.jpg", "Ann/2.gif", "Ann/raw/3.jpg", "raw"]),
    ],
)
def test_patterns_mean_what_they_do_in_gitignore(pattern: str, left: list[str], tmp_path: Path) -> None:
    root = fill(tmp_path / "root", "Ann/1.jpg", "Ann/2.gif", "Ann/raw/3.jpg", "raw")
    assert taken(root, pattern) == left
    assert count([root], exclude=[pattern]) == len(left)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for name in ("Ann/1.jpg", "Ann/2.gif", "Ann/raw/3.jpg", "raw"):
            packed.write(root / name, name)
    assert taken(tmp_path / "a.zip", pattern) == left


PIECES = st.lists(
    st.sampled_from(["a", "b", "*", "?", "[ab]", "[!a]", "\\*", "\\a", "."]), min_size=1, max_size=3
)
GLOBS = st.one_of(PIECES.map("".join), st.just("**"))
PATTERNS = st.builds(
    lambda negated, first, globs, last: negated + first + "/".join(globs) + last,
    st.sampled_from(["", "", "!"]),
    st.sampled_from(["", "/"]),
    st.lists(GLOBS, min_size=1, max_size=3),
    st.sampled_from(["", "/"]),
)
NAME = st.text("ab.*", min_size=1, max_size=3).filter(lambda name: name.strip("."))
NAMES = st.lists(NAME, min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(PATTERNS, NAMES)
def test_a_pattern_matches_what_pathspec_says_git_matches(text: str, names: list[str]) -> None:
    """`pathspec` also matches what lies below a matching folder; a walk never comes there.

    What ends in `**/` is about folders only, says git itself, and about files too, says `pathspec`, whose
    `[!a]` also matches a slash.
    """
    assume(not text.endswith("**/") and "[!" not in text)
    pattern = Pattern.parse(text)
    ends = range(1, len(names) + 1)
    ours = any(pattern.matches(names[:end], folder=end < len(names)) for end in ends)
    spec = pathspec.GitIgnoreSpec.from_lines([text.removeprefix("!")])
    assert ours == spec.match_file("/".join(names))


@pytest.mark.timeout(20)
def test_a_hostile_pattern_takes_linear_time() -> None:
    pattern = Pattern.parse("**/" * 50 + "*a" * 100 + "b")
    assert not pattern.matches(["a" * 255] * 200, folder=False)


def test_the_last_pattern_decides_and_may_take_litter_back(tmp_path: Path) -> None:
    fill(tmp_path, "Thumbs/1.jpg", ".private/2.jpg", "Ann/3.gif", "Ann/keep.gif")
    assert taken(tmp_path, "!Thumbs/", "!.private", "*.gif", "!keep.gif") == [
        ".private/2.jpg",
        "Ann/keep.gif",
        "Thumbs/1.jpg",
    ]


def test_accents_match_however_they_are_composed(tmp_path: Path) -> None:
    fill(tmp_path, "Zoe\u0308/1.jpg", "Ann/2.jpg")
    assert taken(tmp_path, "Zo\u00eb") == ["Ann/2.jpg"]


def test_a_faceprintignore_right_in_a_source_is_read_and_the_commands_patterns_come_after_it(
    tmp_path: Path,
) -> None:
    fill(tmp_path, "Ann/1.jpg", "Ann/2.gif", "Bea/3.gif", "Bea/\u540d.jpg")
    (tmp_path / IGNORE_FILE).write_bytes(b"\xef\xbb\xbf# a comment\r\n\r\n*.gif  \r\n\xe5\x90\x8d.jpg\r\n")
    fill(tmp_path / "Ann").joinpath(IGNORE_FILE).write_text("1.jpg\n")
    assert taken(tmp_path) == ["Ann/1.jpg"]
    assert taken(tmp_path, "!3.gif") == ["Ann/1.jpg", "Bea/3.gif"]
    assert taken(tmp_path / "Bea") == ["3.gif", "\u540d.jpg"]


def _a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_a_pipe, "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not a text in UTF-8"),
        (lambda path: path.write_text("*.gif\n!\n"), r"Line 2 of .*'!' is no pattern"),
        (lambda path: path.write_bytes(b"a\n" * 2**20), "more than 1,048,576 bytes"),
    ],
)
def test_a_faceprintignore_that_is_none_is_one_sentence(make, says: str, tmp_path: Path) -> None:
    make(fill(tmp_path, "Ann/1.jpg") / IGNORE_FILE)
    with pytest.raises(DataError, match=says):
        scan([tmp_path])


@pytest.mark.parametrize("pattern", ["", "  ", "/", "!", "a\0", "\udcff"])
def test_what_is_no_pattern_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no pattern"):
        scan([tmp_path], exclude=[pattern])


def test_patterns_without_a_folder_or_an_archive_are_refused_and_files_that_are_named_are_taken(
    tmp_path: Path,
) -> None:
    fill(tmp_path, "Ann/1.jpg", "@eaDir/2.jpg")
    (tmp_path / "list.txt").write_text("Ann/1.jpg\n@eaDir/2.jpg\n")
    with pytest.raises(InputError, match="are about folders and archives"):
        scan([tmp_path / "list.txt"], exclude=["*.jpg"])
    named = [tmp_path / "list.txt", tmp_path / "Ann/1.jpg", tmp_path / "Ann"]
    assert [photo.identity for photo in scan(named, exclude=["*.jpg"])] == ["Ann", "@eaDir", None]


# Everybody who walks


def people(root: Path, ann: str = "Ann", bea: str = "Bea") -> Path:
    """Two people of two photos each, with thumbnails by a NAS, and what patterns are about."""
    noise = np.random.default_rng([ord(letter) for letter in ann])
    names = (f"{ann}/1", f"{ann}/2", f"{bea}/1", f"{bea}/2", f"{ann}/@eaDir/1", "@eaDir/3", f"{bea}/raw/3")
    for name in names:
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return root


COUNTED = [
    {"rule": "@eaDir", "files": 2, "folders": 2, "at_least": False},
    {"rule": "raw/", "files": 1, "folders": 1, "at_least": False},
]


def test_every_walk_passes_over_the_same_files_and_counts_them(gallery: Gallery, tmp_path: Path) -> None:
    root = people(tmp_path / "photos")
    done = ingest(gallery, [root], exclude=["raw/"])
    assert (done.found, done.enrolled, done.rejected) == (4, 4, 0)
    assert done.passed_over.as_json() == done.summary()["passed_over"] == COUNTED
    checked = check(str(root), exclude=["raw/"])
    assert (checked.photos, checked.passed_over.as_json()) == (4, COUNTED)
    split = load(root, validation_fraction=0.5, min_images=None, seed=0, exclude=["raw/"])
    assert len(split.train) + len(split.validation) == 4
    assert split.passed_over.as_json() == COUNTED
    passed_over = PassedOver()
    assert len(photos_of(root, exclude=["raw/"], passed_over=passed_over)) == 4
    assert passed_over.as_json() == COUNTED
    others = people(tmp_path / "others", "Cleo", "Dora")
    report = calibrate(gallery, 0.5, strangers=[others], exclude=["raw/"]).report
    assert report is not None
    assert (report.found, report.passed_over.as_json()) == (4, COUNTED)


def test_a_file_that_is_excluded_now_and_exists_is_not_gone(gallery: Gallery, tmp_path: Path) -> None:
    root = people(tmp_path / "photos")
    ingest(gallery, [root])
    faces = gallery.info().faces
    (root / IGNORE_FILE).write_text("raw/\n")
    assert gallery.remove_missing([root]).paths == ()
    assert gallery.info().faces == faces == 5


def test_where_everything_is_passed_over_the_sentence_says_so(gallery: Gallery, tmp_path: Path) -> None:
    fill(tmp_path / "photos", "Thumbs/Ann/1.jpg")
    with pytest.raises(DataError, match=r"passed over: 1 file in 1 folder of Thumbs"):
        check(str(tmp_path / "photos"))
    with pytest.raises(DataError, match=r"passed over: 1 file in 1 folder of Thumbs"):
        load(tmp_path / "photos", validation_fraction=0.5, min_images=None, seed=0)


def test_exclusions_compare_by_their_patterns() -> None:
    assert Exclusion.of("raw") == Exclusion.of(["raw"]) != Exclusion.of(["r", "a", "w"])
