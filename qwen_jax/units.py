"""Numbers of bytes and parameters for people to read."""


def binary_size(nbytes: float) -> str:
    """A number of bytes for reading, such as "1.50 GiB"; small ones in MiB, KiB or bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} bytes"


def count(number: float) -> str:
    """A number of parameters for reading, such as "1.54B"; small ones in millions (M) or thousands (K)."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
