"""Which GPU kernels "auto" does not take yet."""

UNPROVEN = frozenset({"quantised layer", "decode step over pages", "pages in 8 bits", "quantised groups"})
"""Kernels that have been compiled for an H200 and checked in an interpreter, and that no GPU has run. Take a name out
once the kernel's tests have passed on a card."""


def proven(kernel: str) -> bool:
    """Whether a kernel has run on a GPU, for `Candidate.automatic`."""
    return kernel not in UNPROVEN
