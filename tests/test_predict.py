import importlib.util
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from transformers import AutoTokenizer

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.example_clip import example_clip_model, example_corpus, make_example_tokenizer
from denseclip_hf.image_processing_denseclip import DenseCLIPImageProcessorPil
from denseclip_hf.inference import overlay
from denseclip_hf.pictures import confusion_picture, heat_map, indexed_picture, overlay_with_legend
from denseclip_hf.prediction import Segmenter, predict_sources
from denseclip_hf.prediction_inputs import find_sources, read_frames, read_picture


SCRIPT = Path(__file__).parent.parent / "scripts" / "predict.py"
PALETTE = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
SIZES = {"a": (90, 70), "b": (64, 100), "c": (90, 70), "d": (70, 90), "e": (90, 70)}


def picture(size=(90, 70), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("predict_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model that knows words: around the example's CLIP with random weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_example_tokenizer(example_corpus(num_scenes=5), vocab_size=700)
    torch.manual_seed(0)
    sizes = {"context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2, "neck_hidden_size": 8}
    model = DenseCLIPForSemanticSegmentation.from_clip(
        example_clip_model(tokenizer, "vit"), ["sky", "road", "tree"], tokenizer, image_size=64, **sizes
    ).eval()
    with torch.no_grad():
        logits = model.window_logits(torch.randn(2, 3, 64, 64))
        model.decode_head.classifier.bias -= logits.mean((0, 2, 3))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        picture(size, seed).save(folder / f"{name}.png")
    return folder


def segmenter(model=None, **options):
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    return Segmenter(tiny_model() if model is None else model, processor, **options)


# The script


def test_script_writes_masks_overlays_and_heat_maps(script, model_dir, photos, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--model", str(model_dir), "--output_dir", str(out), "--score_maps", "tree,a red car"]
    assert script.main([str(photos), *flags, "--batch_size", "2"]) == 0
    assert "5 segmented" in capsys.readouterr().out
    assert len(list(out.iterdir())) == 5 * 4
    model = DenseCLIPForSemanticSegmentation.from_pretrained(model_dir)
    processor = DenseCLIPImageProcessorPil.from_pretrained(model_dir)
    for name, (width, height) in SIZES.items():
        mask = Image.open(out / f"{name}_mask.png")
        assert (mask.mode, mask.size) == ("P", (width, height))
        with torch.no_grad():
            outputs = model(**processor(Image.open(photos / f"{name}.png"), return_tensors="pt"))
        expected = processor.post_process_semantic_segmentation(outputs, [(height, width)])[0].numpy()
        assert (np.asarray(mask) == expected).mean() > 0.999
        overlay = Image.open(out / f"{name}_overlay.png")
        assert overlay.width == width and overlay.height > height
        for score in ("score_0_tree", "score_1_a-red-car"):
            assert Image.open(out / f"{name}_{score}.png").size == (width, height)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_script_segments_new_words_in_any_precision(script, model_dir, photos, tmp_path, dtype):
    flags = ["--model", str(model_dir), "--output_dir", str(tmp_path / "out"), "--inference_mode", "slide"]
    words = ["--words", "a cat,dog,grass,house", "--templates", "--score_maps", "dog"]
    assert script.main([str(photos / "a.png"), *flags, *words, "--dtype", dtype]) == 0
    assert np.asarray(Image.open(tmp_path / "out" / "a_mask.png")).max() < 4


def test_script_reads_sentences_with_commas_from_a_file(script, model_dir, photos, tmp_path):
    (tmp_path / "words.txt").write_text("\ufeffa tall, green tree\nsky\n\n", encoding="utf-8")
    flags = ["--model", str(model_dir), "--output_dir", str(tmp_path / "out"), "--words", str(tmp_path / "words.txt")]
    assert script.main([str(photos / "a.png"), *flags, "--score_maps", str(tmp_path / "words.txt")]) == 0
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["a_mask.png", "a_overlay.png", "a_score_0_a-tall--green-tree.png", "a_score_1_sky.png"]


def test_a_file_of_words_that_is_missing_is_one_sentence(script, photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(photos), "--model", "x", "--words", str(tmp_path / "none.txt")])
    assert "none.txt can not be read as a file of names" in capsys.readouterr().err


def test_help_tells_the_largest_picture(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels" in capsys.readouterr().out


def test_script_goes_on_after_what_it_can_not_read(script, model_dir, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no picture")
    (photos / "zero.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    inputs = [str(photos), str(tmp_path / "empty"), str(tmp_path / "missing.jpg")]
    assert script.main([*inputs, "--model", str(model_dir), "--output_dir", str(tmp_path / "out")]) == 1
    out, error = capsys.readouterr()
    assert "5 segmented" in out and "4 problems" in out
    problems = [line for line in error.splitlines() if "tmp" in line]
    assert [p for p in problems if "broken.jpg cannot be read" in p] and [p for p in problems if "zero.png" in p]
    assert "empty holds no pictures" in error and "/empty/**/*.jpg'" in error and "missing.jpg is no file" in error
    assert "Traceback" not in error and "BytesIO" not in error and "it is none of " in error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch_size", "0"], "at least 1"),
        (["--words", "cat,cat"], "'cat' is given twice"),
        (["--words", "cat,,dog"], "none of them empty"),
        (["--score_maps", "sky,sky"], "'sky' is given twice"),
        (["--words", "word " * 90], "tokens with SOS and EOS"),
    ],
)
def test_script_refuses_bad_flags(script, model_dir, photos, tmp_path, capsys, flags, sentence):
    common = [str(photos), "--model", str(model_dir), "--output_dir", str(tmp_path / "out")]
    assert script.main([*common, *flags]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("model", ["nowhere/to/be/found", "/no/folder"])
def test_a_model_that_is_not_there_is_one_sentence(script, photos, tmp_path, capsys, model):
    assert script.main([str(photos), "--model", model, "--output_dir", str(tmp_path / "out")]) == 1
    assert f"{model} is neither a folder here nor a model on the Hub" in capsys.readouterr().err


# Finding and reading


def test_sources_are_files_folders_patterns_and_addresses(photos, tmp_path):
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
    assert names[:5] == list("abcde") and sorted(names[5:7]) == ["A_2", "a_3"] and names[7:] == ["a_4", "picture"]
    assert len({name.casefold() for name in names}) == len(names) == 9


@pytest.mark.parametrize("existing", ["a_mask.png", "a_overlay.png"])
def test_nothing_is_overwritten_unasked(photos, tmp_path, existing):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / existing).write_text("precious")
    sources, _ = find_sources([photos])
    summary = predict_sources(segmenter(), sources, tmp_path / "out", progress=False)
    assert summary.done == 4 and "is there already" in summary.problems[0] and len(summary.problems) == 1
    assert (tmp_path / "out" / existing).read_text() == "precious"
    assert predict_sources(segmenter(), sources, tmp_path / "out", overwrite=True, progress=False).done == 5


def test_batches_give_what_single_pictures_give(photos, tmp_path):
    sources, _ = find_sources([photos])
    calls, model = [], tiny_model("resnet")
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for batch_size in (1, 2):
        predict_sources(segmenter(model), sources, tmp_path / str(batch_size), batch_size=batch_size, progress=False)
    assert calls == [1] * 5 + [2, 1, 1, 1]  # a with c, then what is left
    for name in SIZES:
        one, two = (np.asarray(Image.open(tmp_path / n / f"{name}_mask.png")) for n in "12")
        assert (one == two).mean() > 0.999


def test_more_classes_than_a_palette_are_announced(caplog):
    with caplog.at_level("WARNING"):
        segmenter(tiny_model(num_labels=257, class_token_ids=[[98, 1, 99]] * 257))
    assert "257 classes do not fit a palette" in caplog.text


def test_a_picture_that_can_not_be_preprocessed_is_left_out(tmp_path, photos):
    asked = segmenter()
    asked.image_processor.size = {"height": 10**5, "width": 10**5}
    summary = predict_sources(asked, find_sources([photos])[0], tmp_path / "out", progress=False)
    assert summary.done == 0 and len(summary.problems) == 5 and "would have 100000" in summary.problems[0]


def test_few_pictures_wait_for_their_size(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(20):
        picture((64 + 2 * index, 64)).save(folder / f"{index:02d}.png")
    asked = segmenter()
    prepared, preprocess = [], asked.preprocess
    asked.preprocess = lambda image: prepared.append(1) or preprocess(image)
    waiting, run = [], asked.model.forward
    asked.model.forward = lambda pixels: waiting.append(len(prepared)) or run(pixels)
    predict_sources(asked, find_sources([folder])[0], tmp_path / "out", batch_size=2, progress=False)
    assert waiting[0] == 8 and len(waiting) == 20


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "I;16", "1"])
def test_any_kind_of_picture_is_read(tmp_path, mode):
    file = tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    (Image.new("I;16", (40, 30)) if mode == "I;16" else picture((40, 30)).convert(mode)).save(file)
    image = read_picture(find_sources([file])[0][0])
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_photographs_are_upright_and_animations_show_their_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture((40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    first, second = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    first.save(tmp_path / "animated.gif", save_all=True, append_images=[second])
    animated, turned = find_sources([tmp_path])[0]
    assert read_picture(turned).size == (30, 40)
    assert read_picture(animated).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("limit", [3000, 5000], ids=["bomb", "above the limit"])
def test_huge_pictures_are_refused(tmp_path, monkeypatch, limit):
    picture((90, 70)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    summary = predict_sources(segmenter(), find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == 0 and "huge.png" in summary.problems[0] and "more" in summary.problems[0]


@pytest.mark.parametrize(
    ("size", "sentence"),
    [((1, 1), None), ((5000, 1), "too small"), ((1, 5000), "too small"), ((300, 20), "too small")],
)
def test_extreme_shapes_give_a_result_or_a_sentence(tmp_path, size, sentence):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    summary = predict_sources(segmenter(), find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == (sentence is None)
    if sentence:
        assert sentence in summary.problems[0]
    else:
        assert Image.open(tmp_path / "out" / "x_mask.png").size == size


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if "slow" in self.path:
            time.sleep(1.5)
        for _ in range(20 if "dripping" in self.path else 0):  # never silent for long
            self.wfile.write(b"H")
            time.sleep(0.1)
        stream = BytesIO()
        picture((40, 30)).save(stream, "PNG")
        self.send_response(404 if "missing" in self.path else 200)
        self.end_headers()
        self.wfile.write(b"<html>no picture</html>" if ".html" in self.path else stream.getvalue())
        for _ in range(40 if "endless" in self.path else 0):
            self.wfile.write(b"0" * 1000)
            time.sleep(0.05)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("photo.png", None),
        ("missing.png", "can not be fetched (Not Found)"),
        ("page.html", "cannot be read as a picture"),
        ("slow.png", "can not be fetched (it takes longer than 0.5 seconds)"),
        ("dripping.png", "can not be fetched (it takes longer than 0.5 seconds)"),
        ("endless.png", "can not be fetched (it takes longer than 0.5 seconds)"),
    ],
)
def test_addresses(server, tmp_path, path, sentence):
    sources, _ = find_sources([f"{server}/{path}"])
    asked, start = segmenter(), time.monotonic()
    summary = predict_sources(asked, sources, tmp_path, timeout=0.5, progress=False)
    assert summary.done == (sentence is None) and all(sentence in problem for problem in summary.problems)
    assert sentence is None or time.monotonic() - start < 1


def test_downloads_are_bounded(server, tmp_path, monkeypatch):
    monkeypatch.setattr("denseclip_hf.prediction_inputs.MAX_DOWNLOAD", 10)
    summary = predict_sources(segmenter(), find_sources([f"{server}/photo.png"])[0], tmp_path, progress=False)
    assert "more than 0 MiB" in summary.problems[0]


def test_an_address_without_server_is_one_sentence(tmp_path):
    summary = predict_sources(segmenter(), find_sources(["http://127.0.0.1:9/x.png"])[0], tmp_path, progress=False)
    assert summary.done == 0 and "http://127.0.0.1:9/x.png can not be fetched" in summary.problems[0]


# Videos


# Where a telephone says which way a video was held: a matrix in the file, of 16-bit fractions.
MATRICES = {
    0: (1, 0, 0, 0, 1, 0, 0, 0, 1 << 14),
    90: (0, 1, 0, -1, 0, 0, 0, 0, 1 << 14),
    180: (-1, 0, 0, 0, -1, 0, 0, 0, 1 << 14),
    270: (0, -1, 0, 1, 0, 0, 0, 0, 1 << 14),
}


def write_video(path, frames, turn=0):
    """An MPEG-4 film of pictures of one size, to be shown turned to the right by so many degrees."""
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


def test_frames_of_a_video_are_pictures(tmp_path):
    write_video(tmp_path / "clip.mp4", [picture((96, 64), seed) for seed in range(7)])
    sources, _ = find_sources([tmp_path / "clip.mp4"])
    summary = predict_sources(segmenter(), sources, tmp_path / "out", every=3, max_frames=2, progress=False)
    assert summary.done == 2
    assert sorted(file.name for file in (tmp_path / "out").glob("*_mask.png")) == [
        "clip_000000_mask.png",
        "clip_000003_mask.png",
    ]


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
    assert "PyAV" in predict_sources(segmenter(), sources, tmp_path / "out", progress=False).problems[0]


def test_a_broken_video_is_one_sentence(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "clip.mp4").write_bytes(b"no film")
    summary = predict_sources(segmenter(), find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == 0 and "clip.mp4 can not be read as a video (" in summary.problems[0]


# Words


def test_other_words_need_a_tokenizer():
    with pytest.raises(ValueError, match="'car' is none of the model's classes"):
        segmenter(score_maps=["class 1", "car"])


@pytest.mark.parametrize("option", ["words", "score_maps"])
def test_a_text_is_no_list_of_words(option):
    with pytest.raises(ValueError, match="must be a list of texts"):
        segmenter(**{option: "car"})


def test_a_class_of_several_phrasings_is_called_by_its_first(model_dir):
    model = DenseCLIPForSemanticSegmentation.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    asked = segmenter(model, tokenizer=tokenizer, words=[["a person on foot", "a pedestrian"], "sky"])
    assert asked.names == ["a person on foot", "sky"] and len(asked.embeds) == 2


def test_score_maps_of_own_classes_are_the_models():
    asked = segmenter(score_maps=["class 2", "class 0"])
    pixel_values = torch.randn(1, 3, 64, 64)
    _, scores = asked(pixel_values, [(64, 64)])
    with torch.no_grad():
        torch.testing.assert_close(scores, asked.model(pixel_values).score_maps[:, [2, 0]])


# Pictures


def test_indexed_pictures_keep_ids_and_colours(tmp_path):
    ids = np.array([[0, 2], [1, 1]])
    indexed_picture(ids, PALETTE).save(tmp_path / "mask.png")
    loaded = Image.open(tmp_path / "mask.png")
    assert np.asarray(loaded).tolist() == ids.tolist()
    assert loaded.convert("RGB").getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize("num_labels", [256, 257, 1000])
def test_more_classes_than_a_palette_has_are_16_bit(tmp_path, num_labels):
    ids = np.array([[0, num_labels - 1]])
    indexed_picture(ids, [[1, 2, 3]] * num_labels).save(tmp_path / "mask.png")
    loaded = Image.open(tmp_path / "mask.png")
    assert np.asarray(loaded).tolist() == ids.tolist() and (loaded.mode == "P") == (num_labels == 256)


@pytest.mark.parametrize("ids", [[[-1]], [[65536]]])
def test_ids_that_fit_no_picture_are_refused(ids):
    with pytest.raises(ValueError, match="0 … 65535"):
        indexed_picture(np.array(ids), PALETTE)


def test_legend_names_what_is_shown():
    image = Image.new("RGB", (200, 100), "white")
    ids = np.zeros((100, 200), dtype=int)
    ids[:, 150:] = 2
    sheet = overlay_with_legend(image, ids, {0: "sky", 1: "sea", 2: "sand"}, PALETTE, opacity=1.0)
    colours = {colour for _, colour in sheet.crop((0, 100, 200, sheet.height)).getcolors(10_000)}
    assert (255, 0, 0) in colours and (0, 0, 255) in colours and (0, 255, 0) not in colours


def test_a_legend_is_as_wide_as_its_names():
    name = "a sentence much wider than the picture"
    sheets = [
        overlay_with_legend(Image.new("RGB", (96, 64)), np.zeros((64, 96), int), {0: shown}, PALETTE)
        for shown in (name, name + " ends")
    ]
    assert 96 < sheets[0].width < sheets[1].width
    for sheet in sheets:  # nothing is cut at the right
        assert sheet.crop((sheet.width - 4, 64, *sheet.size)).getcolors() == [(4 * (sheet.height - 64), (255,) * 3)]
    assert overlay_with_legend(Image.new("RGB", (96, 64)), np.zeros((64, 96), int), {}, PALETTE).size == (96, 64)


@pytest.mark.parametrize("strip", [1, 700])
def test_strips_of_a_picture_equal_the_whole(monkeypatch, strip):
    image, scores = picture((50, 40)), torch.randn(5, 7)
    ids = np.random.default_rng(0).integers(-1, 4, (40, 50))
    names = {0: "sky", 1: "sea", 2: "sand"}

    def pictures():
        return heat_map(image, scores, -1.0, 1.0), overlay_with_legend(image, ids, names, PALETTE)

    whole = pictures()
    assert np.array_equal(whole[1].crop((0, 0, 50, 40)), overlay(image, ids, PALETTE, 0.6))
    monkeypatch.setattr("denseclip_hf.pictures.STRIP_PIXELS", strip)
    for part, expected in zip(pictures(), whole, strict=True):
        assert np.array_equal(part, expected)


def test_drawing_over_a_large_picture_takes_the_memory_of_the_result():
    code = (
        "import resource, numpy as np, torch\n"
        "from PIL import Image\n"
        "from denseclip_hf.pictures import heat_map, overlay_with_legend\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "def draw(side):\n"
        "    image, ids = Image.new('RGB', (side, side)), np.zeros((side, side), np.uint8)\n"
        "    before = peak()\n"
        "    heat_map(image, torch.rand(9, 9), 0, 1); overlay_with_legend(image, ids, {0: 'sky'}, [[9, 9, 9]])\n"
        "    return peak() - before\n"
        "draw(64); print(draw(6000))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(result.stdout) < 137 + 110  # MiB: a result of 4 bytes a pixel, and strips


def test_heat_maps_go_from_blue_to_red():
    picture = heat_map(Image.new("RGB", (40, 20)), torch.tensor([[0.0, 1.0]]), 0.0, 1.0, opacity=1.0)
    cold, hot = picture.getpixel((0, 10)), picture.getpixel((39, 10))
    assert cold[2] > cold[0] and hot[0] > hot[2]
    constant = heat_map(Image.new("RGB", (4, 4)), torch.zeros(2, 2), 0.0, 0.0)
    assert constant.size == (4, 4)


@pytest.mark.parametrize("classes", [2, 150])
def test_confusion_matrix_is_bright_on_its_diagonal(classes):
    sheet = confusion_picture(torch.eye(classes) * 5, [f"class {i}" for i in range(classes)])
    cell = 48 if classes == 2 else 6
    last = (sheet.width - 8 - cell // 2, sheet.height - 8 - cell // 2)
    assert sheet.getpixel(last) == (255, 255, 255) and sheet.getpixel((last[0] - cell, last[1])) == (0, 0, 0)
