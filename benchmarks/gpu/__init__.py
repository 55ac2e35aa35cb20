"""The losses on a GPU: built, tested on the device and measured by one command, `python -m benchmarks.gpu`."""
