"""The model. Its modules:

    plan         what each layer does, as data; does not import torch
    parameters   the table of all parameters: shape, kind, initial values, published name
    linear       the norm, and the product with a matrix of a layer, through which every one of them goes
    rotary       norm, rotation and gain of queries and keys
    layers       attention, MLP
    embedding    the input of the first layer; uses smear_gate and bigram_hash
    gpt          the complete model: hidden states, loss, logits
    generate     sampling; uses kv_cache

A mechanism consists of a function in its own file, one line in `parameters` for each of its parameters, a field of
ModelConfig that sets its size (0 or "none": off), and one line in `layers`, `embedding` or `gpt` that uses it.
"""
