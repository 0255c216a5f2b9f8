"""The command line: one file a command; only main() prints and exits."""
