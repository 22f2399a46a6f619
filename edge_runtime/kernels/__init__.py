"""Ground floor: vector IR, instruction sets, Numba kernels, the thread team."""
