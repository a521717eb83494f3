"""Adapters: what is sound survives every conversion, what is not is refused with the reason."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltamem_vllm.adapter import (
    CONFIG_NAME,
    REFERENCE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    Adapter,
    BackboneShape,
    layer_tensor_shapes,
    load_adapter,
    save_adapter,
    tensor_name,
)
from deltamem_vllm.config import DELTA_HEADS, DeltaMemConfig
from deltamem_vllm.errors import AdapterError, ConfigError

DATA = Path(__file__).parent / "parity" / "data"
CASES = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir())
TSW = DATA / "qwen3_tsw" / "adapter"

Tensors = dict[str, Tensor]


def random_tensors(
    config: DeltaMemConfig, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = layer_tensor_shapes(config, hidden_size=6, q_size=4, kv_size=2)
    return {
        tensor_name(layer, param): torch.randn(shape, generator=generator).to(dtype)
        for layer in range(layers)
        if config.targets_layer(layer)
        for param, shape in shapes.items()
    }


def write_reference(folder: Path, tensors: Any, config: DeltaMemConfig | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / REFERENCE_WEIGHTS_NAME)
    (config or DeltaMemConfig.from_file(TSW / CONFIG_NAME)).save(folder / CONFIG_NAME)
    return folder


def golden_tensors() -> Tensors:
    loaded: Tensors = torch.load(TSW / REFERENCE_WEIGHTS_NAME, weights_only=True)
    return loaded


# Sound adapters


@pytest.mark.parametrize("case", CASES)
def test_golden_adapter_loads_and_fits_its_backbone(case: str) -> None:
    backbone = BackboneShape.from_dir(DATA / case / "model")
    adapter = load_adapter(DATA / case / "adapter", backbone=backbone)
    stored = torch.load(DATA / case / "adapter" / REFERENCE_WEIGHTS_NAME, weights_only=True)
    assert adapter.tensors.keys() == stored.keys()
    assert all(torch.equal(adapter.tensors[name], stored[name]) for name in stored)
    assert adapter.layer_indices == ((0, 2) if case == "qwen3_scaled" else (0, 1, 2))
    assert adapter.source == DATA / case / "adapter"


@pytest.mark.parametrize("case", CASES)
def test_fingerprint_does_not_depend_on_the_form(case: str, tmp_path: Path) -> None:
    first = load_adapter(DATA / case / "adapter")
    second = load_adapter(save_adapter(first, tmp_path / "ours"))
    third = load_adapter(save_adapter(second, tmp_path / "theirs", form="reference"))
    assert not (tmp_path / "ours" / REFERENCE_WEIGHTS_NAME).exists()
    assert not (tmp_path / "theirs" / WEIGHTS_NAME).exists()
    assert first.fingerprint == second.fingerprint == third.fingerprint
    assert first.config == second.config == third.config
    assert all(torch.equal(first.tensors[name], third.tensors[name]) for name in first.tensors)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rank=st.integers(1, 3),
    num_state_heads=st.integers(1, 2),
    couple_lambda=st.booleans(),
    rankwise_gates=st.booleans(),
    trainable_delta_scale=st.booleans(),
    granularity=st.sampled_from(["layer", "head"]),
    delta_o_rmsnorm=st.booleans(),
    delta_heads=st.sets(st.sampled_from(DELTA_HEADS)),
    drop_inactive=st.booleans(),
    target_layers=st.sampled_from([(), (1,), (0, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_sound_adapter_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    granularity: str,
    delta_heads: set[str],
    drop_inactive: bool,
    dtype: torch.dtype,
    **fields: Any,
) -> None:
    config = DeltaMemConfig.from_dict(
        {
            **fields,
            "target_layers": list(fields["target_layers"]),
            "delta_heads": list(delta_heads),
            "delta_scale_granularity": granularity,
        }
    )
    tensors = random_tensors(config, dtype=dtype)
    if drop_inactive:
        off = tuple(f"delta_{head}_proj" for head in DELTA_HEADS if head not in delta_heads)
        tensors = {name: t for name, t in tensors.items() if not name.endswith(off or ("-",))}
    made = Adapter.from_tensors(config, tensors)
    folder = tmp_path_factory.mktemp("round_trip")
    for form in ("safetensors", "reference"):
        read = load_adapter(save_adapter(made, folder / form, form=form))
        assert read.fingerprint == made.fingerprint
        assert read.config == config
        assert read.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read.tensors[name].dtype == dtype
            assert torch.equal(read.tensors[name], tensor)


def test_fingerprint_changes_with_any_content() -> None:
    config = DeltaMemConfig(rank=2)
    tensors = random_tensors(config)
    prints = {Adapter.from_tensors(config, tensors).fingerprint}
    for name in tensors:
        changed = tensors[name].clone()
        changed.view(-1)[-1] += 1
        prints.add(Adapter.from_tensors(config, {**tensors, name: changed}).fingerprint)
    other_alpha = config.model_copy(update={"alpha": 8.0})
    prints.add(Adapter.from_tensors(other_alpha, tensors).fingerprint)
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    prints.add(Adapter.from_tensors(config, halves).fingerprint)
    assert len(prints) == len(tensors) + 3
    same_bytes = {name: tensor.half().view(torch.bfloat16) for name, tensor in tensors.items()}
    assert Adapter.from_tensors(config, same_bytes).fingerprint not in prints
    shuffled = dict(reversed(tensors.items()))
    assert Adapter.from_tensors(config, shuffled).fingerprint in prints


def test_layer_hides_what_the_config_switches_off() -> None:
    layer = load_adapter(TSW).layer(1)
    assert layer.delta_q_proj is not None and layer.delta("o") is layer.delta_o_proj
    # The reference's file holds all four heads, but applies only the active ones.
    assert layer.delta_k_proj is None and layer.delta("v") is None
    assert layer.lambda_proj is None and layer.delta_scale_raw is None
    scaled = load_adapter(DATA / "qwen3_scaled" / "adapter")
    weights = scaled.layer(2)
    assert weights.delta_scale_raw is not None and weights.delta_scale_raw.shape == (4,)
    assert weights.delta_o_rmsnorm_weight is not None
    with pytest.raises(AdapterError, match="layer 1 has no memory"):
        scaled.layer(1)


def test_counts_match_the_published_adapter() -> None:
    config = DeltaMemConfig(delta_heads=("q", "o"))
    shapes = layer_tensor_shapes(config, hidden_size=2560, q_size=4096, kv_size=1024)
    # One layer of Qwen3-4B; all 36 are alike.
    layer = {tensor_name(0, param): torch.zeros(shape) for param, shape in shapes.items()}
    adapter = Adapter.from_tensors(config, layer)
    assert 36 * adapter.num_parameters == 4_866_336, "the paper's 4.87 M"
    assert adapter.num_bytes == 4 * (adapter.num_parameters + 2 * 1024 * 8), "k and v are stored"
    assert 36 * adapter.state_bytes == 9 * 1024
    assert load_adapter(DATA / "qwen3_msw4" / "adapter").state_bytes == 3 * 4 * 8 * 8 * 4


def test_tensors_that_share_storage_are_stored_apart(tmp_path: Path) -> None:
    config = DeltaMemConfig(rank=2)
    tensors = random_tensors(config)
    packed = torch.randn(3, 6)
    tensors[tensor_name(0, "memory_q_proj")] = packed[:2]
    tensors[tensor_name(0, "memory_k_proj")] = packed[1:]
    made = Adapter.from_tensors(config, tensors)
    assert load_adapter(save_adapter(made, tmp_path / "a")).fingerprint == made.fingerprint


# Unsound adapters


class Runs:
    """Executes a command when it is unpickled by anything careless."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_hostile_pickle_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "executed"
    content = {**golden_tensors(), "model.layers.0.self_attn.evil": Runs(marker)}
    folder = write_reference(tmp_path / "hostile", {})
    path = folder / REFERENCE_WEIGHTS_NAME
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(AdapterError, match="was not executed"):
        load_adapter(folder)
    assert not marker.exists()
    assert b"system" in path.read_bytes(), "the file must hold the call"
    call, arguments = Runs(marker).__reduce__()
    call(*arguments)
    assert marker.exists(), "and the call must do what is looked for"


