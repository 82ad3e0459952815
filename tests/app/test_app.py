"""The app: the page in a process of its own, as a visitor and a browser find it."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from denseclip_hf.app.answers import AppModels, segment
from denseclip_hf.example import make_example_clip
from helpers.forked import run_script
from helpers.images import photo
from helpers.models import CLASSES, WORDS


pytestmark = pytest.mark.xdist_group("app")  # so that one process serves the page
APP = Path(__file__).parents[2] / "app.py"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The machine may be busy with many other things.
PATIENCE = 600


@pytest.fixture(scope="module")
def app_url(word_model_dir, tmp_path_factory):
    """The address of `app.py` in a process of its own, which ends with the tests."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("app")
    log = folder / "log"
    environment = {
        **os.environ, "DENSECLIP_MODELS": str(word_model_dir), "GRADIO_TEMP_DIR": str(folder / "files"),
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
        end, marker = time.monotonic() + PATIENCE, "The page is at"
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


def asked(url, data=None, headers=None):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, data, headers or {}), timeout=PATIENCE)


def contents(*question):
    with asked(*question) as answer:
        return answer.read().decode()


def status(*question):
    try:
        with asked(*question) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
@pytest.mark.parametrize("route", ["/file=", "/gradio_api/file="])
def test_only_files_of_the_page_are_served(app_url, word_model_dir, route):
    for file in (word_model_dir / "config.json", APP, Path(__file__), Path("/etc/hostname"), Path("log")):
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


@pytest.mark.slow
def test_addresses_are_not_fetched(app_url):
    """An image by its address would come without a limit, from wherever a visitor says."""
    page = json.loads(contents(f"{app_url}/config"))
    number = next(i for i, event in enumerate(page["dependencies"]) if event["api_name"] == "words")
    head = {"Content-Type": "application/json"}
    for place in range(5):  # whichever part of the page it pretends to be for
        data = [None, "random", 0, "", False]
        data[place] = {"path": "https://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
        question = {"data": data, "fn_index": number, "session_hash": f"s{place}"}
        contents(f"{app_url}/gradio_api/queue/join", json.dumps(question).encode(), head)
        answer = contents(f"{app_url}/gradio_api/queue/data?session_hash=s{place}")
        assert "address" in answer, answer


@pytest.mark.slow
def test_programs_ask_by_named_endpoints(app_url, app_models, photo_file, tmp_path):
    client = pytest.importorskip("gradio_client")
    page = client.Client(app_url, download_files=str(tmp_path), verbose=False)
    assert sorted(page.view_api(return_format="dict")["named_endpoints"]) == ["/segment", "/words"]
    mask, classes = page.predict(client.handle_file(photo_file), "random", 0, api_name="/segment")
    assert (np.asarray(Image.open(mask)) == segment(app_models, photo(), "random").segmentation).all()
    assert classes == {"id2label": {str(i): name for i, name in enumerate(CLASSES)}}
    question = [client.handle_file(photo_file), "random", 0, "\n".join(WORDS), False]
    mask, classes = page.predict(*question, api_name="/words")
    assert (np.asarray(Image.open(mask)) == segment(app_models, photo(), "random", WORDS).segmentation).all()
    assert list(classes["id2label"].values()) == WORDS
    with pytest.raises(Exception, match="twice"):
        page.predict(*question[:3], "sky\nsky", False, api_name="/words")


@pytest.mark.parametrize(("constant", "value"), [("MAX_UPLOADS", 1), ("MAX_KEPT_BYTES", -1)])
def test_uploads_at_a_time_and_what_is_kept_are_bounded(monkeypatch, tmp_path, constant, value):
    page = pytest.importorskip("denseclip_hf.app.page")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(page, constant, value)
    answered = []

    async def server(scope, receive, send):
        answered.append("server")
        if len(answered) < 3:  # another upload while this one is going on
            await limits({"type": "http", "path": "/gradio_api/upload"}, receive, send)

    async def send(message):
        answered.append(message.get("status"))

    limits = page.UploadLimits(server)
    asyncio.run(limits({"type": "http", "path": "/gradio_api/upload"}, None, send))
    assert 429 in answered and answered.count("server") == max(value, 0)
    answered.clear()
    asyncio.run(limits({"type": "http", "path": "/config"}, None, send))
    assert "server" in answered and limits.in_flight == 0


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "named"), [([], "openai/clip"), (["--model", "no/where"], "no/where")])
def test_app_without_a_model_ends_with_one_sentence(flags, named):
    pytest.importorskip("gradio")
    environment = {k: v for k, v in os.environ.items() if k != "DENSECLIP_MODELS"} | {"HF_HUB_OFFLINE": "1"}
    code, said = run_script(APP, *flags, environment=environment)
    assert code == 1 and named in said and "Traceback" not in said


