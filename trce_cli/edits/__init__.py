"""An edit as an object, its files, the forms it is written in, and its hook on a live pipeline."""
