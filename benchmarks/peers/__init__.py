"""Other libraries of preference optimisation: clients of the kit, and side-by-side timings."""
