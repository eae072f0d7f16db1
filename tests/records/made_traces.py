"""Traces made up by hand, a tokenizer of strings, and a reader of the page, for the tests of traces."""

import json
import re
from html.parser import HTMLParser

from transformers_kad import KADTrace, TokenRecord
from transformers_kad.records.trace_page import render_page

ATTACKS = (
    "<script>document.title='pwned'</script>",
    '"><img src=x onerror="document.title=\'pwned\'">',
    "'><svg onload=document.title='pwned'>",
    "</script><script>document.title='pwned'</script>",
    "<!--<script>",
    "{{ 6 * 7 }}",
)


class Strings:
    """A tokenizer whose ids are places in a list of strings."""

    def __init__(self, *strings):
        self.strings = strings

    def decode(self, ids, **_):
        return "".join(self.strings[i] for i in ids)

    def convert_ids_to_tokens(self, index):
        return self.strings[index]


def record(token, share=0.0, mass=0.25, drafted=False, base=(), proxy=()):
    return TokenRecord(token, 0.125, 0.375, 0.5, mass, share, drafted, base, proxy)


def trace_of(ids, **fields):
    return KADTrace((tuple(record(i, **fields) for i in ids),))


def page_of(trace, tokenizer=None, title=None):
    return render_page(trace.sequences, trace.statistics, tokenizer, title)


class Page(HTMLParser):
    """What a page says: all tags with their attributes, the tokens of each text, the text of each element."""

    VOID = ("meta", "line", "rect", "path", "br")

    def __init__(self, source):
        super().__init__()
        self.source, self.tags, self.open, self.tokens, self.words = source, [], [], [], {}
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append((tag, attributes))
        classes = (attributes.get("class") or "").split()
        if "text" in classes:
            self.tokens.append([])
        if tag == "span" and "t" in classes:
            self.tokens[-1].append([set(classes), attributes, ""])

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        names = [tag for tag, _ in self.open]
        if "span" in names and self.tokens and any("text" in (a.get("class") or "").split() for _, a in self.open):
            self.tokens[-1][-1][2] += data
        for name in set(names[-1:]):
            self.words[name] = self.words.get(name, "") + data

    def text(self, sequence=0):
        return "".join(text for *_, text in self.tokens[sequence])

    @property
    def data(self):
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.S)[1])
