"""TODO scale.errors."""



class InputError(ValueError):
    """`FILE:LINE: field 'F': what is wrong`; of a Parquet file, `FILE: row N: ...`, counted from 1."""
