"""Train an adapter with TRL's SFTTrainer, which needs `pip install trl`.

While `inplace_training` lasts, the model is an ordinary transformers model whose only trainable
parameters are the layers' values, so TRL's trainer takes it as it is. TRL brings the data
processing, the loss on completions alone, logging, accumulation. Rows are JSON lines in one of
TRL's own shapes, such as "prompt" and "completion", or "messages".

    python examples/train_trl.py MODEL ROWS.jsonl OUT [--k 1] [--steps 100] [--lr 0.02]
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from neuroada_serve import save_adapter
from neuroada_serve.adapters.format import AdapterConfig, ModuleBypass, make_adapter
from neuroada_serve.model.loader import adaptable_modules, load_base
from neuroada_serve.model.source import resolve_model
from neuroada_serve.train.inplace import inplace_training, magnitude_selections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()

    base = load_base(resolve_model(options.model, print))
    rows = [json.loads(line) for line in options.rows.read_text().splitlines() if line.strip()]
    modules = adaptable_modules(base.model)
    selections = magnitude_selections(modules, options.k)

    with (
        inplace_training(base.model, modules, selections) as layers,
        tempfile.TemporaryDirectory() as scratch,
    ):
        arguments = SFTConfig(
            output_dir=scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=False,  # no autocast: weights stay in the base's dtype, values are float32
            use_cpu=base.device.type == "cpu",
        )
        # More GPUs would each get a replica by DataParallel, without the values written into it.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = SFTTrainer(
            model=base.model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            optimizers=(
                torch.optim.AdamW([layer.value for layer in layers.values()], lr=options.lr),
                None,
            ),
        )
        trainer.train()
        parts = {
            name: ModuleBypass(layer.index.cpu(), layer.value.detach().cpu().bfloat16())
            for name, layer in layers.items()
        }

    config = AdapterConfig(
        base_model_name_or_path=base.spec.name,
        base_fingerprint=base.spec.fingerprint,
        k=options.k,
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in parts})),
        metadata={"recipe": {"trainer": "trl", "lr": options.lr, "steps": options.steps}},
    )
    save_adapter(make_adapter(config, parts), options.out)
    print(f"adapter written to {options.out}")


if __name__ == "__main__":
    main()
