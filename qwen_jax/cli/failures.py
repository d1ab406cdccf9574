"""Turns failures that the user can fix into messages; any other exception is a bug and keeps its traceback."""

import errno
import re
import sys

from qwen_jax.errors import NO_ROOM, InputError

# What the system says of a path that the user gave, and that a command did not foresee.
_PATHS = {
    errno.EEXIST: "there is a file or folder of this name",
    errno.ENOTDIR: "a file stands where a folder is expected",
    errno.EISDIR: "a folder stands where a file is expected",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
}
# Words in the error of a collective when another process is gone: over TCP, over NCCL, from JAX's coordination service.
_LOST = re.compile(r"gloo|nccl|by peer|connection|heartbeat|coordination|barrier", re.IGNORECASE)
# The same in exceptions of other types, which a failed collective raises too: words that nothing else says.
_SURELY_LOST = re.compile(
    r"gloo \w+ failed|gloo/|nccl \w*error|reset by peer|closed by peer|heartbeat timeout|coordination service",
    re.IGNORECASE,
)
_REMEDIES = (
    "What reduces it, where the command has the option: a smaller --batch-size or --prefill-chunk, "
    "shorter prompts, fewer --max-new-tokens, --dtype bfloat16, more devices (--mesh tensor=2). Otherwise use a "
    "smaller model or a larger machine."
)


def explain(error: BaseException) -> str | None:
    """The message for a failure that the user can fix: bad input, a path, too little memory. None for any other."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = f" for {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}. Make room and run the same command again."
    if isinstance(error, OSError) and error.errno in _PATHS and error.filename:
        return f"Cannot use {error.filename}: {_PATHS[error.errno]}. Give another path, or change what is there."
    lost = _lost_process(error)
    if lost is not None:
        return lost
    need = _lacking_memory(error)
    return None if need is None else f"Out of memory: {need.rstrip('.')}. {_REMEDIES}"


def several_processes() -> bool:
    """Whether this process is one of several of a job."""
    jax = sys.modules.get("jax")
    return bool(jax and jax.distributed.is_initialized())


def _lost_process(error: BaseException) -> str | None:
    """The message if the loss of another process is anywhere in the chain of causes; None otherwise."""
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
    """The allocation that failed, if memory of the host or of a device was exhausted; None for any other error."""
    if isinstance(error, MemoryError):
        return str(error) or "the machine has none left"
    if isinstance(error, OSError):
        return "the machine has none left" if error.errno == errno.ENOMEM else None
    # Without JAX imported this cannot be an error of JAX; importing it here would only cost time.
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    text = str(error)
    # CPUs have another status code.
    if not re.search("RESOURCE_EXHAUSTED|Out of memory allocating", text):
        return None
    # Running out of on-chip memory is a bug of a kernel. Other limits (message sizes) have the same status code.
    if re.search(r"\bvmem\b|\bsmem\b|shared memory", text, re.IGNORECASE):
        return None
    found = re.search(r"[^.\n:]*(?:out of memory|allocat)[^\n]*", text, re.IGNORECASE)
    if found is None:
        return None
    said = re.sub(r"^out of memory (?:while )?", "", found[0].strip(), flags=re.IGNORECASE)
    return re.sub(r"\b(\d{6,}) bytes", lambda size: f"{int(size[1]) / 2**30:,.2f} GiB", said)


def complain(problem: object, kind: str = "error") -> None:
    """Prints a message on standard error: an error, or a "warning" of what does not change the exit status."""
    print(f"qwen-jax: {kind}: {problem}", file=sys.stderr)
