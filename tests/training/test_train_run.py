"""`deltamem train`: what it learns, writes, refuses, and that it can be interrupted."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from deltamem_vllm.adapter import load_adapter
from deltamem_vllm.cli import app
from deltamem_vllm.demo.assets import model_dir
from deltamem_vllm.demo.facts import Conversation
from deltamem_vllm.errors import BackboneError, TrainingDataError, TrainingError
from deltamem_vllm.training.chat_encoding import ChatMode, TemplateEncoder
from deltamem_vllm.training.checkpoint import FOLDER
from deltamem_vllm.training.checkpoint import load as load_checkpoint
from deltamem_vllm.training.conversations import parse, read_conversations
from deltamem_vllm.training.demo_data import encode_history
from deltamem_vllm.training.encoding import ChatEncoder
from deltamem_vllm.training.loading import load_backbone
from deltamem_vllm.training.run import Outcome, TrainingRun, split
from deltamem_vllm.training.settings import Strategy, TrainSettings, layer_list
from tests.training.marked import conversations, marked, write_lines

TINY: dict[str, Any] = {
    # What a backbone as small as the demo's learns from within a few steps.
    "update": "no_lambda",
    "output_init": "random",
    "online_gain": 1.47,
    "gate_bias": -1.0,
    "learning_rate": 1e-2,
    "warmup": 2,
    "reply_share": 0.0,
    "batch": 6,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "conversations.jsonl", 60)


def settings_of(data: Path, out: Path, **changes: Any) -> TrainSettings:
    return TrainSettings(model=str(model_dir()), data=data, out=out, **{**TINY, **changes})


def finished(settings: TrainSettings) -> Outcome:
    outcome = TrainingRun(settings, lambda line: None).run()
    assert outcome is not None
    return outcome


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *(str(argument) for argument in arguments)])


def test_a_few_steps_lower_the_loss_and_leave_an_adapter(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    flags = [
        item for name, value in TINY.items() for item in (f"--{name.replace('_', '-')}", value)
    ]
    result = command(
        *("--model", model_dir(), "--data", data, "--out", out),
        *("--steps", 30, "--eval-every", 10, *flags),
    )
    assert result.exit_code == 0, result.output
    state = json.loads((out / FOLDER / "state.json").read_text())
    assert sum(state["losses"][-5:]) < 0.7 * sum(state["losses"][:5])
    looks = [look["loss"] for look in state["evaluations"]]
    assert len(looks) == 3
    assert looks[-1] < looks[0]
    adapter = load_adapter(out)
    assert adapter.config.strategy == "TSW"
    assert adapter.fingerprint in result.output
    card = (out / "README.md").read_text()
    assert adapter.fingerprint in card
    assert "| learning_rate | 0.01 |" in card
    assert (out / "loss.png").stat().st_size > 1000
    assert not list(out.rglob("*.pt"))
    assert [path.name for path in out.rglob("*.safetensors")] == ["delta_mem_adapter.safetensors"]


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
def test_a_run_that_was_stopped_gives_the_weights_of_an_undisturbed_one(
    data: Path, tmp_path: Path, strategy: Strategy
) -> None:
    common: dict[str, Any] = {
        "strategy": strategy,
        "steps": 6,
        "eval_every": 2,
        "accumulate": 2,
        "batch": 3,
    }
    undisturbed = finished(settings_of(data, tmp_path / "whole", **common))
    settings = settings_of(data, tmp_path / "parts", **common)
    for stop in (3, 5):
        assert TrainingRun(settings, lambda line: None).run(stop_after=stop) is None
    gone_on = finished(settings)
    assert gone_on.state.losses == undisturbed.state.losses
    assert gone_on.adapter.fingerprint == undisturbed.adapter.fingerprint


def test_an_interrupted_run_leaves_a_checkpoint(data: Path, tmp_path: Path) -> None:
    settings = settings_of(data, tmp_path / "run", steps=4, eval_every=2, checkpoint_every=100)

    def interrupt(line: str) -> None:
        if line.startswith("step 2"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        TrainingRun(settings, interrupt).run()
    lines: list[str] = []
    outcome = TrainingRun(settings, lines.append).run()
    assert "going on after step 2" in lines
    assert outcome is not None and len(outcome.state.losses) == 4


def test_it_stops_early_and_keeps_the_best_weights(data: Path, tmp_path: Path) -> None:
    """With a rate that destroys what was learned, later looks are worse than the first."""
    changes = {"steps": 60, "eval_every": 2, "patience": 2, "learning_rate": 3.0, "warmup": 0}
    outcome = finished(settings_of(data, tmp_path / "run", **changes))
    looks = outcome.state.evaluations
    assert outcome.state.step < 60
    assert outcome.best.loss == min(look.loss for look in looks)
    assert [look.step for look in looks].index(outcome.best.step) == len(looks) - 3
    again = settings_of(data, tmp_path / "best", **{**changes, "patience": 60})
    run = TrainingRun(again, lambda line: None)
    run.run(stop_after=outcome.best.step)
    kept = load_adapter(tmp_path / "run").tensors
    for name, tensor in run._memory.adapter().tensors.items():
        assert torch.equal(tensor, kept[name]), name


def test_a_folder_of_another_run_is_refused(data: Path, tmp_path: Path) -> None:
    settings = settings_of(data, tmp_path / "run", steps=2, eval_every=1)
    TrainingRun(settings, lambda line: None).run(stop_after=1)
    other = settings_of(data, tmp_path / "run", steps=2, eval_every=1, rank=4, seed=1)
    with pytest.raises(TrainingError, match="another rank, seed"):
        TrainingRun(other, lambda line: None)
    finished(settings)
    with pytest.raises(TrainingError, match="is finished"):
        TrainingRun(settings, lambda line: None)


@pytest.mark.parametrize("name", ["README.md", "delta_mem_adapter.pt", "config.json"])
def test_a_folder_with_files_of_others_is_refused_and_left_alone(
    data: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(TrainingError, match=f"already holds {name}"):
        TrainingRun(settings_of(data, tmp_path, steps=1), lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_does_not_go_on_with_other_conversations(data: Path, tmp_path: Path) -> None:
    """What was learned might be held out then."""
    copy = tmp_path / "conversations.jsonl"
    lines = data.read_text().splitlines(keepends=True)
    copy.write_text("".join(lines))
    settings = settings_of(copy, tmp_path / "run", steps=2, eval_every=1)
    TrainingRun(settings, lambda line: None).run(stop_after=1)
    copy.write_text("".join(reversed(lines)))
    with pytest.raises(TrainingError, match="conversations changed"):
        TrainingRun(settings, lambda line: None)
    copy.write_text("".join(lines))
    assert finished(settings).state.step == 2


def test_a_run_does_not_go_on_with_a_backbone_that_was_replaced(data: Path, tmp_path: Path) -> None:
    """Other weights have the same names, shapes and sizes."""
    model = shutil.copytree(model_dir(), tmp_path / "model")
    settings = settings_of(data, tmp_path / "run", steps=2, eval_every=1)
    settings = settings.model_copy(update={"model": str(model)})
    TrainingRun(settings, lambda line: None).run(stop_after=1)
    weights = load_file(model / "model.safetensors")
    changes: dict[str, tuple[str, bytes]] = {
        "weights": (
            "model.safetensors",
            save({name: 1.001 * one for name, one in weights.items()}, {"format": "pt"}),
        ),
        "config": ("config.json", _changed(model / "config.json", rms_norm_eps=1e-3)),
        "chat_template": ("chat_template.jinja", b"{{ messages }}"),
        "tokenizer": ("added_tokens.json", b"{}"),
    }
    for part, (name, content) in changes.items():
        before = (model / name).read_bytes() if (model / name).exists() else None
        (model / name).write_bytes(content)
        with pytest.raises(TrainingError, match=rf"another model \(its {part} changed\); give"):
            TrainingRun(settings, lambda line: None)
        if before is None:
            (model / name).unlink()
        else:
            (model / name).write_bytes(before)
    assert finished(settings).state.step == 2


def _changed(file: Path, **changes: Any) -> bytes:
    return json.dumps({**json.loads(file.read_bytes()), **changes}).encode()


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_its_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    changes = {"learning_rate": 1e30, "warmup": 0, "steps": 8, "checkpoint_every": 1}
    settings = settings_of(data, tmp_path / "run", eval_every=8, **changes)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf)"):
        TrainingRun(settings, lambda line: None).run()
    kept = load_checkpoint(settings.out)
    assert kept is not None and len(kept.state.losses) == kept.state.step > 0
    assert all(map(math.isfinite, kept.state.losses))


def test_the_held_out_loss_does_not_depend_on_what_is_computed_together(
    data: Path, tmp_path: Path
) -> None:
    one, many = (
        finished(settings_of(data, tmp_path / str(size), steps=1, eval_batch=size))
        for size in (1, 16)
    )
    assert one.best.loss == pytest.approx(many.best.loss, rel=1e-5)
    assert one.best.exact == many.best.exact


def broken_lines() -> dict[str, tuple[Any, str]]:
    told = {"role": "user", "content": "My cat is called Miro."}
    ask = {"role": "user", "content": "What is my cat called?", "ask": True}
    answer = {"role": "assistant", "content": "Miro."}
    return {
        "no JSON": ("{", "no valid JSON"),
        "a list": ([], "valid dictionary"),
        "no role": ({"messages": [{"content": "a"}]}, "messages.0.role: Field required"),
        "unknown role": ({"messages": [{**told, "role": "tool"}]}, "messages.0.role"),
        "unknown field": ({"messages": [{**told, "asked": True}]}, "messages.0.asked"),
        "no question": ({"messages": [told]}, "no message is marked"),
        "no history": ({"messages": [ask, answer]}, "nothing is told"),
        "no answer": ({"messages": [told, ask]}, "the last question has no answer"),
        "asked twice": ({"messages": [told, ask, ask]}, "messages.2: the question before it"),
        "told behind": ({"messages": [told, ask, answer, told]}, "messages.3: after the first"),
        "late system": (
            {"messages": [told, {**told, "role": "system"}, ask, answer]},
            "messages.1: a system message comes first",
        ),
        "value told": ({"messages": [{**told, "value": "Miro"}, ask, answer]}, "messages.0: value"),
        "other value": (
            {"messages": [told, ask, {**answer, "value": "Nori"}]},
            "messages.2: value 'Nori' is not a part",
        ),
        "empty": ({"messages": [{**told, "content": " "}, ask, answer]}, "messages.0: content"),
    }


@pytest.mark.parametrize("name", broken_lines())
def test_a_bad_line_is_named_by_file_and_number(name: str, tmp_path: Path) -> None:
    line, reason = broken_lines()[name]
    path = write_lines(tmp_path / "some.jsonl", 2)
    with path.open("a") as file:
        file.write("\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    result = command("--model", model_dir(), "--data", path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}, line 4: ")
    assert reason in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    base = ("--model", model_dir(), "--data", data, "--out", tmp_path / "out")
    for flags, reason in {
        ("--rank", 0): "--rank",
        ("--strategy", "other"): "--strategy",
        ("--heads", "q,x"): "delta_heads",
        ("--layers", "3-"): "--layers '3-'",
        ("--layers", "3-1"): "--layers '3-1'",
        ("--layers", "2-4"): "the base has 4 layers",
        ("--held-out", tmp_path / "missing.jsonl"): "missing.jsonl",
    }.items():
        result = command(*base, *flags)
        assert result.exit_code == 2, flags
        assert reason in result.stderr
        assert result.stderr.startswith("error: ")
    assert layer_list("0, 4-6") == [0, 4, 5, 6]
    assert layer_list("") == []


def test_an_output_that_cannot_be_written_is_refused_before_the_first_step(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        result = command("--model", model_dir(), "--data", data, "--out", out, "--steps", 1)
        assert result.exit_code == 2
        assert str(out) in result.stderr
        assert "step 1" not in result.stdout


def test_a_model_that_is_not_served_is_refused_by_its_architecture(
    data: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((model_dir() / "config.json").read_text())
    call = ("--model", base, "--data", data, "--out", tmp_path / "out")
    (base / "config.json").write_text(
        json.dumps({**config, "architectures": ["MixtralForCausalLM"]})
    )
    assert "MixtralForCausalLM" in command(*call).stderr
    assert not (tmp_path / "out").exists()
    (base / "model.safetensors").write_bytes((model_dir() / "model.safetensors").read_bytes())
    llama = {**config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (base / "config.json").write_text(json.dumps(llama))
    result = command(*call)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {base}: its tokenizer cannot be loaded")


def test_weights_that_are_damaged_or_of_another_shape_are_refused(tmp_path: Path) -> None:
    for name, change in {
        "cut": lambda base: (base / "model.safetensors").write_bytes(
            (base / "model.safetensors").read_bytes()[:1000]
        ),
        "other": lambda base: (base / "config.json").write_text(
            (base / "config.json").read_text().replace('"vocab_size": ', '"vocab_size": 1')
        ),
    }.items():
        base = tmp_path / name
        shutil.copytree(model_dir(), base)
        change(base)
        with pytest.raises(BackboneError, match=f"{base}: transformers cannot load it"):
            load_backbone(base, "float32", "cpu")


def test_held_out_conversations_that_are_learned_from_are_counted(
    data: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    TrainingRun(settings_of(data, tmp_path / "same", held_out=data), said.append)
    assert any(line.startswith("60 of those held out are learned from, too") for line in said)
    said.clear()
    TrainingRun(settings_of(data, tmp_path / "share"), said.append)
    assert not any("learned from, too" in line for line in said)


def test_a_message_that_fits_no_segment_is_named(data: Path, tmp_path: Path) -> None:
    encoder = encoder_of("message_mean", segment_tokens=8)
    conversation = read_conversations(data)[0]
    with pytest.raises(TrainingDataError, match=r"jsonl, line 1: one message .* --segment-tokens"):
        encoder.history(conversation, "joint")


def encoder_of(granularity: Any, segment_tokens: int = 2048) -> TemplateEncoder:
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    return TemplateEncoder(tokenizer, granularity, segment_tokens, value_weight=4.0)


def same_by_hand(conversation: Conversation, mode: ChatMode, window: int) -> None:
    line = json.dumps(marked(conversation)).encode()
    ours = encoder_of("message_mean").history(parse(line, "here"), mode, window)
    by_hand = encode_history(
        conversation, ChatEncoder(AutoTokenizer.from_pretrained(model_dir())), mode, window
    )
    assert ours.chunks == by_hand.chunks
    assert ours.layout == by_hand.layout
    # A role's token is given by the template, so its weight is 0; a reply's end is predicted.
    assert ours.weights == by_hand.weights
    for mine, theirs in zip(ours.questions, by_hand.questions, strict=True):
        assert (mine.prompt, mine.answer, mine.shown) == (
            theirs.prompt,
            theirs.answer,
            theirs.shown,
        )
        assert mine.layout == theirs.layout
        assert [w == 4.0 for w in mine.weights] == [w == 4.0 for w in theirs.weights]


@pytest.mark.parametrize("mode", ["joint", "turns"])
@pytest.mark.parametrize("window", [0, 1, 2])
def test_a_template_gives_the_tokens_and_spans_that_the_demo_encodes_by_hand(
    mode: ChatMode, window: int
) -> None:
    for conversation in conversations(12, seed=3, max_facts=5, system_share=0.0):
        same_by_hand(conversation, mode, window)


def test_a_share_of_the_conversations_is_asked_beside_a_window(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: dict[str, int] = {}
    encode = TemplateEncoder.history

    def spy(self: TemplateEncoder, one: Any, mode: ChatMode, window: int) -> Any:
        windows[one.where] = window
        return encode(self, one, mode, window)

    monkeypatch.setattr(TemplateEncoder, "history", spy)
    for share, shown in {0.0: {0}, 0.5: {0, 1, 2, 3}, 1.0: {1, 2, 3}}.items():
        changes = {"window_share": share, "window_turns": 3, "history": "joint"}
        settings = settings_of(data, tmp_path / str(share), **changes)
        TrainingRun(settings, lambda line: None)
        training, held_out = split(settings)
        asked = [windows[one.where] for one in training]
        assert set(asked) == shown
        if share == 0.5:
            assert 0.3 < asked.count(0) / len(asked) < 0.7
        assert {windows[one.where] for one in held_out} == {0}


@pytest.mark.parametrize("system_share", [0.0, 1.0])
@pytest.mark.parametrize("window", [0, 1, 9])
def test_a_question_is_written_where_the_template_renders_the_last_reply_in_another_way(
    window: int, system_share: float
) -> None:
    """As Qwen3's does with thoughts: a window's reply is longer while nothing follows it."""
    (conversation,) = conversations(1, seed=7, max_facts=4, system_share=system_share)
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content",
        "('Noted. ' if loop.last and message.role == 'assistant' else '') + message.content",
    )
    encoder = TemplateEncoder(tokenizer, "message_mean", 2048, value_weight=4.0)
    one = parse(json.dumps(marked(conversation)).encode(), "here")
    for question, (asked, _) in zip(
        encoder.history(one, "turns", window).questions, one.questions, strict=True
    ):
        assert question.layout is not None
        written = [
            token
            for token, span in zip(question.prompt, question.layout.spans, strict=False)
            if span >= 0
        ]
        assert asked.content in tokenizer.decode(written)
        assert all(span < 0 for span in question.layout.spans[: question.shown])


def test_a_long_history_is_cut_between_messages() -> None:
    (conversation,) = conversations(1, seed=5, max_facts=6, small_talk_share=1.0)
    one = parse(json.dumps(marked(conversation)).encode(), "here")
    whole = encoder_of("message_mean").history(one, "joint")
    cut = encoder_of("message_mean", segment_tokens=30).history(one, "joint")
    assert len(cut.chunks) > 2
    assert max(map(len, cut.chunks)) <= 30
    assert [token for chunk in cut.chunks for token in chunk] == whole.chunks[0]
    assert cut.layout is not None
    starts = [sum(map(len, cut.chunks[:n])) for n in range(len(cut.chunks))]
    assert all(cut.layout.spans[start] == 0 for start in starts)
    by_token = encoder_of("token", segment_tokens=30).history(one, "joint")
    assert {len(chunk) for chunk in by_token.chunks[:-1]} == {30}


@pytest.mark.parametrize("granularity", ["token", "message_mean"])
def test_a_system_message_is_shown_with_every_turn_and_never_written(granularity: Any) -> None:
    (conversation,) = conversations(1, seed=6, max_facts=3, system_share=1.0)
    line = json.dumps(marked(conversation)).encode()
    encoder, one = encoder_of(granularity), parse(line, "here")
    system = ChatEncoder(AutoTokenizer.from_pretrained(model_dir())).message(
        conversation.messages[0]
    )
    turns, joint = (encoder.history(one, mode) for mode in ("turns", "joint"))
    for chunk in (*turns.chunks, *(question.prompt for question in turns.questions)):
        assert chunk[: len(system)] == system
    assert joint.chunks[0][: len(system)] != system
    told = sum(len(chunk) - len(system) for chunk in turns.chunks)
    assert len(joint.chunks[0]) == told
    for history in (turns, joint):
        if history.layout is not None:
            assert sum(place >= 0 for place in history.layout.spans) == told
        else:
            assert sum(history.written()) == told
