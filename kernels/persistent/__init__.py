"""Recurrent kernels in Triton whose weights stay on chip for all time steps."""
