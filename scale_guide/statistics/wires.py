"""Tensors across ranks: the only `torch.distributed` calls of the package, none of them seen by autograd.

Every function here is collective: call it on every rank of the group, in the same order, with tensors of the same
shapes and dtypes. Many tensors travel as one flat buffer (one large message beats 48 small ones sevenfold), at most
`BUCKET_BYTES` at a time; a larger tensor goes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 256 * 2**20
_PACK_ROWS = 512


@dataclass
class ByteCount:
    """Bytes handed to collectives by this rank, without the ring's factor (2 for an all-reduce)."""

    num_bytes: int = 0


_open_counts: list[ByteCount] = []


@contextmanager
def count_bytes() -> Iterator[ByteCount]:
    """Counts numel x itemsize of all that this rank hands to collectives inside the `with` block."""
    count = ByteCount()
    _open_counts.append(count)
    try:
        yield count
    finally:
        _open_counts.remove(count)


def _count(tensor: Tensor) -> None:
    for count in _open_counts:
        count.num_bytes += tensor.numel() * tensor.element_size()


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yields the indices of tensors that travel together: one dtype, at most BUCKET_BYTES, or one larger tensor."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_dtype.setdefault(tensor.dtype, []).append(index)
    for indices in by_dtype.values():
        bucket: list[int] = []
        num_bytes = 0
        for index in indices:
            size = tensors[index].numel() * tensors[index].element_size()
            if bucket and num_bytes + size > BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(index)
            num_bytes += size
        yield bucket


