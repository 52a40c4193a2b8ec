"""What may stand on the line of each command: HELP, EXAMPLES and add_arguments(parser). They import next to nothing,
so that help is there at once.
"""
