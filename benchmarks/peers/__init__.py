"""Other libraries of preference optimisation as clients of the kit, one file each, calling their own code."""
