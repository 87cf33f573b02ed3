"""One module a command: parse, resolve, one call, show the result."""
