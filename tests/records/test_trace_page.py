"""The page of a trace: what it says, that it reads right, that nothing in it runs or is fetched, and how it looks.

`PYTHONPATH=tests python tests/records/test_trace_page.py recipes/results/trace.png` takes the picture that
the README shows.
"""

import base64
import dataclasses
import hashlib
import html
import itertools
import random
import re
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
from chromium import chromium_path
from hypothesis import given, settings
from hypothesis import strategies as st
from made_traces import ATTACKS, Page, Strings, page_of, record, trace_of
from peft import PeftModel
from run_command import run_command
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from transformers_kad import DualDeferral, KADLogitsProcessor, KADStatistics, KADTrace, SequenceStatistics, TokenRecord

PAIR = Path(__file__).resolve().parents[2] / "recipes" / "tiny_pair"
LABELS = [attack.replace(" ", "␣") for attack in ATTACKS]

deterministic = settings(derandomize=True, deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PAIR / "base")


# --- Text -----------------------------------------------------------------------------------------------------


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@given(st.text(st.sampled_from("aé漢😀 \n\t�\u200d\u0301<&\"'ש"), max_size=12))
@deterministic
def test_the_text_of_the_page_is_the_text_that_was_generated(text):
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "base")
    page = Page(page_of(trace_of([*ids_of(tokenizer, "x" + text), tokenizer.eos_token_id]), tokenizer))
    assert page.text() == "x" + text + tokenizer.eos_token
    assert page.text().count("�") == text.count("�")


def test_any_ids_at_all_read_as_the_tokenizer_decodes_them(tokenizer):
    """Bytes that are no character, ids that are no token, a character that the text ends within."""
    draws = random.Random(0)
    some = [*ids_of(tokenizer, "é😀 \n�x"), 9999]
    for _ in range(120):
        ids = [draws.choice(some) for _ in range(draws.randint(1, 9))]
        page = Page(page_of(trace_of(ids), tokenizer))
        assert page.text() == tokenizer.decode(ids)
        assert sum(len(members) for _, _, members in page.data["pieces"]) == len(ids)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("é", {"é": 2}),
        ("😀", {"😀": 4}),
        ("xéy", {"x": 1, "é": 2, "y": 1}),
        ("�", {"�": 3}),
    ],
)
def test_a_character_of_several_tokens_is_one_piece_that_lists_them(tokenizer, text, pieces):
    ids = ids_of(tokenizer, text)
    page = Page(page_of(trace_of(ids), tokenizer))
    assert [text for *_, text in page.tokens[0]] == list(pieces)
    assert [len(members) for _, _, members in page.data["pieces"]] == list(pieces.values())
    assert [token[0] for _, _, members in page.data["pieces"] for token in members] == ids


def test_the_tokens_of_a_character_are_named_by_their_bytes(tokenizer):
    page = Page(page_of(trace_of(ids_of(tokenizer, "é")), tokenizer))
    assert [*page.data["labels"].values()] == ["bytes A9", "bytes C3"]


def test_a_lone_byte_does_not_swallow_the_token_after_it(tokenizer):
    lone, letter = ids_of(tokenizer, "é")[0], ids_of(tokenizer, "x")[0]
    page = Page(page_of(trace_of([lone, letter, lone]), tokenizer))
    assert [text for *_, text in page.tokens[0]] == ["�", "x", "�"]


@given(st.lists(st.sampled_from(["▁the", "▁", "the", "é", "漢", "😀", "\n", "no token"]), min_size=1, max_size=8))
@deterministic
def test_tokenizers_that_fall_back_to_bytes_and_strip_the_first_space_read_right_too(words):
    vocabulary = {"<unk>": 0, "▁the": 257, "▁": 258, "the": 259} | {f"<0x{b:02X}>": 1 + b for b in range(256)}
    model = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    tokens = {w: [vocabulary[w]] if w in vocabulary else [1 + byte for byte in w.encode()] for w in words}
    tokens["no token"] = [9999]
    ids = [i for w in words for i in tokens[w]]
    page = Page(page_of(trace_of(ids), tokenizer))
    assert page.text() == tokenizer.decode(ids)
    assert [len(members) for _, _, members in page.data["pieces"]] == [len(tokens[w]) for w in words]
    assert {i: name for i, name in page.data["labels"].items() if int(i) > 256}.items() <= {
        *(("257", "␣the"), ("258", "␣"), ("259", "the"))
    }


