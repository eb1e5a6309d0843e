"""Files of this machine: paths as users write them."""
