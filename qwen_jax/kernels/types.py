"""Types of what a kernel works on.

JAX annotates the functions of Pallas with classes that it does not export. For type checkers these names are those
classes; when a program runs, nothing private is imported.
"""

from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jax._src.pallas.mosaic_gpu.core import SomeLayout as Layout
    from jax._src.pallas.mosaic_gpu.core import WGMMAAbstractAccumulatorRef

    class Ref(WGMMAAbstractAccumulatorRef):
        """A reference to memory: an operand or a result of a kernel, scratch, a barrier or an accumulator."""

        shape: tuple[int, ...]
        dtype: Any
        at: Any

        def __getitem__(self, index: Any) -> jax.Array: ...
        def __setitem__(self, index: Any, value: Any) -> None: ...

else:
    Ref, Layout = jax.Ref, object

__all__ = ["Layout", "Ref"]
