"""What programs are compiled for."""

import jax


def platform() -> str:
    """What is compiled for: cpu, gpu or tpu. That of the current mesh, which may be of devices that are not here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else str(name)


def on_hopper() -> bool:
    """Whether the devices are GPUs of the generation that our GPU kernels are for."""
    return (
        platform() == "gpu"
        and jax.default_backend() == "gpu"
        and jax.local_devices()[0].compute_capability.startswith("9.")
    )