def test_blanks_are_marked_and_characters_that_act_on_a_page_are_written_out():
    tokenizer = Strings("\n", "  ", " a", "\t", "\u202eevil", "b\rc\x00", "\ud83d")
    page = page_of(trace_of(range(7)), tokenizer)
    assert page.encode()
    assert Page(page).text() == "\n   a\tU+202EevilbU+000DcU+0000U+D83D"
    for tag, count in {"newline": 1, "blank": 2, "tab": 1, "control": 4}.items():
        assert page.count(f'<i class="{tag}">') == count, tag
    assert not re.search("[\x00\r\u202e]", page)
    assert [*Page(page).data["labels"].values()] == ["↵", "␣␣", "␣a", "⇥", "U+202Eevil", "bU+000DcU+0000", "U+D83D"]


def test_an_id_that_the_tokenizer_does_not_know_is_shown_as_an_id(tokenizer):
    page = Page(page_of(trace_of([*ids_of(tokenizer, "x"), 9999]), tokenizer))
    (_, known, _), (classes, unknown, text) = page.tokens[0]
    assert (text, unknown["data-id"]) == ("", "9999")
    assert "none" in classes
    assert "data-id" not in known
    assert "9999" not in page.data["labels"]


# --- Shades, marks, figures -----------------------------------------------------------------------------------


def test_the_shade_follows_the_share_and_more_than_colour_tells_the_halves_apart():
    shares = [0.0, 0.04, 0.06, 0.49, 0.5, 0.96, 1.0]
    trace = KADTrace((tuple(record(0, share) for share in shares),))
    tokens = Page(page_of(trace, Strings("a"))).tokens[0]
    assert [classes - {"t"} for classes, *_ in tokens] == [
        set(),
        set(),
        {"s1"},
        {"s5"},
        {"s5", "proxy"},
        {"s10", "proxy"},
        {"s10", "proxy"},
    ]


def test_a_character_of_several_tokens_has_their_mean_share_and_is_drafted_if_any_is(tokenizer):
    first, second = ids_of(tokenizer, "é")
    page = Page(page_of(KADTrace(((record(first, 0.2, drafted=True), record(second, 1.0)),)), tokenizer))
    ((classes, *_),) = page.tokens[0]
    assert classes == {"t", "s6", "proxy", "drafted"}


def test_drafted_tokens_are_marked_without_colour():
    trace = KADTrace(((record(0, drafted=True), record(0)),))
    page = page_of(trace, Strings("a"))
    assert ["drafted" in classes for classes, *_ in Page(page).tokens[0]] == [True, False]
    assert re.search(r"\.drafted \{ text-decoration: underline dotted", page)


def test_the_panel_gets_every_figure_and_five_alternatives_of_each_model():
    base = ((1, 0.5), (0, 0.25), (2, 0.125), (3, 0.0625), (4, 1e-5))
    proxy = ((0, 0.75), (2, 0.123456789), (1, 0.0), (4, 0.0), (5, 0.0))
    trace = KADTrace(((TokenRecord(0, 0.25, 0.75, 0.8765432, 0.5, 0.4, True, base, proxy),),))
    data = Page(page_of(trace, Strings(*"abcdef"))).data
    assert data["labels"] == dict(zip("012345", "abcdef", strict=True))
    rounded = [[0, 0.75], [2, 0.1235], [1, 0], [4, 0], [5, 0]]
    assert data["pieces"] == [[0, 1, [[0, 0.25, 0.75, 0.8765, 0.5, 0.4, 1, [list(b) for b in base], rounded]]]]


def test_a_rule_that_is_no_mask_has_no_shade_no_chart_and_the_legend_says_why():
    page = page_of(trace_of([0, 1], share=None, mass=None), Strings("a", "b"))
    assert [classes for classes, *_ in Page(page).tokens[0]] == [{"t"}, {"t"}]
    assert "no deferral mask" in page
    assert '<div class="chart">' not in page
    assert 'class="scale"' not in page
    assert [member[4:6] for _, _, (member,) in Page(page).data["pieces"]] == [[None, None]] * 2
    with_shares = page_of(trace_of([0, 1]), Strings("a", "b"))
    assert "no deferral mask" not in with_shares
    assert 'class="scale"' in with_shares


