import base64
import os
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.app_answers import (
    Answer,
    AppModels,
    heat_maps,
    read_upload,
    read_words,
    save_mask,
    save_overlay,
    segment,
    shown,
)
from denseclip_hf.example_clip import example_clip_model, example_corpus, make_example_tokenizer
from denseclip_hf.image_processing_denseclip import DenseCLIPImageProcessorPil


APP = Path(__file__).parent.parent / "app.py"
CLASSES = ["sky", "road", "tree"]
WORDS = ["a cat on grass", "house", "<b>{{dog}}</b> ${1}"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The machine may be busy with many other things.
PATIENCE = 600


def photo(size=(96, 64), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model that knows words and shows more than one class: around the example's CLIP with random weights."""
    folder = tmp_path_factory.mktemp("models") / "random"
    tokenizer = make_example_tokenizer(example_corpus(num_scenes=5), vocab_size=700)
    torch.manual_seed(0)
    sizes = {"context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2, "neck_hidden_size": 8}
    model = DenseCLIPForSemanticSegmentation.from_clip(
        example_clip_model(tokenizer, "vit"), CLASSES, tokenizer, image_size=64, **sizes
    ).eval()
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    with torch.no_grad():
        logits = model.window_logits(processor(photo(), return_tensors="pt")["pixel_values"])
        model.decode_head.classifier.bias -= logits.mean((0, 2, 3))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(model_dir):
    return AppModels([str(model_dir)], device="cpu")


@pytest.fixture
def photo_file(tmp_path):
    file = tmp_path / "holiday.png"
    photo().save(file)
    return file


def opened(address):
    """The picture in a data address."""
    return Image.open(BytesIO(base64.b64decode(address.split(",")[1])))


# What the page asks for


def test_models_have_the_shortest_names_that_tell_them_apart(tmp_path):
    folders = [tmp_path / name for name in ("a/model", "b/model", "b/other")]
    for folder in folders:
        folder.mkdir(parents=True)
    models = AppModels([*map(str, folders), "user/model", str(folders[2])])
    assert models.names == [str(folders[0]), str(folders[1]), "other", "user/model"]
    assert models.directories == folders


def test_a_page_needs_models_that_are_there(tmp_path):
    with pytest.raises(ValueError, match="at least one model"):
        AppModels([])
    with pytest.raises(ValueError, match="no model 'other' here"):
        AppModels([str(tmp_path)]).load("other")


def test_words_are_the_lines(models):
    assert read_words(" sky \na red car, parked\n\n") == ["sky", "a red car, parked"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "none of them empty"),
        ("sky\n\nroad", "none of them empty"),
        ("sky\nroad\nsky ", "'sky' is given twice"),
        ("\n".join(map(str, range(201))), "201 classes are too many"),
    ],
)
def test_bad_words_are_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_words(text)


def test_own_classes_are_segmented_as_by_the_model(models):
    model, processor, _ = models.load("random")
    answer = segment(models, photo(), "random")
    with torch.no_grad():
        outputs = model(**processor(photo(), return_tensors="pt"))
    expected = processor.post_process_semantic_segmentation(outputs, [(64, 96)])[0].numpy()
    assert (answer.segmentation == expected).mean() > 0.999 and len(np.unique(expected)) > 1
    assert answer.names == CLASSES and answer.image.size == (96, 64)


@pytest.mark.parametrize("sentences", [False, True])
def test_words_are_segmented_from_score_maps(models, sentences):
    model, processor, tokenizer = models.load("random")
    answer = segment(models, photo(), "random", WORDS, sentences)
    segmenter = models.segmenter("random", WORDS, sentences=sentences)
    pixels = processor(photo(), return_tensors="pt")["pixel_values"]
    expected = model.predict_from_scores(pixels, segmenter.embeds, [(64, 96)]).segmentation[0].numpy()
    assert (answer.segmentation == expected).all() and answer.names == WORDS
    plain = model.encode_texts(WORDS, tokenizer)
    assert torch.allclose(segmenter.embeds, plain) is not sentences


def test_without_a_tokenizer_words_are_refused_and_classes_segmented(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path)
    models = AppModels([str(tmp_path)], device="cpu")
    assert segment(models, photo(), models.names[0]).segmentation.shape == (64, 96)
    with pytest.raises(ValueError, match="need CLIP's tokenizer"):
        segment(models, photo(), models.names[0], ["cat"])


def test_heat_maps_share_their_colours(models):
    large = photo((2400, 1600))
    maps = heat_maps(models, large, "random", ["tree", "a cat on grass"])
    assert [caption.rsplit(" ", 3)[0] for _, caption in maps] == ["tree", "a cat on grass"]
    assert all(picture.size == (1024, 683) for picture, _ in maps)
    assert maps[0][0].tobytes() != maps[1][0].tobytes()


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [([], "choose from 1 to 12"), (["x"] * 13, "choose from 1 to 12"), (["sky", "sky "], "'sky' is given twice")],
)
def test_bad_choices_of_heat_maps_are_refused(models, chosen, sentence):
    with pytest.raises(ValueError, match=sentence):
        heat_maps(models, photo(), "random", chosen)


