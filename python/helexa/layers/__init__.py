"""Building blocks of models: weights, shapes and calls of helexa.ops, nothing else.

Layers are plain classes: built from the tensors of a file, called with tensors, and without state of any
request.  A call runs no torch computation (only views and slices), so that a whole forward can be captured
into a graph.
"""
