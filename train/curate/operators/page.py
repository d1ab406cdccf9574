"""The text of one HTML page, and a program that extracts it under limits of time and memory.

As a program it imports nothing of the project, so that it starts at once.
"""

import codecs
import json
import re
import resource
import struct
import sys
from collections.abc import Callable
from typing import IO

Extract = Callable[[bytes], tuple[str | None, str | None]]

SIZE = struct.Struct(">Q")
"""In front of each message between the program and its parent."""

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_TAG = re.compile(r"<[a-zA-Z!/?]")
_ELEMENT = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)")
# Elements without an end, and those that end where the next one begins.
_FLAT = frozenset(
    "area base br col embed hr img input link meta param source track wbr "
    "p li dt dd tr td th thead tbody tfoot option optgroup colgroup caption rp rt".split()
)
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0e-\x1f\x7f]+")
# To find the main content takes up to 8 ns for each character and each element that it is in. In real pages of 1 MB the
# sum is at most 2 * 10^7.
_MOST_DEPTH = 3 * 10**8


def extractor(main_content: bool, title: bool) -> Extract:
    """Loads resiliparse, and returns the function that maps a page to its text and None, or to None and a reason."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import detect_mime
    from resiliparse.parse.html import HTMLTree

    def extract(page: bytes) -> tuple[str | None, str | None]:
        kind = detect_mime(page[:4096])
        # "application/octet-stream" is also said of short pages that are not in English.
        known = ("application/octet-stream", "application/xml", "application/xhtml+xml")
        source = _decoded(page).replace("\0", "") if kind.startswith("text/") or kind in known else ""
        head = source[:4096]
        if not _TAG.search(source) or sum(map(len, _CONTROL.findall(head))) > len(head) // 10:
            return None, "not HTML"
        if main_content and _depths(source) > _MOST_DEPTH:
            return None, "elements are nested too deeply"
        tree = HTMLTree.parse(source)
        text = extract_plain_text(tree, main_content=main_content, preserve_formatting=True).strip()
        if not text:
            return None, "no text in the page"
        name = " ".join((tree.title or "").split()) if title else ""
        return (f"{name}\n\n{text}" if name and not text.startswith(name) else text), None

    return extract


def _decoded(page: bytes) -> str:
    """The page as text, without its byte order mark."""
    from resiliparse.parse.encoding import detect_encoding

    for mark, name in _MARKS:
        if page.startswith(mark):
            return page[len(mark) :].decode(name, "replace")
    # Text in another encoding is hardly ever valid UTF-8. What a page declares is read from its first 1,024 bytes, as
    # HTML prescribes; the detector knows the names of the WHATWG alone, and not Python's "unicode_escape".
    for declared in ("utf-8", detect_encoding(page[:1024], from_html_meta=True)):
        try:
            return page.decode(declared or "utf-8")
        except (UnicodeDecodeError, LookupError):
            continue
    try:
        return page.decode(detect_encoding(page) or "utf-8", "replace")
    except LookupError:
        return page.decode("utf-8", "replace")


def _depths(source: str) -> int:
    """The sum, over all characters, of the depth of their element; what is not closed counts as open to the end."""
    # With so few tags the sum cannot be large.
    if source.count("<") * len(source) <= _MOST_DEPTH:
        return 0
    depth = total = last = 0
    for match in _ELEMENT.finditer(source):
        total += depth * (match.start() - last)
        last = match.start()
        if match[2].lower() not in _FLAT:
            depth = max(depth - 1, 0) if match[1] else depth + 1
    return total + depth * (len(source) - last)


def read_message(file: IO[bytes]) -> bytes | None:
    """The next message; None at the end of the file."""
    head = file.read(SIZE.size)
    if len(head) < SIZE.size:
        return None
    size = SIZE.unpack(head)[0]
    body = file.read(size)
    return body if len(body) == size else None


def write_message(file: IO[bytes], body: bytes) -> None:
    file.write(SIZE.pack(len(body)))
    file.write(body)
    file.flush()


def main() -> None:
    """Answers each page on the standard input with text and reason as JSON.

    A page that takes too much processor time ends the process by SIGXCPU, one that takes too much memory by any signal.
    """
    settings = json.loads(sys.argv[1])
    seconds = settings.pop("seconds")
    resource.setrlimit(resource.RLIMIT_AS, (settings.pop("memory"),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    extract = extractor(**settings)
    while (page := read_message(sys.stdin.buffer)) is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))
        write_message(sys.stdout.buffer, json.dumps(extract(page)).encode())


if __name__ == "__main__":
    main()
