"""Files of this machine: paths as users write them, whole writes, locks and downloads."""
