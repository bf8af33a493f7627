"""The smallest model that the kernel of whole steps takes.

Every matrix is a multiple of 32 wide and high, but for the head.
"""

SIZES = {
    "max_position_embeddings": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}