def test_a_clip_opens_the_page_for_words(tmp_path, word_model_dir):
    pytest.importorskip("gradio")
    from denseclip_hf.app.page import NEW_WORDS, OWN_CLASSES, build_page

    clip = str(make_example_clip(tmp_path / "clip", "vit"))
    for models, expected in (([clip, str(word_model_dir)], NEW_WORDS), ([str(word_model_dir), clip], OWN_CLASSES)):
        parts = build_page(AppModels(models, device="cpu"), [APP]).config["components"]
        (mode,) = (part["props"] for part in parts if part["props"].get("elem_id") == "mode")
        assert mode["value"] == expected and mode["visible"] == (expected == OWN_CLASSES)  # a CLIP leaves no choice


@pytest.mark.slow
def test_a_space_needs_nothing_installed_but_the_requirements(tmp_path):
    pytest.importorskip("gradio")
    shutil.copy(APP, tmp_path)
    shutil.copytree(APP.parent / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    code = "import runpy; runpy.run_path('app.py'); import denseclip_hf; print(denseclip_hf.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_a_space_gets_what_the_package_needs():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
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
    page.locator("#image input[type=file]").set_input_files(file)
    page.locator("#image img").wait_for()


def legend(page, *names):
    """What the legend says once it names one of `names`, by class."""
    said = "document.querySelector('#result').innerText"
    page.wait_for_function(f"names => names.some(name => {said}.includes(name))", arg=list(names))
    shown = page.locator("#result").inner_text()
    return {name for name in names if name in shown}


def shown_names(answer):
    return {answer.names[index] for index in np.unique(answer.segmentation)}


def downloaded(page, button):
    with page.expect_download() as download:
        page.locator(button).click()
    return download.value.suggested_filename, Image.open(download.value.path())


@pytest.mark.slow
def test_visitor_segments_tries_words_and_downloads(page, app_models, photo_file):
    upload(page, photo_file)
    page.locator("#segment").click()
    answer = segment(app_models, photo(), "random")
    assert legend(page, *CLASSES) == shown_names(answer)
    name, mask = downloaded(page, "#mask")
    assert name == "holiday_mask.png" and mask.mode == "P" and (np.asarray(mask) == answer.segmentation).all()
    name, painted = downloaded(page, "#painted")
    assert name == "holiday_overlay.png" and painted.width == 96 and painted.height > 64

    page.locator("#mode").get_by_label("words of your own").click()
    page.locator("#words textarea").fill("\n".join(WORDS))
    page.locator("#segment").click()
    answer = segment(app_models, photo(), "random", WORDS)
    assert legend(page, *WORDS) == shown_names(answer)
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


@pytest.mark.slow
def test_visitor_reads_what_is_wrong_and_goes_on(page, app_models, photo_file, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.locator("#image input[type=file]").set_input_files(tmp_path / "broken.png")
    page.locator("#image button[aria-label='Clear'], #image img").first.wait_for()
    page.locator("#segment").click()
    said = page.locator("[data-testid=toast-body]").first.inner_text()
    assert "broken.png" in said and str(tmp_path) not in said and "gradio" not in said
    page.reload()
    upload(page, photo_file)
    page.locator("#segment").click()
    assert legend(page, *CLASSES) == shown_names(segment(app_models, photo(), "random"))
