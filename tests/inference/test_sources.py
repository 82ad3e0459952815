"""What is segmented: files, folders, patterns, addresses and videos, found and read."""

import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from denseclip_hf.inference import find_sources, predict_sources, read_image_of
from denseclip_hf.inference.sources import read_frames
from helpers.images import photo
from helpers.models import segmenter


def test_sources_are_files_folders_patterns_and_addresses(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "abcde":
        photo((40, 30)).save(photos / f"{name}.png")
    (tmp_path / "more" / "deep").mkdir(parents=True)
    for name in ("A.jpg", "deep/a.webp", "notes.txt"):
        (tmp_path / "more" / name).write_bytes(b"")
    inputs = [
        photos,
        tmp_path / "more/**/*.[jw]*",
        photos / "a.png",
        "https://host.org/x/a.png?size=3",
        "http://host.org",
    ]
    sources, problems = find_sources(inputs)
    assert not problems
    names = [source.name for source in sources]
    assert names[:5] == list("abcde") and sorted(names[5:7]) == ["A_2", "a_3"] and names[7:] == ["a_4", "image"]
    assert len({name.casefold() for name in names}) == len(names) == 9


def test_what_is_left_out_of_a_folder_is_said(tmp_path, caplog):
    for name in ("a.jpg", "b.HEIC", "c.heic", "README", ".DS_Store"):
        (tmp_path / name).write_bytes(b"")
    caplog.set_level("INFO", "denseclip_hf")
    assert [source.name for source in find_sources([tmp_path])[0]] == ["a"]
    assert caplog.messages == [f"Left out of {tmp_path}: .heic, README."]


def test_photographs_are_upright_and_animations_show_their_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    photo((40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    first, second = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    first.save(tmp_path / "animated.gif", save_all=True, append_images=[second])
    animated, turned = find_sources([tmp_path])[0]
    assert read_image_of(turned).size == (30, 40)
    assert read_image_of(animated).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("limit", [3000, 5000], ids=["bomb", "above the limit"])
def test_huge_images_are_refused(tmp_path, monkeypatch, limit):
    photo((90, 70)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    summary = predict_sources(segmenter(), find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == 0 and "huge.png" in summary.problems[0] and "pixels" in summary.problems[0]


class Handler(BaseHTTPRequestHandler):
    over = threading.Event()  # set when a test ends, so that no answer is waited for

    def do_GET(self):
        if "slow" in self.path:
            self.over.wait(60)
        for _ in range(600 if "dripping" in self.path else 0):  # never silent for long
            self.wfile.write(b"H")
            self.over.wait(0.1)
        stream = BytesIO()
        photo((40, 30)).save(stream, "PNG")
        self.send_response(404 if "missing" in self.path else 200)
        self.end_headers()
        self.wfile.write(b"<html>no image</html>" if ".html" in self.path else stream.getvalue())
        for _ in range(1200 if "endless" in self.path else 0):
            self.wfile.write(b"0" * 1000)
            self.over.wait(0.05)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Handler.over.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # when nobody listens any more
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    Handler.over.set()
    server.shutdown()


@pytest.mark.parametrize(
    ("path", "timeout", "reason"),
    [
        ("photo.png", 60, None),
        ("missing.png", 60, "Not Found"),
        ("page.html", 60, "page.html"),
        ("slow.png", 0.5, "0.5 seconds"),
        ("dripping.png", 0.5, "0.5 seconds"),
        ("endless.png", 0.5, "0.5 seconds"),
    ],
)
def test_addresses(server, tmp_path, path, timeout, reason):
    sources, _ = find_sources([f"{server}/{path}"])
    asked, start = segmenter(), time.monotonic()
    summary = predict_sources(asked, sources, tmp_path, timeout=timeout, progress=False)
    assert summary.done == (reason is None) and all(reason in problem for problem in summary.problems)
    assert reason is None or time.monotonic() - start < 30  # the server is done a minute later


def test_downloads_are_bounded(server, tmp_path, monkeypatch):
    monkeypatch.setattr("denseclip_hf.inference.sources.MAX_DOWNLOAD", 10)
    summary = predict_sources(segmenter(), find_sources([f"{server}/photo.png"])[0], tmp_path, progress=False)
    assert summary.done == 0 and "MiB" in summary.problems[0]


def test_an_address_without_server_is_one_sentence(tmp_path):
    summary = predict_sources(segmenter(), find_sources(["http://127.0.0.1:9/x.png"])[0], tmp_path, progress=False)
    assert summary.done == 0 and "http://127.0.0.1:9/x.png" in summary.problems[0]


# Videos


# Where a telephone says which way a video was held: a matrix in the file, of 16-bit fractions.
MATRICES = {
    0: (1, 0, 0, 0, 1, 0, 0, 0, 1 << 14),
    90: (0, 1, 0, -1, 0, 0, 0, 0, 1 << 14),
    180: (-1, 0, 0, 0, -1, 0, 0, 0, 1 << 14),
    270: (0, -1, 0, 1, 0, 0, 0, 0, 1 << 14),
}


def write_video(path, frames, turn=0):
    """An MPEG-4 film of images of one size, to be shown turned to the right by so many degrees."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=5)
        (stream.width, stream.height), stream.pix_fmt = frames[0].size, "yuv420p"
        for frame in [*map(av.VideoFrame.from_image, frames), None]:
            film.mux(stream.encode(frame))
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", *(value << 16 for value in MATRICES[turn]))
    path.write_bytes(content)


def test_frames_of_a_video_are_images(tmp_path):
    write_video(tmp_path / "clip.mp4", [photo((96, 64), seed) for seed in range(7)])
    sources, _ = find_sources([tmp_path / "clip.mp4"])
    summary = predict_sources(segmenter(), sources, tmp_path / "out", every=3, max_frames=2, progress=False)
    assert summary.done == 2
    assert sorted(file.name for file in (tmp_path / "out").glob("*_mask.png")) == [
        "clip_000000_mask.png",
        "clip_000003_mask.png",
    ]


def test_a_frame_and_an_image_of_one_name_do_not_replace_each_other(tmp_path):
    write_video(tmp_path / "clip.mp4", [photo((96, 64))] * 3)
    photo((40, 30)).save(tmp_path / "CLIP_000001.png")
    inputs = [tmp_path / "clip.mp4", tmp_path / "CLIP_000001.png"]
    for order in (inputs, inputs[::-1]):
        sources, _ = find_sources(order)
        summary = predict_sources(segmenter(), sources, tmp_path / "out", overwrite=True, progress=False)
        assert summary.done == 3 and len(summary.problems) == 1
    assert "clip.mp4" in summary.problems[0]
    summary = predict_sources(segmenter(), find_sources(inputs)[0], tmp_path / "new", progress=False)
    assert sorted(file.name for file in (tmp_path / "new").glob("*_mask.png")) == [
        f"clip_00000{number}_mask.png" for number in range(3)
    ]
    assert "CLIP_000001.png" in summary.problems[0]


def test_frames_larger_than_an_image_may_be_are_refused(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", [photo((96, 64))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 64 - 1)
    summary = predict_sources(segmenter(), find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == 0 and "96x64" in summary.problems[0]


@pytest.mark.parametrize("damage", ["no film", "a codec that nobody knows"])
def test_a_video_that_cannot_be_decoded_is_one_sentence(tmp_path, damage):
    write_video(tmp_path / "clip.mp4", [photo((96, 64))])
    content = (tmp_path / "clip.mp4").read_bytes().replace(b"mp4v", b"zzzz").replace(b"esds", b"xxxx")
    (tmp_path / "clip.mp4").write_bytes(b"no film" if damage == "no film" else content)
    photo((40, 30)).save(tmp_path / "photo.png")
    summary = predict_sources(segmenter(), find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == 1 and "clip.mp4" in summary.problems[0]


@pytest.mark.parametrize("turn", MATRICES)
def test_frames_of_a_video_are_upright(tmp_path, turn):
    frame = Image.new("RGB", (64, 32), "red")
    frame.paste("blue", (0, 0, 64, 16))
    write_video(tmp_path / "clip.mp4", [frame] * 2, turn)
    expected = np.asarray(frame.rotate(-turn, expand=True), dtype=int)
    frames = list(read_frames(find_sources([tmp_path])[0][0]))
    assert len(frames) == 2
    for _, found in frames:
        assert found.size == expected.shape[1::-1] and np.abs(np.asarray(found) - expected).mean() < 10


def test_a_video_without_its_library_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.MP4").write_bytes(b"")
    sources, _ = find_sources([tmp_path])
    with pytest.raises(ImportError, match="pip install av"):
        next(read_frames(sources[0]))
    assert "pip install av" in predict_sources(segmenter(), sources, tmp_path / "out", progress=False).problems[0]
