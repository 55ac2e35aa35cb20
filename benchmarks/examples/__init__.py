"""Short training scripts: plain PyTorch and Lightning."""