def shard_sizes(width: int, num_processes: int) -> list[int]:
    """Returns how many of `width` columns each rank owns: as even as can be, the first ranks one more."""
    return [width // num_processes + (rank < width % num_processes) for rank in range(num_processes)]


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Returns the upper triangle of a symmetric [n, n] matrix as one vector, by blocks of rows: half the wire."""
    blocks = range(0, matrix.shape[0], _PACK_ROWS)
    return torch.cat([matrix[i : i + _PACK_ROWS, i:].reshape(-1) for i in blocks]) if blocks else matrix.reshape(-1)


def unpack_symmetric(packed: Tensor, matrix: Tensor) -> None:
    """Writes the vector made by `pack_symmetric` back into both triangles of `matrix` [n, n]."""
    n, start = matrix.shape[0], 0
    for i in range(0, n, _PACK_ROWS):
        height = min(_PACK_ROWS, n - i)
        block = packed[start : start + height * (n - i)].view(height, n - i)
        matrix[i : i + height, i:] = block
        matrix[i + height :, i : i + height] = block[:, height:].T
        start += height * (n - i)


class Wires:
    """The group of ranks that share one global batch: the group over which the engine averages gradients.

    Attributes:
        size: Number of processes; 1 when there is no process group at all.
        rank: Index of this process in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        ready = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if ready else 1
        self.rank = dist.get_rank(group) if ready else 0

    def exchange(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Returns every rank's `numbers`, by rank. Collective: call on every rank."""
        if self.size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        everyone = torch.empty(self.size * len(numbers), dtype=torch.int64, device=device)
        _count(own)
        dist.all_gather_into_tensor(everyone, own, group=self.group)
        return everyone.view(self.size, -1).tolist()

    def all_reduce_bucketed(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over the ranks, in place. Collective: call on every rank."""
        if self.size == 1:
            return
        for bucket in buckets(tensors):
            alone = len(bucket) == 1 and tensors[bucket[0]].is_contiguous()
            flat = tensors[bucket[0]] if alone else torch.cat([tensors[i].reshape(-1) for i in bucket])
            _count(flat)
            dist.all_reduce(flat, group=self.group)
            if not alone:
                for i, part in zip(bucket, torch.split(flat, [tensors[i].numel() for i in bucket]), strict=True):
                    tensors[i].copy_(part.view_as(tensors[i]))

    def all_reduce_symmetric(self, matrices: Sequence[Tensor], others: Sequence[Tensor] = ()) -> None:
        """Sums symmetric [n, n] matrices, packed, and `others` over the ranks, in place. Collective."""
        if self.size == 1:
            return
        packed = [pack_symmetric(matrix) for matrix in matrices]
        self.all_reduce_bucketed([*packed, *others])
        for vector, matrix in zip(packed, matrices, strict=True):
            unpack_symmetric(vector, matrix)

    def all_rows(
        self, tensors: list[Tensor], use: Callable[[int, Tensor], None], device: torch.device | None = None
    ) -> None:
        """Hands `use(index, rows)` each tensor's rows of all ranks, [b, p] -> [W * b, p], rank by rank.

        Collective: call on every rank. One bucket is on the wire at a time, so `use` may drop what it does not keep;
        `tensors` is emptied on the way, and may lie on the host while `device` computes.
        """
        if self.size == 1:
            for index in range(len(tensors)):
                use(index, _take(tensors, index).to(device))
            return
        widths = [tensor.shape[1] for tensor in tensors]
        for bucket in list(buckets(tensors)):
            numels = [tensors[i].numel() for i in bucket]
            flat = torch.cat([_take(tensors, i).reshape(-1) for i in bucket]).to(device)
            everyone = flat.new_empty(self.size, flat.numel())
            _count(flat)
            dist.all_gather_into_tensor(everyone.view(-1), flat, group=self.group)
            for i, part in zip(bucket, torch.split(everyone, numels, dim=1), strict=True):
                use(i, part.reshape(-1, widths[i]))

    def to_features(
        self, tensors: list[Tensor], use: Callable[[int, Tensor], None], device: torch.device | None = None
    ) -> None:
        """Hands `use(index, shard)` this rank's columns of all rows: [b, p] -> [W * b, p / W].

        Collective: call on every rank. One bucket is on the wire at a time; `tensors` is emptied on the way, and may
        lie on the host while `device` computes.
        """
        if self.size == 1:
            self.all_rows(tensors, use, device)
            return
        for bucket in list(buckets(tensors)):
            sizes = [shard_sizes(tensors[i].shape[1], self.size) for i in bucket]
            rows = [tensors[i].shape[0] for i in bucket]
            pieces = [torch.split(_take(tensors, i), s, dim=1) for i, s in zip(bucket, sizes, strict=True)]
            sent = torch.cat([p[to].reshape(-1) for to in range(self.size) for p in pieces]).to(device)
            own = [s[self.rank] * b for s, b in zip(sizes, rows, strict=True)]
            received = sent.new_empty(self.size, sum(own))
            self._all_to_all(received.view(-1), sent, [sum(own)] * self.size, _splits(sizes, rows))
            del sent, pieces
            for i, s, part in zip(bucket, sizes, torch.split(received, own, dim=1), strict=True):
                use(i, part.reshape(-1, s[self.rank]))

    def to_rows(self, shards: list[Tensor], widths: Sequence[int]) -> list[Tensor]:
        """Returns the way back of `to_features`: feature shards [W * b, p / W] -> this rank's own rows [b, p].

        Collective: call on every rank. `shards` is emptied on the way.
        """
        if self.size == 1:
            return list(shards)
        home: dict[int, Tensor] = {}
        for bucket in list(buckets(shards)):
            sizes = [shard_sizes(widths[i], self.size) for i in bucket]
            rows = [shards[i].shape[0] // self.size for i in bucket]
            own = [s[self.rank] * b for s, b in zip(sizes, rows, strict=True)]
            sent = torch.cat([_take(shards, i).reshape(self.size, -1) for i in bucket], dim=1)
            splits = _splits(sizes, rows)
            received = sent.new_empty(sum(splits))
            self._all_to_all(received, sent.view(-1), splits, [sum(own)] * self.size)
            for position, i in enumerate(bucket):
                home[i] = _assemble(received, splits, sizes, rows, position)
        return [home[i] for i in range(len(shards))]

    def _all_to_all(self, received: Tensor, sent: Tensor, received_splits: list[int], sent_splits: list[int]) -> None:
        _count(sent)
        dist.all_to_all_single(received, sent, received_splits, sent_splits, group=self.group)


def _take(tensors: list[Tensor], index: int) -> Tensor:
    """Returns a tensor of the list and leaves an empty one there, so that nothing is kept that is used up."""
    taken = tensors[index]
    tensors[index] = taken.new_empty(0)
    return taken


def _splits(sizes: list[list[int]], rows: list[int]) -> list[int]:
    return [sum(s[rank] * b for s, b in zip(sizes, rows, strict=True)) for rank in range(len(sizes[0]))]


def _assemble(received: Tensor, splits: list[int], sizes: list[list[int]], rows: list[int], position: int) -> Tensor:
    """Returns one tensor's rows [b, p] from its column shards, which lie by the rank they came from."""
    parts = []
    for rank, from_rank in enumerate(torch.split(received, splits)):
        start = sum(sizes[i][rank] * rows[i] for i in range(position))
        columns = sizes[position][rank]
        parts.append(from_rank[start : start + columns * rows[position]].view(rows[position], columns))
    return torch.cat(parts, dim=1)
