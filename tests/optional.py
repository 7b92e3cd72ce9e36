"""Optional libraries as the tests find them."""

from __future__ import annotations

import importlib
import sys

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPS: list[torch.library.Library] = []  # alive as long as the process


def import_torchvision() -> None:
    """Import torchvision, also beside a build of torch for which its compiled part was not made.

    Its wheel is linked to a CUDA build. Beside one for the CPU it imports once the two operators that it gives fake
    kernels are declared; models and transforms then work, box operators and reading of files do not.
    """
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _OPS.append(library)
    importlib.import_module("torchvision")
