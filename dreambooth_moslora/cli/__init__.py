"""The command line: parser, signals, progress and commands."""
