"""The commands, a module each: ``add_options(parser)``, and ``main(args)``, which returns the exit status.

Options in, text on stdout, progress on stderr, JSON where asked.
"""
