"""Lists of any length on a mesh: cut into a few compiled sizes, placed as one global array, fetched again."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from unialign_jax import agreement, parallel


class Batches:
    """The batch sizes that are compiled for a mesh, and the way of rows to its devices and back.

    Args:
      mesh: see `parallel.make_mesh`.
      max_batch: most items worked on at once.
      single: compile `max_batch` only, instead of smaller sizes too.

    Attributes:
      sizes: ascending; each is a multiple of the parts that the mesh splits a batch into.

    Raises:
      ValueError: `max_batch` is below 1 or, with `single`, can't be split.
    """

    def __init__(self, mesh: Mesh, max_batch: int, *, single: bool = False):
        parts = parallel.batch_parts(mesh)
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; at least 1 item must fit")
        if single:
            parallel.check_batch(mesh, max_batch)
        sizes = [max_batch] if single else [parts]
        while sizes[-1] * 2 <= max_batch:
            sizes.append(sizes[-1] * 2)
        self.sizes = tuple(sizes)
        self._mesh, self._sharding = mesh, parallel.batch_sharding(mesh)

    def cut(self, count: int) -> list[tuple[int, int, int]]:
        """`(start, stop, size)` of the batches for `count` items; `size` is the smallest compiled one that holds it."""
        largest = self.sizes[-1]
        spans = [(start, min(start + largest, count)) for start in range(0, count, largest)]
        return [(a, b, next(size for size in self.sizes if size >= b - a)) for a, b in spans]

    def place(self, rows: np.ndarray, size: int) -> jax.Array:
        """Host rows `[n, ...]`, the same in all processes, as a global array `[size, ...]`; the last row fills it up.

        Rows that no device of this process holds (`held`) are not read.
        """
        count = len(rows)
        order = np.minimum(np.arange(size), count - 1)
        shape = (size, *rows.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, lambda index: rows[order[index[0]]][:, *index[1:]])

    def fetch(self, array: jax.Array, count: int, *, gather: bool) -> list[np.ndarray | None]:
        """The first `count` rows on the host.

        Args:
          array: `[size, ...]`, split as `place` splits.
          count: rows that are no filling.
          gather: give all rows to every process. Otherwise each gets those it owns, and None for the others.
        """
        if array.is_fully_addressable:
            return list(np.asarray(array)[:count])
        if gather:
            return list(np.asarray(multihost_utils.process_allgather(array, tiled=True))[:count])
        out: list[np.ndarray | None] = [None] * count
        owned = self.owned(len(array))
        for shard in array.addressable_shards:
            data = None
            for offset, row in enumerate(range(*shard.index[0].indices(len(array)))):
                if row < count and owned[row] and out[row] is None:
                    data = np.asarray(shard.data) if data is None else data
                    out[row] = data[offset]
        return out

    def held(self, size: int) -> np.ndarray:
        """bool `[size]`: rows of a batch of a compiled size that devices of this process work on."""
        rows = np.zeros(size, bool)
        for index in self._sharding.addressable_devices_indices_map((size,)).values():
            rows[index[0]] = True
        return rows

    def owned(self, size: int) -> np.ndarray:
        """bool `[size]`: as `held`, but each row in one process only, though several may work on it."""
        owner: dict[tuple[int, int], int] = {}
        for device, index in self._sharding.devices_indices_map((size,)).items():
            start, stop, _ = index[0].indices(size)
            owner.setdefault((start, stop), device.process_index)
        rows = np.zeros(size, bool)
        for (start, stop), process in owner.items():
            rows[start:stop] = process == jax.process_index()
        return rows

    def check_same(self, **request: Any) -> None:
        """Refuses a request that is not the same in all processes of the mesh; they would wait for ever.

        Args:
          request: by name, all that decides which programs run, and how often: numbers and names, or lists of them.

        Raises:
          ValueError: another process was asked for something else.
        """
        if not self._mesh.is_multi_process:
            return
        everyone = agreement.gather({name: np.asarray(value).tolist() for name, value in request.items()})
        names = sorted({name for one in everyone for name in one})
        differing = [
            f"{name} is {', '.join(str(one.get(name)) for one in everyone)}"
            for name in names
            if any(one.get(name) != everyone[0].get(name) for one in everyone)
        ]
        if differing:
            raise ValueError(f"every process must make the same request; by process, {'; '.join(differing)}")
