"""Reading weight files: headers, metadata, and tensors packed for the kernels."""
