"""The planner: how much memory a method needs on a model, from fake tensors, before anything is downloaded or bought.

It runs the very method, the very training step and the very meter. What it adds is that layers are alike: a few depths
are simulated and extended to the model's own.
"""
