import os

import torch

if (
    not torch.cuda.is_available()
):  # before the first import of the kernels, which decides how they run
    os.environ.setdefault("TRITON_INTERPRET", "1")
