"""Several processes as one: finding each other, signals, and what happens when one dies."""
