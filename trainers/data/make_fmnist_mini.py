"""Cut Fashion-MNIST down to fmnist_mini.npz: the first 500 training and 100 test images of each class, in file order.

python trainers/data/make_fmnist_mini.py IDX_FOLDER     the folder of the four *-ubyte.gz files, for instance
                                                       /usr/share/datasets/fashion-mnist (Debian: dataset-fashion-mnist)
"""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent
TARGET = HERE / "fmnist_mini.npz"
DIGEST = HERE / "fmnist_mini.npz.sha256"
PER_CLASS = {"train": 500, "test": 100}
FILES = {"train": "train", "test": "t10k"}
HEADER_BYTES = {"images": 16, "labels": 8}

Bytes = npt.NDArray[np.uint8]


def read_idx(path: Path, header_bytes: int) -> Bytes:
    """The payload of an IDX file of bytes, flat."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header_bytes)


def first_of_each_class(labels: Bytes, per_class: int) -> npt.NDArray[np.int64]:
    """Positions of the first `per_class` samples of every class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(10)]))


def cut(folder: Path, split: str) -> tuple[Bytes, Bytes]:
    """Images (N, 28, 28) and labels (N,) of one split."""
    stem = folder / FILES[split]
    labels = read_idx(stem.with_name(f"{stem.name}-labels-idx1-ubyte.gz"), HEADER_BYTES["labels"])
    images = read_idx(stem.with_name(f"{stem.name}-images-idx3-ubyte.gz"), HEADER_BYTES["images"]).reshape(-1, 28, 28)
    chosen = first_of_each_class(labels, PER_CLASS[split])
    return images[chosen], labels[chosen]


def main(folder: Path) -> None:
    """Write the archive and its digest beside this file; numpy stamps every member 1980, so the bytes repeat."""
    train_images, train_labels = cut(folder, "train")
    test_images, test_labels = cut(folder, "test")
    np.savez_compressed(
        TARGET,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )
    DIGEST.write_text(f"{hashlib.sha256(TARGET.read_bytes()).hexdigest()}  {TARGET.name}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
