"""What went wrong, in words that say what to do; anything else is a bug and keeps its traceback."""

import errno
import re
import sys

from qwen_jax.errors import NO_ROOM, InputError

# What JAX's errors say when another process is gone: over TCP, over NCCL, from the coordination service.
_LOST = re.compile(r"gloo|nccl|by peer|connection|heartbeat|coordination|barrier", re.IGNORECASE)
# The same in exceptions of other types, which a failed collective raises too: words that nothing else says.
_SURELY_LOST = re.compile(
    r"gloo \w+ failed|gloo/|nccl \w*error|reset by peer|closed by peer|heartbeat timeout|coordination service",
    re.IGNORECASE,
)
_REMEDIES = (
    "Where the command has them, these need less: a smaller --batch-size, shorter prompts, fewer --max-new-tokens, "
    "--dtype bfloat16, more devices (--mesh tensor=2). Otherwise take a smaller model or a larger machine."
)


def explain(error: BaseException) -> str | None:
    """The message for a failure that the user can mend: bad input, or too little memory. None for any other."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = f" for {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}. Make room and run the same command again."
    lost = _lost_process(error)
    if lost is not None:
        return lost
    need = _lacking_memory(error)
    return None if need is None else f"Out of memory: {need.rstrip('.')}. {_REMEDIES}"


def several_processes() -> bool:
    """Whether this process has joined others."""
    jax = sys.modules.get("jax")
    return bool(jax and jax.distributed.is_initialized())


def _lost_process(error: BaseException) -> str | None:
    """What to do if another process of the job is gone, which any exception in the chain of causes may tell."""
    if not several_processes():
        return None
    text: str | None = None
    cause: BaseException | None = error
    while cause is not None and text is None:
        if isinstance(cause, sys.modules["jax"].errors.JaxRuntimeError):
            lost = _LOST.search(str(cause)) is not None
        else:
            lost = isinstance(cause, TimeoutError) or _SURELY_LOST.search(str(cause)) is not None
        text, cause = (str(cause) if lost else None), cause.__cause__ or cause.__context__
    if text is None:
        return None
    return (
        "Another process of the job has ended or cannot be reached, and its own output says why "
        f"({text.strip().partition(chr(10))[0][:300]}). Start all of them again with the same command."
    )


def _lacking_memory(error: BaseException) -> str | None:
    """What could not be had, if memory of the host or of a device is what was lacking."""
    if isinstance(error, MemoryError):
        return str(error) or "the machine has none left"
    if isinstance(error, OSError):
        return "the machine has none left" if error.errno == errno.ENOMEM else None
    # Whoever has not imported JAX cannot have its error; importing it here would only cost time.
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    text = str(error)
    # On-chip memory is a kernel's affair, not the user's; other limits (message sizes) carry this status, too.
    if "RESOURCE_EXHAUSTED" not in text or re.search(r"\bvmem\b|\bsmem\b|shared memory", text, re.IGNORECASE):
        return None
    found = re.search(r"[^.\n:]*(?:out of memory|allocat)[^\n]*", text, re.IGNORECASE)
    if found is None:
        return None
    said = re.sub(r"^out of memory (?:while )?", "", found[0].strip(), flags=re.IGNORECASE)
    return re.sub(r"\b(\d{6,}) bytes", lambda size: f"{int(size[1]) / 2**30:,.2f} GiB", said)


def complain(problem: object) -> None:
    """Says on standard error what went wrong."""
    print(f"qwen-jax: error: {problem}", file=sys.stderr)
