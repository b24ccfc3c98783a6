def faults(home, whole, tally): pass
