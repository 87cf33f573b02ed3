"""What looks at pictures and tells whether a concept is in them, one file each."""
