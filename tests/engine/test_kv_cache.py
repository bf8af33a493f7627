"""The KV cache."""

import torch

from neuroada_serve.engine.kv_cache import KVCache


def test_coarse_cache_moves_rarely_and_is_kept():
    cache = KVCache(100, 5000, coarse=True)
    sizes = [(1, 1), (16, 1000), (17, 900), (30, 2000), (32, 2048), (1, 5000), (100, 5000)]
    versions = []
    for num_slots, num_tokens in sizes:
        cache.reserve(num_slots, num_tokens)
        versions.append(cache.version)
    assert versions == [1, 1, 2, 3, 3, 4, 5]
    kept = torch.ones(1, 2, 4)
    cache.write(0, kept, kept, torch.tensor([99]), torch.tensor([4999]))
    cache.release()
    assert torch.equal(cache.layer(0)[0][99, :, 4999], kept[0])
    assert cache.version == 5
