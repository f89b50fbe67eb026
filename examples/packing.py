"""Whole documents side by side in rows of fixed length, each seeing only itself.

Rows of padded single documents would spend more than half of the arithmetic on padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # what cross entropy leaves out


@dataclass(frozen=True)
class Rows:
    """Packed documents, R rows of S tokens: all int64 [R, S]. `document` is -1 where a row is padding."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document: Tensor

    def take(self, rows: Tensor) -> "Rows":
        """The rows with these indices, int64 [B]."""
        return Rows(self.tokens[rows], self.labels[rows], self.positions[rows], self.document[rows])

    def mask(self) -> Tensor:
        """bool [R, 1, S, S], true where a query (third axis) may see a key: same document, not later."""
        same = self.document[:, :, None] == self.document[:, None, :]
        return torch.tril(same)[:, None]


def best_fit(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Best-fit decreasing: indices of the documents of each row; every length is at most `row_tokens`."""
    open_rows: list[list[list[int]]] = [[] for _ in range(row_tokens + 1)]  # by the space that is left
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        space = next((left for left in range(length, row_tokens + 1) if open_rows[left]), None)
        if space is None:
            row: list[int] = []
            rows.append(row)
            space = row_tokens
        else:
            row = open_rows[space].pop()
        row.append(index)
        open_rows[space - length].append(row)
    return rows


def pack(documents: list[list[int]], row_tokens: int, pad_id: int) -> Rows:
    """Pack token lists into rows. A label is the next token of the same document; a document's last has none."""
    placed = best_fit([len(document) for document in documents], row_tokens)
    shape = (len(placed), row_tokens)
    tokens = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORED)
    positions = torch.zeros(shape, dtype=torch.int64)
    owner = torch.full(shape, -1)
    for row, members in enumerate(placed):
        start = 0
        for index in members:
            ids = torch.tensor(documents[index])
            span = slice(start, start + len(ids))
            tokens[row, span] = ids
            labels[row, start : start + len(ids) - 1] = ids[1:]
            positions[row, span] = torch.arange(len(ids))
            owner[row, span] = index
            start += len(ids)
    return Rows(tokens, labels, positions, owner)
