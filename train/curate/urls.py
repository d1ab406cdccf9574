"""Addresses of the web in one form, so that the same page has the same address."""

import re
from urllib.parse import urlsplit

_PORTS = {"http": "80", "https": "443"}
# Parameters that say where a reader came from, and not what is shown.
_TRACKING = re.compile(
    r"utm_\w*|fbclid|gclid|dclid|gbraid|wbraid|gclsrc|msclkid|yclid|twclid|ttclid|igshid|mc_[ce]id|_hsenc|_hsmi|mkt_tok"
    r"|_ga|_gl|oly_(?:anon|enc)_id|vero_id|wickedid|__s|ref_src|ref_url|spm",
    re.IGNORECASE,
)
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def normalise_url(url: str) -> str | None:
    """An address in normal form; two addresses with the same form are taken to show the same page.

    For http and https: the scheme is dropped, for both show the same; so are the default port, a user name, a dot that
    ends the host, the fragment, parameters that track a reader (utm_..., fbclid, gclid and others), empty parameters
    (`a=1&&b=2`) and slashes that end the path. The host is in lower case and in its ASCII form (IDNA). Escapes are in
    upper case, and letters, digits and -._~ are not escaped (RFC 3986, section 6.2.2); "." and ".." in a path are
    resolved (section 5.2.4). The order of parameters and the case of path and query stay, since servers may tell them
    apart. Other schemes: only spaces around the address and the case of the scheme change.

    Args:
      url: as it was found.

    Returns:
      The normal form; None if there is no address, so that documents without one are never taken for the same.
    """
    # Browsers remove spaces around an address, and line breaks and tabs within.
    url = re.sub(r"[\t\r\n]", "", url.strip())
    if not url:
        return None
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError:
        return url
    if scheme not in _PORTS or not host:
        return url if not scheme else scheme + url[len(scheme) :]
    host = _ascii(host.rstrip("."))
    if ":" in host:
        host = f"[{host}]"
    if port is not None and str(port) not in _PORTS.values():
        host = f"{host}:{port}"
    path = _without_dots(_escaped(parts.path)).rstrip("/")
    query = "&".join(
        part for part in _escaped(parts.query).split("&") if part and not _TRACKING.fullmatch(part.partition("=")[0])
    )
    return f"{host}{path}?{query}" if query else f"{host}{path}"


def _ascii(host: str) -> str:
    if host.isascii():
        return host.lower()
    try:
        return host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        return host.lower()


def _escaped(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        character = chr(int(match[1], 16))
        return character if character in _UNRESERVED else match[0].upper()

    text = _ESCAPE.sub(one, text)
    if text.isascii() and " " not in text:
        return text
    return "".join(c if c.isascii() and c != " " else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)


def _without_dots(path: str) -> str:
    if "/." not in path:
        return path
    kept: list[str] = []
    for part in path.split("/")[1:]:
        if part == "..":
            del kept[-1:]
        elif part != ".":
            kept.append(part)
    return "".join(f"/{part}" for part in kept)
