"""Matrices -> scalar: pure torch on small replicated tensors, ordinary autograd, no process group in sight.

A file is a similarity. It says how its rows are prepared (`ROWS = "centre" | "none" | "unit"`), and gives
`gram(K, L)` on [n, n] matrices of valid rows and, where it exists, `feature(A, C, D)`, equal to it. With
`NORMS = True` the feature form takes a fourth argument, the sums of squared row norms that unbiased estimators need.
"""
