"""Keeps the signatures of all of vLLM that we touch, version by version, in `signatures.json`.

    python patches/signatures.py                  # add those of the installed vLLM
    python patches/signatures.py FOLDER VERSION   # add those of an unpacked one: FOLDER holds vllm/

Sources are parsed and not imported, so a version that does not run on this machine can be compared
as well. `tests/test_patches.py` checks the installed version against its record.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE / "signatures.json"
ROW = re.compile(r"^\| (`vllm[^|]*) \|", re.MULTILINE)

CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
BACKEND = "vllm.v1.attention.backend"
FURTHER = [
    *(
        f"{CONNECTOR}.{method}"
        for method in (
            "__init__",
            "requires_kv_delivery",
            "on_new_request",
            "get_num_new_matched_tokens",
            "update_state_after_alloc",
            "build_connector_meta",
            "bind_connector_metadata",
            "get_finished",
            "start_load_kv",
            "wait_for_layer_load",
            "save_kv_layer",
            "wait_for_save",
        )
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base:SupportsHMA.request_finished_all_groups",
    f"{BACKEND}:AttentionMetadataBuilder.__init__",
    f"{BACKEND}:AttentionMetadataBuilder.build",
    f"{BACKEND}:AttentionMetadataBuilder.build_for_cudagraph_capture",
    f"{BACKEND}:AttentionMetadataBuilder._cudagraph_support",
    f"{BACKEND}:AttentionMetadataBuilder.get_cudagraph_support",
    f"{BACKEND}:AttentionMetadataBuilder.reorder_batch_threshold",
    f"{BACKEND}:AttentionBackend.get_builder_cls",
    f"{BACKEND}:AttentionBackend.get_impl_cls",
    f"{BACKEND}:AttentionBackend.get_name",
    f"{BACKEND}:AttentionBackend.supported_dtypes",
    f"{BACKEND}:AttentionBackend.get_supported_kernel_block_sizes",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.bind_kv_cache",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_attn_backend",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_kv_cache_spec",
    "vllm.model_executor.models.qwen3:Qwen3Attention.forward",
    "vllm.model_executor.models.qwen2:Qwen2Attention.forward",
    "vllm.model_executor.models.llama:LlamaAttention.forward",
    "vllm.model_executor.models.mistral:MistralAttention.forward",
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config",
    "vllm.v1.core.sched.output:CachedRequestData",
    "vllm.v1.core.sched.output:NewRequestData",
    "vllm.v1.core.sched.output:KVConnectorBlockState.resolve_block_ids",
    "vllm.v1.engine.core_client:SyncMPClient",
    "vllm.LLM.generate",
    "vllm.LLM.chat",
]
"""What we override or call of the classes in the tables."""


def touched() -> list[str]:
    """The names of the tables in README.md, and `FURTHER`, as `vllm.module:Class.attribute`."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    rows = ROW.findall(readme)
    return sorted({*FURTHER, *(name for row in rows for name in re.findall(r"`([^`]+)`", row))})


class Sources:
    """The sources of one vLLM.

    Args:
        root: the folder that holds `vllm/`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._parse = cache(self._parse_file)

    def signature(self, name: str) -> Any:
        """What a name of `touched` looks like: JSON values.

        Raises:
            LookupError: there is no such name.
        """
        module, colon, path = name.partition(":")
        if not colon:
            module, path = name.split(".", 1)
        *owners, last = path.split(".")
        for owner in owners:
            found_in, node = self._find(module, owner)
            if not isinstance(node, ast.ClassDef):
                raise LookupError(f"{owner} of {module} is no class")
            return _described(self._member(found_in, node, last))
        return _described(self._find(module, last)[1])

    def _parse_file(self, module: str) -> ast.Module:
        path = self._root.joinpath(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.exists():
            raise LookupError(f"no module {module}")
        return ast.parse(file.read_text(encoding="utf-8"))

    def _find(self, module: str, name: str) -> tuple[str, ast.AST]:
        """The definition of a module's name, and the module that it stands in."""
        tree = self._parse(module)
        for node in _statements(tree):
            if name in _names(node):
                return module, node
        for node in ast.walk(tree):  # also what is imported for type checkers only
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._find(self._origin(module, node), alias.name)
        raise LookupError(f"no {name} in {module}")

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """The module that `node` of `module` imports from."""
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = self._root.joinpath(*parts).is_dir()
        package = parts[: len(parts) + is_package - node.level]
        return ".".join([*package, *filter(None, [node.module])])

    def _member(self, module: str, owner: ast.ClassDef, name: str) -> ast.AST:
        for node in _statements(owner):
            if name in _names(node):
                return node
        for base in owner.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name):
                try:
                    found_in, node = self._find(module, plain.id)
                except LookupError:
                    continue  # not of vLLM
                if isinstance(node, ast.ClassDef):
                    try:
                        return self._member(found_in, node, name)
                    except LookupError:
                        continue
        raise LookupError(f"no {name} in {owner.name} of {module}")


def _statements(parent: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """Those of a body, and of the branches of its conditions."""
    waiting = list(parent.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, ast.If):
            waiting = [*node.body, *node.orelse, *waiting]


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _described(node: ast.AST) -> Any:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            marks = [f"@{ast.unparse(mark)}" for mark in node.decorator_list]
            kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            return " ".join([*marks, f"{kind}({ast.unparse(node.args)}){returns}"])
        case ast.ClassDef():
            fields = {
                ast.unparse(item.target): ast.unparse(item.annotation)
                for item in _statements(node)
                if isinstance(item, ast.AnnAssign)
            }
            made = [item for item in _statements(node) if "__init__" in _names(item)]
            described: dict[str, Any] = {"bases": [ast.unparse(base) for base in node.bases]}
            if fields:
                described["fields"] = fields
            if made:
                described["__init__"] = _described(made[0])
            return described
        case ast.AnnAssign():
            return ast.unparse(node.annotation)
        case ast.Assign():
            return type(node.value).__name__
    raise LookupError(f"what is {ast.unparse(node)}?")


def signatures(root: Path) -> dict[str, Any]:
    """The signatures of all touched names; None for one that a version has not."""
    sources = Sources(root)
    found = {}
    for name in touched():
        try:
            found[name] = sources.signature(name)
        except LookupError:
            found[name] = None
    return found


def minor(version: str) -> str:
    """`0.32` of `0.32.0+cpu`."""
    return ".".join(version.split(".")[:2])


def main(arguments: list[str]) -> None:
    if arguments:
        folder, version = arguments
        root = Path(folder)
    else:
        import vllm

        spec = find_spec("vllm")
        assert spec is not None and spec.origin is not None
        root, version = Path(spec.origin).parents[1], vllm.__version__
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    record[minor(version)] = signatures(root)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    missing = [name for name, found in record[minor(version)].items() if found is None]
    print(f"wrote {len(record[minor(version)])} signatures of vLLM {minor(version)}")
    if missing:
        print("it has no", ", ".join(missing))


if __name__ == "__main__":
    main(sys.argv[1:])
