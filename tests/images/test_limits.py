"""What a photo may cost: memory, known from its header, and seconds, in a process that can be killed."""

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retrieval.errors import Interrupted, Reason, RunError, UnreadableImage
from retrieval.images import formats, picture, pixels
from retrieval.images.decoders import Decoders
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.system import cancellation, isolation
from retrieval.system.memory_budget import ByteBudget
from tests.images.test_pixels import MODES, encoded, noisy, photo, smooth, turned

# A picture of 10 x 10 pixels for which Pillow takes many minutes: it copies what is left for each comment.
ENDLESS = b"P3\n10 10\n255\n" + b"#\n" * (32 * 2**20)


def reason_and_detail(data: bytes, **options: Any) -> tuple[Reason, str]:
    with pytest.raises(UnreadableImage) as caught:
        pixels.read(data, **{"size": 16, **options})
    return caught.value.reason, caught.value.detail


# Seconds


@pytest.mark.parametrize("name", ["plain PPM of comments", "run-length BMP"])
def test_a_photo_that_takes_hours_is_too_slow_and_the_next_one_is_read(name: str) -> None:
    data = ENDLESS if name == "plain PPM of comments" else run_length_bmp(9000)
    expected = "decoding it takes longer than 0.3 seconds, which is the limit"
    assert reason_and_detail(data, seconds=0.3) == (Reason.TOO_SLOW, expected)
    assert pixels.read(encoded(Image.new("L", (9, 9)), "BMP"), size=16).shape == (16, 16, 3)


