"""What is told of a trained run: a table in the terminal, and a page of figures."""
