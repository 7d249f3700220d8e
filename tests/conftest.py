import os

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its threads do not survive a fork

import torch

if not torch.cuda.is_available():  # decided here, since the first import of the kernels reads it
    os.environ.setdefault("TRITON_INTERPRET", "1")