@pytest.mark.parametrize("content", [b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a"])
def test_what_is_no_picture_is_one_sentence_without_its_folder(tmp_path, content):
    file = tmp_path / "holiday.jpg"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="holiday.jpg cannot be read as a picture") as error:
        read_upload(file)
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [1000, 5000], ids=["bomb", "above the limit"])
def test_too_many_pixels_are_refused(photo_file, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="holiday.png .*more") as error:
        read_upload(photo_file)
    assert str(photo_file.parent) not in str(error.value)


@pytest.mark.parametrize("file", [None, "", "missing.png", "http://127.0.0.1:9/x.png", "file:///etc/hostname"])
def test_only_files_are_read(file):
    with pytest.raises(ValueError, match="choose a picture first"):
        read_upload(file)


def test_photographs_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    photo().save(tmp_path / "turned.jpg", exif=exif)
    assert read_upload(tmp_path / "turned.jpg").size == (64, 96)


@pytest.mark.parametrize("classes", [5, 300])
def test_shown_mask_holds_the_classes(classes):
    ids = np.random.default_rng(0).integers(0, classes, (40, 30))
    sent = shown(Answer(photo((30, 40)), ids, [str(i) for i in range(classes)], [[0, 0, 0]] * classes))
    mask = np.asarray(opened(sent["mask"])).astype(int)
    assert (mask[..., 0] + 256 * mask[..., 1] == ids).all()
    assert opened(sent["picture"]).size == (30, 40) and len(sent["names"]) == classes


def test_large_pictures_are_shown_smaller():
    answer = Answer(photo((3200, 160)), np.zeros((160, 3200), int), ["sky"], [[0, 0, 0]])
    sent = shown(answer)
    assert opened(sent["picture"]).size == opened(sent["mask"]).size == (1024, 51)


def test_downloads(models, tmp_path):
    answer = segment(models, photo(), "random")
    mask = save_mask(answer, tmp_path / "new", "holiday.x.png")
    assert mask == tmp_path / "new" / "holiday.x_mask.png"
    picture = Image.open(mask)
    assert picture.mode == "P" and (np.asarray(picture) == answer.segmentation).all()
    overlay = np.asarray(Image.open(save_overlay(answer, tmp_path, "holiday", 0.0)))
    assert (overlay[:64] == np.asarray(photo())).all() and len(overlay) > 64
    overlay = Image.open(save_overlay(answer, tmp_path, "holiday", 7.0))
    assert overlay.getpixel((0, 0)) == tuple(answer.palette[answer.segmentation[0, 0]])


# The page


@pytest.fixture(scope="module")
def app_url(model_dir, tmp_path_factory):
    """The address of `app.py` in a process of its own, which ends with the tests."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("app")
    log = folder / "log"
    environment = {
        **os.environ, "DENSECLIP_MODELS": str(model_dir), "GRADIO_TEMP_DIR": str(folder / "files"),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NO_PROXY": "*",
    }  # fmt: skip
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, str(APP), "--device", "cpu"],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
    try:
        end, marker = time.monotonic() + PATIENCE, "Running on local URL:"
        while marker not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield log.read_text().split(marker)[1].split()[0]
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def status(url, data=None, headers=None):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data, headers or {}), timeout=PATIENCE) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
@pytest.mark.parametrize("route", ["/file=", "/gradio_api/file="])
def test_only_files_of_the_page_are_served(app_url, model_dir, route):
    for file in (model_dir / "config.json", APP, Path(__file__), Path("/etc/hostname"), Path("log")):
        assert status(f"{app_url}{route}{quote(str(file))}") in (403, 404), file
    assert status(app_url) == 200


@pytest.mark.slow
def test_uploads_are_limited(app_url):
    def upload(size):
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head + bytes(size) + b"\r\n--x--\r\n"
        return status(f"{app_url}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})

    assert upload(1000) == 200
    assert upload(21 * 2**20) == 413


@pytest.mark.parametrize(("flags", "sentence"), [([], "at least one model"), (["--model", "no/where"], "no/where is")])
def test_app_without_a_model_ends_with_one_sentence(flags, sentence, tmp_path):
    pytest.importorskip("gradio")
    environment = {k: v for k, v in os.environ.items() if k != "DENSECLIP_MODELS"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(APP), *flags]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr


def test_a_space_needs_nothing_installed_but_the_requirements(tmp_path):
    pytest.importorskip("gradio")
    shutil.copy(APP, tmp_path)
    shutil.copytree(APP.parent / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    code = "import runpy; runpy.run_path('app.py'); import denseclip_hf; print(denseclip_hf.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_a_space_gets_what_the_package_needs():
    project = tomllib.loads((APP.parent / "pyproject.toml").read_text())["project"]
    lines = (APP.parent / "requirements.txt").read_text().splitlines()
    needed = [*project["dependencies"], *project["optional-dependencies"]["app"]]
    assert [line for line in lines if not line.startswith("#")] == needed


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no browser is installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], timeout=1000 * PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, app_url):
    """The page as a visitor finds it; whatever it asks of other hosts is refused and remembered."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(1000 * PATIENCE)
    page.elsewhere = []

    def only_the_app(route):
        if route.request.url.startswith((app_url, "data:", "blob:")):
            return route.continue_()
        page.elsewhere.append(route.request.url)
        return route.abort()

    page.route("**/*", only_the_app)
    page.goto(app_url)
    page.locator("#segment").wait_for()
    yield page
    page.close()


