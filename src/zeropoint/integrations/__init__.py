"""Other libraries, taught to use these layers: one file each, imported where it is wanted."""
