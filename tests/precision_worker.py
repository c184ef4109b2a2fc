"""A rank of `dist-rec` that writes down how exact its sequence model's matrix products are.

python tests/precision_worker.py FILE train CONFIG ...
"""

from __future__ import annotations

import inspect
import sys

import torch

from dist_rec.models import unisrec

if __name__ == "__main__":
    path = sys.argv.pop(1)
    softmax_losses = unisrec.softmax_losses

    def watched(*args, **kwargs):
        given = inspect.signature(softmax_losses).bind(*args, **kwargs).arguments
        what = "train" if given["states"].requires_grad else "evaluate"
        with open(path, "a") as file:
            file.write(f"{what} {torch.get_float32_matmul_precision()} {given['products']}\n")
        return softmax_losses(*args, **kwargs)

    unisrec.softmax_losses = watched
    from dist_rec.cli import main

    main()
