"""CIFAR-10 and CIFAR-100 from torchvision's files, or from class folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bnncore.data.cache import Found, Source, entries
from bnncore.data.folders import class_folders, where
from bnncore.data.parts import DataError, Split
from bnncore.params import DataParams


def cifar(params: DataParams, root: Path) -> Source:
    """torchvision's CIFAR files, or class folders.

    The files are pickles. torchvision compares their md5 with the published ones before it
    unpickles them, and refuses others; this module never unpickles anything.
    """
    path = where(params, root)
    count, inner = {"cifar10": (10, "cifar-10-batches-py"), "cifar100": (100, "cifar-100-python")}[
        params.name
    ]
    files = path / inner

    def read() -> Found:
        sets = torchvision_datasets()
        maker = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[params.name]
        try:
            train = maker(path, train=True, download=params.download)
            test = maker(path, train=False)
        except Exception as error:  # of the network, the archive, or a wrong md5
            raise DataError(
                f"{files}: torchvision could not read {params.name}: {error}"
            ) from error
        return tuple(train.classes), {
            part: Split(np.ascontiguousarray(one.data), np.asarray(one.targets, dtype=np.int64))
            for part, one in (("train", train), ("test", test))
        }

    if not files.is_dir():
        if (path / "train").is_dir():
            return class_folders(params, path, count)
        if not params.download:
            raise DataError(
                f"{path}: expected the folder {inner} (unpacked from {params.name}'s archive for "
                f"Python), or class folders train/CLASS/IMAGE and test/CLASS/IMAGE, found neither; "
                f"with data.download true it is fetched"
            )
        read()  # for its download: the key of the cache is made from the files
    return Source(read, files, tuple(entry.path for entry in entries(files)))


_kept: list[Any] = []  # a torch.library.Library forgets its operators when it is collected


def torchvision_datasets() -> Any:
    """`torchvision.datasets`, also where torchvision's compiled operators do not load.

    Beside a torch of another build (a CPU-only one, say) `import torchvision` fails: it describes
    its operators nms and qnms, which do not exist there. No data set uses them, so their names
    are declared and the import tried again. Only then: to declare them twice ends the process.
    """
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import torch

        if not _kept:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
            _kept.append(library)
        from torchvision import datasets
    return datasets
