"""The config reads what the reference writes, and refuses everything that we do not serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_vllm.config import ARCHIVED_FIELDS, DELTA_HEADS, DeltaMemConfig
from deltamem_vllm.errors import ConfigError

DATA = Path(__file__).parent / "parity" / "data"
CASES = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir())

OTHER_VALUES: dict[type, Any] = {bool: True, int: 7, float: 0.75, str: "other", tuple: [1]}


def valid_fields() -> st.SearchStrategy[dict[str, Any]]:
    floats = st.floats(allow_nan=False, allow_infinity=False)
    scale = st.floats(min_value=1e-3, max_value=1.0)
    return st.fixed_dictionaries(
        {},
        optional={
            "rank": st.integers(1, 64),
            "alpha": floats,
            "beta_bias_init": floats,
            "normalize_qk": st.booleans(),
            "couple_lambda": st.booleans(),
            "state_update_mode": st.sampled_from(["standard", "lambda_outside", "no_lambda"]),
            "rankwise_gates": st.booleans(),
            "output_init": st.sampled_from(["zero", "random", "base_slice", "base_slice_fixed"]),
            "num_state_heads": st.integers(1, 9),
            "memory_write_granularity": st.sampled_from(["token", "message_mean", "sentence_mean"]),
            "target_layers": st.lists(st.integers(0, 99), unique=True),
            "delta_heads": st.lists(st.sampled_from(DELTA_HEADS)),
            "delta_o_rmsnorm": st.booleans(),
            "trainable_delta_scale": st.booleans(),
            "delta_scale_init": scale,
            "delta_scale_granularity": st.sampled_from(["layer", "head"]),
        },
    )


@pytest.mark.parametrize("case", CASES)
def test_reference_file_survives_field_for_field(case: str) -> None:
    path = DATA / case / "adapter" / "delta_mem_config.json"
    written = json.loads(path.read_text())
    dumped = DeltaMemConfig.from_file(path).to_dict()
    assert list(dumped) == list(written), "same keys in the same order"
    assert dumped == written


@settings(max_examples=50)
@given(valid_fields())
def test_config_round_trips_through_json(fields: dict[str, Any]) -> None:
    config = DeltaMemConfig.from_dict(fields)
    assert DeltaMemConfig.from_dict(json.loads(config.to_json())) == config


def test_config_round_trips_through_a_file(tmp_path: Path) -> None:
    config = DeltaMemConfig(rank=4, delta_heads=("q", "o"), target_layers=(2, 0))
    config.save(tmp_path / "config.json")
    assert DeltaMemConfig.from_file(tmp_path / "config.json") == config
    assert config.target_layers == (0, 2)


def test_missing_keys_take_the_reference_defaults() -> None:
    config = DeltaMemConfig.from_dict({})
    assert (config.rank, config.alpha, config.online_gain) == (8, 16.0, 0.05)
    assert config.delta_heads == ("q", "k", "v", "o")
    assert config.beta_bias_init == -1.5
    assert config.state_update_mode == "standard"
    assert len(config.to_dict()) == 49


@pytest.mark.parametrize("field", ARCHIVED_FIELDS)
def test_archived_field_is_refused_by_name(field: str) -> None:
    default = DeltaMemConfig.model_fields[field].default
    value = not default if isinstance(default, bool) else OTHER_VALUES[type(default)]
    with pytest.raises(ConfigError) as caught:
        DeltaMemConfig.from_dict({field: value})
    assert f"{field} = {value!r}" in str(caught.value)
    assert json.dumps(default) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": "8"},
        {"rank": True},
        {"rank": 8.0},
        {"rank": None},
        {"rank": 0},
        {"rank": 65},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"alpha": 10**400},
        {"alpha": "16"},
        {"normalize_qk": 1},
        {"num_state_heads": 0},
        {"base_slice_ref_width": 0},
        {"state_update_mode": "no_erase"},
        {"memory_write_granularity": "message_proposals"},
        {"output_init": "ones"},
        {"target_modules": ["mlp"]},
        {"target_modules": ["self_attn", "mlp"]},
        {"target_modules": []},
        {"target_layers": [-1]},
        {"target_layers": [1, 1]},
        {"target_layers": [True]},
        {"target_layers": 3},
        {"delta_heads": ["q", "x"]},
        {"delta_heads": "q;o"},
        {"delta_heads": 5},
        {"delta_heads": [1]},
        {"delta_heads": None},
        {"delta_o_rmsnorm_eps": 0.0},
        {"delta_scale_init": 0.0},
        {"delta_scale_max": -1.0},
        {"delta_scale_granularity": "token"},
        {"delta_scale_parameterization": "rank_over_alpha"},
    ],
    ids=str,
)
def test_bad_value_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        DeltaMemConfig.from_dict(fields)
    with pytest.raises(ConfigError):
        DeltaMemConfig(**fields)


def test_scale_must_start_below_its_bound() -> None:
    with pytest.raises(ConfigError, match=r"delta_scale_init \(2\.0\).*delta_scale_max \(2\.0\)"):
        DeltaMemConfig(delta_scale_init=2.0)


def test_unknown_field_is_refused_with_the_likely_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown field rnak = 4; did you mean rank\?"):
        DeltaMemConfig.from_dict({"rnak": 4})


def test_every_problem_gets_its_own_line() -> None:
    with pytest.raises(ConfigError) as caught:
        DeltaMemConfig.from_dict({"rank": 0, "alpha": "x", "bogus": 1})
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(
        name in text for name, text in zip(("rank", "alpha", "bogus"), lines[1:], strict=True)
    )


@pytest.mark.parametrize(
    ("given_heads", "kept"),
    [
        ("O, q", ("q", "o")),
        (["o", "Q", "o"], ("q", "o")),
        (("v", "k"), ("k", "v")),
        ("none", ()),
        ("", ()),
        ([], ()),
        (["none"], ()),
    ],
)
def test_delta_heads_are_normalised(given_heads: Any, kept: tuple[str, ...]) -> None:
    assert DeltaMemConfig.from_dict({"delta_heads": given_heads}).delta_heads == kept


def test_names_are_normalised_like_the_reference() -> None:
    config = DeltaMemConfig.from_dict({"state_update_mode": " No_Lambda "})
    assert config.state_update_mode == "no_lambda"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON list"),
        ('{"rank": 4, "rank": 8}', "key given twice: rank"),
        ('{"alpha": NaN}', "alpha"),
        ('{"rank": "8"}', "rank"),
        ("\xff", "not valid JSON"),
    ],
)
def test_bad_file_is_refused_with_its_path(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "delta_mem_config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        DeltaMemConfig.from_file(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_absent_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        DeltaMemConfig.from_file(tmp_path / "absent.json")


def test_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DeltaMemConfig().rank = 4


@pytest.mark.parametrize(
    ("config", "read", "gate", "projection"),
    [
        (DeltaMemConfig(), 8, 8, 32),
        (DeltaMemConfig(rankwise_gates=False), 8, 1, 25),
        (DeltaMemConfig(num_state_heads=4), 32, 32, 128),
        (DeltaMemConfig(num_state_heads=4, rankwise_gates=False), 32, 4, 100),
        (DeltaMemConfig(couple_lambda=False), 8, 8, 40),
        (DeltaMemConfig(couple_lambda=False, state_update_mode="no_lambda"), 8, 8, 40),
    ],
)
def test_derived_dimensions(config: DeltaMemConfig, read: int, gate: int, projection: int) -> None:
    assert (config.read_dim, config.gate_dim, config.projection_dim) == (read, gate, projection)
    assert config.state_shape == (config.num_state_heads, 8, 8)
    assert config.scaling == 2.0


def test_no_target_layers_means_every_layer() -> None:
    assert DeltaMemConfig().targets_layer(35)
    some = DeltaMemConfig(target_layers=(0, 2))
    assert [some.targets_layer(index) for index in range(4)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (DeltaMemConfig(), "TSW"),
        (DeltaMemConfig(num_state_heads=4), "MSW"),
        (DeltaMemConfig(memory_write_granularity="message_mean"), "SSW"),
        (DeltaMemConfig(memory_write_granularity="sentence_mean", num_state_heads=2), "MSW+SSW"),
    ],
)
def test_strategy_has_the_papers_name(config: DeltaMemConfig, name: str) -> None:
    assert config.strategy == name
