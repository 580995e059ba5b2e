"""The checks: one file per subject; dropping a file in is all it takes."""
