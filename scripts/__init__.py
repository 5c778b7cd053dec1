"""The command line and thin launchers."""
