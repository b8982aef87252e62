"""Optimal Brain Surgeon as pure functions of tensors (SlimGPT, sections 3 and 4): no hooks, no
devices, no output.
"""