def test_the_totals_are_those_of_the_call_and_unknown_ones_are_dashes():
    statistics = KADStatistics(2, 1, 4, 1, 0.375, (0, 1), 11, 12, (SequenceStatistics(2, 1, 4, 1, 0.375, (0, 1)),))
    trace = KADTrace(trace_of([0, 1]).sequences, statistics)

    def totals(page):
        return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))

    assert totals(page_of(trace, Strings("a", "b"))) == {
        "tokens": "2",
        "rounds": "1",
        "drafted": "4",
        "accepted": "1",
        "acceptance rate": "0.25",
        "tokens per round": "2.00",
        "mean deferral mass": "0.38",
        "base forwards": "11",
        "proxy forwards": "12",
    }
    unknown = totals(page_of(trace_of([0, 1]), Strings("a", "b")))
    assert unknown.pop("tokens") == "2"
    assert set(unknown.values()) == {"–"}


def test_the_page_names_both_models_and_the_rule(tmp_path):
    trace = KADTrace(
        trace_of([0]).sequences, base="some/base", proxy="<some>/proxy", rule="DualDeferral(threshold=0.6)"
    )
    for page in (
        trace.to_html(tmp_path / "page.html", Strings("a")).read_text("utf-8"),
        html.unescape(re.search(r'srcdoc="([^"]*)"', trace._repr_html_())[1]),
    ):
        assert dict(re.findall(r"<b>(.*?)</b> <code>(.*?)</code>", page)) == {
            "base": "some/base",
            "proxy": "&lt;some&gt;/proxy",
            "rule": "DualDeferral(threshold=0.6)",
        }
    assert "<b>base</b>" not in page_of(trace_of([0]), Strings("a"))


def test_half_a_character_in_a_title_or_a_name_is_written_out(tmp_path):
    trace = KADTrace(trace_of([0]).sequences, base="caf\ud83d")
    page = trace.to_html(tmp_path / "page.html", Strings("a"), title="th\udce9").read_text("utf-8")
    assert "<h1>th\\udce9</h1>" in page
    assert "caf\\ud83d" in page


def test_the_chart_has_a_step_of_height_d_for_every_token_and_can_be_read_aloud():
    trace = KADTrace((tuple(record(0, mass=mass) for mass in (0.0, 1.0, 0.25)),))
    page = page_of(trace, Strings("a"))
    assert 'viewBox="0 0 3 1"' in page
    assert '<path class="area" d="M0 1V1H1V0H2V0.75H3V1Z"/>' in page
    assert re.findall(r'<text x="-6"[^>]*>(.*?)</text>', page) == ["1", "0.5", "0"]
    words = Page(page).words
    assert "Deferral mass D along the text" in words["title"]
    assert "3 tokens" in words["desc"]
    assert "Mean 0.42, lowest 0.00, highest 1.00" in words["desc"]
    names = {attributes["id"] for _, attributes in Page(page).tags if "id" in attributes}
    (svg,) = [attributes for tag, attributes in Page(page).tags if tag == "svg" and "role" in attributes]
    assert svg["role"] == "img"
    assert set(svg["aria-labelledby"].split()) <= names


