"""The command line: ``tenfold --help``."""
