"""GGUF files as checkpoints: names, and rows that llama.cpp's converter moved."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gguf_llama import convert, hugging_face_name, unpermute

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD = 64, 4, 2, 96


def test_rows_of_a_pair_go_half_a_head_apart() -> None:
    # Two heads of four rows; in a GGUF, rows of a rotated pair are neighbours.
    weight = np.arange(8)[:, None] * np.ones((1, 3))
    assert unpermute(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert unpermute(weight, 1)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_tensors_get_their_names(name: str, expected: str) -> None:
    assert hugging_face_name(name) == expected


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight", "other"])
def test_tensors_of_other_models_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a tensor of a Llama model"):
        hugging_face_name(name)


def write_gguf(model: torch.nn.Module, file: Path) -> None:
    """A Llama as a GGUF file, by gguf's own names and with rows moved as its converter does."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<end>", "a", "b", "ab", "1"])
    writer.add_token_types([3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        weight = tensor.float().numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                moved = weight.reshape(heads, 2, -1, HIDDEN).swapaxes(1, 2)
                weight = moved.reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_computes_the_same_after_its_way_through_a_gguf_file(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=FEED_FORWARD,
        vocab_size=5,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # large, so that a wrong rotation shows
    write_gguf(model, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "made", "float32")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    tokens = torch.tensor([[1, 2, 3, 4, 3, 2, 1]])
    with torch.inference_mode():
        torch.testing.assert_close(made(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer("ab11<end>a")["input_ids"] == [3, 4, 4, 0, 1]
    chat = [{"role": "user", "content": "aab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "aab"
