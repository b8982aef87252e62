"""How many rows a forward pass has: the configured number, or the largest that memory allows."""

from __future__ import annotations

from prunekit.errors import ConfigError, DataError
from prunekit.recovery.settings import Recovery
from prunekit.runtime.torchrun import count_launched

_LARGEST = 16


def first_micro_batch(recovery: Recovery) -> int:
    """The configured number; for "auto" the largest one up to 16 that divides a process's rows.

    Raises:
        ConfigError: the processes can't have the same number of micro-batches.
    """
    processes, fixed = count_launched(), recovery.micro_batch
    own, rest = divmod(recovery.batch_size, processes)
    if isinstance(fixed, int):
        if rest or own % fixed:
            raise ConfigError(
                f"recovery.batch_size: expected a multiple of {processes} processes × "
                f"recovery.micro_batch={fixed}, got {recovery.batch_size}"
            )
        return fixed
    if rest:
        raise ConfigError(
            f"recovery.batch_size: expected a multiple of {processes} processes, "
            f"got {recovery.batch_size}"
        )
    return _largest_divisor(own, _LARGEST)


def shrink_micro_batch(recovery: Recovery, micro: int, error: Exception) -> int:
    """The next smaller number of rows after a micro-batch that did not fit into memory.

    Raises:
        DataError: the number is fixed, one row is too much, or several processes would have to
            begin again together.
    """
    if micro == 1:
        raise DataError(
            "recovery: out of memory with one row; recovery.length, half as long, halves it"
        ) from error
    half = _largest_divisor(micro, micro // 2)
    if recovery.micro_batch == "auto" and count_launched() == 1:
        return half
    raise DataError(
        f"recovery: out of memory with micro_batch={micro}; recovery.micro_batch={half} halves it"
    ) from error


def _largest_divisor(number: int, most: int) -> int:
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)