def test_every_sequence_has_its_section():
    own = (SequenceStatistics(2, 2, 6, 3, 0.5), SequenceStatistics(1, 1), SequenceStatistics())
    trace = KADTrace(((record(0), record(1)), (record(1),), ()), KADStatistics(3, 3, sequences=own))
    page = page_of(trace, Strings("a", "b"))
    assert [Page(page).text(at) for at in range(2)] == ["ab", "b"]
    assert re.findall(r"<h2>(Sequence . of .)", page) == [f"Sequence {at} of 3" for at in (1, 2, 3)]
    assert page.count("No tokens.") == 1
    assert page.count('<div class="chart">') == 2
    assert "acceptance rate 0.50, tokens per round 1.00, mean D 0.50" in page
    ids = [attributes["id"] for _, attributes in Page(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"t1-1", "t1-2", "t2-1"} <= set(ids)


def test_tokens_can_be_reached_by_keyboard_one_stop_a_text():
    page = Page(page_of(KADTrace(((record(0), record(0)), (record(0),))), Strings("a")))
    assert [[attributes["tabindex"] for _, attributes, _ in tokens] for tokens in page.tokens] == [["0", "-1"], ["0"]]


@pytest.mark.parametrize("trace", [KADTrace(), KADTrace(((),)), KADTrace(((), ()))], ids=len)
def test_an_empty_trace_makes_a_page_that_says_so(trace):
    page = page_of(trace, Strings())
    assert "This trace has no tokens" in page
    assert Page(page).tokens == []


def test_two_thousand_tokens_stay_below_three_megabytes(tokenizer):
    draws = random.Random(0)
    words = [i for i in range(640) if tokenizer.decode([i]).strip().isalnum()]

    def found():
        return tuple((draws.choice(words), draws.random()) for _ in range(5))

    records = [
        TokenRecord(draws.choice(words), *(draws.random() for _ in range(5)), True, found(), found())
        for _ in range(2000)
    ]
    page = page_of(KADTrace((tuple(records),)), tokenizer)
    assert Page(page).text() == tokenizer.decode([r.token_id for r in records])
    assert len(page.encode()) < 3e6


# --- Colours --------------------------------------------------------------------------------------------------


def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def schemes():
    """The colours of the light and of the dark scheme, by name."""
    page = page_of(trace_of([0]), Strings("a"))
    light, dark = re.findall(r":root \{(.*?)\}", page, re.S)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in (light, dark)]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_is_legible_on_every_shade_and_shades_differ_in_lightness(scheme):
    colours = schemes()[scheme]
    shades = [colours["paper"], *(colours[f"s{k}"] for k in range(1, 11))]
    assert min(contrast(colours["ink"], shade) for shade in shades) > 4.5
    steps = [luminance(after) - luminance(before) for before, after in itertools.pairwise(shades)]
    assert all(step < 0 if scheme == 0 else step > 0 for step in steps)
    assert contrast(shades[0], shades[10]) > 2
    for back in ("paper", "raised"):
        assert contrast(colours["soft"], colours[back]) > 4.5
        assert min(contrast(colours[bar], colours[back]) for bar in ("base", "proxy")) > 3
    assert contrast(colours["area"], colours["paper"]) > 3
    assert min(contrast(colours["mark"], shade) for shade in shades) > 3


# --- Nothing runs, nothing is fetched -------------------------------------------------------------------------


def attacked(title=None):
    """A page whose tokens, alternatives and title are all attacks."""
    found = tuple((at, 0.5) for at in range(5))
    trace = trace_of(range(len(ATTACKS)), base=found, proxy=found)
    return page_of(trace, Strings(*ATTACKS), title)


def test_what_a_model_wrote_is_escaped_wherever_it_is_printed():
    page = Page(attacked(title=ATTACKS[0]))
    assert page.text() == "".join(ATTACKS)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in page.tags]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert ATTACKS[0] in page.words["h1"]
    assert ATTACKS[0] in page.words["title"]
    assert [*page.data["labels"].values()] == LABELS


def test_the_page_asks_for_nothing_and_its_policy_allows_nothing_but_its_own_style_and_script():
    page = page_of(trace_of([0]), Strings("a"))
    for fetcher in ("//", "http:", "url(", "@import", "import(", "src=", "href=", "<link", "fetch(", "XMLHttp"):
        assert fetcher not in page, fetcher
    (policy,) = [a["content"] for _, a in Page(page).tags if a.get("http-equiv") == "Content-Security-Policy"]
    directives = {name: value for name, _, value in (part.strip().partition(" ") for part in policy.split(";"))}

    def source(tag):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert directives == {
        "default-src": "'none'",
        "style-src": source("style"),
        "script-src": source("script"),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert " style=" not in page  # the policy would drop it


# --- In a browser ---------------------------------------------------------------------------------------------


def run_chromium(page, *arguments, fragment="", budget=2000):
    """Load a file in headless Chromium and return what it prints."""
    chromium = chromium_path()
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run hide-scrollbars disable-background-networking"
    quiet += " disable-component-update disable-sync"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium, *(f"--{flag}" for flag in quiet.split()), f"--user-data-dir={profile}"]
        command += [f"--virtual-time-budget={budget}", *arguments, page.as_uri() + fragment]
        done = run_command(command)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def loaded(folder, source, fragment=""):
    """The document that a browser makes of a page, scripts run."""
    page = folder / "page.html"
    page.write_text(source, encoding="utf-8")
    return run_chromium(page, "--dump-dom", fragment=fragment)


