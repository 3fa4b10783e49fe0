"""The machine and its processes: devices, kernels of a CPU, processes that work together and keep what they did."""
