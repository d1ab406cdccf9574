"""Whether an output is the expected one. Decided here, outside: a program never sees what is expected of it."""


def lines_of(output: bytes) -> list[bytes]:
    """The lines of an output without trailing white space, and without empty lines at the end."""
    return [line.rstrip() for line in output.rstrip().split(b"\n")]


def difference(output: bytes, expected: bytes) -> str | None:
    """What first differs between two outputs, by lines without trailing white space; None if nothing does.

    A missing line and one too many differ like a wrong one. The expected text itself is not in the message, which may
    be shown to the program's author.
    """
    got, wanted = lines_of(output), lines_of(expected)
    for number, (line, right) in enumerate(zip(got, wanted, strict=False), 1):
        if line != right:
            return f"line {number} differs"
    if len(got) != len(wanted):
        return f"{len(got)} lines instead of {len(wanted)}"
    return None
