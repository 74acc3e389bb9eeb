"""A second, independent MoE layer: slow loops written from the formulas, against which epmoe is compared.

Nothing here imports epmoe. Integers are Python integers, numbers that carry a gradient are float64 torch
scalars, so that autograd gives the reference gradients too.
"""
