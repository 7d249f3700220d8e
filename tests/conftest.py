import os

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
os.environ.setdefault("OMP_NUM_THREADS", "1")