def title_of(document):
    return html.unescape(re.search(r"<title>(.*?)</title>", document, re.S)[1])


def without_policy(source):
    return re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", source)


def unescaped(source):
    """The page as it would be if its text were not escaped."""
    start, end = source.index('<div class="text'), source.index("<aside")
    return source[:start] + html.unescape(source[start:end]) + source[end:]


def panel_of(document):
    """The text of the panel's elements, by tag."""
    inside = re.search(r'<div id="details">(.*?)</aside>', document, re.S)[1]
    cells = re.findall(r"<(h2|p|th|td|code|span)[^>]*>([^<]*)</\1>", inside)
    words = [html.unescape(text) for _, text in cells if text]
    return dict(zip(*[iter(words)] * 2, strict=False)), words


def test_a_page_of_attacks_runs_none_of_them(tmp_path):
    document = loaded(tmp_path, attacked("Calm"))
    assert title_of(document) == "Calm"
    assert Page(document.replace("<!DOCTYPE html>", "")).text() == "".join(ATTACKS)


def test_the_same_page_unescaped_would_be_taken_over_and_the_policy_alone_holds_it(tmp_path):
    source = unescaped(attacked("Calm"))
    assert title_of(loaded(tmp_path, without_policy(source))) == "pwned"
    assert title_of(loaded(tmp_path, source)) == "Calm"


def test_attacks_in_the_panel_are_text_too(tmp_path):
    document = loaded(tmp_path, without_policy(attacked("Calm")), "#t1-2")
    assert title_of(document) == "Calm"
    _, words = panel_of(document)
    assert words[0] == LABELS[1]
    assert words.count(LABELS[0]) == words.count(LABELS[3]) == 2  # once in each model's list


EVENTS = {
    "hover": "document.getElementById('t1-2').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))",
    "touch": "document.getElementById('t1-2').click()",
    "focus": "document.getElementById('t1-2').focus()",
    "arrow": "document.getElementById('t1-1').focus();"
    "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))",
    "end": "document.getElementById('t1-1').focus();"
    "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'End', bubbles: true}))",
}


@pytest.mark.parametrize("event", EVENTS)
def test_pointing_focus_and_arrows_fill_the_panel(tmp_path, event):
    records = (
        record(0),
        TokenRecord(1, 0.0625, 0.875, 0.6875, 0.75, 0.9375, True, ((0, 0.5), (1, 0.0625)), ((1, 0.875), (2, 1e-5))),
    )
    source = page_of(KADTrace((records,)), Strings("a", " b", "\n"))
    before, _ = panel_of(loaded(tmp_path, source))
    assert before == {}
    document = loaded(tmp_path, without_policy(source) + f"<script>{EVENTS[event]}</script>")
    _, words = panel_of(document)
    assert words == [
        *("␣b", "token 2 of 2 · id 1 · drafted"),
        *("base p", "0.063", "proxy q", "0.875", "target r", "0.688"),
        *("deferral mass D", "0.750", "owed to the proxy", "0.938"),
        *("the base's best", "a", "0.500", "␣b", "0.063"),
        *("the proxy's best", "␣b", "0.875", "↵", "1.0e-5"),
    ]
    assert re.search(r'id="t1-2" tabindex="\d|-1"[^>]*>', document)
    assert re.search(r'class="[^"]*\bon\b[^"]*" id="t1-2"', document)


def test_a_link_to_a_token_opens_it_under_the_policy_and_undefined_figures_are_dashes(tmp_path):
    document = loaded(tmp_path, page_of(trace_of([0, 1], share=None, mass=None), Strings("a", "b")), "#t1-2")
    _, words = panel_of(document)
    assert words[:2] == ["b", "token 2 of 2 · id 1 · not drafted"]
    assert words[-4:] == ["deferral mass D", "–", "owed to the proxy", "–"]


