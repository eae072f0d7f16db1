"""Ways in which a file can be damaged, each drawn at random with a seed."""

import copy
import json
from pathlib import Path

RAW = "@@RAW@@"
LITERALS = ("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1" * 5000, str(2**70), str(10**9), "-1", "1e-320")
OTHER_TYPES = (None, True, False, 0, 1.5, "", "x", [], [1], {}, {"a": 1}, [[]], "caf\ud83d", ["a", None])
DEEP = "[" * 5000 + "]" * 5000


def places(value, path=()):
    """The paths of all values in a JSON value, the value itself included."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def holder(value, path):
    for key in path[:-1]:
        value = value[key]
    return value


def put(random, value, new):
    """The value with `new` at a random place; fields at the top are drawn as often as all that is deeper."""
    value = copy.deepcopy(value)
    found = list(places(value))
    shallow = [path for path in found if len(path) == 1]
    path = random.choice(shallow if shallow and random.random() < 0.5 else found)
    if not path:
        return new
    holder(value, path)[path[-1]] = new
    return value


def objects(value):
    return [path for path in places(value) if isinstance(holder(value, (*path, None)), dict)]


def change_document(random, text, kind):
    """A JSON text with one change; None if it can't be changed in this way."""
    value = json.loads(text)
    if kind == "another type":
        return json.dumps(put(random, value, random.choice(OTHER_TYPES)))
    if kind == "a number out of range":
        return json.dumps(put(random, value, RAW)).replace(json.dumps(RAW), random.choice(LITERALS))
    if kind == "deep nesting":
        return json.dumps(put(random, value, RAW)).replace(json.dumps(RAW), DEEP)
    if kind == "a text of 10 MB":
        return json.dumps(put(random, value, "ab c" * 2_500_000))
    if not objects(value):
        return None
    path = random.choice(objects(value))
    inner = copy.deepcopy(holder(value, (*path, None)))
    if kind == "an unknown key":
        inner[random.choice(["", "more", "caf\ud83d", "x" * 300])] = random.choice(OTHER_TYPES)
        changed = json.dumps(inner)
    elif not inner:
        return None
    elif kind == "a missing key":
        del inner[random.choice(list(inner))]
        changed = json.dumps(inner)
    else:  # a doubled key
        key = random.choice(list(inner))
        other = random.choice([inner[key], *OTHER_TYPES])
        changed = f"{json.dumps(inner)[:-1]}, {json.dumps({key: other})[1:]}"
    if not path:
        return changed
    value = copy.deepcopy(value)
    holder(value, path)[path[-1]] = RAW
    return json.dumps(value).replace(json.dumps(RAW), changed)


DOCUMENT_CHANGES = (
    *("another type", "a number out of range", "deep nesting", "an unknown key", "a missing key", "a doubled key"),
    "a text of 10 MB",
)


def change_line(random, content, kind):
    """JSON Lines with one change in one line."""
    lines = content.split(b"\n")
    numbers = [at for at, line in enumerate(lines) if line.lstrip().startswith(b"{")]
    if not numbers:
        return None
    at = random.choice(numbers)
    changed = change_document(random, lines[at].decode(), kind)
    if changed is None:
        return None
    lines[at] = changed.encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def truncated(random, content):
    return content[: random.randrange(len(content))]


def without_its_beginning(random, content):
    return content[random.randrange(1, len(content)) :]


def flipped(random, content):
    at = random.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]


def inserted(*choices):
    def insert(random, content):
        at = random.randrange(len(content) + 1)
        return content[:at] + random.choice(choices) + content[at:]

    return insert


def zeroed(random, content):
    """A block of zeros, which file systems leave after a loss of power."""
    at = random.randrange(len(content))
    length = random.randrange(1, len(content) - at + 1)
    return content[:at] + bytes(length) + content[at + length :]


def zeros_behind(random, content):
    return content + bytes(random.randrange(1, 5000))


def lines_of(content):
    return content.splitlines(keepends=True)


def doubled_line(random, content):
    lines = lines_of(content)
    at = random.randrange(len(lines))
    lines.insert(random.randrange(len(lines) + 1), lines[at])
    return b"".join(lines)


def swapped_lines(random, content):
    lines = lines_of(content)
    if len(lines) < 2:
        return None
    one, other = random.sample(range(len(lines)), 2)
    lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def missing_line(random, content):
    lines = lines_of(content)
    del lines[random.randrange(len(lines))]
    return b"".join(lines)


def long_line(random, content):
    lines = lines_of(content)
    lines.insert(random.randrange(len(lines) + 1), b"ab c" * 2_500_000 + b"\n")
    return b"".join(lines)


def joined_lines(random, content):
    at = random.choice([at for at, byte in enumerate(content) if byte == ord("\n")] or [0])
    return content[:at] + content[at + 1 :]


BYTES = {
    "truncated": truncated,
    "without its beginning": without_its_beginning,
    "a bit flipped": flipped,
    "NUL bytes inserted": inserted(b"\0", bytes(100)),
    "invalid UTF-8 inserted": inserted(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"),
    "control characters inserted": inserted(b"\x01", b"\x1b", b"\r", b"\n", b"\x0b", "\u2028".encode(), b"\x85"),
    "a block of zeros": zeroed,
    "zeros behind the end": zeros_behind,
    "a byte order mark": lambda random, content: b"\xef\xbb\xbf" + content,
    "a byte order mark in every line": lambda random, content: (
        b"\xef\xbb\xbf" + content.replace(b"\n", b"\n\xef\xbb\xbf")
    ),
    "CRLF": lambda random, content: content.replace(b"\n", b"\r\n"),
    "CR": lambda random, content: content.replace(b"\n", b"\r"),
    "UTF-16": lambda random, content: content.decode().encode("utf-16"),
    "UTF-16 without a mark": lambda random, content: content.decode().encode("utf-16-le"),
    "empty": lambda random, content: b"",
    "only blanks": lambda random, content: b" \n\t\n",
    "a doubled line": doubled_line,
    "two swapped lines": swapped_lines,
    "a missing line": missing_line,
    "a line of 10 MB": long_line,
    "two joined lines": joined_lines,
    "other text behind the end": lambda random, content: (
        content + random.choice([b"x", b"{}", b"\n\n", b"{", b"[]\n"])
    ),
}
ONE_DRAW = frozenset(name for name in BYTES if name.startswith(("a byte order", "CR", "UTF-16", "empty", "only")))
# These change what no reader can tell from a file that was written so.
HARMLESS = frozenset({"a byte order mark", "CRLF"})


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere" / "nothing")


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def missing(path: Path) -> None:
    path.unlink()


IN_ITS_PLACE = {
    "a folder in its place": a_folder,
    "a dangling link in its place": a_dangling_link,
    "a link to itself in its place": a_link_to_itself,
    "missing": missing,
}
