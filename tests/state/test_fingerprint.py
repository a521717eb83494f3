"""What changes the meaning of a state, what does not, and how weights are read once."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamem_vllm.adapter import Adapter, link_checkpoint, load_adapter, save_adapter
from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.errors import BackboneError, SnapshotError
from deltamem_vllm.models.registry import ARCHITECTURES
from deltamem_vllm.state import digests
from deltamem_vllm.state.fingerprint import FingerprintParts, fingerprint, weight_files


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir(), tmp_path / "model"))


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return load_adapter(adapter_dir("tsw"))


def parts_of(model: Path, adapter: Adapter, **options: object) -> FingerprintParts:
    arguments = {"quantization": None, "chat_template": None, **options}
    return fingerprint(model, adapter, **arguments)  # type: ignore[arg-type]


def change(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def change_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def add_special_token(model: Path) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:-1]
    path.write_text(json.dumps(content))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight": (change_weight, "weights"),
    "rope": (lambda m: change(m / "config.json", rope_parameters={"rope_theta": 2.0}), "config"),
    "an unknown key": (lambda m: change(m / "config.json", novelty=1), "config"),
    "quantised": (
        lambda m: change(m / "config.json", quantization_config={"quant_method": "awq"}),
        "quantization",
    ),
    "a token": (add_special_token, "tokenizer"),
    "how text is split": (
        lambda m: change(m / "tokenizer_config.json", add_prefix_space=True),
        "tokenizer",
    ),
    "more vocabulary": (lambda m: (m / "qwen.tiktoken").write_text("YQ== 0"), "tokenizer"),
    "a template": (
        lambda m: change(m / "tokenizer_config.json", chat_template="{{ messages }}"),
        "chat_template",
    ),
    "a template's file": (
        lambda m: (m / "chat_template.jinja").write_text("{{ messages }}"),
        "chat_template",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_meaning_changes_its_part_alone(
    name: str, model: Path, adapter: Adapter
) -> None:
    before = parts_of(model, adapter)
    apply, part = CHANGES[name]
    apply(model)
    after = parts_of(model, adapter)
    assert before.differences(after) == [part]
    assert before.digest != after.digest


SAME: dict[str, Callable[[Path], object]] = {
    "names and versions": lambda m: change(
        m / "config.json", _name_or_path="x", transformers_version="9", dtype="bfloat16"
    ),
    "torch_dtype": lambda m: change(m / "config.json", torch_dtype="float16"),
    "training": lambda m: change(m / "config.json", initializer_range=1.0, use_cache=False),
    "layout of config.json": lambda m: (m / "config.json").write_text(
        json.dumps(dict(reversed(json.loads((m / "config.json").read_text()).items())))
    ),
    "generation": lambda m: change(m / "generation_config.json", temperature=0.5),
    "a README": lambda m: (m / "README.md").write_text("x"),
    "where the tokenizer came from": lambda m: change(
        m / "tokenizer_config.json", name_or_path="x", transformers_version="9"
    ),
    "the weights' name": lambda m: (m / "model.safetensors").rename(m / "a.safetensors"),
    "an adapter beside them": lambda m: [
        shutil.copy(file, m / file.name) for file in adapter_dir("msw").iterdir()
    ],
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_change_the_meaning_changes_nothing(
    name: str, model: Path, adapter: Adapter
) -> None:
    before = parts_of(model, adapter)
    SAME[name](model)
    assert parts_of(model, adapter) == before


@pytest.mark.parametrize("copy", [False, True])
def test_a_linked_checkpoint_is_its_base_with_its_adapter(
    copy: bool, model: Path, adapter: Adapter, tmp_path: Path
) -> None:
    reference = save_adapter(adapter, tmp_path / "reference", form="reference")
    linked = link_checkpoint(
        model, reference, tmp_path / "linked", architectures=ARCHITECTURES, copy=copy
    )
    assert (linked / "config.json").read_bytes() != (model / "config.json").read_bytes()
    inside = load_adapter(linked / "deltamem_adapter")
    assert parts_of(linked, inside) == parts_of(model, adapter)


def test_another_adapter_is_named(model: Path, adapter: Adapter) -> None:
    other = load_adapter(adapter_dir("msw"))
    assert parts_of(model, adapter).differences(parts_of(model, other)) == ["adapter"]


def test_overrides_count_as_if_they_stood_in_the_config(model: Path, adapter: Adapter) -> None:
    stock = parts_of(model, adapter)
    served = {"architectures": ["DeltaMemQwen3ForCausalLM"], "deltamem": {"adapter": "/x"}}
    assert parts_of(model, adapter, overrides=served) == stock
    rope = {"rope_parameters": {"rope_theta": 2.0}}
    overridden = parts_of(model, adapter, overrides={**served, **rope})
    assert stock.differences(overridden) == ["config"]
    change(model / "config.json", **rope)
    assert parts_of(model, adapter) == overridden


def test_a_template_is_its_text_wherever_it_stands(model: Path, adapter: Adapter) -> None:
    given = parts_of(model, adapter, chat_template="{{ messages }}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert parts_of(model, adapter) == given


def test_a_tokenizer_may_lie_elsewhere(model: Path, adapter: Adapter, tmp_path: Path) -> None:
    elsewhere = tmp_path / "tokenizer"
    elsewhere.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(model / name, elsewhere / name)
    (elsewhere / "config.json").write_text("{}")
    original = parts_of(model_dir(), adapter)
    assert parts_of(model, adapter, tokenizer_dir=elsewhere) == original
    assert parts_of(model, adapter).differences(original) == ["tokenizer", "chat_template"]


def test_quantisation_is_a_part_of_its_own_and_not_a_matter_of_kernels(
    model: Path, adapter: Adapter
) -> None:
    plain = parts_of(model, adapter)
    assert plain.differences(parts_of(model, adapter, quantization="fp8")) == ["quantization"]
    change(model / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    by_config = parts_of(model, adapter)
    assert by_config == parts_of(model, adapter, quantization="awq_marlin")
    change(model / "config.json", quantization_config={"quant_method": "awq", "bits": 8})
    assert by_config.differences(parts_of(model, adapter)) == ["quantization"]


def test_an_alias_joins_a_quantised_and_an_unquantised_backbone(
    model: Path, adapter: Adapter
) -> None:
    plain = parts_of(model, adapter, alias="demo")
    change_weight(model)
    change(model / "config.json", quantization_config={"quant_method": "awq"})
    assert parts_of(model, adapter, alias="demo", quantization="awq") == plain
    other = parts_of(model, adapter, alias="another")
    assert plain.differences(other) == ["weights", "config", "quantization"]
    add_special_token(model)
    assert plain.differences(parts_of(model, adapter, alias="demo")) == ["tokenizer"]


def test_a_lora_is_its_weights_and_arithmetic(
    model: Path, adapter: Adapter, tmp_path: Path
) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    change(lora / "adapter_config.json", **config, base_model_name_or_path="a")
    save_file({"a": torch.ones(2)}, lora / "adapter_model.safetensors")
    plain = parts_of(model, adapter)
    first = parts_of(model, adapter, lora=lora)
    assert plain.differences(first) == ["lora"]
    assert plain.with_lora(lora) == first and first.with_lora(None) == plain
    change(lora / "adapter_config.json", target_modules=["v_proj", "q_proj"])
    change(lora / "adapter_config.json", base_model_name_or_path="b", inference_mode=True)
    assert plain.with_lora(lora) == first
    change(lora / "adapter_config.json", lora_alpha=16)
    second = plain.with_lora(lora)
    assert second != first
    save_file({"a": torch.zeros(2)}, lora / "adapter_model.safetensors")
    assert plain.with_lora(lora) not in (first, second)
    with pytest.raises(BackboneError, match="no LoRA's folder"):
        plain.with_lora(model)


def test_weights_are_those_that_the_index_names(model: Path, adapter: Adapter) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    shutil.copy(model / "model-00001-of-00001.safetensors", model / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    change(model / "model.safetensors.index.json", **index)
    assert [file.name for file in weight_files(model)] == ["model-00001-of-00001.safetensors"]
    assert parts_of(model, adapter) == parts_of(model_dir(), adapter)
    for hostile in ("absent.safetensors", "../model/config.json"):
        change(model / "model.safetensors.index.json", weight_map={"a": hostile})
        with pytest.raises(BackboneError, match=r"index|missing"):
            weight_files(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_damaged_files_are_refused_by_name(name: str, model: Path, adapter: Adapter) -> None:
    (model / name).write_text("[1")
    with pytest.raises(BackboneError, match=name):
        parts_of(model, adapter)


def test_a_folder_without_weights_is_refused(model: Path, adapter: Adapter) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="no weights"):
        parts_of(model, adapter)


def test_parts_are_whole_or_refused(model: Path, adapter: Adapter) -> None:
    parts = parts_of(model, adapter)
    values = dataclasses.asdict(parts)
    assert FingerprintParts.from_mapping(values) == parts
    for wrong in (
        {**values, "weights": "x"},
        {**values, "weights": 3},
        {**values, "novelty": parts.weights},
        {"weights": parts.weights},
    ):
        with pytest.raises(SnapshotError):
            FingerprintParts.from_mapping(wrong)


# Digests of large files


def large_file(path: Path, fill: bytes, *, settled: bool = True) -> Path:
    path.write_bytes(fill * digests.REMEMBERED_BYTES)
    if settled:
        time.sleep(digests.SETTLED_S + 0.1)
    return path


@pytest.fixture(scope="module")
def settled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_file(tmp_path_factory.mktemp("settled") / "weights", b"a")


def remembered() -> dict[str, str]:
    path = digests.cache_file()
    return dict(json.loads(path.read_text())) if path.exists() else {}


def test_a_large_file_is_read_once_and_again_when_it_changed(tmp_path: Path) -> None:
    path = large_file(tmp_path / "weights", b"a")
    (first,) = digests.file_digests([path])
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(remembered().values()) == [first]
    # A digest that only the cache can know shows that the file is not read.
    (key,) = remembered()
    digests.cache_file().write_text(json.dumps({key: "0" * 64}))
    assert digests.file_digests([path]) == ["0" * 64]
    times = path.stat()
    path.write_bytes(b"b" * digests.REMEMBERED_BYTES)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    (second,) = digests.file_digests([path])
    assert second == hashlib.sha256(path.read_bytes()).hexdigest() != first


def test_a_file_that_just_changed_is_not_remembered(tmp_path: Path) -> None:
    digests.file_digests([large_file(tmp_path / "weights", b"a", settled=False)])
    assert remembered() == {}


def test_a_file_of_the_hub_cache_carries_its_digest(tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / ("1" * 64)).write_bytes(b"weights")
    (blobs / ("2" * 40)).write_bytes(b"config")
    links = [tmp_path / "model.safetensors", tmp_path / "config.json"]
    for link, blob in zip(links, ("1" * 64, "2" * 40), strict=True):
        link.symlink_to(blobs / blob)
    assert digests.file_digests(links) == ["1" * 64, hashlib.sha256(b"config").hexdigest()]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "b": "no digest"}'])
def test_a_damaged_cache_is_made_anew(content: str, settled_file: Path) -> None:
    digests.cache_file().parent.mkdir(parents=True)
    digests.cache_file().write_text(content)
    expected = hashlib.sha256(settled_file.read_bytes()).hexdigest()
    assert digests.file_digests([settled_file]) == [expected]
    assert list(remembered().values()) == [expected]


def test_without_a_cache_files_are_read_each_time(
    settled_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    expected = hashlib.sha256(settled_file.read_bytes()).hexdigest()
    assert digests.file_digests([settled_file]) == [expected]
