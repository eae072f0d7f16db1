"""The Space: the page in a browser, as two visitors, on a phone and in the dark, and the folder as the Hub takes it.

`PYTHONPATH=tests python tests/recipes/scripts/test_space.py recipes/results/playground` takes the pictures of
the documentation.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pytest
from chromium import chromium_path
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from packaging.version import Version
from playwright.sync_api import expect, sync_playwright
from run_command import SECONDS

from transformers_kad import __version__
from transformers_kad.recipes.playground.pairs import LoadedPairs, PairNames, pairs_from_environment

SPACE = Path(__file__).resolve().parents[3] / "recipes" / "space"
PAIR = SPACE.parent / "tiny_pair"
TIMEOUT = 120_000  # milliseconds that a browser waits
expect.set_options(timeout=TIMEOUT)
DESKTOP = {"viewport": {"width": 1200, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
MIA = "Mia has 83 apples. She gives 47 to Jon. How many apples does Mia have now?"
ADA = "Ada has 12 hats. She finds 5 more. How many hats does Ada have now?"
ATTACK = "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title = 'pwned'\">"


def load_app(path):
    spec = importlib.util.spec_from_file_location("space_app", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(pairs):
    """The address of a page."""
    blocks = load_app(SPACE / "app.py").launch(pairs, server_port=free_port(), prevent_thread_lock=True, quiet=True)
    try:
        yield blocks.local_url
    finally:
        blocks.close()


@contextlib.contextmanager
def running_browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_path(), args=["--no-sandbox", "--disable-gpu"], timeout=TIMEOUT
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def visiting(browser, url, **settings):
    """A page that a visitor of their own has opened."""
    context = browser.new_context(**(settings or DESKTOP))
    context.set_default_timeout(TIMEOUT)
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#generate")).to_be_visible()
    try:
        yield page
    finally:
        context.close()


# --- The page -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    return pairs_from_environment({}, PAIR)


@pytest.fixture(scope="module")
def url(pairs):
    with served(pairs) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with running_browser() as found:
        yield found


class SlowForwards:
    """Makes the base slow, as a large one is, and counts its forwards."""

    def __init__(self):
        self.count, self.seconds = 0, 0.05

    def __call__(self, *_):
        self.count += 1
        time.sleep(self.seconds)

    def wait_for_end(self):
        """Wait until there has been no forward for half a second; fail if that does not happen."""
        for _ in range(20):
            before = self.count
            time.sleep(0.5 + self.seconds)
            if self.count == before:
                return
        pytest.fail(f"the base still runs, after {self.count} forwards")


@pytest.fixture
def forwards(pairs):
    slow = SlowForwards()
    hook = pairs.get(pairs.offered.base, pairs.offered.proxy).base.register_forward_pre_hook(slow)
    yield slow
    hook.remove()


def ask(page, prompt=None):
    if prompt is not None:
        page.locator("#prompt textarea").fill(prompt)
    page.locator("#generate").click()


def set_slider(page, name, value):
    slider = page.locator(f"#{name} input[type=number]")
    slider.fill(str(value))
    slider.blur()


def text_of(page, box="guided"):
    """The text in a box, without the signs for blanks."""
    return page.locator(f"#{box} .text").evaluate("element => element.textContent")


def totals_of(page):
    return dict(
        page.locator("#guided .totals div").evaluate_all(
            "divs => divs.map(div => [div.querySelector('dt').textContent, div.querySelector('dd').textContent])"
        )
    )


def wait_for_end(page):
    """Wait until the last of the three texts, that of the proxy, has ended."""
    expect(page.locator("#proxy-alone .text")).to_contain_text("<|end|>")


@pytest.mark.slow
def test_a_text_is_shown_beside_those_of_both_models_and_a_slider_changes_it(browser, url):
    with visiting(browser, url) as page:
        ask(page, MIA)
        wait_for_end(page)
        assert text_of(page) == "We get 83 - 47 = 36. The answer is 36.<|end|>"
        assert text_of(page, "base-alone").startswith("- 53 - 26 = 27\n")
        assert text_of(page, "proxy-alone") == "We get 83 - 48 = 35. The answer is 35.<|end|>"
        first = totals_of(page)
        assert (first["tokens"], first["tokens per round"], first["acceptance rate"]) == ("22", "4.40", "0.78")
        shades = page.locator("#guided .text .t").evaluate_all("tokens => tokens.map(token => token.className)")
        assert len(shades) == 22
        assert {"t s10 proxy drafted", "t"} <= {*shades}
        assert page.locator("#guided .plot").get_attribute("viewBox") == "0 0 22 1"

        set_slider(page, "dual-threshold", 0.01)
        ask(page)
        expect(page.locator("#guided .text")).to_contain_text("- 53 - 26 = 27")
        wait_for_end(page)
        second = totals_of(page)
        assert second["tokens"] == "64"
        assert float(second["mean deferral mass"]) < 0.1 < float(first["mean deferral mass"])


@pytest.mark.slow
def test_the_sliders_are_those_of_the_rule(browser, url):
    with visiting(browser, url) as page:
        expect(page.locator("#dual-threshold")).to_be_visible()
        expect(page.locator("#paced-budget")).to_be_hidden()
        page.locator("#rule input").click()
        page.get_by_role("option", name="cascade", exact=True).click()
        expect(page.locator("#cascade-alpha")).to_be_visible()
        expect(page.locator("#cascade-variant")).to_be_visible()
        expect(page.locator("#dual-threshold")).to_be_hidden()
        ask(page, MIA)
        wait_for_end(page)
        cascade = totals_of(page)
        page.locator("#rule input").click()
        page.get_by_role("option", name="implicit_reward", exact=True).click()
        ask(page)
        expect(page.locator("#guided .legend")).not_to_contain_text("shade")
        wait_for_end(page)
        assert cascade["mean deferral mass"] != totals_of(page)["mean deferral mass"] == "–"


@pytest.mark.slow
def test_text_and_chart_grow_and_stop_ends_them(browser, url, forwards):
    with visiting(browser, url) as page:
        set_slider(page, "dual-threshold", 0.01)
        forwards.seconds = 0.3
        ask(page, MIA)
        chart = page.locator("#guided .plot")
        expect(chart).to_be_visible()
        lengths = [chart.get_attribute("viewBox")]
        expect(chart).not_to_have_attribute("viewBox", lengths[0])
        lengths.append(chart.get_attribute("viewBox"))
        expect(page.locator("#generate")).to_be_disabled()
        page.locator("#stop").click()
        before, after = (int(length.split()[2]) for length in lengths)
        assert 0 < before < after < 64
        forwards.wait_for_end()
        assert after <= int(totals_of(page)["tokens"]) < 64
        assert page.locator("#base-alone .text").count() == 0
        forwards.seconds = 0.0
        ask(page)  # the next text is whole
        expect(page.locator("#guided .totals dd").first).to_have_text("64")


@pytest.mark.slow
def test_a_visitor_who_leaves_ends_their_text(browser, url, forwards):
    with visiting(browser, url) as page:
        page.get_by_role("button", name="Sampling").click()
        page.get_by_label("number input for Maximum of new tokens").fill("400")
        set_slider(page, "dual-threshold", 0.01)
        ask(page, MIA)
        expect(page.locator("#guided .plot")).to_be_visible()
    forwards.wait_for_end()
    assert forwards.count < 200


@pytest.mark.slow
def test_two_visitors_at_once_get_their_own_texts(browser, url, forwards):
    with visiting(browser, url) as one, visiting(browser, url) as other:
        set_slider(other, "dual-threshold", 0.6)
        ask(one, MIA)
        ask(other, ADA)
        expect(other.locator("#guided")).to_contain_text(re.compile(r"queue: \d/\d"))
        wait_for_end(one)
        wait_for_end(other)
        assert text_of(one) == "We get 83 - 47 = 36. The answer is 36.<|end|>"
        assert text_of(other) == "We get 12 + 5 = 17. The answer is 17.<|end|>"
        assert totals_of(one)["mean deferral mass"] != totals_of(other)["mean deferral mass"]


@pytest.mark.slow
def test_markup_in_a_prompt_and_in_a_text_stays_text(browser, url, pairs, monkeypatch):
    pair = pairs.get(pairs.offered.base, pairs.offered.proxy)
    decode = pair.tokenizer.decode

    def attacking(ids, **settings):
        return decode(ids, **settings) + (ATTACK if isinstance(ids, list) and ids else "")

    monkeypatch.setattr(pair.tokenizer, "decode", attacking)  # a model could write anything
    with visiting(browser, url) as page:
        ask(page, f"{ATTACK} {MIA}")
        for box in ("base-alone", "proxy-alone"):
            expect(page.locator(f"#{box} .text")).to_contain_text(ATTACK)
        expect(page.locator("#guided .text")).to_contain_text(ATTACK)
        page.locator("button", has_text="Models").click()
        page.locator("#base textarea").fill(f"./{ATTACK}")
        ask(page)
        expect(page.locator("#guided [role=alert]")).to_contain_text("<img src=x onerror=")
        assert page.locator("#guided script, #guided img, #base-alone img, #proxy-alone img").count() == 0
        assert "pwned" not in page.title()


@pytest.mark.slow
def test_what_is_wrong_is_said_on_the_page_and_the_next_text_is_right(browser, url):
    with visiting(browser, url) as page:
        page.locator("button", has_text="Models").click()
        name = page.locator("#base textarea")
        right = name.input_value()
        for prompt, base, message in (
            (MIA, "./nothing", "Folder not found: './nothing'"),
            (MIA, "nobody/no-such-model", "'nobody/no-such-model'"),
            (MIA, "", "Name the base: a Hub id"),
            (" ", right, "Write a prompt first."),
            ("123 " * 300, right, "and the models read at most 512"),
        ):
            name.fill(base)
            ask(page, prompt)
            expect(page.locator("#guided [role=alert]")).to_contain_text(message)
        ask(page, MIA)
        wait_for_end(page)
        expect(page.locator("#guided [role=alert]")).to_have_count(0)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_is_legible_in_both_schemes(browser, url, scheme):
    with visiting(browser, url, **PHONE, color_scheme=scheme) as page:
        ask(page, MIA)
        wait_for_end(page)
        page.locator("button", has_text="Models").click()
        page.locator("button", has_text="Sampling").click()
        width, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert (width, window) == (390, 390)
        # On a phone nothing stands beside another text, and no element is wider than the screen.
        boxes = [page.locator(f"#{name} .kad").bounding_box() for name in ("guided", "base-alone", "proxy-alone")]
        assert all(box["x"] >= 0 and box["width"] > 300 and box["x"] + box["width"] <= 390 for box in boxes)
        assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"]
        colours = page.evaluate(LEGIBLE)
        assert len(colours) > 25
        for words, ink, paper in colours:
            assert contrast(ink, paper) > 4.5, (words, ink, paper)
        background = next(paper for words, _, paper in colours if words == "22")
        assert (sum(background) > 600) == (scheme == "light")


# Every element of the three boxes that has text of its own, its colour, and the colour behind it.
LEGIBLE = """() => {
  const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const found = [];
  for (const element of document.querySelectorAll(".kad *")) {
    const own = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.textContent);
    if (!own.join("").trim()) continue;
    const isDrawn = element.closest("svg");
    if (isDrawn && element.tagName !== "text") continue;
    let behind = element;
    while (rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const style = getComputedStyle(element);
    found.push([own.join(""), rgb(isDrawn ? style.fill : style.color), rgb(getComputedStyle(behind).backgroundColor)]);
  }
  return found;
}"""


def contrast(*colours):
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour[:3])]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
def test_the_page_loads_nothing_from_elsewhere(browser, url):
    context = browser.new_context(**DESKTOP)
    asked, failures = [], []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(url)
    ask(page, MIA)
    wait_for_end(page)
    context.close()
    assert len(asked) > 10
    assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []
    assert failures == []


@pytest.mark.slow
def test_a_fixed_page_takes_no_other_models(browser):
    fixed = LoadedPairs(PairNames(str(PAIR / "base"), str(PAIR / "proxy")), is_fixed=True)
    with served(fixed) as address, visiting(browser, address) as page:
        page.locator("button", has_text="Models").click()
        for name in ("base", "proxy"):
            expect(page.locator(f"#{name} textarea")).to_be_disabled()


# --- The folder -----------------------------------------------------------------------------------------------


def test_the_page_is_built_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_app(SPACE / "app.py").build(LoadedPairs(PairNames()))


@pytest.mark.slow
def test_the_script_serves_the_page_with_the_pair_of_the_repository(tmp_path):
    port = free_port()
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, str(SPACE / "app.py")]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        config = json.loads(read_when_ready(f"http://127.0.0.1:{port}/config", server, tmp_path / "log"))
    finally:
        server.terminate()
        server.wait(timeout=SECONDS)
    values = [component["props"].get("value") for component in config["components"]]
    assert {str(PAIR / "base"), str(PAIR / "proxy")} <= {value for value in values if isinstance(value, str)}
    assert config["analytics_enabled"] is False


def test_a_folder_of_its_own_has_no_pair_and_opens_the_fields_for_one(tmp_path):
    app = load_app(shutil.copytree(SPACE, tmp_path / "space") / "app.py")
    alone = pairs_from_environment({}, app.PAIR_HERE)
    assert alone.offered == PairNames()
    fields = [block for block in app.build(alone).blocks.values() if block.elem_id in ("base", "proxy")]
    assert [field.value for field in fields] == ["", ""]
    assert all(field.interactive and field.parent.parent.open for field in fields)


def read_when_ready(address, server, log):
    end = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(address, timeout=SECONDS).read().decode()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_the_card_is_one_of_a_gradio_space_with_the_version_that_is_tested():
    card = SpaceCard.load(SPACE / "README.md")
    pinned = dict(
        line.split("==") for line in (SPACE.parents[1] / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert card.data.sdk == "gradio"
    assert card.data.sdk_version == pinned["gradio"]
    assert (SPACE / card.data.app_file).is_file()
    assert card.data.license == "apache-2.0"
    assert Version(card.data.python_version) >= Version("3.11")
    assert len(card.data.short_description) <= 60


def test_the_requirements_are_met_by_this_version_and_hold_all_that_the_page_imports():
    (requirement,) = map(Requirement, (SPACE / "requirements.txt").read_text().split())
    assert requirement.name == "transformers-kad"
    assert requirement.specifier.contains(__version__)
    imported = set(re.findall(r"^(?:import|from) (\w+)", (SPACE / "app.py").read_text(), re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"gradio", "transformers_kad"}


# --- The pictures of the documentation --------------------------------------------------------------------------


def take_pictures(folder):
    """The page after a text, on a desktop in light colours and on a phone in dark ones."""
    folder.mkdir(parents=True, exist_ok=True)
    with served(pairs_from_environment({}, PAIR)) as address, running_browser() as browser:
        for name, settings in {"desktop": DESKTOP, "phone": {**PHONE, "color_scheme": "dark"}}.items():
            with visiting(browser, address, **settings) as page:
                ask(page, MIA)
                wait_for_end(page)
                page.locator("body").click(position={"x": 2, "y": 2})  # no focus is shown
                page.screenshot(path=folder / f"{name}.png", full_page=True)


def test_the_pictures_are_small():
    for name in ("desktop", "phone"):
        picture = SPACE.parent / "results" / "playground" / f"{name}.png"
        assert picture.stat().st_size < 150_000


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    take_pictures(Path(sys.argv[1]).resolve())
