"""Puts the freezing benchmark's results from several processes together.

The same step differs by several per cent from one process to the next, in all windows of each: more
windows do not average that out, more processes do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.freezing_rows import PARTS, derived, own_speedups

# What has to be equal, or the samples are not of one thing.
_SAME = ("format", "size", "hardware", "device", "flags", "measuring")
_OF_A_PROCESS = ("date", "load_average", "elapsed_seconds")


def pool(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one result with the samples of all, process after process.

    Ratios pair windows of one process, as before; what was compiled and the presets are those of
    the first result.

    Raises:
      ValueError: the results are of different sizes, machines or rows, or hold an error.
    """
    first = results[0]
    for name in _SAME:
        if any(result[name] != first[name] for result in results):
            raise ValueError(f"the results differ in {name}: they cannot be pooled")
    for name in ("versions", "peers", "git"):
        found = [result["environment"].get(name) for result in results]
        if any(each != found[0] for each in found):
            raise ValueError(f"the results differ in {name}: they cannot be pooled")
    tables = [{_key(row): row for row in result["rows"]} for result in results]
    if any(table.keys() != tables[0].keys() for table in tables):
        raise ValueError("the results differ in rows: they cannot be pooled")
    rows = [_row([table[key] for table in tables]) for key in tables[0]]
    own_speedups(rows)
    processes = [{name: result[name] for name in _OF_A_PROCESS} for result in results]
    total = sum(result["elapsed_seconds"] for result in results)
    return {**first, "elapsed_seconds": total, "processes": processes, "rows": rows}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    if "error" in row:
        raise ValueError(f"{row['workload']}, {row['what']} failed: it cannot be pooled")
    return row["workload"], row["peer"], row["cache"], row["f_nominal"]


def _row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first row with the samples of all."""
    raw = {
        "seconds": [seconds for row in rows for seconds in row["seconds"]],
        "part_seconds": {
            part: [seconds for row in rows for seconds in row["part_seconds"][part]]
            for part in PARTS
        },
    }
    return {**rows[0], **raw, **derived({**rows[0], **raw})}
