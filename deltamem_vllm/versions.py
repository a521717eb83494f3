"""Refuses versions of other packages that this one was never run with."""

import os
from collections.abc import Sequence

from deltamem_vllm.errors import EngineConfigError


def check_tested(package: str, version: str, minors: Sequence[str], variable: str) -> None:
    """Refuse a version of a package whose minor version was never tried.

    Args:
        package: its name, for the message.
        version: that is installed.
        minors: minor versions that were tried, such as "0.33".
        variable: an environment variable; set to 1, any version passes.

    Raises:
        EngineConfigError: the version is another one.
    """
    if version.startswith(tuple(f"{minor}." for minor in minors)):
        return
    if os.environ.get(variable) == "1":
        return
    raise EngineConfigError(
        f"deltamem-vllm supports {package} {' and '.join(minors)}, but {version} is installed. "
        f"Install a supported version, or set {variable}=1 to try."
    )
