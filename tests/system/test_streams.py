"""The console script whatever its launcher gives it: closed streams, readers that go, locales of old."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval.errors import Reason
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle

Done = tuple[int, str, str]


def run(*arguments: object, redirect: str = "", environment: dict[str, str] | None = None, **options) -> Done:
    """`faceprint ARGUMENTS` in a shell that redirects its streams: exit status, standard output and error."""
    command = ["sh", "-c", f'exec "$0" "$@" {redirect}', sys.executable, "-m", "retrieval.cli.app"]
    done = subprocess.run(
        [*command, *map(os.fspath, map(_argument, arguments))],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )
    return done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode()


def _argument(argument: object) -> "str | bytes | os.PathLike[str]":
    return argument if isinstance(argument, bytes | os.PathLike) else str(argument)


@pytest.fixture
def photos(faces: Path, tmp_path: Path) -> Path:
    """Two people with two photos each."""
    for person in sorted(faces.iterdir())[:2]:
        (tmp_path / "photos" / person.name).mkdir(parents=True)
        for photo in sorted(person.iterdir())[:2]:
            shutil.copy(photo, tmp_path / "photos" / person.name)
    return tmp_path / "photos"


@pytest.fixture
def enrolled(bundle: ModelBundle, photos: Path, tmp_path: Path) -> Path:
    with Gallery.create(tmp_path / "g", bundle) as gallery:
        gallery.enroll([(path, path.parent.name) for path in sorted(photos.glob("*/*"))])
    return tmp_path / "g"


@pytest.mark.parametrize("redirect", [">&-", "<&- >&- 2>&-"])
def test_ingest_with_closed_streams_enrolls_everything_and_exits_0(
    redirect: str, bundle: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    arguments = ("ingest", tmp_path / "g", photos, "--model", bundle.folder)
    status, _, err = run(*arguments, redirect=redirect)
    assert (status, "Traceback" in err) == (0, False)
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.info().faces == 4
        assert gallery.verify().whole


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("info", "g", "--json"),
        ("backup", "g", "b"),
    ],
)
def test_commands_without_an_output_exit_by_their_own_outcome(
    arguments: tuple[str, ...], enrolled: Path, tmp_path: Path
) -> None:
    assert run(*arguments, redirect=">&-", cwd=tmp_path) == (0, "", "")
    assert run("info", "nothing here", redirect=">&- 2>&-", cwd=tmp_path)[0] == 2


def test_a_list_on_a_closed_standard_input_is_an_input_error(enrolled: Path) -> None:
    for arguments in (("ingest", enrolled, "-"), ("search", enrolled, "--paths", "-")):
        status, _, err = run(*arguments, redirect="<&-")
        assert (status, "no standard input" in err, "Traceback" in err) == (2, True, False)


def _without_a_reader(*arguments: object) -> Done:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return run(*arguments, stdout=writing)
    finally:
        os.close(writing)


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_a_search_whose_reader_has_gone_exits_0_without_a_word_of_it(
    json_option: tuple[str, ...], enrolled: Path
) -> None:
    status, _, err = _without_a_reader("search", enrolled, "--face", "1", *json_option)
    assert (status, err.splitlines()[0].split(":")[0], len(err.splitlines())) == (0, "no decision", 1)


def test_an_ingest_whose_reader_has_gone_goes_on_to_its_end(
    bundle: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    arguments = (
        "ingest",
        tmp_path / "g",
        photos,
        "--model",
        bundle.folder,
        "--log-json",
        "--batch-size",
        "1",
    )
    assert _without_a_reader(*arguments) == (0, "", "")
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.info().faces == 4


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no disk that is always full")
def test_output_that_a_full_disk_refuses_is_a_sentence_and_status_1_after_the_run(
    bundle: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    arguments = ("ingest", tmp_path / "g", photos, "--model", bundle.folder, "--log-json")
    status, _, err = run(*arguments, redirect=">/dev/full")
    assert (status, err) == (1, "faceprint: The output is not complete: no space left on device.\n")
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.info().faces == 4


# Locales


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a locale in ISO 8859-1, which is made for it."""
    folder = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / "en_US.ISO-8859-1"]
    if shutil.which("localedef") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no locale in ISO 8859-1 can be made here")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1"}