def run_length_bmp(side: int) -> bytes:
    """One pixel a run: Pillow decodes it in Python, for minutes."""
    body = b"\x01\x07" * (side * side // 2)
    palette = bytes(1024)
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
    return (
        b"BM"
        + struct.pack("<IHHI", 14 + 40 + 1024 + len(body), 0, 0, 14 + 40 + 1024)
        + header
        + palette
        + body
    )


def test_decoders_answer_too_slow_as_threads_do() -> None:
    reader = PhotoReader(Preprocessing(16, 1.0))
    with Decoders(1, reader=reader, ahead=1, seconds=0.3) as decoders:
        good, slow = decoders([PNG, ENDLESS], reader)
    assert isinstance(slow, UnreadableImage)
    assert slow.reason is Reason.TOO_SLOW
    assert isinstance(good, list)
    assert np.array_equal(good[0].pixels, pixels.read(PNG, size=16))


PNG = encoded(Image.fromarray(smooth(20, 20)), "PNG")


def test_an_end_that_is_asked_for_ends_a_decoder_that_would_go_on_for_hours() -> None:
    asked = threading.Event()
    with cancellation.stoppable(asked.is_set), ThreadPoolExecutor() as threads:
        underway = threads.submit(pixels.read, ENDLESS, size=16, seconds=3600)
        asked.set()
        with pytest.raises(Interrupted):
            underway.result()


@pytest.mark.parametrize("decoders", ["0", "1"])
def test_ctrl_c_ends_an_ingest_that_decodes_for_hours_and_what_came_before_is_enrolled(
    decoders: str, bundle: ModelBundle, tmp_path: Path
) -> None:
    folder = tmp_path / "people" / "Ada"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(PNG)
    (folder / "2.ppm").write_bytes(ENDLESS)
    command = [sys.executable, "-m", "retrieval.cli.app", "ingest", "g", "people", "--model", bundle.folder]
    command += ["--decoders", decoders, "--batch-size", "1", "--photo-seconds", "3600"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and not is_decoding(process.pid):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        said = process.stdout.read().decode()
    assert "Stopped; what was enrolled stays" in said
    assert process.returncode == 130


def is_decoding(parent: int) -> bool:
    """Whether a process that decodes has been at work for a second of its own time."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            program = (status.parent / "cmdline").read_text()
        except OSError:
            continue
        seconds = int(fields[11]) / os.sysconf("SC_CLK_TCK")
        if int(fields[1]) == parent and "pixels import serve" in program and seconds > 1:
            return True
    return False


ECHO = """
import os, sys
from retrieval.system.isolation import serve
def answer(caller):
    question = caller.receive()
    if question == "crash":
        os.abort()
    if question == "raise":
        raise LookupError
    while question == "forever":
        pass
    caller.send((os.getpid(), question))
serve(int(sys.argv[1]), answer)
"""


def test_a_process_is_used_again_until_it_fails() -> None:
    def ask(question: object, seconds: float = 60) -> Any:
        with isolation.process(ECHO) as process:
            process.send(question)
            return process.receive(seconds)

    first, said = ask([1, "two"])
    assert said == [1, "two"]
    assert ask("again")[0] == first
    for question in ("raise", "crash"):
        with pytest.raises(isolation.Crashed):
            ask(question)
    second = ask("again")[0]
    assert second != first
    with pytest.raises(isolation.TooSlow):
        ask("forever", 0.2)
    third = ask("again")[0]
    assert third != second
    os.kill(third, signal.SIGKILL)
    with pytest.raises(RunError, match=r"was ended from outside \(signal 9\); run the command again"):
        ask("again")


def test_a_photo_is_read_although_the_process_for_it_was_killed() -> None:
    data = encoded(Image.new("RGB", (40, 30), "red"), "BMP")
    expected = pixels.read(data, size=16)
    with isolation.process(pixels._PROGRAM) as process:
        number = process._popen.pid
    os.kill(number, signal.SIGKILL)
    assert np.array_equal(pixels.read(data, size=16), expected)


@pytest.mark.parametrize("module", ["numpy.py", "types.py", "retrieval/__init__.py"])
def test_no_module_in_the_current_folder_is_run(module: str, tmp_path: Path) -> None:
    """It may hold the photos of a stranger. Neither by a process for one photo nor by one of many."""
    (tmp_path / module).parent.mkdir(exist_ok=True)
    (tmp_path / module).write_text("open('run', 'w')\nraise SystemExit")
    for name, kind in (("a.bmp", "BMP"), ("a.jpg", "JPEG")):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (40, 30), "red"), kind))
    program = (
        "from retrieval.images import decoders as decoding, pixels\n"
        "from retrieval.images.photo_reader import PhotoReader\n"
        "from retrieval.images.preprocessing import Preprocessing\n"
        "reader = PhotoReader(Preprocessing(16, 1.0))\n"
        "assert pixels.read('a.bmp', size=16).shape == (16, 16, 3)\n"
        "with decoding.Decoders(1, reader=reader, ahead=1) as decoders:\n"
        "    ((found,),) = decoders([open('a.jpg', 'rb').read()], reader)\n"
        "    assert decoders._processes[0]._popen is not None\n"
        "assert found.pixels.shape == (16, 16, 3)\n"
    )
    command = [sys.executable, "-P", "-c", program]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert not (tmp_path / "run").exists()


def test_a_process_ends_with_a_caller_that_is_killed_while_it_works() -> None:
    program = (
        "import os, signal, sys, time\n"
        "from retrieval.system import isolation\n"
        f"with isolation.process({ECHO!r}) as process:\n"
        "    process.send('which')\n"
        "    print(process.receive(60)[0], flush=True)\n"
        "    process.send('forever')\n"
        "    time.sleep(0.5)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    while _runs(done.stdout.strip()):
        time.sleep(0.02)


def _runs(process: str) -> bool:
    status = Path("/proc") / process / "stat"
    return status.exists() and " Z " not in status.read_text()


# Memory


@pytest.mark.parametrize(
    ("name", "make", "most"),
    [
        ("float TIFF", lambda: encoded(Image.new("F", (5000, 5000)), "TIFF", compression="tiff_deflate"), 8),
        ("16-bit PNG", lambda: encoded(Image.new("I;16", (5000, 5000)), "PNG"), 5),
        ("RGBA PNG", lambda: encoded(Image.new("RGBA", (5000, 5000)), "PNG"), 8),
        ("RGBA JPEG 2000", lambda: encoded(Image.new("RGBA", (2500, 2500)), "JPEG2000"), 30),
        ("WebP", lambda: encoded(Image.new("RGB", (2500, 2500)), "WEBP", lossless=True), 19),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_decoding_and_converting_takes_no_more_memory_than_the_header_says(
    name: str, make: Callable[[], bytes], most: int, tmp_path: Path
) -> None:
    """Besides 32 MiB for what decoders and interpreters need of their own."""
    path = tmp_path / "photo"
    path.write_bytes(make())
    program = (
        "import sys; from contextlib import nullcontext; from retrieval.images import containers, pixels\n"
        "from PIL import Image\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "data = open(sys.argv[1], 'rb').read(); Image.init(); before = peak()\n"
        "def hold(number): print(number); return nullcontext()\n"
        "task, container = pixels._Task('square', 64), containers.parse(data)\n"
        "made = pixels._work_on_container(container, task, hold) if container else "
        "pixels._work(pixels.Picture.of_file(pixels.open_untrusted(data)), task, hold)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True, check=True
    )
    promised, taken = map(int, done.stdout.split())
    assert taken <= promised + 32 * 2**20
    with Image.open(path) as opened:
        assert promised <= most * opened.width * opened.height + 32 * 2**20


def test_a_small_file_that_takes_more_than_a_gibibyte_is_refused_by_its_header() -> None:
    data = encoded(Image.new("RGBA", (640, 650)), "JPEG2000")
    # Of a box and of the code stream, which say them in different orders.
    for size, larger in (((640, 650), (6400, 6500)), ((650, 640), (6500, 6400))):
        data = data.replace(struct.pack(">II", *size), struct.pack(">II", *larger))
    assert len(data) < 8192
    expected = "decoding it takes more than 1,024 MiB of memory, which is the limit"
    assert reason_and_detail(data) == (Reason.TOO_MANY_PIXELS, expected)


def test_threads_hold_no_more_than_their_budget_and_what_is_larger_than_all_of_it_comes_alone() -> None:
    budget = ByteBudget(100)
    most, lock = [0], threading.Lock()

    def hold(number: int) -> None:
        with budget.holding(number), lock:
            most[0] = max(most[0], budget.held)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(hold, [30, 70, 100, 500, 1, 99] * 50))
    assert (most[0], budget.held) == (100, 0)


@pytest.mark.parametrize("name", [name for name in MODES if not isinstance(MODES[name][0], np.ndarray)])
@pytest.mark.parametrize("crop", [1.0, 0.7])
def test_conversion_in_strips_gives_the_very_pixels_of_conversion_at_once(
    name: str, crop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = MODES[name][0]
    image = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    image.load()
    large = image.resize((131, 97), Image.Resampling.NEAREST)
    large.info = image.info
    at_once = [pixels.read(large, size=size, crop=crop) for size in (7, 61, 97, 150)]
    small = np.asarray(pixels.thumbnail(large, side=40))
    monkeypatch.setattr(picture, "_STRIP_BYTES", 131 * 24 * 5)
    in_strips = [pixels.read(large, size=size, crop=crop) for size in (7, 61, 97, 150)]
    assert all(np.array_equal(a, b) for a, b in zip(at_once, in_strips, strict=True))
    assert np.array_equal(small, np.asarray(pixels.thumbnail(large, side=40)))


# Large photos


def test_a_jpeg_of_108_million_pixels_is_read_at_a_reduced_scale() -> None:
    tile = encoded(Image.fromarray(photo(1500, 1125)), "JPEG", quality=60)
    large = encoded(
        Image.open(io.BytesIO(tile)).resize((12_000, 9_000), Image.Resampling.NEAREST), "JPEG", quality=60
    )
    found = pixels.read(large, size=64)
    assert np.abs(found.astype(int) - pixels.read(tile, size=64)).mean() < 3
    assert max(pixels.thumbnail(large, side=100).size) == 100
    glance = pixels.glance(large, side=32)
    assert (glance.width, glance.height) == (12_000, 9_000)
    assert reason_and_detail(large, size=4000)[0] is Reason.TOO_MANY_PIXELS


def test_a_progressive_jpeg_of_many_scans_has_a_process_of_its_own() -> None:
    """Each scan passes over all pixels, whatever bytes it has."""
    data = encoded(Image.fromarray(noisy(640, 480)), "JPEG", progressive=True)
    assert pixels.is_light(data, size=64)
    start = data.rindex(b"\xff\xda")
    assert not pixels.is_light(data[:start] + data[start:-2] * 400 + data[-2:], size=64)


def test_a_png_of_60_000_chunks_has_a_process_of_its_own_and_is_read() -> None:
    at = PNG.index(b"IDAT") - 4
    data = PNG[:at] + chunk(b"tEXt", b"") * 60_000 + PNG[at:]
    assert not pixels.is_light(data, size=16)
    assert np.array_equal(pixels.read(data, size=16), pixels.read(PNG, size=16))


@pytest.mark.parametrize(
    ("sizes", "reduced", "level"),
    [([40, 400], True, 2), ([40, 400], False, 2), ([400, 440], False, 1), ([40, 80, 400], True, 3)],
)
def test_a_tiff_that_begins_with_a_thumbnail_is_read_from_its_picture(
    sizes: list[int], reduced: bool, level: int
) -> None:
    file = io.BytesIO()
    pages = [Image.new("L", (size, size), number + 1) for number, size in enumerate(sizes)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:], tiffinfo={254: int(reduced)})
    # All pages are given the first one's tags, but only the first is asked.
    assert np.unique(pixels.read(file.getvalue(), size=16)).tolist() == [level]


def test_a_raw_photo_in_a_tiff_is_an_unsupported_format_and_not_its_thumbnail() -> None:
    data = encoded(Image.new("L", (40, 30)), "TIFF", tiffinfo={254: 1, 330: 8})
    reason, detail = reason_and_detail(data)
    assert reason is Reason.UNSUPPORTED_FORMAT
    assert detail.endswith("convert it to JPEG")


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"hevx", b"heim", b"msf1", b"mif1"])
def test_without_the_extra_a_heic_photo_or_burst_names_it(
    brand: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    expected = "it is a HEIC photo; install faceprint[heif], or convert it to JPEG"
    assert reason_and_detail(b"\0\0\0\x18ftyp" + brand + bytes(40)) == (Reason.UNSUPPORTED_FORMAT, expected)


def test_with_the_extra_a_heic_photo_is_read() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    photo = Image.linear_gradient("L").convert("RGB")
    pillow_heif.from_pillow(photo).save(file, quality=-1)  # without loss
    found = pixels.read(file.getvalue(), size=64)
    assert np.abs(found.astype(int) - pixels.read(photo, size=64)).max() <= 2


def test_with_the_extra_a_heic_photo_that_is_cut_off_is_truncated_or_damaged() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.linear_gradient("L").convert("RGB")).save(file)
    reason, _ = reason_and_detail(file.getvalue()[: len(file.getvalue()) // 2])
    assert reason in (Reason.TRUNCATED, Reason.DAMAGED)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\x0a" + bytes(30),
        b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(30),
        b"8BPS\0\1" + bytes(30),
        b"\0\0\1\0\1\0" + bytes(30),
        b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
        b"FUJIFILMCCD-RAW 0201",
        b"IIU\0\x18\0\0\0" + bytes(30),
    ],
)
def test_other_formats_of_pictures_are_unsupported_and_say_how_to_go_on(data: bytes) -> None:
    reason, detail = reason_and_detail(data)
    assert reason is Reason.UNSUPPORTED_FORMAT
    assert "convert it to" in detail


# Metadata that decides no pixel


def chunk(name: bytes, body: bytes, *, right: bool = True) -> bytes:
    crc = zlib.crc32(name + body) ^ (not right)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


LONG = np.random.default_rng(1).bytes(2**20) + bytes(2**20)


@pytest.mark.parametrize(
    "odd",
    [
        chunk(b"iCCP", b"x\0\0" + zlib.compress(LONG)),
        chunk(b"iCCP", b"x\0\7" + zlib.compress(b"profile")),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LONG)),
        chunk(b"tEXt", b"Comment\0hello", right=False),
        chunk(b"eXIf", turned(3).tobytes()[6:], right=False),
        chunk(b"gAMA", b"\0\1"),
        chunk(b"cHRM", b"\0\1"),
        chunk(b"pHYs", b""),
        chunk(b"acTL", b"\0\0"),
        chunk(b"fcTL", bytes(3)),
    ],
    ids=lambda odd: f"{odd[4:8].decode()}-{len(odd)}",
)
@pytest.mark.parametrize("place", ["before the pixels", "behind them"])
def test_what_decides_no_pixel_of_a_png_does_no_harm(odd: bytes, place: str) -> None:
    at = PNG.index(b"IDAT" if place == "before the pixels" else b"IEND") - 4
    found = pixels.read(PNG[:at] + odd + PNG[at:], size=16)
    assert np.array_equal(found, pixels.read(PNG, size=16))


JPEG = encoded(Image.fromarray(noisy(64, 48)), "JPEG")
PROGRESSIVE = encoded(Image.fromarray(noisy(64, 48)), "JPEG", progressive=True)


def segment(number: int, body: bytes) -> bytes:
    return bytes([0xFF, number]) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize(
    "odd",
    [
        segment(0xE0, b"JFIF\0"),
        segment(0xE0, b"JFXX\0\x13" + bytes(9)),
        segment(0xE1, b"Exif\0\0nonsense"),
        segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE2, b"ICC_PROFILE\0\1\1nonsense"),
        segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
        segment(0xED, b"Photoshop 3.0\x008BIM\4"),
        segment(0xFE, b""),
    ],
    ids=lambda odd: repr(odd[4:16]),
)
@pytest.mark.parametrize("heard", ["error", "ignore"])
def test_what_decides_no_pixel_of_a_jpeg_does_no_harm(odd: bytes, heard: Any) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter(heard)
        found = pixels.read(JPEG[:2] + odd + JPEG[2:], size=16)
    assert np.array_equal(found, pixels.read(JPEG, size=16))


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE, encoded(Image.new("RGB", (64, 48)), "JPEG")])
@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_that_lacks_only_its_end_mark_is_read(data: bytes, lost: int) -> None:
    assert np.array_equal(pixels.read(data[:-lost], size=16), pixels.read(data, size=16))


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE])
def test_a_jpeg_that_lacks_any_of_its_picture_is_truncated(data: bytes) -> None:
    """Also one that ends between two scans."""
    ends = [*range(data.index(b"\xff\xda") + 20, len(data) - 8, 97)]
    ends += [at for at in range(data.index(b"\xff\xda") + 1, len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert {reason_and_detail(data[:end], size=48)[0] for end in ends} == {Reason.TRUNCATED}


def test_only_orientations_that_pillow_finds_turn_a_picture() -> None:
    for number in range(12):
        for file_format in ("JPEG", "PNG", "WEBP"):
            data = encoded(Image.fromarray(smooth(20, 30)), file_format, exif=turned(number), quality=95)
            opened = Image.open(io.BytesIO(data))
            assert np.array_equal(pixels.read(data, size=16), pixels.read(opened, size=16))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_in_xmp_counts_where_exif_has_none(file_format: str) -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if file_format == "PNG":
        at = PNG.index(b"IDAT") - 4
        data = PNG[:at] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) + PNG[at:]
    else:
        data = encoded(Image.fromarray(smooth(20, 30)), file_format, xmp=xmp, quality=95)
    assert np.array_equal(pixels.read(data, size=16), pixels.read(Image.open(io.BytesIO(data)), size=16))
