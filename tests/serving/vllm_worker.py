"""What runs in vLLM's environment, without prunekit: greedy tokens of model folders.

`python vllm_worker.py REQUEST ANSWERS` reads a JSON list of cases, each with the name, the folder,
the prompts, the number of tokens and the arguments of the engine. It writes one line of JSON a
case, with the tokens and the class that vLLM ran, or with the error.
"""

import gc
import json
import sys
from pathlib import Path

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "seed": 0,
}


def answer(case):
    from vllm import LLM, SamplingParams

    engine = LLM(case["folder"], **{**ENGINE, **case["engine"]})
    greedy = SamplingParams(
        temperature=0, max_tokens=case["length"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    outputs = engine.generate(prompts, greedy, use_tqdm=False)
    architecture = engine.llm_engine.model_config.architecture
    return {"tokens": [list(o.outputs[0].token_ids) for o in outputs], "class": architecture}


def main():
    cases, answers = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for case in cases:
        try:
            found = answer(case)
        except Exception as error:  # of vLLM, of transformers, of torch
            found = {"error": f"{type(error).__name__}: {error}"}
        with answers.open("a") as file:
            file.write(json.dumps({"name": case["name"], **found}) + "\n")
        gc.collect()


if __name__ == "__main__":  # a worker of several processes imports this file again
    main()