@pytest.mark.parametrize("kept", [0, 1, 100, 20_000, -10])
def test_truncated_reference_file_is_refused(tmp_path: Path, kept: int) -> None:
    folder = Path(shutil.copytree(TSW, tmp_path / "cut"))
    path = folder / REFERENCE_WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(AdapterError, match=REFERENCE_WEIGHTS_NAME):
        load_adapter(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -10])
def test_truncated_safetensors_file_is_refused(tmp_path: Path, kept: int) -> None:
    folder = save_adapter(load_adapter(TSW), tmp_path / "cut")
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(AdapterError, match=WEIGHTS_NAME):
        load_adapter(folder)


def _drop(param: str) -> Callable[[Tensors], Any]:
    return lambda tensors: {name: t for name, t in tensors.items() if name != tensor_name(1, param)}


def _put(name: str, value: Any) -> Callable[[Tensors], Any]:
    return lambda tensors: {**tensors, name: value}


Q0 = tensor_name(0, "memory_q_proj")
BIAS = tensor_name(0, "beta_bias")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda tensors: list(tensors.values()), "holds a list"),
        (lambda tensors: {}, "no tensors"),
        (lambda tensors: {1: torch.ones(1)}, "expected a dict from names"),
        (_drop("memory_q_proj"), "missing tensor model.layers.1.self_attn.memory_q_proj"),
        (_drop("delta_o_proj"), "missing tensor model.layers.1.self_attn.delta_o_proj"),
        (_put(tensor_name(0, "lambda_proj"), torch.ones(8, 64)), "lambda_proj has no place"),
        (_put(tensor_name(0, "q_norm"), torch.ones(8)), "q_norm has no place"),
        (_put("lm_head.weight", torch.ones(8)), "unknown tensor 'lm_head.weight'"),
        (_put("model.layers.01.self_attn.beta_bias", torch.ones(8)), "unknown tensor"),
        (_put(tensor_name(4, "beta_bias"), torch.ones(8)), "layer 3 has no tensors"),
        (_put(Q0, [1.0]), "is a list, expected a tensor"),
        (_put(Q0, torch.ones(8, 32)), "expected"),
        (_put(Q0, torch.ones(64, 8)), "expected"),
        (_put(BIAS, torch.ones(1)), r"beta_bias has shape \[1\], expected \[8\]"),
        (_put(BIAS, torch.ones(8, dtype=torch.float64)), "torch.float64"),
        (_put(BIAS, torch.ones(8, dtype=torch.int32)), "torch.int32"),
        (_put(BIAS, torch.ones(8).to_sparse()), "plain dense CPU tensor"),
        (_put(BIAS, torch.full((8,), float("nan"))), "NaN or infinity"),
        (_put(BIAS, torch.tensor([1.0] * 7 + [float("inf")])), "NaN or infinity"),
        (_put(Q0, torch.ones(0, 64)), "is empty"),
        (_put(Q0, torch.ones(1).expand(8, 1 << 40)), "without the data for it"),
    ],
)
def test_unsound_content_is_refused(tmp_path: Path, damage: Any, reason: str) -> None:
    folder = write_reference(tmp_path / "bad", damage(golden_tensors()))
    with pytest.raises(AdapterError, match=reason) as caught:
        load_adapter(folder)
    assert str(folder) in str(caught.value)


