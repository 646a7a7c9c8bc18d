"""The namespace that every custom op of the package is registered in.

A build for the Hugging Face hub writes this file anew, with a namespace of its own: no other file spells one out.
"""

import torch

ops = torch.ops.golfgpt_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    return f"golfgpt_kernels::{op_name}"
