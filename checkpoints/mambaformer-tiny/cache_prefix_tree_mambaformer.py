"""A radix tree of token sequences, some of which have stored states."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache_buffers_mambaformer import count_leading

if TYPE_CHECKING:
    from .cache_mambaformer import MambaFormerCache


@dataclass(eq=False)
class Entry:
    """The states after a token sequence.

    Args:
        cache: holds the sequence, in one row and without padding; it is forked and never fed.
        num_hits: requests that were answered from it.
        priority: entries of the lowest priority are evicted first.
    """

    cache: "MambaFormerCache"
    num_tokens: int
    nbytes: int
    num_hits: int = 0
    priority: float = 0.0


@dataclass(eq=False)
class Node:
    """A node of a radix tree of token sequences: `edge` has the tokens from its parent to it."""

    edge: Tensor
    parent: "Node | None" = None
    entry: Entry | None = None
    children: dict[int, "Node"] = field(default_factory=dict)

    def entries(self) -> Iterator[Entry]:
        """The entries of the node and of all nodes below it."""
        nodes: list[Node] = [self]
        while nodes:
            node = nodes.pop()
            if node.entry is not None:
                yield node.entry
            nodes.extend(node.children.values())


@dataclass
class Match:
    """The longest prefix of a sequence that a tree knows.

    Args:
        length: tokens of the prefix.
        entry: the longest entry whose whole sequence is part of the prefix.
        longer: entries of sequences that start with the prefix and go beyond it.
    """

    length: int = 0
    entry: Entry | None = None
    longer: list[Entry] = field(default_factory=list)


class PrefixTree:
    """The sequences that were encoded with one expert vector and one state of the weights."""

    def __init__(self):
        self.root = Node(torch.empty(0, dtype=torch.int32, device="cpu"))

    def match(self, ids: Tensor) -> Match:
        """The longest prefix of `ids` (tokens,), integers on the CPU."""
        node, match = self.root, Match()
        while match.length < len(ids):
            child = node.children.get(int(ids[match.length]))
            if child is None:
                break
            shared = _common_length(child.edge, ids[match.length :])
            match.length += shared
            if shared < len(child.edge):
                match.longer = list(child.entries())
                return match
            node = child
            match.entry = node.entry or match.entry
        match.longer = [entry for entry in node.entries() if entry is not node.entry]
        return match

    def node_at(self, ids: Tensor) -> Node:
        """The node at the end of `ids` (tokens,); it is made where there is none."""
        node, start = self.root, 0
        while start < len(ids):
            child = node.children.get(int(ids[start]))
            if child is None:
                child = node.children[int(ids[start])] = Node(ids[start:].clone(), node)
            shared = _common_length(child.edge, ids[start:])
            node, start = (child if shared == len(child.edge) else _split(child, shared)), start + shared
        return node

    def remove(self, entry: Entry, ids: Tensor) -> None:
        """Removes the entry at the end of `ids` (tokens,), and the tokens that no other entry needs."""
        node: Node | None = self.node_at(ids)
        if node is None or node.entry is not entry:
            return
        node.entry = None
        while node is not None and node.parent is not None and node.entry is None and not node.children:
            del node.parent.children[int(node.edge[0])]
            node = node.parent


def _split(node: Node, length: int) -> Node:
    """A new node after the first `length` tokens of a node's edge."""
    upper = Node(node.edge[:length].clone(), node.parent, children={int(node.edge[length]): node})
    if node.parent is not None:
        node.parent.children[int(node.edge[0])] = upper
    node.parent, node.edge = upper, node.edge[length:].clone()
    return upper


def _common_length(one: Tensor, other: Tensor) -> int:
    length = min(len(one), len(other))
    return count_leading(one[:length] == other[:length])


__all__ = ["Entry", "Match", "PrefixTree"]
