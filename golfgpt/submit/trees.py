"""Walk and copy syntax trees, several times as fast as `ast.walk` and `copy.deepcopy`: a program is made of 10^5 nodes
that are looked at in every round."""

from __future__ import annotations

import ast
from typing import TypeVar

T = TypeVar("T")


def walk(tree: ast.AST) -> list[ast.AST]:
    """The nodes of a tree in the order of `ast.walk`, without contexts (Load, Store, Del)."""
    nodes = [tree]
    for node in nodes:  # which grows meanwhile
        for name in node._fields:
            value = getattr(node, name, None)
            if value.__class__ is list:
                nodes += [part for part in value if isinstance(part, ast.AST)]
            elif isinstance(value, ast.AST) and not isinstance(value, ast.expr_context):
                nodes.append(value)
    return nodes


def clone(value: T) -> T:
    """A copy of a node, or of a list of nodes, with copies of all below it; contexts and constants are shared."""
    if value.__class__ is list:
        return [clone(part) for part in value]
    if not isinstance(value, ast.AST) or isinstance(value, ast.expr_context):
        return value
    new = value.__class__.__new__(value.__class__)
    for name, part in vars(value).items():
        setattr(new, name, clone(part))
    return new
