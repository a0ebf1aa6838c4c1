"""What was published, run again: one module or folder an experiment, each a command that writes a document or a figure.
Nothing in the package imports this."""