C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(params=["C", "latin_1"])
def locale(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of a locale that is not UTF-8."""
    return C if request.param == "C" else request.getfixturevalue("latin_1")


def named(photos: Path) -> Path:
    """Photos under names in Latin and Han letters, and one in bytes that are not UTF-8."""
    found = sorted(photos.glob("*/*"))
    root = photos.parent / "named"
    for name, photo in zip(["Zoë/ä.jpg", "名/名.jpg"], found, strict=False):
        (root / name).parent.mkdir(parents=True)
        shutil.copy(photo, root / name)
    shutil.copy(found[2], os.fsencode(root / "Zoë") + b"/\xe4.jpg")
    return root


def test_names_are_stored_and_shown_in_utf_8_whatever_the_locale(
    locale: dict[str, str], bundle: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    root, gallery, report = named(photos), tmp_path / "gallery of Zoë", tmp_path / "report.jsonl"
    shutil.copy(sorted(photos.glob("*/*"))[3], tmp_path / "é.jpg")
    (tmp_path / "list.csv").write_text(f"path,identity\n{tmp_path}/é.jpg,Ærø\n", "utf-8")
    names = os.fsencode(root) + b"/Zo\xc3\xab/\xc3\xa4.jpg\n" + os.fsencode(root) + b"/Zo\xc3\xab/\xe4.jpg\n"
    sources = (root, tmp_path / "list.csv", "-")
    arguments = ("ingest", gallery, *sources, "--model", bundle.folder, "--report", report)
    status, out, err = run(*arguments, environment=locale, input=names)
    assert (status, err.strip()) == (0, "")
    assert "found 6 = enrolled 3 + already known 1 + duplicate 0 + rejected 2" in out
    lines = [json.loads(line) for line in report.read_text("utf-8").splitlines()]
    rejected = [(line["path"], line["reason"]) for line in lines if line["status"] == "rejected"]
    assert rejected == [(f"{root}/Zoë/\\xe4.jpg", Reason.NAME_NOT_UTF8)] * 2
    with Gallery.open(gallery) as opened, opened.vault.store.read() as reader:
        faces = {(face.identity, face.path) for face in reader.faces([1, 2, 3]).values()}
    assert faces == {
        ("Zoë", f"{root}/Zoë/ä.jpg"),
        ("名", f"{root}/名/名.jpg"),
        ("Ærø", f"{tmp_path}/é.jpg"),
    }
    status, out, _ = run("search", gallery, root / "名/名.jpg", "--json", environment=locale)
    assert json.loads(out)[0]["matches"][0]["path"] == f"{root}/名/名.jpg"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "latin-1:strict", "utf-16"])
def test_an_encoding_that_somebody_asks_for_is_taken_and_what_it_lacks_is_escaped_as_in_json(
    encoding: str, bundle: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    root = named(photos)
    with Gallery.create(tmp_path / "g", bundle) as gallery:
        gallery.enroll([(root / "Zoë/ä.jpg", "Zoë"), (root / "名/名.jpg", "名 😀")])
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "retrieval.cli.app", "search", tmp_path / "g", "--paths", "-"]
    listed = os.fsencode(root / "名/名.jpg")  # names of files are UTF-8 all the same
    for options in (["--json"], []):
        done = subprocess.run([*command, *options], env=environment, capture_output=True, input=listed)
        name = "utf-8" if encoding == "ascii" else encoding.partition(":")[0]
        assert done.returncode == 0
        assert "Traceback" not in done.stderr.decode(name)
        out = done.stdout.decode(name)
        assert "Zoë" in out
        assert ("名" in out) == (not name.startswith("latin-1"))
        if options:
            found = json.loads(out)[0]["matches"]
            assert {one["identity"] for one in found} == {"Zoë", "名 😀"}
            assert {one["path"] for one in found} == {f"{root}/Zoë/ä.jpg", f"{root}/名/名.jpg"}


LIBRARY = """
import sys
from retrieval import Gallery, ModelBundle, ingest
from retrieval.sources.photos import scan
root, list, bundle, folder = sys.argv[1:]
for source in (root, list):
    found = scan([source])
    print([(one.identity and one.identity.encode().hex(), one.problem, one.why) for one in found])
with Gallery.create(folder, ModelBundle.load(bundle)) as gallery:
    print(ingest(gallery, [root, list]).summary()["reasons"])
    print(len(gallery.missing_files([root]).paths))
"""


def test_in_a_program_that_reads_names_by_another_encoding_such_names_are_rejected_with_what_to_do(
    locale: dict[str, str], bundle: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    """What is stored is never garbled, ASCII goes on to work, and nothing is taken for gone."""
    root = named(photos)
    (root / "plain").mkdir()
    shutil.copy(sorted(photos.glob("*/*"))[3], root / "plain" / "a.jpg")
    (tmp_path / "list.csv").write_text(f"path,identity\n{root}/Zoë/ä.jpg,Zoë\n", "utf-8")
    arguments = [root, tmp_path / "list.csv", bundle.folder, tmp_path / "g"]
    environment = {**os.environ, **locale, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", LIBRARY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    walked, listed, reasons, gone = done.stdout.decode().splitlines()
    assert walked.count("start Python with -X utf8 or PYTHONUTF8=1") == 3
    assert "Zoë".encode().hex() in walked
    assert listed.count("start Python with -X utf8 or PYTHONUTF8=1") == 1
    assert (reasons, gone) == ("{'name-not-utf8': 4}", "0")
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.info().faces == 1


def test_a_program_that_cannot_get_into_utf_8_mode_does_not_restart_for_ever(enrolled: Path) -> None:
    environment = {**C, "FACEPRINT_RESTARTED_IN_UTF8": "1"}
    assert run("info", enrolled, environment=environment)[0] == 0


@pytest.mark.parametrize("encoding", ["idna", "undefined"])
def test_an_encoding_that_is_none_for_texts_is_not_taken(encoding: str, tmp_path: Path) -> None:
    """A codec for names of hosts takes no error handler, and the sentence would be lost with the stream."""
    folder = tmp_path / "Zoë"
    assert run("info", folder, environment={"PYTHONIOENCODING": encoding}) == (
        2,
        "",
        f"faceprint: There is no gallery {folder}; make one with `faceprint ingest`.\n",
    )
