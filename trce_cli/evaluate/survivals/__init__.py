"""What survives release: treatments of a published model, one file each, after which it is measured again."""