def test_no_alternative_is_cut(tmp_path):
    """Bytes, and tokens longer than the column: all of each is inside its own box, and no box lies over another."""
    labels = ("bytes E2 80 A6", "bytes F0 9F 98 80", "=" * 64, "a", "Donaudampfschifffahrtsgesellschaft")
    found = tuple((at, 0.125) for at in range(5))
    source = page_of(trace_of([0], base=found, proxy=found), Strings(*labels))
    measure = """
      const boxes = [...document.querySelectorAll(".lists code")].map((code) => {
        const range = document.createRange(), box = code.getBoundingClientRect();
        range.selectNodeContents(code);
        const text = range.getBoundingClientRect(), figure = code.nextElementSibling.getBoundingClientRect();
        return code.scrollWidth <= code.clientWidth && text.right <= box.right + 1 && box.right <= figure.left + 1;
      });
      document.title = `${boxes.length} ${boxes.every(Boolean)}`;
    """
    for width in (1000, 500):
        page = tmp_path / "page.html"
        page.write_text(without_policy(source) + f"<script>{measure}</script>", encoding="utf-8")
        document = run_chromium(page, "--dump-dom", f"--window-size={width},600", fragment="#t1-1")
        assert title_of(document) == "10 true"


# --- The picture of the README --------------------------------------------------------------------------------

QUESTION = "Mia has 34 apples. Jon brings 28 more. Mia gives 17 to Ada. How many apples does Mia have now?"


def write_tiny_pairs_page(path):
    """A two-step problem, solved by the tiny pair speculatively."""
    base = AutoModelForCausalLM.from_pretrained(PAIR / "base")
    reference = AutoModelForCausalLM.from_pretrained(PAIR / "reference")
    proxy = PeftModel.from_pretrained(reference, PAIR / "proxy")
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "base")
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    kad = KADLogitsProcessor(proxy, DualDeferral(threshold=0.6), trace=True, tokenizer=tokenizer)
    base.generate(**inputs, logits_processor=[kad], assistant_model=proxy, do_sample=False, max_new_tokens=40)
    trace = dataclasses.replace(kad.trace, base="recipes/tiny_pair/base", proxy="recipes/tiny_pair/proxy")
    return trace.to_html(path, title=QUESTION.partition(" How")[0])


def photograph(page, picture, *arguments):
    run_chromium(page, "--window-size=1000,600", f"--screenshot={picture}", *arguments, fragment="#t1-15")


def pixels_of(picture):
    """Width, height and the pixels of a PNG of 8 bits a channel, as rows of bytes."""
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", content[16:29])
    assert (depth, interlaced) == (8, 0)
    channels = {2: 3, 6: 4}[colour]
    at, packed = 8, b""
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        packed += content[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    raw, rows, stride = zlib.decompress(packed), [], width * channels
    above = bytes(stride)
    for start in range(0, len(raw), stride + 1):
        row = bytearray(raw[start + 1 : start + 1 + stride])
        for i in range(stride):
            left, corner = (row[i - channels], above[i - channels]) if i >= channels else (0, 0)
            paeth = min((left, above[i], corner), key=lambda x, guess=left + above[i] - corner: abs(guess - x))
            row[i] = (row[i] + (0, left, above[i], (left + above[i]) // 2, paeth)[raw[start]]) & 0xFF
        rows.append(above := bytes(row))
    return width, height, [tuple(row[i : i + 3]) for row in rows for i in range(0, stride, channels)]


@pytest.mark.slow
def test_the_page_of_the_tiny_pair_can_be_photographed_in_light_and_in_dark(tmp_path):
    page = write_tiny_pairs_page(tmp_path / "trace.html")
    source = Page(page.read_text("utf-8"))
    assert source.text() == "We get 34 + 28 = 62. Then 62 - 17 = 45. The answer is 45.<|end|>"
    shares = ["proxy" in classes for classes, *_ in source.tokens[0]]
    assert 0 < sum(shares) < len(shares)
    for colours, arguments in zip(schemes(), ([], ["--blink-settings=preferredColorScheme=0"]), strict=True):
        photograph(page, tmp_path / "trace.png", *arguments)
        width, height, pixels = pixels_of(tmp_path / "trace.png")
        assert (width, height) == (1000, 600)
        count = {name: pixels.count(tuple(bytes.fromhex(value[1:]))) for name, value in colours.items()}
        assert count["paper"] > width * height / 2
        assert count["s10"] > 2000  # the tokens that are the proxy's
        assert count["area"] > 2000  # the chart
        assert min(count["base"], count["proxy"], count["ink"]) > 200  # the panel, which is open


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        photograph(write_tiny_pairs_page(Path(folder) / "trace.html"), Path(sys.argv[1]).resolve())
