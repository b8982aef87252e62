"""What runs in the environment of ONNX's servers, without prunekit: greedy tokens of graphs.

`python onnx_worker.py REQUEST ANSWERS` reads a JSON list of cases, each with the name, the folder,
the reader ("genai" or "optimum"), the prompts and the number of tokens. It writes one line of JSON
a case, with the tokens or with the error.
"""

import json
import sys
from pathlib import Path


def ask_genai(case):
    import onnxruntime_genai as genai

    model = genai.Model(case["folder"])
    found = []
    for prompt in case["prompts"]:
        if isinstance(prompt, str):
            prompt = genai.Tokenizer(model).encode(prompt)
        length = len(prompt) + case["length"]
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=length)
        generator = genai.Generator(model, params)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        found.append([int(token) for token in generator.get_sequence(0)[len(prompt) :]])
    return found


def ask_optimum(case):
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(case["folder"])
    assert model.can_use_cache
    found = []
    for prompt in case["prompts"]:
        ids = torch.tensor([prompt])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        made = model.generate(**given, max_new_tokens=case["length"], do_sample=False)
        found.append(made[0, len(prompt) :].tolist())
    return found


def main():
    cases, answers = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for case in cases:
        try:
            found = {"tokens": {"genai": ask_genai, "optimum": ask_optimum}[case["reader"]](case)}
        except Exception as error:  # of onnxruntime, of transformers, of torch
            found = {"error": f"{type(error).__name__}: {error}"}
        with answers.open("a") as file:
            file.write(json.dumps({"name": case["name"], **found}) + "\n")


if __name__ == "__main__":
    main()
