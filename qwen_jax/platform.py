"""The platform that programs are compiled for.

Code that chooses by platform calls these functions through the module (`platform.platform()`), so that a test replaces
them in one place.
"""

import jax


def platform() -> str:
    """The platform that is compiled for: "cpu", "gpu" or "tpu".

    It is that of the current mesh, whose devices may be descriptions of devices that this machine does not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else str(name)


def on_hopper() -> bool:
    """Whether the devices are NVIDIA GPUs of the Hopper generation, for which the GPU kernels are."""
    return (
        platform() == "gpu"
        and jax.default_backend() == "gpu"
        and jax.local_devices()[0].compute_capability.startswith("9.")
    )
