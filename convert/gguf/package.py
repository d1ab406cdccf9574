"""The `gguf` package, which is installed with an extra."""

from types import ModuleType

from qwen_jax.errors import InputError


def gguf_library() -> ModuleType:
    """Imports the package `gguf` of llama.cpp.

    Raises:
      InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("This needs the package gguf. Install it: pip install 'qwen-jax[gguf]'.") from None
    return gguf