def upload(page, file):
    page.locator("#picture input[type=file]").set_input_files(file)
    page.locator("#picture img").wait_for()


def legend(page, *names):
    """What the legend says once it names one of `names`, by class."""
    entries = "[...document.querySelectorAll('#overlay .legend li')].map(entry => entry.innerText)"
    page.wait_for_function(f"names => {entries}.some(text => names.some(n => text.startsWith(n)))", arg=list(names))
    entries = [text.rsplit(" ", 2) for text in page.locator("#overlay .legend li").all_inner_texts()]
    return {name: int(percent) for name, percent, _ in entries}


def shares(answer):
    counts = np.bincount(answer.segmentation.flat, minlength=len(answer.names)) / answer.segmentation.size
    return {name: pytest.approx(100 * n, abs=1.1) for name, n in zip(answer.names, counts, strict=True) if n}


def downloaded(page, button):
    with page.expect_download() as download:
        page.locator(button).click()
    return download.value.suggested_filename, Image.open(download.value.path())


@pytest.mark.slow
def test_visitor_segments_tries_words_and_downloads(page, models, photo_file):
    upload(page, photo_file)
    page.locator("#segment").click()
    answer = segment(models, photo(), "random")
    assert legend(page, *CLASSES) == shares(answer)

    canvas = page.locator("#overlay .paint")
    drawn = page.evaluate("""() => {
        const canvas = document.querySelector('#overlay .paint');
        return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data];
    }""")
    colours = np.array(drawn).reshape(64, 96, 4)
    assert (colours[..., :3] == np.array(answer.palette)[answer.segmentation]).all()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for x, y in ((10, 8), (48, 32), (90, 60)):
        page.mouse.move(box["x"] + (x + 0.5) * box["width"] / 96, box["y"] + (y + 0.5) * box["height"] / 64)
        assert page.locator("#overlay .tip").inner_text() == CLASSES[answer.segmentation[y, x]]

    name, mask = downloaded(page, "#mask")
    assert name == "holiday_mask.png" and mask.mode == "P" and (np.asarray(mask) == answer.segmentation).all()
    name, painted = downloaded(page, "#painted")
    assert name == "holiday_overlay.png" and painted.width == 96 and painted.height > 64

    opacity = page.locator("#opacity input[type=number]")
    opacity.fill("0")
    opacity.press("Enter")
    page.wait_for_function("getComputedStyle(document.querySelector('#overlay .paint')).opacity === '0'")

    page.locator("#mode").get_by_label("words of your own").click()
    page.locator("#words textarea").fill("\n".join(WORDS))
    page.locator("#segment").click()
    answer = segment(models, photo(), "random", WORDS)
    assert legend(page, *WORDS) == shares(answer)
    _, mask = downloaded(page, "#mask")
    assert (np.asarray(mask) == answer.segmentation).all()

    for word in ("house", "a red bus"):
        page.locator("#chosen input").fill(word)
        page.locator("#chosen input").press("Enter")
    page.locator("#draw").click()
    page.locator("#maps img").nth(1).wait_for()
    captions = page.locator("#maps .caption-label").all_inner_texts()
    assert [caption.rsplit(" ", 3)[0] for caption in captions] == ["house", "a red bus"]
    assert page.elsewhere == []


def complaint(page):
    """What the page says after a click on the button; it goes on working."""
    page.locator("#segment").click()
    toast = page.locator("[data-testid=toast-body]").first
    toast.wait_for()
    text = toast.inner_text()
    toast.get_by_test_id("toast-close").click()
    toast.wait_for(state="detached")
    return text


@pytest.mark.slow
def test_visitor_reads_what_is_wrong(page, models, photo_file, tmp_path):
    assert "choose a picture first" in complaint(page)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.locator("#picture input[type=file]").set_input_files(broken)
    page.locator("#picture button[aria-label='Clear'], #picture img").first.wait_for()
    text = complaint(page)
    assert "broken.png cannot be read as a picture" in text and str(tmp_path) not in text and "gradio" not in text
    page.reload()
    upload(page, photo_file)
    page.locator("#mode").get_by_label("words of your own").click()
    for words, sentence in (("sky\nsky", "'sky' is given twice"), ("sky\n\nroad", "none of them empty")):
        page.locator("#words textarea").fill(words)
        assert sentence in complaint(page)
    page.locator("#words textarea").fill("sky\nroad")
    page.locator("#segment").click()
    assert legend(page, "sky", "road") == shares(segment(models, photo(), "random", ["sky", "road"]))
