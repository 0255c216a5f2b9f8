"""Stored rows as people want them: names for ids, scalars as columns, one attempt per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    from stabilitykit.record.names import Names

Spans = dict[tuple[int, int], tuple[int, int]]  # (rank, attempt) -> first and last step it recorded


def texts(codes: NDArray[Any], vocabulary: Sequence[str]) -> pd.Series[str]:
    """Strings for small integers; a code outside the vocabulary becomes `?code`."""
    wide = codes.astype(np.int64)
    last = int(wide.max(initial=-1))
    known = [*vocabulary, *(f"?{code}" for code in range(len(vocabulary), last + 1))]
    coded = pa.DictionaryArray.from_arrays(pa.array(wide), pa.array(known, pa.string()))
    return cast("pd.Series[str]", coded.dictionary_decode().to_pandas())


def tensor_names(ranks: NDArray[Any], ids: NDArray[Any], names: Mapping[int, Names]) -> pd.Series[str]:
    """The name of each row's tensor; an id whose name is lost becomes `tensor 17`."""
    pairs = ranks.astype(np.int64) << 32 | ids.astype(np.int64)
    unique, codes = np.unique(pairs, return_inverse=True)
    vocabulary = [_tensor_name(names, int(pair >> 32), int(pair & 0xFFFFFFFF)) for pair in unique]
    return texts(codes, vocabulary)


def spans(frame: pd.DataFrame) -> Spans:
    """First and last step of every attempt of every rank."""
    rank, attempt, step = (frame[name].to_numpy().astype(np.int64) for name in ("rank", "attempt", "step"))
    key = rank << 32 | attempt
    found: Spans = {}
    for number in np.unique(key).tolist():
        steps = step[key == number]
        found[number >> 32, number & 0xFFFFFFFF] = (int(steps.min()), int(steps.max()))
    return found


def latest(frame: pd.DataFrame, *recorded: Spans) -> pd.DataFrame:
    """Without the rows whose step a later attempt recorded again: a resumed run repeats steps."""
    stale = np.zeros(len(frame), dtype=bool)
    rank, attempt, step = (frame[name].to_numpy() for name in ("rank", "attempt", "step"))
    for spans_of in recorded:
        for (owner, later), (first, last) in spans_of.items():
            stale |= (rank == owner) & (attempt < later) & (first <= step) & (step <= last)
    return frame[~stale] if stale.any() else frame


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order in which they were measured."""
    keys = [frame[name].to_numpy() for name in ("order", "micro", "attempt", "step") if name in frame]
    order = np.lexsort(keys)
    in_order = bool((order == np.arange(len(order))).all())
    return (frame if in_order else frame.iloc[order]).reset_index(drop=True)


def pivot_scalars(steps: pd.DataFrame, scalars: pd.DataFrame, names: Mapping[int, Names]) -> pd.DataFrame:
    """`steps` with one more column for each scalar, nan where it was not logged; the last value of a step counts."""
    keys = ["rank", "attempt", "step"]
    group = steps.groupby(keys, sort=False).ngroup().to_numpy()
    place = steps[keys].assign(group=group).drop_duplicates(keys)
    found = scalars.merge(place, on=keys, how="inner", sort=False)
    columns: dict[str, NDArray[np.float64]] = {}
    for rank, number in found[["rank", "scalar"]].drop_duplicates().itertuples(index=False):
        rows = found[(found["rank"] == rank) & (found["scalar"] == number)]
        values = columns.setdefault(_scalar_name(names, rank, number, steps.columns), np.full(len(place), np.nan))
        values[rows["group"].to_numpy()] = rows["value"].to_numpy()
    wide = pd.DataFrame({name: columns[name][group] for name in sorted(columns)}, index=steps.index)
    return pd.concat([steps, wide], axis="columns")


def _tensor_name(names: Mapping[int, Names], rank: int, number: int) -> str:
    entry = names[rank].tensors.get(number)
    return str(entry["name"]) if entry else f"tensor {number}"


def _scalar_name(names: Mapping[int, Names], rank: int, number: int, taken: pd.Index[str]) -> str:
    entry = names[rank].scalars.get(number)
    name = str(entry["name"]) if entry else f"scalar {number}"
    return f"scalar/{name}" if name in taken else name
