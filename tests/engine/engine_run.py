"""Runs one engine in a process of its own: `python -m tests.engine.engine_run SPEC.json OUT`.

SPEC holds `llm` (arguments of `MemoryLLM`), `prompts` (lists of token ids), `spans` (of each, or
null) and `max_tokens`. OUT becomes a safetensors file with, per prompt i, `tokens.i`,
`logprobs.i` [n, vocab] and `state.i.<layer>`, and with `norms_before` and `norms` [workers, 2],
what probes added up until the first prompt, and since then. Engines that span processes or compile
are started this way, so that they share nothing with the test's process. `drafts` says how many
were made, if `llm` has the engine count.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm import SamplingParams, TokensPrompt

from deltamem_vllm import Memory, MemoryLLM
from tests.helpers import VOCAB, full_logprobs


def main(spec_path: str, out_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    llm = MemoryLLM(**spec["llm"])
    sampling = SamplingParams(
        temperature=0,
        max_tokens=spec["max_tokens"],
        logprobs=VOCAB,
        ignore_eos=True,
        detokenize=False,
    )
    prompts = spec["prompts"]
    tensors = {"norms_before": torch.tensor(llm.collective_rpc("take_correction_norms"))}
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
        sampling,
        memory=[
            Memory(session=str(index), spans=spans) for index, spans in enumerate(spec["spans"])
        ],
        use_tqdm=False,
    )
    tensors["norms"] = torch.tensor(llm.collective_rpc("take_correction_norms"))
    drafts = 0.0
    if not spec["llm"].get("disable_log_stats", True):
        found = [one for one in llm.get_metrics() if one.name == "vllm:spec_decode_num_drafts"]
        drafts = sum(one.value for one in found)
    tensors["drafts"] = torch.tensor(drafts)
    for index, output in enumerate(outputs):
        tensors[f"tokens.{index}"] = torch.tensor(output.outputs[0].token_ids)
        tensors[f"logprobs.{index}"] = full_logprobs(output.outputs[0].logprobs)
        for layer, state in llm.sessions[str(index)].state.items():
            tensors[f"state.{index}.{layer}"] = state
    save_file(tensors, out_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
