"""What a user types and sees: a command a module, shared options, the console."""
