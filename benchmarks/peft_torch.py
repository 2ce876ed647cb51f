"""The torch side of ``lifting.py``: one LoRA step of Hugging Face PEFT on a MiniLM-L6, and the forward pass alone.

Needs torch, transformers and peft, and is called by ``lifting.py --torch-python PYTHON``. The weights are random, which
does not change the time. Prints the median milliseconds as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

BATCH, TOKENS, RANK, CLASSES = 32, 64, 8, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=CLASSES))
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["query", "value"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    tokens, labels = torch.randint(0, 1000, (BATCH, TOKENS)), torch.randint(0, CLASSES, (BATCH,))

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()

    def forward():
        with torch.no_grad():
            model(input_ids=tokens)

    print(json.dumps({"step": milliseconds(step, arguments.turns), "forward": milliseconds(forward, arguments.turns)}))


def milliseconds(run, turns):
    """The median of so many calls, after one that does not count."""
    run()
    times = []
    for _ in range(turns):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


if __name__ == "__main__":
    main()
