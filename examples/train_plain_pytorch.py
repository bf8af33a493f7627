"""Train an adapter in a PyTorch loop of your own.

While `inplace_training` lasts, the model is an ordinary transformers model whose only trainable
parameters are the layers' values; how loss, batches and steps are made is up to you. Afterwards the
base's weights have their own bits again. Rows are JSON lines with "prompt" and "completion".

    python examples/train_plain_pytorch.py MODEL ROWS.jsonl OUT [--k 1] [--steps 100] [--lr 0.02]
"""

import argparse
import json
import random
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from neuroada_serve import save_adapter
from neuroada_serve.adapters.format import AdapterConfig, ModuleBypass, make_adapter
from neuroada_serve.model.loader import adaptable_modules, load_base
from neuroada_serve.model.prompt import encode_continuation, encode_exchange
from neuroada_serve.model.source import resolve_model
from neuroada_serve.train.inplace import inplace_training, magnitude_selections

NOT_AN_ANSWER = -100  # transformers' losses leave it out


def encoded(base, row: dict[str, str], max_length: int) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer, and labels that count the answer alone."""
    if base.has_chat_template:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt, answer = encode_exchange(base, messages, row["completion"])
    else:
        prompt, answer = encode_continuation(base, row["prompt"], row["completion"])
    ids = prompt + answer
    labels = [NOT_AN_ANSWER] * len(prompt) + answer
    return ids[:max_length], labels[:max_length]


def padded(batch: list[tuple[list[int], list[int]]], device) -> dict[str, torch.Tensor]:
    """[rows, width] each. Padding stands on the right, where no token of the row sees it."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([ls + [NOT_AN_ANSWER] * (width - len(ls)) for _, ls in batch])
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    base = load_base(resolve_model(options.model, print))
    rows = [json.loads(line) for line in options.rows.read_text().splitlines() if line.strip()]
    examples = [encoded(base, row, options.max_length) for row in rows]
    choice = random.Random(options.seed)

    # 1. Which inputs each neuron keeps. Any Selection will do; this is the method's own.
    modules = adaptable_modules(base.model)
    selections = magnitude_selections(modules, options.k)

    with inplace_training(base.model, modules, selections) as layers:
        # 2. Only the values are trained. Their learning rate is 10 to 100 times LoRA's; it falls as
        # k rises.
        values = [layer.value for layer in layers.values()]
        optimizer = torch.optim.AdamW(values, lr=options.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
        base.model.train()
        for step in range(1, options.steps + 1):
            batch = choice.sample(examples, min(options.batch_size, len(examples)))
            loss = base.model(**padded(batch, base.device), use_cache=False).loss
            loss.backward()
            clip_grad_norm_(values, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 0 or step == options.steps:
                print(f"step {step}: loss {loss.item():.3f}")

        # 3. Values and columns, off the device, before the layers go.
        parts = {
            name: ModuleBypass(layer.index.cpu(), layer.value.detach().cpu().bfloat16())
            for name, layer in layers.items()
        }

    config = AdapterConfig(
        base_model_name_or_path=base.spec.name,
        base_fingerprint=base.spec.fingerprint,
        k=options.k,
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in parts})),
        metadata={"recipe": {"lr": options.lr, "steps": options.steps, "rows": len(rows)}},
    )
    save_adapter(make_adapter(config, parts), options.out)
    print(f"adapter written to {options.out}")


if __name__ == "__main__":
    main()
