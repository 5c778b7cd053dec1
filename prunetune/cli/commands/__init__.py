"""One file per subcommand, whose object ``command`` is it. None imports torch before it runs."""
