"""ArrayRecord files as one sequence of records, and what is said when one can't be read."""

import bisect
import errno
import functools
import itertools
import os
import resource
from collections.abc import Sequence

from array_record.python import array_record_data_source

from unialign_jax.data.report import CorpusError

# How the reader says that it has read, but not what was written; of anything else the files need not be at fault.
_DAMAGE = ("Corrupted Riegeli/records file", "Invalid Riegeli/records file", "ArrayRecord file should be")
# Of these, how it says so of a file that it can't even open, none of whose records it can find.
_DAMAGE_OF_ALL = ("ArrayRecord file should be", "Failed to read Riegeli")
_TOO_MANY_OPEN = os.strerror(errno.EMFILE)


class DamagedShard(CorpusError):
    """The content of a file is not what was written; none of its records can be read."""


class DamagedRecord(DamagedShard):
    """The content of a file is not what was written where a record is; others may be read."""


class Shards:
    """The records of several files by number, none of them empty.

    Picklable; may be read from several threads and processes at once. A file is opened when it is first read, and then
    stays open, in every process.

    Args:
      files: in order, with the records to take of each; TFDS' `FileInstruction` or alike.
    """

    def __init__(self, files: Sequence[array_record_data_source.FileInstruction]):
        self._records = array_record_data_source.ArrayRecordDataSource(files)
        self._names = [str(file.filename) for file in files]
        self._ends = list(itertools.accumulate(file.take for file in files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        """One record.

        Raises:
          DamagedShard: naming the file.
          DamagedRecord: likewise, where only the record is damaged.
          CorpusError: the file can't be read, which may pass: it is not there, a network or a limit is in the way. The
            reader does not open it again; a new `Shards` would.
        """
        _raise_limit_of_open_files()
        try:
            if record := self._records[index]:
                return record
        except (RuntimeError, ValueError, IndexError) as error:
            what = f"{self._name(index)} can't be read: {error}"
            if any(words in str(error) for words in _DAMAGE):
                whole = any(words in str(error) for words in _DAMAGE_OF_ALL)
                raise (DamagedShard if whole else DamagedRecord)(what) from error
            if _TOO_MANY_OPEN in str(error):
                limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
                what += (
                    f". This process may have {limit} files open (at most {highest}), and every shard that it reads "
                    f"stays open, here {len(self._names)}: raise the limit (ulimit -Hn, or LimitNOFILE of a service), "
                    "or make fewer, larger shards (rows_per_shard)"
                )
            raise CorpusError(what) from error
        # What the reader makes of a file that is cut off where a block ends.
        raise DamagedShard(f"{self._name(index)} can't be read: a record is empty, as if the file were cut short")

    def _name(self, index: int) -> str:
        """The file that a record is in."""
        return self._names[bisect.bisect_right(self._ends, index)]


@functools.cache  # once in every process
def _raise_limit_of_open_files() -> None:
    """As far as the system lets a program itself: the usual 1024 is less than the shards of a large dataset."""
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != highest:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
        except (ValueError, OSError):  # macOS says "unlimited" and takes no such number; reading tells what is missing
            return
