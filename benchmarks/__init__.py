"""What the kernels cost beside eager torch, torch.compile and the machine itself."""