def test_absent_inactive_head_is_accepted_but_not_an_active_one(tmp_path: Path) -> None:
    folder = write_reference(tmp_path / "a", _drop("delta_k_proj")(golden_tensors()))
    assert load_adapter(folder).layer(1).delta_k_proj is None


def test_layer_outside_target_layers_is_refused(tmp_path: Path) -> None:
    config = DeltaMemConfig.from_file(TSW / CONFIG_NAME).model_copy(
        update={"target_layers": (0, 1)}
    )
    folder = write_reference(tmp_path / "a", golden_tensors(), config)
    with pytest.raises(AdapterError, match="layer 2 has tensors but is not in target_layers"):
        load_adapter(folder)


def test_targeted_layer_without_tensors_is_refused(tmp_path: Path) -> None:
    config = DeltaMemConfig.from_file(TSW / CONFIG_NAME).model_copy(
        update={"target_layers": (0, 1, 2, 3)}
    )
    folder = write_reference(tmp_path / "a", golden_tensors(), config)
    with pytest.raises(AdapterError, match="layer 3 has no tensors"):
        load_adapter(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=CONFIG_NAME):
        load_adapter(tmp_path)
    shutil.copy(TSW / CONFIG_NAME, tmp_path)
    with pytest.raises(AdapterError, match="has no weights"):
        load_adapter(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_adapter(tmp_path)


def test_config_edited_after_export_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(load_adapter(TSW), tmp_path / "a")
    config = DeltaMemConfig.from_file(folder / CONFIG_NAME)
    config.model_copy(update={"alpha": 32.0}).save(folder / CONFIG_NAME)
    with pytest.raises(AdapterError, match="fingerprint"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format_version": "2"}, "format version '2'"),
        ({"format_version": None}, "format version None"),
        ({"format": "pt"}, "not in the format"),
        ({"fingerprint": None}, "not in the format"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
    ],
)
def test_safetensors_metadata_is_checked(
    tmp_path: Path, change: dict[str, str | None], reason: str
) -> None:
    adapter = load_adapter(TSW)
    folder = save_adapter(adapter, tmp_path / "a")
    metadata = {
        "format": "deltamem-adapter",
        "format_version": "1",
        "fingerprint": adapter.fingerprint,
        **change,
    }
    kept = {name: value for name, value in metadata.items() if value is not None}
    safetensors.torch.save_file(adapter.tensors, folder / WEIGHTS_NAME, metadata=kept)
    with pytest.raises(AdapterError, match=reason):
        load_adapter(folder)


def test_safetensors_is_preferred_over_the_pickle(tmp_path: Path) -> None:
    folder = save_adapter(load_adapter(TSW), tmp_path / "a")
    (folder / REFERENCE_WEIGHTS_NAME).write_bytes(b"never opened")
    assert load_adapter(folder).fingerprint == load_adapter(TSW).fingerprint


def test_saving_never_overwrites_unasked(tmp_path: Path) -> None:
    first, second = load_adapter(TSW), load_adapter(DATA / "qwen3_msw4" / "adapter")
    folder = save_adapter(first, tmp_path / "a", form="reference")
    for form in ("safetensors", "reference"):
        with pytest.raises(AdapterError, match="already holds"):
            save_adapter(second, folder, form=form)
    assert load_adapter(folder).fingerprint == first.fingerprint
    save_adapter(second, folder, form="safetensors", overwrite=True)
    assert load_adapter(folder).fingerprint == second.fingerprint
    # The other form of the old adapter, and temporary files, must not stay behind.
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS_NAME, CONFIG_NAME]
    with pytest.raises(AdapterError, match="unknown form"):
        save_adapter(first, tmp_path / "b", form="gguf")  # type: ignore[arg-type]


def test_written_config_is_the_references_file(tmp_path: Path) -> None:
    folder = save_adapter(load_adapter(TSW), tmp_path / "a", form="reference")
    ours, theirs = (json.loads((place / CONFIG_NAME).read_text()) for place in (folder, TSW))
    assert list(ours.items()) == list(theirs.items())
