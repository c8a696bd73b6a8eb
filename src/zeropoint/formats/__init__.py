"""File formats: one file each; :mod:`.native` is zeropoint's own."""
