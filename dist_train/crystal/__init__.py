"""Crystals, periodic grids and the way back: numpy, scipy and numba only (pymatgen in `interop` alone)."""
