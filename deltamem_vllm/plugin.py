"""The `vllm.general_plugins` entry point: registration, nothing else."""

from deltamem_vllm.engine.names import MEMORY_STEP_OP
from deltamem_vllm.models.registry import MODEL_CLASSES


def register() -> None:
    """Make vLLM know our model classes. Runs in every vLLM process, possibly more than once.

    vLLM only logs a plugin that raises, so a failure shows up later as an unknown architecture;
    the assertion at the end keeps a half registration from passing silently.
    """
    from vllm import ModelRegistry

    from deltamem_vllm.engine.compat import (
        add_config_hook,
        add_splitting_op,
        check_version,
        let_kernel_scan_pass_llvmlite,
    )

    check_version()
    from deltamem_vllm.api.guard import refuse_memory_field
    from deltamem_vllm.engine.settings import MemoryConfigHook

    for architecture, location in MODEL_CLASSES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, location)
        add_config_hook(architecture, MemoryConfigHook)
    add_splitting_op(MEMORY_STEP_OP)
    let_kernel_scan_pass_llvmlite()
    refuse_memory_field()
    assert set(MODEL_CLASSES) <= set(ModelRegistry.get_supported_archs())
