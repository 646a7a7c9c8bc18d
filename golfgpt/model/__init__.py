"""The model. Where things are:

    plan         what each layer does, as data; no torch
    parameters   the one table of what a model holds: shape, kind, initial values, published name
    layers       norm, rotary embedding, attention, MLP, and `linear`, through which every matrix of a layer multiplies
    embedding    what goes into the first layer, with smear_gate and bigram_hash
    gpt          the whole of it: hidden states, loss, logits
    generate     sampling, with the keys and values that kv_cache keeps

A mechanism is a function in a file of its own, its parameters a line each in `parameters`, its size a field of
ModelConfig (0 or "none": off), its use one line in `layers`, `embedding` or `gpt`.
"""
