"""Random classifiers of tiny models."""

from dataclasses import replace

import torch

from neuroada_serve.adapters.format import Adapter, make_adapter
from neuroada_serve.tasks import SEQ_CLS
from tests.support.tiny import random_adapter

LABELS = ("bad", "fair", "good")
TEXTS = ["a fine day", "no", "the longest of all of these texts, by far"]


def classifier(source, seed: int, labels=LABELS, hidden: int = 32) -> Adapter:
    plain = random_adapter(source, seed, scale=0.3)
    head = torch.randn(len(labels), hidden, generator=torch.Generator().manual_seed(seed))
    config = replace(plain.config, task_type=SEQ_CLS, labels=labels)
    return make_adapter(config, plain.modules, head)
