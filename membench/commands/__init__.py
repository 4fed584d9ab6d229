"""The commands: options in, an exit code out."""
