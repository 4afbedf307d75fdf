"""Which sizes of blocks kernels are fastest with, on a chip here or by its compiler."""
