"""The planner: how much memory a method needs on a model, from fake tensors, before anything is downloaded or bought.

It runs the same method, the same training step and the same meter as a real run. In addition it uses that layers are
alike: a few depths are simulated and extrapolated to the model's own.
"""
