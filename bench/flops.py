"""What a training step must compute and move at least: model flops, MFU, and a floor of its time."""

from __future__ import annotations

import math

from golfgpt.config import ModelConfig
from golfgpt.model.parameters import parameter_shapes

PEAK_FLOPS = 989e12  # bf16, dense, of an H100 or H200: what MFU is a share of


def matrix_parameters(c: ModelConfig) -> int:
    """Weights that multiply activations: the layers' matrices, the pair projection and the head, tied or not."""
    layer = 2 * c.model_dim**2 + 2 * c.model_dim * c.kv_dim + 2 * c.model_dim * c.mlp_hidden
    return c.num_layers * layer + c.vocab_size * c.model_dim + c.model_dim * c.bigram.dim


def matrix_flops(c: ModelConfig, tokens: int) -> int:
    """A multiplication and an addition per weight and token, in the forward and for both gradients: 6."""
    return 6 * matrix_parameters(c) * tokens


def attention_flops(c: ModelConfig, tokens: int, seq_len: int) -> int:
    """Causal forward: q kᵀ and its product with v, 2 flops per channel and pair of positions each; half the pairs."""
    return c.num_layers * tokens * seq_len * 2 * c.model_dim


def mfu(c: ModelConfig, tokens: int, seq_len: int, ms: float) -> float:
    """Share of the peak: 6 flops per matrix weight and token, and attention's backward counted as two forwards."""
    return (matrix_flops(c, tokens) + 3 * attention_flops(c, tokens, seq_len)) / (ms / 1e3 * PEAK_FLOPS)


def floor_ms(c: ModelConfig, tokens: int, seq_len: int, tflops: float, gbps: float) -> float:
    """No step is faster at these roofs, as far as is known how to fuse it. The sum of

    - matrix products, and attention with a backward of 2.5 forwards (it computes q kᵀ again), at `tflops`
    - Newton-Schulz of M x N, M <= N: 5 (3 M² N + M³) flops, half of each symmetric product
    - 15 passes over the residual stream per layer, which remain when all that may be fused into a GEMM is
    - logits written, read, and read and written again, in bf16
    - the update: 20 bytes per parameter, gradient read, momentum and weight read and written
    """
    matrices = [
        *c.num_layers * (2 * [(c.model_dim, c.model_dim)] + 2 * [(c.kv_dim, c.model_dim)]),
        *c.num_layers * (2 * [sorted((c.mlp_hidden, c.model_dim))]),
        *([sorted((c.bigram.dim, c.model_dim))] if c.bigram.dim else []),
    ]
    parameters = sum(math.prod(shape) for shape in parameter_shapes(c).values())
    flops = matrix_flops(c, tokens) + 3.5 * attention_flops(c, tokens, seq_len)
    flops += sum(5 * (3 * m * m * n + m**3) for m, n in matrices)
    traffic = 2 * tokens * (15 * c.num_layers * c.model_dim + 4 * c.vocab_size) + 20 * parameters
    return flops / tflops / 1e9 + traffic / gbps / 1e6
