import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabilitykit.errors import RunFolderError, UsageError
from trainers.checkpoint import NAME, pack, read_checkpoint, unpack, write_checkpoint
from trainers.run_state import check_same_run, sole_owner

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(TREES)
def test_a_tree_comes_back_as_it_was(tree: object) -> None:
    found = unpack(pack(tree, {}), {})

    assert found == tree
    assert repr(found) == repr(tree)


def test_tensors_and_odd_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.tensor([[0.1, math.nan], [math.inf, -0.0]])
    state = {
        "view": shared.t(),
        "same": shared,
        "bytes": torch.get_rng_state(),
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "words": np.arange(3, dtype=np.uint32),
        "odd": [math.inf, 0.1 + 0.2, 5e-324],
        "nan": math.nan,
    }

    write_checkpoint(tmp_path, state)
    found = read_checkpoint(tmp_path)

    for name in ("view", "same", "bytes", "count", "empty", "half"):
        assert found[name].dtype == state[name].dtype
        expected = state[name].contiguous()
        assert found[name].shape == expected.shape
        assert found[name].flatten().view(torch.uint8).tolist() == expected.flatten().view(torch.uint8).tolist()
    assert found["words"].dtype == np.uint32
    assert found["odd"] == state["odd"]
    assert math.isnan(found["nan"])


def test_what_only_a_pickle_could_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="got a Generator, expected tensors"):
        pack({"draws": torch.Generator()}, {})


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, {"step": 2})

    assert read_checkpoint(tmp_path) == {"step": 1}


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, keep: int) -> None:
    write_checkpoint(tmp_path, {"weights": torch.ones(50)})
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(RunFolderError, match=r"--resume: .*expected a checkpoint") as caught:
        read_checkpoint(tmp_path)

    assert "\n" not in str(caught.value)


def test_no_checkpoint_and_a_later_version_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFolderError, match="no checkpoint"):
        read_checkpoint(tmp_path)

    monkeypatch.setattr("trainers.checkpoint.VERSION", 99)
    write_checkpoint(tmp_path, {})
    monkeypatch.undo()

    with pytest.raises(RunFolderError, match="has version 99, expected 1"):
        read_checkpoint(tmp_path)


def test_another_configuration_is_refused_by_name_and_another_folder_is_not() -> None:
    stored = {"seed": 1, "run_dir": "a", "buffer": {"size": 200}, "dataset": {"base_path": "x"}}

    check_same_run(stored, stored | {"run_dir": "b", "dataset": {"base_path": "y"}})
    with pytest.raises(UsageError, match=r"--resume: got buffer\.size 500, expected the run's own 200"):
        check_same_run(stored, stored | {"buffer": {"size": 500}})


def test_a_checkpoint_that_lacks_a_setting_is_said_to_be_of_another_version() -> None:
    stored = {"seed": 1, "method": {"alpha": 0.1}}

    with pytest.raises(UsageError, match=r"checkpoint of another version of the trainer \(method\.beta is not in both"):
        check_same_run(stored, {"seed": 1, "method": {"alpha": 0.1, "beta": 0.5}})


def test_a_run_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    with (
        sole_owner(tmp_path),
        pytest.raises(RunFolderError, match="another process trains in it"),
        sole_owner(tmp_path),
    ):
        raise AssertionError

    with sole_owner(tmp_path):
        pass
