"""Optimal Brain Surgeon: second moments of the inputs, the solver, and what it does to the weights."""
