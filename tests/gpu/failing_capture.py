"""An engine whose steps fit into no CUDA graph: `python -m tests.gpu.failing_capture FOLDER`."""

import json
import logging
import sys

import torch

from engine import LLM, SamplingParams


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    llm = LLM(sys.argv[1], dtype="bfloat16", device="cuda", kv_cache_memory_bytes=1 << 28)
    runner = llm.engine._runner
    argmax = runner._argmax

    def wait_and_choose(logits: torch.Tensor) -> torch.Tensor:
        torch.cuda.current_stream().synchronize()  # no graph can hold this
        return argmax(logits)

    runner._argmax = wait_and_choose
    graphs = runner._graphs
    assert graphs is not None
    graphs._graphs.clear()  # those made at the start
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    results = llm.generate(["a", "bc", "def"], params, use_tqdm=False)
    found = {
        "tokens": [len(result.outputs[0].token_ids) for result in results],
        "given up": graphs.are_given_up,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
