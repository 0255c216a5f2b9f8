import threading

import pytest
import torch
from torch import Tensor

from stabilitykit.diagnose.numbers import watching_exports


def test_arrays_and_lists_are_reported_and_are_what_torch_gives() -> None:
    seen: list[Tensor] = []
    tensor = torch.tensor([1.0, 2.0])

    with watching_exports(seen.append):
        given = tensor.numpy().tolist(), tensor.tolist()
    tensor.tolist()

    assert given == ([1.0, 2.0], [1.0, 2.0])
    assert len(seen) == 2
    assert not {"numpy", "tolist"} & set(vars(Tensor))


def test_what_another_thread_exports_is_none_of_the_steps() -> None:
    seen: list[Tensor] = []

    with watching_exports(seen.append):
        loader = threading.Thread(target=torch.ones(2).tolist)
        loader.start()
        loader.join()

    assert not seen


def test_a_method_that_someone_else_has_put_there_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "tolist", lambda _: ["theirs"], raising=False)

    with watching_exports(lambda _: None):
        assert torch.ones(2).tolist() == ["theirs"]

    assert torch.ones(2).tolist() == ["theirs"]
    with watching_exports(lambda _: None):
        pass
    assert torch.ones(2).tolist() == ["theirs"]
