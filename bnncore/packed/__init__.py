"""The packed network: its Program, its file, its kernels. Knows numpy and numba; never torch."""
