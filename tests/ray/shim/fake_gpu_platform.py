"""For tests only: the CPU platform, which tells Ray that its workers run on GPUs.

vLLM's Ray executor asks for a kind of resource per worker, and the CPU platform names none. With
this one on `PYTHONPATH` (vLLM finds it by its entry point) workers take what `ray.init(num_gpus=2)`
claims to have, and run on the CPU.
"""

from vllm.platforms.cpu import CpuPlatform


class FakeGpuPlatform(CpuPlatform):
    """A CPU under another name."""

    ray_device_key = "GPU"


def platform() -> str:
    """What the entry point names."""
    return "fake_gpu_platform.FakeGpuPlatform"
